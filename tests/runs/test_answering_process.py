"""Prompts answered in a process of its own: all of them, whatever becomes of it or of whoever started it, and told where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from refine_lab.experiments.compare import answers_of as results
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.runs import ttt_runs
from refine_lab.runs.environment import project_root
from refine_lab.runs.files import take_lock
from refine_lab.runs.process import request_stop
from refine_lab.runs.queue import BACKGROUND, require_finished, run_in_turn
from refine_lab.runs.run import Run
from refine_lab.training.answer_run import answer_run
from refine_lab.training.loading import load_prompts
from widgets.parts.live_curves import LiveCurves

pytestmark = pytest.mark.process

SECONDS = 120
TIMES = ["seconds"]


@pytest.fixture(autouse=True)
def as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this process has: sums over more of them differ in the last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def made(folder: Path, count: int = 3, steps: int = 2) -> list[Run]:
    """Runs of the three methods over a file of prompts, nothing answered yet."""
    folder.mkdir(exist_ok=True)
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"The word for tree {i} is fish. " * 9 + "The word is", "answer": "fish"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"num_chunks": 2, "rollout_length": 3, "steps": steps, "answer_tokens": 3, "device": "cpu"}
    configs = method_configs("per_prompt", [0], prompts=str(file), **shape)
    policy, _, task = load_prompts(configs[-1])
    return ttt_runs(configs, policy, task.test, folder / "runs")


def answers_of(runs: list[Run]) -> pd.DataFrame:
    require_finished(runs)
    return results(runs)


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def by_hand(runs: list[Run], folder: Path) -> pd.DataFrame:
    """The answers of the same configurations, given by this process."""
    policy, tokenizer, task = load_prompts(runs[-1].config)
    again = ttt_runs([run.config for run in runs], policy, task.test, folder)
    for run in again:
        with take_lock(run.path):
            answer_run(run, policy, tokenizer, task)
    return answers_of(again).drop(columns=TIMES)


def test_all_are_answered_as_this_process_would(tmp_path):
    runs, said = made(tmp_path), []
    assert [run.state for run in runs] == ["waiting"] * 3
    run_in_turn(runs, detach=False, log=said.append)
    assert [run.state for run in runs] == ["finished"] * 3
    ended = [line for line in said if "finished, step 3/3" in line]
    assert [line.split(":")[0] for line in ended] == ["none s0", "sft s0", "refine s0"]
    for run, method in zip(runs, ("none", "sft", "refine"), strict=True):  # in a log of its own, from one process
        assert f"{method} s0: 3 answers" in (run.path / "log.txt").read_text()
    assert len({run.status.pid for run in runs}) == 1
    pd.testing.assert_frame_equal(
        answers_of(runs).drop(columns=TIMES), by_hand(runs, tmp_path / "again"), check_exact=True
    )
    before = [run.path.stat().st_mtime_ns for run in runs]
    run_in_turn(runs, detach=False, log=said.append)
    assert said[-3:] == [f"{run.name} has already finished" for run in runs]
    assert [run.path.stat().st_mtime_ns for run in runs] == before, "nothing is begun anew"


def test_detached_it_is_followed_stopped_and_gone_on_with(tmp_path):
    runs, said = made(tmp_path, count=20), []
    began = time.monotonic()
    run_in_turn(runs, detach=True, log=said.append)
    assert time.monotonic() - began < 5 and said == [BACKGROUND + "".join(f"\n  {run.path}" for run in runs)]
    curves = LiveCurves(runs)
    assert [run.alive for run in runs] == [True] * 3, "also those that wait for their turn"
    with pytest.raises(RuntimeError, match=r"3 of 3 runs are still in progress \(.*: step 0 of 20, .*"):
        answers_of(runs)
    run_in_turn(runs, detach=True, log=said.append)  # nobody begins a second one
    with pytest.raises(RuntimeError, match=r"is in use by process \d+ on .*; stop that process first"):
        run_in_turn(runs, detach=False)
    wait_for(lambda: runs[1].log.rows > 1)
    wait_for(lambda: curves.progress[1]["step"] > 1)
    assert curves.progress[0] | {"seconds_left": None} == (
        {
            "name": runs[0].name,
            "label": "baseline (no adaptation), seed 0",
            "method": "none",
            "state": "finished",
            "step": 20,
            "steps": 20,
        }
        | {"error": "", "note": "", "tokens_per_second": None, "seconds_left": None}
        | {"shown": "finished", "failure": "", "remark": ""}
    )
    request_stop(runs)
    wait_for(lambda: not any(run.alive for run in runs))
    assert [run.state for run in runs] == ["finished", "stopped", "stopped"]
    with pytest.raises(RuntimeError, match=r"was stopped at step \d+ of 20: a stop was requested"):
        answers_of(runs)
    kept = runs[1].answers()
    run_in_turn(runs, detach=True, log=said.append)
    curves.start()
    wait_for(lambda: all(row["state"] == "finished" for row in curves.progress))
    pd.testing.assert_frame_equal(answers_of(runs[1:2]).iloc[: len(kept)], kept)
    assert answers_of(runs).groupby("method").size().to_dict() == {"none": 20, "refine": 20, "sft": 20}
    panels = {panel["name"]: panel for panel in curves.curves["panels"]}
    assert {"answers:contains_answer", "answers:loss_after"} <= set(panels)
    assert panels["answers:contains_answer"]["of"] == "prompt"
    labels = {method["method"]: (method["label"], method["look"]) for method in curves.curves["methods"]}
    assert labels == {"none": ("baseline (no adaptation)", 0), "sft": ("SFT", 1), "refine": ("REFINE", 2)}
    means = runs[0].answers()["contains_answer"].expanding().mean() * 100
    line = pd.Series(memoryview(panels["answers:contains_answer"]["lines"][0]["y"]).cast("f"))
    assert line.to_list() == pytest.approx(means.to_list())
    assert "contains answer" in repr(curves) and "20/20" in repr(curves)
    curves.close()


@pytest.mark.parametrize("end", ["its own", "its parent's"])
def test_a_process_that_is_killed_leaves_whole_answers(tmp_path, end):
    """It goes on as if nothing had been; one whose parent is no more ends by itself."""
    runs = made(tmp_path, count=12)
    paths = [str(run.path) for run in runs]
    program = (
        "import sys; from refine_lab.runs.queue import run_in_turn; from refine_lab.runs.run import Run\n"
        "run_in_turn([Run(path) for path in sys.argv[1:]], detach=False)"
    )
    environ = os.environ | {"PYTHONPATH": str(project_root())}
    with subprocess.Popen([sys.executable, "-c", program, *paths], env=environ, stderr=subprocess.PIPE) as parent:
        wait_for(lambda: runs[1].log.rows > 1)
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(child) if end == "its own" else parent.pid, signal.SIGKILL)
        error = parent.communicate()[1].decode()
    if end == "its own":
        assert f"RuntimeError: run {runs[1].name} was killed by SIGKILL at step " in error
    wait_for(lambda: not any(run.alive for run in runs))
    assert runs[0].state == "finished" and runs[2].log.rows == 0
    assert [run.state for run in runs[1:]] == (["killed", "stopped"] if end == "its own" else ["stopped"] * 2)
    run_in_turn(runs, detach=False, log=lambda line: None)
    pd.testing.assert_frame_equal(
        answers_of(runs).drop(columns=TIMES), by_hand(runs, tmp_path / "again"), check_exact=True
    )


def test_a_failure_is_told_where_one_looks(tmp_path):
    runs = made(tmp_path)
    file = tmp_path / "prompts.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace("tree 2", "bush 2"))
    changed = f"{runs[0].path} was started with different inputs: the content of '{file}' has changed"
    sentence = f"run {runs[0].name} failed at step 0 of 3: ValueError: {changed}"
    with pytest.raises(RuntimeError, match=sentence):
        run_in_turn(runs, detach=False)
    assert [run.state for run in runs] == ["failed", "stopped", "stopped"]
    curves = LiveCurves(runs)
    assert (
        curves.progress[0]["state"] == "failed" and "was started with different inputs" in curves.progress[0]["error"]
    )
    curves.close()
    with pytest.raises(RuntimeError, match=r"failed at step 0 of 3: ValueError: .* was started with different inputs"):
        answers_of(runs)
    assert "Traceback" in (runs[0].path / "log.txt").read_text()
    file.write_text(whole)
    run_in_turn(runs, detach=False, log=lambda line: None)
    assert [run.state for run in runs] == ["finished"] * 3 and runs[0].status.error is None
