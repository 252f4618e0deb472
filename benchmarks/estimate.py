"""`refine_lab.estimate` against counted peaks: `python -m benchmarks.estimate --json FILE`.

A step of REFINE on the fake GPU for two models, several lengths and two recompute modes, each in a process of its own. It
takes an hour or more; `--folder` keeps the counted figures, and those that are there are not counted again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, write
from benchmarks.fake_gpu.__main__ import MODELS
from refine_lab.estimate import estimate

LENGTHS = {"DeltaNet-1.3B": (4096, 16_384, 65_536), "LaCT-760M": (4096, 8192, 16_384)}
"""Longer rows of LaCT take a quarter of an hour to count."""
MODES = ("blocks", "none")


def cases() -> Iterator[tuple[str, int, Any]]:
    """Yields model, tokens of the row, and what is recomputed."""
    for model in MODELS:
        for length in LENGTHS[model]:
            yield from ((model, length, mode) for mode in MODES)


def counted(model: str, length: int, mode: Any, folder: Path) -> dict[str, Any]:
    """Returns the figures of the fake GPU, from the folder or from a new process."""
    path = folder / f"{model}_{length}_{mode}.json"
    if not path.exists():
        command = [
            sys.executable,
            "-m",
            "benchmarks.fake_gpu",
            "--model",
            model,
            "--length",
            str(length),
            "--no-search",
        ]
        subprocess.run([*command, "--activation-checkpointing", mode, "--json", str(path)], check=True)
    return json.loads(path.read_text(encoding="utf-8"))


def compared(model: str, length: int, mode: Any, folder: Path) -> dict[str, Any]:
    """Returns GiB by part and seconds of the fake GPU and of the estimate, and the estimate's relative errors."""
    figures, found = counted(model, length, mode, folder), estimate(model, length, activation_checkpointing=mode)
    peak = figures["peak_gib"]
    return {
        "model": model,
        "length": length,
        "activation_checkpointing": mode,
        "counted_gib": peak,
        "estimated_gib": {**found.memory, "total": found.peak},
        "moment": found.moment,
        "error": found.peak / peak["total"] - 1,
        "counted_seconds": figures["seconds"],
        "estimated_seconds": found.seconds,
    }


def main() -> None:
    folder = ("--folder", {"type": Path, "default": None, "help": "folder of the counted figures"})
    chosen = arguments(__doc__, folder, model=None)
    with tempfile.TemporaryDirectory() as temporary:
        place = chosen.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        pairs = [compared(*case, place) for case in cases()]
    for each in pairs:
        counted_gib, estimated_gib = each["counted_gib"]["total"], each["estimated_gib"]["total"]
        name = f"{each['model']:14s} {each['length']:6,d} {each['activation_checkpointing']:6s}"
        print(f"{name} counted {counted_gib:6.1f}  estimated {estimated_gib:6.1f}  {each['error']:+.1%}")
    write(chosen.json, {"pairs": pairs, "largest_error": max(abs(each["error"]) for each in pairs)}, threads=1)


if __name__ == "__main__":
    main()
