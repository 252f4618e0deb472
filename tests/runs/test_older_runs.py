"""Run directories of format version 1, recorded before training and test-time training had one: they are read and resumed.

`fixtures/runs/` holds one of each kind, and in `expected.json` what the code of that time read from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from refine_lab.config import to_json
from refine_lab.runs.environment import project_root
from refine_lab.runs.files import take_lock
from refine_lab.runs.queue import run_in_turn
from refine_lab.runs.run import Run, list_runs
from refine_lab.runs.writer import RunWriter
from refine_lab.training.inputs import resume_or_create
from tests.support.paths import TESTS
from widgets.parts.live_curves import LiveCurves

FIXTURES = TESTS / "fixtures" / "runs"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
TRAIN, ANSWER = EXPECTED["train"], EXPECTED["answer"]
RENAMED = {"member": "sample_index", "way": "method", "recall": "contains_answer"}
"""Columns of that time and their present names."""
CLOCKS = ["time", "seconds", "tokens_per_second"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of both directories."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "runs"))


def assert_rows(frame: pd.DataFrame, rows: list[dict[str, Any]], *, clocks: bool = True, rtol: float = 1e-12) -> None:
    dropped = [] if clocks else CLOCKS
    there = pd.DataFrame(json.loads(frame.to_json(orient="records", double_precision=15)))
    ours, theirs = (
        each.drop(columns=dropped, errors="ignore") for each in (there, pd.DataFrame(rows).rename(columns=RENAMED))
    )
    pd.testing.assert_frame_equal(ours, theirs, rtol=rtol, check_like=True)  # the order of columns is no one's promise


def test_both_kinds_are_listed_and_read_as_by_the_code_of_their_time() -> None:
    train, answer = list_runs(FIXTURES)
    assert (train.name, train.kind, train.state, train.config.method) == (
        TRAIN["name"],
        "train",
        TRAIN["state"],
        "refine",
    )
    assert [train.status.step, train.status.steps] == TRAIN["status"]
    assert [step for step, _ in train.checkpoints()] == [TRAIN["latest_checkpoint"]]
    assert_rows(train.metrics(), TRAIN["metrics"])
    assert_rows(train.evaluations(), TRAIN["evaluations"])
    assert_rows(train.rollouts(), TRAIN["rollouts"])
    assert (answer.name, answer.kind, answer.state, answer.config.method) == (
        ANSWER["name"],
        "answer",
        "stopped",
        "refine",
    )
    assert (answer.log.rows, answer.steps, answer.status.step) == (ANSWER["rows"], ANSWER["prompts"], ANSWER["rows"])
    assert answer.status.error is None and not answer.alive
    assert_rows(answer.updates(), ANSWER["updates"])
    assert_rows(answer.answers(), ANSWER["answers"])


def test_an_older_run_is_found_again_by_its_configuration(folder: Path) -> None:
    runs = list_runs(folder)
    assert all(json.loads(to_json(run.config))["kind"] == run.kind for run in runs)
    assert [resume_or_create([run.config], folder, run.inputs)[0].path for run in runs] == [run.path for run in runs]


def test_the_state_of_older_answers_is_that_of_their_files(folder: Path) -> None:
    run = Run(folder / ANSWER["name"])
    with take_lock(run.path):
        assert run.state == "running"
    (run.path / "error.txt").write_text("ValueError: no more")
    assert (run.state, run.status.error) == ("failed", "ValueError: no more")
    curves = LiveCurves(run)
    try:
        (row,) = curves.progress
        assert (row["state"], row["step"], row["steps"], row["error"]) == ("failed", 2, 4, "ValueError: no more")
    finally:
        curves.close()


def test_a_writer_gives_an_older_directory_the_names_of_this_version_once(folder: Path) -> None:
    run = Run(folder / ANSWER["name"])
    for _ in range(2):
        with RunWriter.open(run.path, done={1, 2}):
            pass
        again = Run(run.path)
        assert {"ttt.json", "updates.jsonl", "error.txt"}.isdisjoint(path.name for path in run.path.iterdir())
        assert (again.config, again.status.state, again.status.step) == (run.config, "stopped", 2)
        assert_rows(again.updates(), ANSWER["updates"])
        assert_rows(again.answers(), ANSWER["answers"])


@pytest.mark.process
def test_older_runs_are_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on with the third prompt; training without its weights is refused, and from nothing gives the same."""
    monkeypatch.chdir(str(project_root()))  # where the paths in their configurations begin
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    train, answer = list_runs(folder)
    lines: list[str] = []
    run_in_turn([train, answer], detach=False, log=lines.append)
    assert lines[0] == f"{train.name} has already finished" and "finished, step 4/4" in lines[-1]
    assert Run(answer.path).state == "finished"
    assert_rows(answer.updates(), ANSWER["whole"]["updates"], clocks=False, rtol=1e-4)
    assert_rows(answer.answers(), ANSWER["whole"]["answers"], clocks=False, rtol=1e-4)
    assert_rows(answer.answers()[:2], ANSWER["answers"])  # these were not given again

    status = train.path / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    with pytest.raises(RuntimeError) as refused:
        run_in_turn([train], detach=False, log=lines.append)
    assert "step-4" in str(refused.value) and "\n" not in str(refused.value)
    shutil.rmtree(train.path / "checkpoints")
    run_in_turn([train], detach=False, log=lines.append)
    assert_rows(train.metrics(), TRAIN["metrics"], clocks=False, rtol=1e-4)
    assert_rows(train.rollouts(), TRAIN["rollouts"], clocks=False, rtol=1e-4)
