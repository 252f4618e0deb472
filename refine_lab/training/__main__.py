"""The process of one or several runs: `python -m refine_lab.training RUN_DIR [RUN_DIR ...] [--override NAME ...]`.

It executes the runs one after another: each trains, or adapts to prompts and answers them, according to its
configuration. It reads and writes only the run directories, and resumes a run where an earlier process ended.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from refine_lab.runs.child import StopSignal, child_setup
from refine_lab.runs.files import LockLostError
from refine_lab.runs.run import Run
from refine_lab.runs.started import accept, check_unchanged
from refine_lab.runs.writer import write_status
from refine_lab.text import printable, shorten

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE
)
"""What the allocators of torch and of the system write into an error."""
ADVICE = "lower micro_batch_size, or set activation_checkpointing to 'mlp' or 'blocks' in a training run"


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 if all runs finished or were asked to stop, 1 if one failed, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m refine_lab.training", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="NAME",
        help="accept that a setting, a function (reward.py, selection.py) or an input (texts, prompts, begins_with, model) "
        "has changed since the run started; the run records it",
    )
    options = parser.parse_args(arguments)
    if _launched_workers() > 1:
        if len(options.runs) > 1:
            parser.error(f"several workers execute one run at a time, got {len(options.runs)} run directories")
        if int(os.environ["RANK"]) > 0:
            return _work(options.runs[0])
    try:
        stops = child_setup(*options.runs)
        runs = [Run(path) for path in options.runs]
        steps = [run.status.step for run in runs if run.config]
        for run, changes in [(run, check_unchanged(run, options.override)) for run in runs]:
            accept(run, changes)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    pid = os.getpid()
    for run, stop, step in zip(runs, stops, steps, strict=True):
        if len(runs) > 1:
            _log_into(run)
        try:
            if reason := stop.requested():
                write_status(run, "stopped", error=reason)
            else:
                write_status(run, "starting", pid=os.getpid())
                execute = _executor(run)
                with _reported_exit(run.path, step):
                    execute(run.path, stop, options.override)
        except BaseException as error:
            if os.getpid() != pid:
                os._exit(1)  # a process that a library or a reward has forked is not the run's
            # In one sentence in status.json, and in full in log.txt, unless the disk is full.
            _report(run.path, step, error)
            with suppress(OSError):
                traceback.print_exc()
            return 1
        stop.release()
    return 0


def _work(path: str) -> int:
    """Executes a run as a worker other than the first: it writes nothing, and its errors reach the first worker."""
    try:
        (stop,) = child_setup(path, writes=False)
        run = Run(path)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the first worker prints the same
        _executor(run)(run.path, stop, ())
    except Exception as error:
        if type(error).__name__ != "WorkerLostError":  # the one that is lost has printed its own
            traceback.print_exc()
        return 1
    return 0


@contextmanager
def _reported_exit(path: Path, step: int) -> Iterator[None]:
    """Makes `os._exit` report the failure of the run at `path` inside the block, since no other code would run after it.

    The exit status is then never 0. In a process that a library or a reward has forked, `os._exit` is unchanged.
    """
    leave, pid = os._exit, os.getpid()

    def reported(status: int) -> NoReturn:
        if os.getpid() == pid:
            _report(path, step, _early_exit(status))
            status = status or 1
        leave(status)

    os._exit = reported
    try:
        yield
    finally:
        os._exit = leave


def _early_exit(status: int) -> RuntimeError:
    """Returns the error for a call of `os._exit` during a run, with the file and line of the call."""
    caller = sys._getframe(2)
    place = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
    return RuntimeError(
        f"the process ended with exit code {status} before the last step, since os._exit was called in {place}; a likely "
        "cause is a custom reward or a library that it calls"
    )


def _launched_workers() -> int:
    """Returns the number of workers that `torchrun` has started, of which this process is one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _executor(run: Run) -> Callable[[Path, StopSignal, Collection[str]], None]:
    """Returns the function that trains or answers a run; torch is loaded only here, so that signals are handled meanwhile."""
    if _launched_workers() > 1 or run.config.processes > 1:
        from refine_lab.training.parallel import execute_with_workers

        return execute_with_workers
    if run.kind == "train":
        from refine_lab.training.trainer import train

        return train
    from refine_lab.training.answer_run import answer_prompts

    return answer_prompts


def _log_into(run: Run) -> None:
    """Redirects output to the log of the current run."""
    with (run.path / "log.txt").open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())


def sentence_of(error: BaseException) -> str:
    """Returns an error's type and text for `status.json`, with advice if memory ran out."""
    text = f"{type(error).__name__}: {printable(shorten(str(error), 1500))}".removesuffix(": ")
    full = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None
    return f"{text.rstrip('. ')}; there is not enough memory: {ADVICE}" if full else text


def _report(path: Path, step: int, error: BaseException) -> None:
    """Writes the failure to status.json, if the run directory still allows it; `step` is the initial step."""
    if isinstance(error, LockLostError):
        print(error, file=sys.stderr)
        return
    try:
        step = Run(path).status.step
    except (OSError, ValueError) as damage:
        print(damage, file=sys.stderr)
    try:
        write_status(Run(path), "failed", error=sentence_of(error), step=step)
    except (OSError, RuntimeError, ValueError) as damage:
        print(f"the failure cannot be written into status.json: {damage}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
