"""Training as a process of its own, which writes a run directory that everyone else only reads.

Whether a run lives is asked of its lock, which the process inherits before its first instruction and no kill can leave
behind. A run that is not detached also inherits the reading end of a pipe as its stdin: nobody writes to it, and it
ends when the process that started the run does, however it ends; the run then saves and stops. (Linux and macOS.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine_lab.config import TrainConfig
from refine_lab.environment import project_root
from refine_lab.records import MetricsTail, Run, RunWriter
from refine_lab.run_files import take_lock

TRAINER = (sys.executable, "-P", "-u", "-m", "refine_lab.train")
"""The command that a run directory is given to; -P: a folder `refine_lab` where it is started is not taken for ours."""

LOCK_FD, WATCH_FD = "REFINE_LOCK_FD", "REFINE_WATCH_FD"
"""Environment variables that tell a training process which of its descriptors are the lock and the parent's pipe."""

SAVE_SECONDS = 120.0
"""How long a run may take to save before it is killed, where whoever started it wants it stopped or is no more."""


@dataclass(frozen=True, kw_only=True)
class RunProcess:
    """A run and, where this process started it, its process."""

    run: Run
    detached: bool
    popen: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self.popen.returncode is None if self.popen else self.run.alive

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
    """Start a process that goes on with an existing run directory.

    Raises RuntimeError where a process trains in it already.
    """
    run = run if isinstance(run, Run) else Run(run)
    lock = _take_lock(run.path)
    try:
        (run.path / "stop").unlink(missing_ok=True)  # of an earlier process
        _announce(run)
        return _spawn(run, lock, detach, command)
    finally:
        os.close(lock)  # the process has inherited it


def attach(run: Run | Path | str) -> RunProcess:
    """A run that was started elsewhere, or before this kernel was restarted."""
    return RunProcess(run=run if isinstance(run, Run) else Run(run), detached=True)


def follow(
    run: RunProcess | Run | Path | str,
    *,
    every: float = 2.0,
    on_update: Callable[[Run], object] | None = None,
    log: Callable[[str], object] = print,
) -> Run:
    """Wait until a run ends, with a line of progress and a call of `on_update` every few seconds.

    A run that is not detached is stopped, and has saved, when waiting ends for any other reason: an interrupt, SIGTERM,
    an error of `on_update`. Raises RuntimeError with the run's last error where it failed, was killed or, not being
    detached, was stopped before its last step.
    """
    process = run if isinstance(run, RunProcess) else attach(run)
    with raised_sigterm():
        try:
            _wait(process, every, on_update, log)
        except BaseException:
            if not process.detached:
                _stop_or_kill(process, log)
            raise
    _raise_unless_whole(process)
    return process.run


def stop(run: RunProcess | Run | Path | str, timeout: float = SAVE_SECONDS) -> Run:
    """Ask a run to save and stop, and wait until it has. Raises TimeoutError where it has not in `timeout` seconds."""
    process = run if isinstance(run, RunProcess) else attach(run)
    if process.alive:
        (process.run.path / "stop").touch()
        deadline = time.monotonic() + timeout
        while process.alive:
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {process.run.name} was asked to stop and has not after {timeout:g} s")
            time.sleep(0.05)
    return process.run


class StopSignal:
    """A training process's own knowledge of whether it is asked to stop."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "stop"
        self._reason: str | None = None

    def set(self, reason: str) -> None:
        self._reason = self._reason or reason

    def requested(self) -> str | None:
        """Why the process should save and stop, or None; asked between two steps."""
        if self._reason is None and self._file.exists():
            self.set("a stop was requested")
        return self._reason


def child_setup(run_dir: Path | str) -> StopSignal:
    """The training process's side, called before anything slow: hold the lock, heed signals, parent and stop file.

    Raises RuntimeError where another process trains in `run_dir`, FileNotFoundError where it is no run directory.
    """
    path = Run(run_dir).path
    signals = StopSignal(path)
    if inherited := os.environ.pop(LOCK_FD, None):
        os.set_inheritable(int(inherited), False)
    else:  # started by hand
        _take_lock(path)
        (path / "stop").unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.set(f"stopped by {signal.Signals(number).name}"))
    if watched := os.environ.pop(WATCH_FD, None):
        watch_parent(int(watched), lambda: _outlive_parent(signals))
    return signals


def _outlive_parent(signals: StopSignal) -> None:
    """Ask for the stop, and end a process that hangs: nobody is left who would."""
    signals.set("the process that started it ended")
    time.sleep(SAVE_SECONDS)  # in a daemon thread: a process that has saved does not wait for it
    print(f"the process that started it ended, and it has not saved in {SAVE_SECONDS:g} s: killed", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_parent(fd: int, on_death: Callable[[], object]) -> threading.Thread:
    """Call `on_death` from a thread when the pipe that `fd` reads from has no writer any more."""

    def watch() -> None:
        while os.read(fd, 1024):
            pass
        on_death()

    thread = threading.Thread(target=watch, name="watch-parent", daemon=True)
    thread.start()
    return thread


def _take_lock(path: Path) -> int:
    try:
        return take_lock(path)
    except BlockingIOError:
        raise RuntimeError(f"{path} is being trained by another process; stop that one first") from None


def _announce(run: Run) -> None:
    """Write the status of a run whose process has not said anything yet."""
    step, _ = run.latest_checkpoint() or (0, None)
    with RunWriter(run.path, step=step) as writer:
        writer.status("starting")


def _spawn(run: Run, lock: int, detach: bool, command: Sequence[str]) -> RunProcess:
    environ = {**os.environ, LOCK_FD: str(lock), "PYTHONIOENCODING": "utf-8"}
    environ.pop(WATCH_FD, None)
    if root := project_root():
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    read_end, write_end = (os.open(os.devnull, os.O_RDONLY), None) if detach else os.pipe()
    if not detach:
        environ[WATCH_FD] = "0"
    try:
        with (run.path / "log.txt").open("ab") as output:
            popen = subprocess.Popen(
                [*command, str(run.path)],
                stdin=read_end,
                stdout=output,
                stderr=output,
                env=environ,
                pass_fds=(lock,),
                start_new_session=True,  # neither Ctrl-C nor the end of a kernel's process group reaches it
            )
    finally:
        os.close(read_end)
    threading.Thread(target=_reap, args=(popen, write_end), name=f"reap-{popen.pid}", daemon=True).start()
    return RunProcess(run=run, detached=detach, popen=popen)


def _reap(popen: subprocess.Popen[bytes], write_end: int | None) -> None:
    """Hold the parent's end of the pipe for as long as the process lives, and leave no zombie."""
    popen.wait()
    if write_end is not None:
        os.close(write_end)


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


def _wait(
    process: RunProcess, every: float, on_update: Callable[[Run], object] | None, log: Callable[[str], object]
) -> None:
    tail, latest, shown, due = MetricsTail(process.run), {}, "", 0.0
    while True:
        alive = process.alive
        if not alive or time.monotonic() >= due:
            due = time.monotonic() + every
            latest.update({line["kind"]: line for line in tail.read()})
            if on_update is not None:
                on_update(process.run)
            if (line := _progress(process.run, latest)) != shown:
                log(shown := line)
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


def _raise_unless_whole(process: RunProcess) -> None:
    run, status, code = process.run, process.run.status, process.returncode
    written = run.metrics()["step"]  # every step; the status is not
    where = f"at step {max([status.step, *written.tail(1)])} of {status.steps}"
    if status.state == "finished" or (status.state == "stopped" and process.detached):
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
