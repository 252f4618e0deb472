"""The process of one or several runs: `python -m refine_lab.training RUN_DIR [RUN_DIR ...]`.

It executes the runs one after another: each trains, or adapts to prompts and answers them, according to its
configuration. It reads and writes only the run directories, and resumes a run where an earlier process ended.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from refine_lab.runs.child import StopSignal, child_setup
from refine_lab.runs.run import Run
from refine_lab.runs.writer import write_status


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 if all runs finished or were asked to stop, 1 if one failed, 2 for a usage error."""
    if not arguments:
        print("usage: python -m refine_lab.training RUN_DIR [RUN_DIR ...]", file=sys.stderr)
        return 2
    try:
        stops = child_setup(*arguments)
        runs = [Run(path) for path in arguments]
        steps = [run.status.step for run in runs if run.config]
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for run, stop, step in zip(runs, stops, steps, strict=True):
        if len(runs) > 1:
            _log_into(run)
        try:
            _work(run, stop)
        except Exception as error:  # in one sentence in status.json, and in full in log.txt, unless the disk is full
            _report(run.path, step, error)
            with suppress(OSError):
                traceback.print_exc()
            return 1
        stop.release()
    return 0


def _work(run: Run, stop: StopSignal) -> None:
    """Trains or answers one run; torch is loaded only here, so that signals are handled during the import."""
    if reason := stop.requested():
        write_status(run, "stopped", error=reason)
    elif run.kind == "train":
        from refine_lab.training.trainer import train

        train(run.path, stop)
    else:
        from refine_lab.training.answer_run import answer_prompts

        answer_prompts(run, stop)


def _log_into(run: Run) -> None:
    """Redirects output to the log of the current run."""
    with (run.path / "log.txt").open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())


def _report(path: Path, step: int, error: Exception) -> None:
    """Writes the failure to status.json, if the run directory still allows it; `step` is the initial step."""
    try:
        step = Run(path).status.step
    except (OSError, ValueError) as damage:
        print(damage, file=sys.stderr)
    try:
        write_status(Run(path), "failed", error=f"{type(error).__name__}: {error}", step=step)
    except (OSError, ValueError) as damage:
        print(f"the failure cannot be written into status.json: {damage}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
