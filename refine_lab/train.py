"""A training process: `python -m refine_lab.train RUN_DIR` trains what the run's config.json says.

It reads nothing but the run directory, writes nothing else, and goes on from the last checkpoint where there is one.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from refine_lab.launch import child_setup
from refine_lab.records import Run, RunWriter


def main(arguments: list[str]) -> int:
    """The exit status: 0 for a run that is finished or was asked to stop, 1 for one that failed, 2 for a wrong call."""
    if len(arguments) != 1:
        print("usage: python -m refine_lab.train RUN_DIR", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        stop = child_setup(path)
        run = Run(path)
        _, step = run.config, run.status.step
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        from refine_lab.loop import train  # here: it loads torch, for seconds in which signals must be heeded already

        train(path, stop)
    except Exception as error:  # told where the user looks, in full in log.txt
        traceback.print_exc()
        _tell(path, step, error)
        return 1
    return 0


def _tell(path: Path, step: int, error: Exception) -> None:
    """Write the failure into status.json, as far as the run directory still allows it; `step` is that of the start."""
    try:
        step = Run(path).status.step
    except (OSError, ValueError) as damage:
        print(damage, file=sys.stderr)
    try:
        with RunWriter(path, step=step) as writer:
            writer.status("failed", error=f"{type(error).__name__}: {error}")
    except (OSError, ValueError) as damage:
        print(f"the failure cannot be written into status.json: {damage}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
