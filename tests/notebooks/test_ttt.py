"""The notebook of test-time training as papermill runs it: on the embedded task, on a file, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refine_lab.runs.run import Run
from tests.support.executed_notebooks import execute, outputs, said, tables, texts

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

PLOTLY = "application/vnd.plotly.v1+json"


def papermill(folder: Path, **values: Any) -> tuple[int, str]:
    return execute("ttt", folder, **values)


def runs(folder: Path) -> dict[str, Run]:
    return {run.config.method: run for run in map(Run, sorted((folder / "runs").iterdir()))}


def test_the_embedded_task_and_again(tmp_path):
    settings = {"count": 3, "steps": 2, "prompt_tokens": 256, "prompts": "recall:word-4", "held_out": 0.2}
    status, output = papermill(tmp_path, **settings)
    assert status == 0, output
    text = said(tmp_path)
    assert text.index("Answering with all methods should take about") < text.index("sft step 1: remainder ")
    assert text.endswith("Every figure has its data.\n") and "\nRuns created with commit " in text
    curve, figure = [output["data"][PLOTLY] for output in outputs(tmp_path) if PLOTLY in output.get("data", {})]
    lines = {f"{method}, {part}" for method in ("SFT", "REFINE") for part in ("held-out remainder", "adapted part")}
    assert {trace["name"] for trace in curve["data"]} == lines
    assert {trace["name"] for trace in figure["data"]} == {"baseline (no adaptation)", "SFT", "REFINE"}
    rests, steps, answers, methods, differences, per_seed, samples = tables(tmp_path)
    assert rests.count("gain beyond noise") == 2 and "before" in rests and "after" in rests and "95 % from" in rests
    same = "In contains answer, SFT and baseline (no adaptation) have the same mean (100.0 %). Compared with SFT (100.0 %), "
    assert differences.startswith(same) and "There is no interval because " in differences, differences
    assert "interval over" in differences and "distinct questions, fewer than 100" in differences
    assert [line.split()[:2] for line in steps.splitlines()[2:]] == [
        *(["SFT", "1"], ["SFT", "2"], ["REFINE", "1"], ["REFINE", "2"])
    ]
    assert (
        "tokens/s" in steps and "references" in answers and "loss after (nats)" in differences and "question" in samples
    )
    assert (
        all(
            method in table for method in ("baseline (no adaptation)", "SFT", "REFINE") for table in (methods, per_seed)
        )
        and "[" in methods
    )
    assert any(
        "more certain about" in output["data"].get("text/plain", "") for output in outputs(tmp_path) if "data" in output
    )
    assert not [output for output in outputs(tmp_path) if output.get("name") == "stderr"]
    panel = next(text for text in texts(tmp_path) if text.startswith("TTTPanel"))
    assert "gain beyond noise: the loss on the held-out remainder changes by" in panel
    assert "REFINE, 2 steps" in panel and "Original weights restored exactly (2 updates undone)." in panel
    assert (tmp_path / "out.ipynb").stat().st_size < 1_000_000
    page = (tmp_path / "ttt-tiny-deltanet.html").read_text(encoding="utf-8")
    assert '"label": "before adaptation"' in page and "loss after (nats)" in page  # the panel and all prompts
    first = {method: (run.path, run.answers()) for method, run in runs(tmp_path).items()}
    assert {method: len(answers) for method, (_, answers) in first.items()} == {"none": 3, "sft": 3, "refine": 3}
    assert papermill(tmp_path, **settings)[0] == 0
    assert said(tmp_path).count("3 prompts already answered") == 3
    for method, run in runs(tmp_path).items():
        assert run.path == first[method][0] and run.answers().equals(first[method][1])


def test_a_file_of_prompts_without_answers_in_batches_that_are_never_reset(tmp_path):
    """A prompt of one's own is watched; of five, the last is dropped; there is nothing to score."""
    rows = [{"text": f"The word of the day is {'fish ' * (30 + i)}.\nQuestion: What is it?"} for i in range(5)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"prompts": "mine.jsonl", "prompt_column": "text", "count": "none", "reset": "never", "lr": 1e-5}
    own = {"text": "The secret word for fish is stone. " * 8, "question": "What is the secret word for fish?"}
    status, output = papermill(tmp_path, **settings, **own, batch_size=2, mini_batch_size=1, steps=1)
    assert status == 0, output
    assert "1 of 5 prompts are skipped" in said(tmp_path) and "own: " in said(tmp_path)
    assert {method: len(run.answers()) for method, run in runs(tmp_path).items()} == {"none": 4, "sft": 4, "refine": 4}
    lines = runs(tmp_path)["refine"].updates()
    assert lines["updates"].tolist() == [2, 2] and lines["step"].tolist() == [1, 2]
    methods = tables(tmp_path)[3]
    assert "contains_answer" not in methods and "loss after (nats)" in methods


def test_a_wrong_name_ends_it_in_one_sentence(tmp_path):
    status, output = papermill(tmp_path, prompt="recall:word-4")
    assert status != 0 and "unknown parameter 'prompt'; did you mean 'prompts'?" in output
    assert not (tmp_path / "runs").exists()
