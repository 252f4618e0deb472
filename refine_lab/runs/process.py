"""Spawns child processes, and starts, follows and stops a run's process (for the code inside that process, see `child`).

A run's process writes a run directory, which all others only read. Whether a run is alive is determined by its lock,
which the process inherits before its first instruction and which is released even if it is killed. A child that is not
detached also inherits the reading end of a pipe as its stdin: nothing is written to it, and it closes when the process
that started the child ends, for whatever reason; the run then saves and stops. (Linux and macOS.)
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
from typing import IO, Any, BinaryIO

from refine_lab.config import TrainConfig
from refine_lab.runs.child import LOCKS, SAVE_SECONDS, WATCH_FD
from refine_lab.runs.environment import project_root
from refine_lab.runs.files import name_holder, take_lock
from refine_lab.runs.run import MetricsTail, Run
from refine_lab.runs.started import check_unchanged
from refine_lab.runs.writer import RunWriter, write_status
from refine_lab.text import printable, shorten, signal_name

PYTHON = (sys.executable, "-P", "-u", "-m")
"""Command that starts one of our modules; -P prevents a folder `refine_lab` in the current folder from being imported."""

TRAINER = (*PYTHON, "refine_lab.training")
"""The command that takes run directories as arguments."""

LOG_END = 8192
"""Number of bytes read from the end of a log."""

Log = Callable[[str], object]
"""Receives the lines of a progress report, as `print`."""


def safe_log(log: Log) -> Log:
    """Returns `log` with control characters escaped, since a run's name and error may come from another source."""
    return lambda line: log(printable(line))


# -- starting ----------------------------------------------------------------------------------------------------------


def spawn(
    command: Sequence[str],
    output: IO[bytes],
    *,
    inherit: Sequence[int] = (),
    watched: bool = False,
    environ: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child process in a separate session, with this checkout on its path and its output in `output`.

    `inherit` are descriptors that it keeps. If `watched`, its stdin is a pipe that closes when this process ends, and
    WATCH_FD is set; otherwise its stdin is empty. `environ` are further environment variables. No zombie is left.
    """
    path = filter(None, (project_root(), os.environ.get("PYTHONPATH")))
    ours = {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": os.pathsep.join(map(str, path))}
    popen = subprocess.Popen(
        command,
        stdin=subprocess.PIPE if watched else subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, **ours, **(environ or {}), WATCH_FD: "0" if watched else ""},
        pass_fds=inherit,
        start_new_session=True,  # neither Ctrl-C nor the end of a kernel's process group reaches it
    )
    threading.Thread(target=_reap, args=(popen,), name=f"reap-{popen.pid}", daemon=True).start()
    return popen


def _reap(popen: subprocess.Popen[bytes]) -> None:
    """Holds the parent's end of the pipe as long as the child lives, and leaves no zombie."""
    popen.wait()
    if popen.stdin:
        popen.stdin.close()


@dataclass(frozen=True, kw_only=True)
class RunProcess:
    """Runs that one process executes one after another, and the process itself if this process started it."""

    runs: tuple[Run, ...]
    detached: bool
    popen: subprocess.Popen[bytes] | None = None

    @property
    def run(self) -> Run:
        """Returns the first run, which is the only one of a training process."""
        return self.runs[0]

    @property
    def alive(self) -> bool:
        return self.popen.returncode is None if self.popen else any(run.alive for run in self.runs)

    @property
    def returncode(self) -> int | None:
        """Returns the exit status, -N if signal N ended it; None while it lives, and for a process started elsewhere."""
        return self.popen.returncode if self.popen else None


def start(
    config: TrainConfig,
    *,
    detach: bool,
    reward_source: str | None = None,
    selection_source: str | None = None,
    runs: Path | None = None,
    command: Sequence[str] = TRAINER,
) -> RunProcess:
    """Creates a run directory in `runs` and starts a process that trains in it.

    A detached process continues independently; otherwise it saves and stops when this process ends. `reward_source` is
    stored as the run's `reward.py`, `selection_source` as its `selection.py`; `command` receives the run
    directory as its last argument.
    """
    with RunWriter.create(config, runs, reward_source=reward_source, selection_source=selection_source) as writer:
        path = writer.path
    return resume(path, detach=detach, command=command)


def resume(run: Run | Path | str, *, detach: bool, command: Sequence[str] = TRAINER) -> RunProcess:
    """Starts a process that resumes an existing run directory.

    Raises RuntimeError if another process works on it.
    """
    run = run if isinstance(run, Run) else Run(run)
    with hold(run) as lock:  # the process inherits a copy
        return launch([(run, lock)], detach=detach, command=command, log=run)


def hold(run: Run) -> BinaryIO:
    """Takes a run's lock for a future process, withdraws an earlier stop request, and sets the status to starting.

    Returns the lock's open file. Raises RuntimeError if another process holds the lock, and ValueError, before anything
    is changed, if the run's settings or reward are not those that it started with.
    """
    check_unchanged(run)
    lock = take_lock(run.path)
    try:
        (run.path / "stop").unlink(missing_ok=True)
        write_status(run, "starting", step=run.done)
    except BaseException:
        lock.close()
        raise
    return lock


def launch(
    queue: Sequence[tuple[Run, BinaryIO]], *, detach: bool, command: Sequence[str] = TRAINER, log: Run
) -> RunProcess:
    """Starts a process that executes runs one after another and inherits their locks, which `hold` took.

    The process's output is appended to the log of the run `log`.
    """
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # frees memory that this process does not use, which the other one may need
    runs, fds = tuple(run for run, _ in queue), [lock.fileno() for _, lock in queue]
    command, locks = [*command, *(str(run.path) for run in runs)], {LOCKS: ",".join(map(str, fds))}
    with (log.path / "log.txt").open("ab") as output:
        popen = spawn(command, output, inherit=fds, watched=not detach, environ=locks)
    for _, lock in queue:
        name_holder(lock, popen.pid)
    return RunProcess(runs=runs, detached=detach, popen=popen)


def attach(run: Run | Path | str) -> RunProcess:
    """Returns the process of a run that was started elsewhere, or before this kernel was restarted."""
    return RunProcess(runs=(run if isinstance(run, Run) else Run(run),), detached=True)


# -- stopping ----------------------------------------------------------------------------------------------------------


def request_stop(runs: Iterable[Run]) -> list[Run]:
    """Asks runs to save and stop, or not to begin, without waiting; returns those that are alive."""
    living = [run for run in runs if run.alive]
    for run in living:
        (run.path / "stop").touch()
    return living


def stop_all(runs: Iterable[Run], timeout: float = SAVE_SECONDS) -> None:
    """Asks runs to save and stop, or not to begin, and waits until all have done so.

    Raises TimeoutError if one has not after `timeout` seconds.
    """
    living, deadline = request_stop(runs), time.monotonic() + timeout
    while left := [run.name for run in living if run.alive]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"run {left[0]} did not stop within {timeout:g} s of being asked to")
        time.sleep(0.05)


