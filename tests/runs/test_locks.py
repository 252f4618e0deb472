"""A run's lock: who holds it, what a forked child inherits, and what readers need."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from refine_lab.config import TrainConfig
from refine_lab.runs.child import StopSignal
from refine_lab.runs.files import is_held, name_holder, take_lock
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter, write_status
from tests.support.paths import ROOT
from tests.support.refusals import naming


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with RunWriter.create(TrainConfig(recipe="tiny", refine=None, batch_size=32), tmp_path) as writer:
        return writer.run


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_holder_is_named(run: Run) -> None:
    with take_lock(run.path), naming(RuntimeError, run.name, f"process {os.getpid()} on {socket.gethostname()}"):
        take_lock(run.path)
    assert not is_held(run.path), "what is left in the file of a stale lock holds nothing"
    take_lock(run.path).close()


def test_a_lock_whose_holder_has_ended_is_recognised(run: Run) -> None:
    ended = 2**22 + 1  # above any process id of Linux
    with take_lock(run.path) as lock:
        name_holder(lock, ended)
        with naming(RuntimeError, f"a process started by process {ended} on {socket.gethostname()}"):
            take_lock(run.path)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_lock_is_taken_on_the_file_that_others_find(run: Run, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    flock, path, opened = fcntl.flock, run.path / "lock", []

    def late(file: BinaryIO, operation: int) -> None:
        """Another user deletes the file after it was opened and before it is locked."""
        if not opened:
            path.unlink()
            if how == "replaced":
                path.touch()
        opened.append(file)
        flock(file, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        lock = take_lock(run.path)
    with lock, naming(RuntimeError, run.name, f"process {os.getpid()}"):
        take_lock(run.path)
    assert len(opened) == 2, "the first file was given up"


def test_a_writer_whose_lock_another_process_has_taken_changes_nothing(run: Run) -> None:
    with take_lock(run.path):
        writer = RunWriter.open(run.path)
        writer.train(1, {"ntp_loss": 1.0})
        (run.path / "lock").unlink()
        writer.train(2, {"ntp_loss": 1.0})  # nobody else works on the run: what is done can be saved
        take_lock(run.path).close()
        with naming(RuntimeError, run.path / "lock", "another process"), writer.checkpoint(2) as folder:
            raise AssertionError(f"{folder} was made")
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        actions: list[Callable[[], object]] = [
            lambda: writer.train(3, {"ntp_loss": 1.0}),
            lambda: writer.evaluation(2, {"ntp_loss": 1.0}),
            lambda: writer.status("failed", error="anything"),
            lambda: write_status(run, "stopped"),
            lambda: RunWriter.open(run.path),
            StopSignal(run.path).requested,
            writer.close,
        ]
        for act in actions:
            with naming(RuntimeError, run.path / "lock", "another process"):
                act()
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_is_not_put_into_place_once_the_lock_is_lost(run: Run) -> None:
    with take_lock(run.path), RunWriter.open(run.path) as writer:
        writer.train(1, {"ntp_loss": 1.0})
        with naming(RuntimeError, run.path / "lock"), writer.checkpoint(1) as folder:
            (folder / "weights").write_bytes(b"1")
            (run.path / "lock").unlink()
            take_lock(run.path).close()
        assert [*(run.path / "checkpoints").iterdir()] == []
        (run.path / "lock").unlink()


FORKS = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from refine_lab.runs.files import take_lock

lock = take_lock(Path(sys.argv[1]))
pool = ProcessPoolExecutor(1, mp_context=get_context("fork"))
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def test_the_lock_ends_with_its_holder_though_forked_children_live(run: Run) -> None:
    with child(FORKS, run.path) as holder:
        assert holder.stdout is not None
        forked = int(holder.stdout.readline())
        try:
            assert is_held(run.path)
            holder.kill()
            holder.wait()
            os.kill(forked, 0)  # lives
            take_lock(run.path).close()
        finally:
            os.kill(forked, signal.SIGKILL)


@pytest.fixture
def read_only(run: Run) -> Iterator[Path]:
    """A copy of a finished run, below a folder that anyone can read and nobody write."""
    with RunWriter.open(run.path) as writer:
        writer.train(1, {"ntp_loss": 1.0, "tokens": 2})
        writer.status("finished", 100)
    take_lock(run.path).close()
    folder = Path(tempfile.mkdtemp())
    copy = shutil.copytree(run.path, folder / run.name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield copy
    for path in (folder, copy):
        path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


READS = """
import os, sys
from pathlib import Path
from refine_lab.runs.process import follow, stop
from refine_lab.runs.run import list_runs
if os.geteuid() == 0:  # who may write everywhere
    os.setgid(65534)
    os.setuid(65534)
assert not os.access(sys.argv[1], os.W_OK)
(run,) = list_runs(Path(sys.argv[1]).parent)
follow(run, log=lambda line: None)
stop(run)
print(run.state, run.alive, len(run.metrics()))
"""


def test_readers_need_no_write_access(read_only: Path) -> None:
    output, errors = child(READS, read_only).communicate(timeout=120)
    assert output == "finished False 1\n", errors


def test_a_file_system_without_locks_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with naming(OSError, tmp_path / "runs", "does not support file locks (flock)", "REFINE_RUNS"):
        RunWriter.create(TrainConfig(recipe="tiny", refine=None), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_run_copied_to_a_file_system_without_locks_is_read_and_not_executed(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    take_lock(run.path).close()

    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert (run.alive, run.state) == (False, "waiting")
    with naming(OSError, run.path, "does not support file locks (flock)"):
        take_lock(run.path)


HANGS = """
import os, sys
from pathlib import Path
from refine_lab.runs.child import child_setup

child_setup(Path(sys.argv[1]))
print("hangs", flush=True)
while True:
    pass
"""


def test_a_process_that_hangs_ends_with_the_second_signal(run: Run) -> None:
    with child(HANGS, run.path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
