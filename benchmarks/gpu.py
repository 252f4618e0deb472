"""Training on one GPU at real shapes, with random weights: `python -m benchmarks.gpu --json FILE`.

DeltaNet-1.3B and LaCT-760M at 4,096 to 16,384 tokens: seconds of an SFT and of a REFINE step, tokens a second, model FLOPs
utilisation and peak memory; the paper's own procedure on one row; and each kernel of ours beside what it would replace.

Every case runs in a process of its own, so that one that runs out of memory takes no other with it, and is written to the
file as soon as it is done. Cases that stand in the file already are not run again: call it until it says that all are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write
from benchmarks.gpu_cases import CASES, run_case

ROOT = Path(__file__).parent.parent


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file that the figures are written to")
    parser.add_argument(
        "--cases", default="", help="words with commas between them: only cases whose name has one of them"
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="after which no case is begun, and the last one is ended"
    )
    parser.add_argument("--again", action="store_true", help="also cases that failed before")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what the processes of single cases are called with
    return parser.parse_args()


def chosen_cases(words: str) -> list[str]:
    """Names of the cases that have one of the words in them; all for none. Raises ValueError where there is none such."""
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    names = [name for name in CASES if not wanted or any(word in name for word in wanted)]
    if not names:
        raise ValueError(f"no case has {words!r} in its name; there are {', '.join(CASES)}")
    return names


def finished(path: Path, again: bool) -> dict[str, Any]:
    """What the file holds: case -> figures, or the error it ended with (left out where it is to be run `again`)."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    return {name: found for name, found in cases.items() if not (again and "error" in found)}


def in_its_own_process(name: str, path: Path, seconds: float) -> dict[str, Any] | None:
    """The figures of a case or its error; None where the time ran out."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(path), "--case", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": lines[-1] if lines else f"exit status {done.returncode}"}


def run_all(path: Path, names: list[str], seconds: float, again: bool) -> list[str]:
    """Run and write the cases that the file does not have; the names of those for which there was no time."""
    began, left = time.monotonic(), []
    cases = finished(path, again)
    for name in names:
        if name in cases:
            continue
        allowed = seconds - (time.monotonic() - began)
        found = in_its_own_process(name, path, allowed) if allowed > 0 else None
        if found is None and allowed > 0.9 * seconds:  # it had all of the time
            found = {"error": f"takes more than {seconds:.0f} s"}
        if found is None:
            left.append(name)
            continue
        cases[name] = found
        print(name, {key: value for key, value in found.items() if key != "seconds"}, flush=True)
        write(
            path, {"cases": cases}, device="cuda", weights="random, seed 0", dtype="bfloat16 autocast, float32 masters"
        )
    return left


def main() -> None:
    arguments = parsed()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures on a CUDA device, and torch finds none here")
    try:
        names = chosen_cases(arguments.cases)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.case:
        print(json.dumps(run_case(arguments.case)))
        return
    left = run_all(arguments.json, names, arguments.seconds, arguments.again)
    print(f"no time was left for {', '.join(left)}: call it again" if left else "all cases are there")


if __name__ == "__main__":
    main()
