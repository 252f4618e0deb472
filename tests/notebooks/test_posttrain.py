"""The notebook of post-training as papermill runs it: all methods on the embedded task, and again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from refine_lab.runs.run import Run, list_runs
from tests.support.executed_notebooks import execute, outputs, said, tables

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

SMALL = {
    "task": "recall:word-2", "prompt_tokens": 256, "train": 8, "validation": 2, "test": 3, "steps": 2, "batch_size": 4,
    "num_chunks": 4, "seeds": 0, "release": True,
}  # fmt: skip


def papermill(folder: Path, **values: Any) -> tuple[int, str]:
    return execute("posttrain", folder, **values)


def trained(folder: Path) -> dict[str, Run]:
    return {run.config.method: run for run in list_runs(folder / "runs")}


def test_all_ways_on_the_embedded_task_and_again(tmp_path):
    status, output = papermill(tmp_path, **SMALL)
    assert status == 0, output
    text = said(tmp_path)
    assert "No question and no document is shared between splits." in text and "4 of 4 runs to train, about" in text
    assert text.endswith("Every figure has its data.\n") and "\nRuns created with commit " in text
    rollouts, methods, differences, samples = tables(tmp_path)
    assert "There is no interval because " in differences and "distinct questions, fewer than 100" in differences
    assert "with their references" in rollouts and "question" in samples
    for method in ("base", "SFT", "nested SFT", "nested REFINE", "nested SFT, one inner update"):
        assert method in methods
    same = "In contains answer, nested SFT and base have the same mean (100.0 %)."
    assert differences.startswith(
        f"{same} Compared with nested SFT (100.0 %), SFT is not shown to differ (+0.0 points;"
    )
    assert "RunMonitor of 4 runs" in text and text.count(" finished ") >= 4
    assert (tmp_path / "out.ipynb").stat().st_size < 1_000_000
    page = (tmp_path / "posttrain-tiny-deltanet.html").read_text(encoding="utf-8")
    said_at_top = re.search('"conclusion": "(.*?)"', page)
    assert said_at_top and said_at_top[1].startswith(same), page[:3000]
    assert "nested REFINE is not shown to differ" in said_at_top[1], said_at_top[1]
    assert all(part in page for part in ("Answers side by side", "Methods: mean", '["model", "tiny-deltanet"]'))
    first = trained(tmp_path)
    updates = {name: int(run.metrics()["updates"].iloc[-1]) for name, run in first.items()}
    assert updates == {"sft": 2, "nested_sft": 10, "nested_refine": 10, "nested_sft_release": 4}
    assert {run.config.recipe for run in first.values()} == {"posttrain"}
    assert not [output for output in outputs(tmp_path) if output.get("name") == "stderr"]
    assert papermill(tmp_path, **SMALL)[0] == 0
    assert said(tmp_path).count("has already finished") == 4 and "0 of 4 runs to train" in said(tmp_path)
    assert {run.path for run in trained(tmp_path).values()} == {run.path for run in first.values()}


def test_a_task_that_shares_questions_ends_the_notebook_before_a_run_is_made(tmp_path):
    rows = [
        f'{{"prompt": "Document 1:\\n{"word " * 60}{i}\\nQuestion: the same?\\nAnswer:", "answer": "yes"}}'
        for i in range(8)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    values = {**SMALL, "task": "mine.jsonl", "train": 4, "validation": 0, "test": 4}
    status, output = papermill(tmp_path, **values)
    assert status != 0 and "train and test share 1 question" in output
    assert not (tmp_path / "runs").exists()
