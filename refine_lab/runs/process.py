"""Child processes: one way to start them, and how a run's process is started, followed and stopped (its own side: `child`).

A run's process writes a run directory, which everyone else only reads. Whether a run lives is asked of its lock, which the
process inherits before its first instruction and no kill can leave behind. A child that is not detached also inherits the
reading end of a pipe as its stdin: nobody writes to it, and it ends when the process that started the child does, however it
ends; the run then saves and stops. (Linux and macOS.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from refine_lab.config import TrainConfig
from refine_lab.runs.child import LOCKS, SAVE_SECONDS, WATCH_FD, lock_for_work
from refine_lab.runs.environment import project_root
from refine_lab.runs.run import MetricsTail, Run
from refine_lab.runs.writer import RunWriter, write_status

PYTHON = (sys.executable, "-P", "-u", "-m")
"""Starts one of our modules; -P: a folder `refine_lab` in the current folder is not taken for ours."""

TRAINER = (*PYTHON, "refine_lab.training")
"""The command that run directories are given to."""

# -- starting ----------------------------------------------------------------------------------------------------------


def spawn(
    command: Sequence[str],
    output: IO[bytes],
    *,
    inherit: Sequence[int] = (),
    watched: bool = False,
    environ: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child process in a session of its own, with this checkout on its path and what it prints in `output`.

    `inherit` are descriptors that it keeps. `watched`: its stdin is a pipe that ends when this process does, and WATCH_FD
    says so; otherwise its stdin is empty. `environ` are further environment variables. No zombie is left.
    """
    path = filter(None, (project_root(), os.environ.get("PYTHONPATH")))
    ours = {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": os.pathsep.join(map(str, path))}
    whole = {**os.environ, **ours, **(environ or {})}
    whole.pop(WATCH_FD, None)
    read_end, write_end = os.pipe() if watched else (os.open(os.devnull, os.O_RDONLY), None)
    if watched:
        whole[WATCH_FD] = "0"
    try:
        popen = subprocess.Popen(
            command,
            stdin=read_end,
            stdout=output,
            stderr=output,
            env=whole,
            pass_fds=inherit,
            start_new_session=True,  # neither Ctrl-C nor the end of a kernel's process group reaches it
        )
    except BaseException:
        if write_end is not None:
            os.close(write_end)
        raise
    finally:
        os.close(read_end)
    threading.Thread(target=_reap, args=(popen, write_end), name=f"reap-{popen.pid}", daemon=True).start()
    return popen


def _reap(popen: subprocess.Popen[bytes], write_end: int | None) -> None:
    """Hold the parent's end of the pipe for as long as the process lives, and leave no zombie."""
    popen.wait()
    if write_end is not None:
        os.close(write_end)


@dataclass(frozen=True, kw_only=True)
class RunProcess:
    """Runs that one process works on in turn and, where this process started it, that process."""

    runs: tuple[Run, ...]
    detached: bool
    popen: subprocess.Popen[bytes] | None = None

    @property
    def run(self) -> Run:
        """The first run, which is the only one of a training process."""
        return self.runs[0]

    @property
    def alive(self) -> bool:
        return self.popen.returncode is None if self.popen else any(run.alive for run in self.runs)

    @property
    def returncode(self) -> int | None:
        """Exit status, -N where signal N ended it; None while it lives, and for a process started elsewhere."""
        return self.popen.returncode if self.popen else None


def start(
    config: TrainConfig,
    *,
    detach: bool,
    reward_source: str | None = None,
    runs: Path | None = None,
    command: Sequence[str] = TRAINER,
) -> RunProcess:
    """Make a run directory in `runs` and start a process that trains in it.

    Detached, it lives on by itself; otherwise it saves and stops when this process ends. `reward_source` is kept as the
    run's `reward.py`; `command` is given the run directory as its last argument.
    """
    with RunWriter.create(config, runs, reward_source=reward_source) as writer:
        path = writer.path
    return resume(path, detach=detach, command=command)


def resume(run: Run | Path | str, *, detach: bool, command: Sequence[str] = TRAINER) -> RunProcess:
    """Start a process that resumes an existing run directory.

    Raises RuntimeError where another process works on it.
    """
    run = run if isinstance(run, Run) else Run(run)
    lock = hold(run)
    try:
        return launch([run], [lock], detach=detach, command=command)
    finally:
        os.close(lock)  # the process has inherited it


def hold(run: Run) -> int:
    """Take a run's lock for a process to come, withdraw an earlier request to stop, and write that the run starts.

    Returns the lock's descriptor. Raises RuntimeError where another process holds it.
    """
    lock = lock_for_work(run.path)
    try:
        (run.path / "stop").unlink(missing_ok=True)
        write_status(run, "starting", step=run.done)
    except BaseException:
        os.close(lock)
        raise
    return lock


def launch(runs: Sequence[Run], locks: Sequence[int], *, detach: bool, command: Sequence[str] = TRAINER) -> RunProcess:
    """Start a process that works on `runs` in turn and inherits their locks, which `hold` took."""
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # what this process holds and does not use, the other one may need
    paths, fds = [str(run.path) for run in runs], ",".join(map(str, locks))
    with (runs[0].path / "log.txt").open("ab") as output:
        popen = spawn([*command, *paths], output, inherit=locks, watched=not detach, environ={LOCKS: fds})
    return RunProcess(runs=tuple(runs), detached=detach, popen=popen)


def attach(run: Run | Path | str) -> RunProcess:
    """A run that was started elsewhere, or before this kernel was restarted."""
    return RunProcess(runs=(run if isinstance(run, Run) else Run(run),), detached=True)


# -- stopping ----------------------------------------------------------------------------------------------------------


def request_stop(runs: Iterable[Run]) -> list[Run]:
    """Ask runs to save and stop, or not to begin, without waiting; returns those that live."""
    living = [run for run in runs if run.alive]
    for run in living:
        (run.path / "stop").touch()
    return living


def stop_all(runs: Iterable[Run], timeout: float = SAVE_SECONDS) -> None:
    """Ask runs to save and stop, or not to begin, and wait until all have.

    Raises TimeoutError where one has not in `timeout` seconds.
    """
    living, deadline = request_stop(runs), time.monotonic() + timeout
    while left := [run.name for run in living if run.alive]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"run {left[0]} was asked to stop and has not after {timeout:g} s")
        time.sleep(0.05)


