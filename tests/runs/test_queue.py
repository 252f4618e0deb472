"""Runs one after the other, here or detached: who waits counts as living, a failure ends the queue, a stop ends it all.

The trainer is stood in for by a script of a few lines; the detached queue trains with the real one.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest

from refine_lab.config import DataConfig, TrainConfig
from refine_lab.runs.process import stop_all
from refine_lab.runs.queue import BACKGROUND, UnfinishedError, require_finished, run_in_turn, wait_until_finished
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter

pytestmark = pytest.mark.process

TRAINER = """
import os, sys, time
from pathlib import Path
from refine_lab.runs.child import child_setup
(stop,) = child_setup(sys.argv[-1])
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter

path = Path(sys.argv[-1])
others = [run for run in path.parent.iterdir() if run != path and (run / "config.json").exists()]
alive = sorted(run.name[-1] for run in others if Run(run).alive)
with RunWriter.open(path) as writer:
    writer.status("running", 0)
    for step in range(1, writer.config.steps + 1):
        writer.train(step, {"ntp_loss": 1.0})
        if sys.argv[1] == "fails" and writer.config.seed == 1:
            writer.status("failed", step, error="ValueError: the loss is nan; living: " + "".join(alive))
            sys.exit(1)
        if stop.requested():
            writer.status("stopped", step, error=stop.requested())
            sys.exit(0)
        time.sleep(0.05)
    writer.status("finished", step)
"""


def make_runs(folder: Path, steps: int = 2, source: str = "python") -> list[Run]:
    rows = DataConfig(sources={source: 1.0}, sequence_length=64, validation_sequences=1)
    sizes = {"batch_size": 1, "mini_batch_size": 1, "micro_batch_size": 1, "threads": 1}
    configs = [TrainConfig(recipe="tiny", refine=None, data=rows, steps=steps, seed=n, **sizes) for n in range(3)]
    runs = []
    for config in configs:
        with RunWriter.create(config, folder) as writer:
            runs.append(writer.run)
    return runs


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[[str], list[str]]:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return lambda mode: [sys.executable, str(script), mode]


def wait_until(done: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def test_runs_train_one_after_the_other_and_only_once(
    tmp_path: Path, trainer: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs, lines = make_runs(tmp_path / "runs"), []
    with pytest.raises(RuntimeError, match=rf"run {runs[0].name} has not started \(0 of 2 steps\)"):
        require_finished(runs)
    run_in_turn(runs, detach=False, log=lines.append, command=trainer("trains"))
    wait_until_finished(runs)
    assert capsys.readouterr().out == "", "nothing is waited for"
    times = [run.metrics()["time"] for run in runs]
    assert times[0].max() < times[1].min() < times[1].max() < times[2].min()
    assert [line for line in lines if "finished, step 2/2" in line] == [
        line for seed in range(3) for line in lines if line.startswith(f"sft s{seed}: finished")
    ]
    lines.clear()
    run_in_turn(runs, detach=False, log=lines.append, command=trainer("trains"))
    assert lines == [f"{run.name} has already finished" for run in runs]


def test_a_failure_ends_the_queue_and_is_told(tmp_path: Path, trainer: Callable[[str], list[str]]) -> None:
    runs = make_runs(tmp_path / "runs")
    with pytest.raises(RuntimeError, match="failed at step 1 of 2: ValueError: the loss is nan; living: 2"):
        run_in_turn(runs, detach=False, command=trainer("fails"))
    assert [run.state for run in runs] == ["finished", "failed", "stopped"]
    assert runs[2].status.error == f"never started because {runs[1].name} did not finish"
    assert len(runs[2].metrics()) == 0
    with pytest.raises(RuntimeError, match=f"run {runs[1].name} failed at step 1 of 2: ValueError: the loss is nan"):
        require_finished(runs)


def test_a_run_in_the_queue_of_another_is_refused(tmp_path: Path, trainer: Callable[[str], list[str]]) -> None:
    runs = make_runs(tmp_path / "runs")
    lock = (runs[1].path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match=f"run {runs[1].name} is in use by another process"):
        run_in_turn(runs, detach=False, command=trainer("trains"))
    lock.close()
    assert not any(run.alive for run in runs), "every lock is given back"


def test_a_detached_queue_needs_nobody_and_stops_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("A sentence of some words. " * 4000)
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = make_runs(tmp_path / "runs", steps=100_000, source=str(tmp_path / "a.txt"))
    lines: list[str] = []
    run_in_turn(runs, detach=True, log=lines.append)
    assert lines[0].splitlines() == [BACKGROUND, *(f"  {run.path}" for run in runs)]
    assert [run.state for run in runs] == ["starting"] * 3, "those that wait count as living"
    wait_until(lambda: len(runs[0].metrics()) > 0)
    assert [run.state for run in runs[1:]] == ["starting"] * 2
    with pytest.raises(RuntimeError, match=f"3 of 3 runs are still in progress .{runs[0].name}: step"):
        require_finished(runs)
    run_in_turn(runs, detach=True, log=lines.append)  # nobody begins a second time
    assert lines[1:] == [f"{run.name} is already {run.state}" for run in runs]
    capsys.readouterr()
    stops = Timer(1, stop_all, [runs])
    stops.start()
    with pytest.raises(UnfinishedError, match=f"run {runs[0].name} was stopped at step") as stopped:
        wait_until_finished(runs, every=0.1)
    stops.join()
    told = capsys.readouterr().out.split("\r")
    assert told[1].startswith(f"0 of 3 runs have ended; {runs[0].name} is at step ")
    assert told[-1].strip() == "All 3 runs have ended."
    assert stopped.value._render_traceback_() == [str(stopped.value)], "IPython shows the sentence and nothing else"
    wait_until(lambda: [run.state for run in runs] == ["stopped"] * 3)
    assert runs[0].latest_checkpoint() is not None, "it has saved"
    assert [str(run.status.error).partition(";")[0] for run in runs] == ["a stop was requested"] * 3
    assert (runs[2].path / "log.txt").read_text() == "", "nothing went wrong in the queue itself"
