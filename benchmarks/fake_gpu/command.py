"""The command behind `__main__`, in a process whose torch has the fake device."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks.common import write
from benchmarks.fake_gpu.phases import MODELS, Case
from benchmarks.fake_gpu.report import best_micro_batch, measure


def run(arguments: argparse.Namespace) -> None:
    """Measures the step, then the best micro-batch; writes the figures and prints the most important ones."""
    torch.set_num_threads(1)
    case = Case(
        model=MODELS[arguments.model],
        phase=arguments.phase,
        method=arguments.method,
        rows=arguments.rows,
        length=arguments.length,
        activation_checkpointing=arguments.activation_checkpointing,
        workers=arguments.workers,
    )
    try:
        figures = measure(case)
        if arguments.phase != "explore" and arguments.workers == 1 and not arguments.no_search:
            figures |= best_micro_batch(case, figures)
    except ValueError as error:
        sys.exit(str(error))
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    write(arguments.json, figures, **settings)
    print("\n".join(summary(figures)))


SETTINGS = ("model", "phase", "method", "rows", "length", "activation_checkpointing", "workers")


def summary(figures: dict[str, Any]) -> list[str]:
    """Returns the figures in lines of text: what is counted, and then what is estimated."""
    peak, phases = figures["peak_gib"], figures["phases"]
    parts = ", ".join(f"{name} {value:.1f}" for name, value in peak.items() if name != "total")
    lines = [
        f"launches {figures['launches']:,} (one by one {figures['launches_eager']:,}, Triton {figures['triton_launches']:,}), "
        f"synchronisations {figures['synchronisations']}, tensors on the wrong device {figures['device_mismatches']}",
        f"peak memory {peak['total']:.1f} GiB: {parts}",
        f"float32 streams {figures['fp32_stream_gib']:.1f} GiB made, {figures['fp32_stream_gib_at_peak']:.1f} at the peak",
        *(f"  {count:5d} x waits   {line}" for line, count in figures["synchronisation_lines"].items()),
        *(f"  {count:5d} x promotes {line}" for line, count in figures["promotion_lines"].items()),
        f"{'estimated':12s} {'launches':>9s} {'device ms':>10s} {'host ms':>9s}",
    ]
    for name, cost in sorted(phases.items(), key=lambda item: -item[1]["device_ms"]):
        lines.append(f"{name:12s} {cost['launches']:9,d} {cost['device_ms']:10.1f} {cost['host_ms']:9.1f}")
    if shared := figures.get("workers"):
        received = ", ".join(f"{name} {size:.1f}" for name, size in shared["received_gib"].items())
        overlap = ", ".join(f"{each['overlap']:.0%} over {name}" for name, each in shared["links"].items())
        lines.append(f"received from the other workers, GiB: {received}; estimated overlap {overlap}")
    lines.append(f"estimated {figures['tokens_per_second']:,.0f} tokens/s in one micro-batch")
    if figures.get("micro_batch_size"):
        estimate, rows = figures["tokens_per_second_estimate"], figures["micro_batch_size"]
        lines.append(f"estimated {estimate:,.0f} tokens/s in micro-batches of {rows}")
    return lines