def stop(run: RunProcess | Run | Path | str, timeout: float = SAVE_SECONDS) -> Run:
    """Stops one run or the runs of one process, as `stop_all`; returns the run."""
    process = run if isinstance(run, RunProcess) else attach(run)
    stop_all(process.runs, timeout)
    return process.run


# -- following ---------------------------------------------------------------------------------------------------------


def follow(
    run: RunProcess | Run | Path | str,
    *,
    every: float = 2.0,
    on_update: Callable[[Run], object] = lambda run: None,
    log: Log = print,
    patient: bool = False,
) -> Run:
    """Waits until a run ends, printing progress and calling `on_update` every few seconds.

    If waiting ends for any other reason (an interrupt, SIGTERM, an error in `on_update`), a process that is not
    detached is stopped after its runs have saved. Raises RuntimeError with the run's last error if it failed, was
    killed or, not being detached, was stopped before its last step. If `patient`, a stopped run is not an error.
    """
    process = run if isinstance(run, RunProcess) else attach(run)
    log = safe_log(log)
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


def _wait(process: RunProcess, run: Run, every: float, on_update: Callable[[Run], object], log: Log) -> None:
    tail, latest, written, due = MetricsTail(run), {}, "", 0.0
    while True:
        alive = process.alive and (run is process.runs[-1] or run.alive)
        if not alive or time.monotonic() >= due:
            due = time.monotonic() + every
            latest.update({line["kind"]: line for line in tail.read()})
            on_update(run)
            if (line := _progress(run, latest)) != written:
                log(written := line)
        if not alive:
            return
        time.sleep(min(0.1, every))


def _progress(run: Run, latest: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns one line with the run, its progress, speed, remaining time, last losses and mean reward."""
    status, train, held_out = run.status, latest.get("train", {}), latest.get("eval", {})
    parts = [f"step {max(status.step, train.get('step', 0))}/{status.steps}"]
    if status.state != "running":
        parts.insert(0, status.state)
    if speed := status.tokens_per_second or train.get("tokens_per_second"):
        parts.append(f"{speed:,.0f} tokens/s")
    if status.seconds_left is not None and status.state == "running":
        parts.append(f"{status.seconds_left // 60:.0f}:{status.seconds_left % 60:02.0f} left")
    parts += [f"{name} {train[name]:.4f}" for name in ("ntp_loss", "reward_mean", "answer_loss") if name in train]
    measured = [f"{name} {held_out[name]:.4f}" for name in ("ntp_loss", "answer_loss") if name in held_out]
    parts += [f"held-out {measure} after step {held_out['step']}" for measure in measured]
    return f"{run.config.method} s{run.config.seed}: " + ", ".join(parts)


def _stop_or_kill(process: RunProcess, log: Log) -> None:
    if process.popen and not process.run.path.is_dir():  # nothing is left to save to
        process.popen.kill()
        process.popen.wait()
        return
    log(f"stopping run {process.run.name} after it has saved")
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
        reason = status.error or "a stop was requested"
        raise RuntimeError(printable(f"run {run.name} was stopped {where}: {reason}"))
    if code is not None and code < 0:
        what = f"was killed by {signal_name(-code)}"
    elif status.state == "failed":
        what = "failed"
    else:
        what = "was killed" if code is None else f"ended with exit status {code}"
    reason = status.error or _log_end(run) or "the process printed nothing"
    raise RuntimeError(printable(f"run {run.name} {what} {where}: {reason}"))


def _log_end(run: Run, lines: int = 15) -> str:
    """Returns the last lines that the process printed."""
    path = run.path / "log.txt"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_END))
        text = file.read(LOG_END).decode(errors="replace")
    return "\n".join(shorten(line) for line in text.strip().splitlines()[-lines:])


class _Terminated(BaseException):
    """SIGTERM was received."""


@contextmanager
def raised_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception inside the block, and delivers it again after cleanup."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may set a handler, or is sent one
        yield
        return

    def handle(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, handle) or signal.SIG_DFL
    try:
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
    except _Terminated:
        signal.raise_signal(signal.SIGTERM)
        raise
