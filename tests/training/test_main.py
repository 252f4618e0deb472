"""The process of a run: what it reports when something ends it, or takes its lock, between two steps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from refine_lab.method.custom import reward_source
from refine_lab.runs.files import take_lock
from refine_lab.runs.process import RunProcess, follow, hold, resume
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.trainer import train
from tests.factories.durable_runs import After, begun, tiny_config, tiny_model
from tests.support.paths import ROOT
from tests.support.refusals import naming

ENDLESS = 10**6


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny_model(tmp_path_factory.mktemp("home"))


# -- os._exit in a reward ------------------------------------------------------------------------------------------------


def leaves_without_an_error(inputs):
    import os

    os._exit(0)


def leaves_after_two_steps(inputs):
    import os
    import pathlib

    marks = pathlib.Path(os.environ["REFINE_CACHE"], "calls")
    marks.write_text(marks.read_text() + "x" if marks.exists() else "x")
    if len(marks.read_text()) > 4:
        os._exit(7)
    return inputs.logprobs.sum(-1)


def forks(inputs):
    import os

    if (pid := os.fork()) == 0:
        os._exit(0)  # the usual end of a forked process
    assert os.waitpid(pid, 0)[1] == 0
    return inputs.logprobs.sum(-1)


def with_reward(home: Path, folder: Path, reward: Callable[..., object]) -> Run:
    config = tiny_config(home)
    assert config.refine is not None
    config = replace(config, refine=replace(config.refine, reward="custom"))
    with RunWriter.create(config, folder, reward_source=reward_source(reward)) as writer:
        return writer.run


@pytest.mark.process
@pytest.mark.parametrize(
    ("reward", "code", "steps"), [(leaves_without_an_error, 0, range(1)), (leaves_after_two_steps, 7, range(1, 6))]
)
def test_a_reward_that_ends_the_process_is_reported(
    home: Path, tmp_path: Path, reward: Callable[..., object], code: int, steps: range
) -> None:
    run = with_reward(home, tmp_path, reward)
    with naming(RuntimeError, run.name, f"exit code {code}", "reward.py, line"):
        follow(resume(run, detach=False), log=lambda line: None)
    error = str(run.status.error)
    assert run.state == "failed" and run.status.step in steps
    assert "before the last step" in error and "os._exit" in error and "a likely cause is a custom reward" in error
    assert not run.alive


@pytest.mark.process
def test_a_process_that_a_reward_forks_may_end_by_itself(home: Path, tmp_path: Path) -> None:
    run = with_reward(home, tmp_path, forks)
    done = subprocess.run([sys.executable, "-m", "refine_lab.training", str(run.path)], cwd=ROOT, capture_output=True)
    assert (done.returncode, run.state, run.status.error) == (0, "finished", None), done.stderr.decode()


# -- a lock that is deleted while the run is in progress -----------------------------------------------------------------


@pytest.fixture
def running(home: Path, tmp_path: Path) -> Iterator[RunProcess]:
    """A run that goes on until it is stopped."""
    run = begun(tiny_config(home, steps=ENDLESS, eval_every=ENDLESS, checkpoint_every=ENDLESS, refine=None), tmp_path)
    process = resume(run, detach=True)
    assert process.popen is not None
    try:
        wait_until(lambda: run.status.step >= 2 or not process.alive)
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()


@pytest.mark.process
def test_a_run_whose_lock_is_deleted_saves_and_stops_with_a_sentence(running: RunProcess) -> None:
    run = running.run
    (run.path / "lock").unlink()
    wait_until(lambda: not running.alive)
    status, (saved, _) = run.status, run.latest_checkpoint() or (0, None)
    assert (running.returncode, run.state) == (0, "stopped")
    assert "the run's lock file was deleted" in str(status.error) and f"saved after step {saved} in" in str(
        status.error
    )
    assert saved == status.step == len(run.metrics())
    assert not (run.path / "lock").exists(), "it is not created again by a process that no longer holds it"
    hold(run).close()  # the run can be resumed


@pytest.mark.process
def test_a_run_whose_lock_another_process_has_taken_ends_before_it_writes(running: RunProcess) -> None:
    run = running.run
    (run.path / "lock").unlink()
    with take_lock(run.path):
        wait_until(lambda: not running.alive)
        assert running.returncode == 1
        assert f"LockLostError: {run.path / 'lock'} was deleted" in (run.path / "log.txt").read_text(encoding="utf-8")
        assert (run.status.state, run.status.error) == ("running", None), "the status is the other process's"
        assert run.checkpoints() == []
        train(run.path, After(run.path, 3))
    assert run.metrics()["step"].tolist() == [1, 2, 3]
    assert (run.state, run.status.step, os.getpid()) == ("stopped", 3, run.status.pid)
