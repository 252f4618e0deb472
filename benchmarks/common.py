"""What the benchmarks share: arguments, interleaved timing, and the record of where they ran."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from refine_lab.runs.environment import environment

REPEATS = ("--repeats", {"type": int, "default": None, "help": "rounds that medians are taken over"})


def arguments(
    description: str | None, *more: tuple[str, dict[str, Any]], model: str | None = "tiny-deltanet"
) -> argparse.Namespace:
    """What every benchmark is told, and `more`: a flag and the settings of `add_argument` each.

    `model` is measured where none is named; None: the benchmark makes its own.
    """
    parser = argparse.ArgumentParser(description=description)
    if model is not None:
        parser.add_argument("--model", default=model, help="what load_model takes")
    parser.add_argument("--json", type=Path, required=True, help="file that the figures are written to")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    for flag, settings in more:
        parser.add_argument(flag, **settings)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def interleaved(actions: Mapping[str, Callable[[], object]], repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of every action, `repeats` rounds of all of them in turn, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmups + repeats):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if turn >= warmups:
                times[name].append(time.perf_counter() - began)
    return times


def relative(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Of every action the median over rounds of its seconds over its round's mean: a slow round counts against none."""
    means = [statistics.fmean(seconds) for seconds in zip(*times.values(), strict=True)]
    return {
        name: statistics.median(value / mean for value, mean in zip(values, means, strict=True))
        for name, values in times.items()
    }


def spread(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:9.1f} ms  ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f})"


def summary(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of every action, as they are written beside the ratios."""
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in times.items()
    }


def write(path: Path, figures: Mapping[str, Any], *, device: str = "cpu", **settings: Any) -> None:
    """Figures, with what they were measured with and on, as JSON."""
    record = {
        **figures,
        "settings": {**settings, "threads": torch.get_num_threads()},
        "environment": environment(device),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