def stop(run: RunProcess | Run | Path | str, timeout: float = SAVE_SECONDS) -> Run:
    """As `stop_all`, of one run or of the runs of one process; returns the run."""
    process = run if isinstance(run, RunProcess) else attach(run)
    stop_all(process.runs, timeout)
    return process.run


# -- following ---------------------------------------------------------------------------------------------------------


def follow(
    run: RunProcess | Run | Path | str,
    *,
    every: float = 2.0,
    on_update: Callable[[Run], object] | None = None,
    log: Callable[[str], object] = print,
    patient: bool = False,
) -> Run:
    """Wait until a run ends, with a line of progress and a call of `on_update` every few seconds.

    A process that is not detached is stopped, and its runs have saved, when waiting ends for any other reason: an interrupt,
    SIGTERM, an error of `on_update`. Raises RuntimeError with the run's last error where it failed, was killed or, not being
    detached, was stopped before its last step. `patient`: that a run was stopped is no error.
    """
    process = run if isinstance(run, RunProcess) else attach(run)
    with raised_sigterm():
        try:
            for each in process.runs:
                _wait(process, each, every, on_update, log)
                _raise_unless_whole(process, each, patient or process.detached)
        except BaseException:
            if not process.detached and process.alive:
                _stop_or_kill(process, log)
            raise
    return process.run


def _wait(
    process: RunProcess,
    run: Run,
    every: float,
    on_update: Callable[[Run], object] | None,
    log: Callable[[str], object],
) -> None:
    tail, latest, written, due = MetricsTail(run), {}, "", 0.0
    while True:
        alive = process.alive and (run is process.runs[-1] or run.alive)
        if not alive or time.monotonic() >= due:
            due = time.monotonic() + every
            latest.update({line["kind"]: line for line in tail.read()})
            if on_update is not None:
                on_update(run)
            if (line := _progress(run, latest)) != written:
                log(written := line)
        if not alive:
            return
        time.sleep(min(0.1, every))


def _progress(run: Run, latest: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: which run, how far, how fast, how long still, its last losses."""
    status, train, held_out = run.status, latest.get("train", {}), latest.get("eval", {})
    parts = [f"step {max(status.step, train.get('step', 0))}/{status.steps}"]
    if status.state != "running":
        parts.insert(0, status.state)
    if speed := status.tokens_per_second or train.get("tokens_per_second"):
        parts.append(f"{speed:,.0f} tokens/s")
    if status.seconds_left is not None and status.state == "running":
        parts.append(f"{status.seconds_left // 60:.0f}:{status.seconds_left % 60:02.0f} left")
    parts += [
        f"{name} {train[name]:.4f}" for name in ("ntp_loss", "nsp_loss", "reward_mean", "answer_loss") if name in train
    ]
    for name in ("ntp_loss", "answer_loss"):
        if name in held_out:
            parts.append(f"held-out {name} {held_out[name]:.4f} after step {held_out['step']}")
    return f"{run.config.way} s{run.config.seed}: " + ", ".join(parts)


def _stop_or_kill(process: RunProcess, log: Callable[[str], object]) -> None:
    log(f"stopping run {process.run.name}, which saves first")
    try:
        stop(process, SAVE_SECONDS)
    except TimeoutError as error:
        log(f"{error}; killing it")
        if process.popen:
            process.popen.kill()
            process.popen.wait()


def _raise_unless_whole(process: RunProcess, run: Run, may_be_stopped: bool) -> None:
    status = run.status
    if status.state in ("starting", "running"):
        if run.alive:
            return  # another process has resumed it in the meantime
        if process.popen:
            process.popen.wait()  # the lock is free: the process has ended, or is about to
    written, code = MetricsTail(run).read()[-1:], process.returncode  # every step is there; in the status it is not
    where = f"at step {max([status.step, *(line['step'] for line in written)])} of {status.steps}"
    if status.state == "finished" or (status.state == "stopped" and may_be_stopped):
        return
    if status.state == "stopped":
        raise RuntimeError(f"run {run.name} was stopped {where}: {status.error or 'a stop was requested'}")
    if code is not None and code < 0:
        what = f"was killed by {signal.Signals(-code).name}"
    elif status.state == "failed":
        what = "failed"
    else:
        what = "was killed" if code is None else f"ended with exit status {code}"
    raise RuntimeError(f"run {run.name} {what} {where}: {status.error or _log_end(run) or 'it left no word'}")


def _log_end(run: Run, lines: int = 15) -> str:
    """The last lines that the process printed."""
    path = run.path / "log.txt"
    text = path.read_bytes()[-8192:].decode(errors="replace") if path.exists() else ""
    return "\n".join(text.strip().splitlines()[-lines:])


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def raised_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block, and deliver it again behind it, when all is cleaned up."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may set a handler, or is sent one
        yield
        return

    def handle(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
