"""The figures of a step, and the micro-batch with which its tokens are estimated to be quickest."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch

from benchmarks.fake_gpu.ledger import by_part
from benchmarks.fake_gpu.phases import Case, make_step, middle_positions, one_graph
from benchmarks.fake_gpu.watch import Watch, fp32_streams, watching
from benchmarks.fake_gpu.workers import Exchanges, divide, gathered_weights

MEMORY = 120.0
"""GiB below which a step must stay on an H200 of 139 GiB: the rest is for fragmentation and for CUDA itself."""
MOST_ROWS = 64
"""Largest micro-batch that is tried."""


def measure(case: Case) -> dict[str, Any]:
    """Returns the figures of one step in the steady state, with Adam's moments and the last step's gradients in memory."""
    gc.collect()
    with watching() as watch, middle_positions(), one_graph(watch), gathered_weights(watch.ledger):
        with torch.device("cuda"):
            policy = case.model()
        if case.workers > 1:
            divide(policy, case.workers)
            watch.exchanges = Exchanges(case.workers)
        step = make_step(policy, case)
        watch.ledger.mark([*policy.parameters(), *policy.buffers()], "weights")
        watch.ledger.mark(step.settle(), "moments")
        watch.ledger.mark([p.grad for p in policy.parameters() if p.grad is not None], "gradients")
        for parameter in policy.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: watch.ledger.mark([p.grad], "gradients"))
        stream = case.rows * case.length * policy.config.hidden_size
        watch.begin(stream=None if step.dtype == "float32" else stream)
        step.run(case.length)
        return _figures(watch, case, policy)


def best_micro_batch(case: Case, one: dict[str, Any], memory: float = MEMORY) -> dict[str, Any]:
    """Returns the quickest micro-batch whose peak is below `memory` GiB, with its estimated speed; `one`: the case's figures.

    More rows never make a token slower, since every launch does more; so the largest that fits is looked for. The first
    guess is that all activations grow with the rows, and the next ones follow the line through the measured peaks.
    """
    peak = one["peak_gib"]
    fixed = 4 * peak["weights"] if peak["moments"] else peak["weights"]  # Adam's moments, and gradients at another time
    found, rows = {case.rows: one}, int((memory - fixed) / peak["activations"] * case.rows)
    for _ in range(3):
        rows = min(max(rows, case.rows), MOST_ROWS)
        if rows in found:
            break
        found[rows] = measure(replace(case, rows=rows))
        slope = (found[rows]["peak_gib"]["total"] - peak["total"]) / (rows - case.rows)
        rows = case.rows + int((memory - peak["total"]) / slope)
    fitting = {rows: figures for rows, figures in found.items() if figures["peak_gib"]["total"] < memory}
    if not fitting:
        return {"micro_batch_size": None, "tokens_per_second_estimate": None}
    best = max(fitting, key=lambda rows: fitting[rows]["tokens_per_second"])
    return {
        "micro_batch_size": best,
        "tokens_per_second_estimate": fitting[best]["tokens_per_second"],
        "micro_batch_peak_gib": fitting[best]["peak_gib"],
        "micro_batch_phases": fitting[best]["phases"],
    }


def _figures(watch: Watch, case: Case, policy: Any) -> dict[str, Any]:
    roofline, peak = watch.roofline, watch.ledger.at_peak()
    weights = {tuple(p.shape) for p in policy.parameters()}
    lines = fp32_streams(watch, watch.ledger.made(), weights)
    seconds = sum(cost.seconds for cost in roofline.phases.values())
    shared = {} if watch.exchanges is None else {"workers": watch.exchanges.figures(roofline.device_seconds)}
    return shared | {
        "launches": roofline.total("started"),
        "launches_eager": roofline.total("launches"),
        "triton_launches": roofline.total("triton_launches"),
        "synchronisations": sum(watch.synchronisations.values()),
        "synchronisation_lines": dict(watch.synchronisations.most_common()),
        "device_mismatches": sum(watch.mismatches.values()),
        "device_mismatch_lines": dict(watch.mismatches),
        "peak_gib": by_part(peak),
        "bytes": roofline.total("bytes"),
        "flops": roofline.total("flops"),
        "promotion_lines": dict(watch.promotions.most_common()),
        "fp32_stream_gib": sum(lines.values()),
        "fp32_stream_gib_at_peak": sum(fp32_streams(watch, peak, weights).values()),
        "fp32_stream_lines": lines,
        "seconds": seconds,
        "tokens_per_second": case.rows * case.length / seconds,
        "phases": {
            name: {
                "launches": cost.launches,
                "triton_launches": cost.triton_launches,
                "gigabytes": cost.bytes / 1e9,
                "device_ms": cost.device_seconds * 1e3,
                "host_ms": cost.host_seconds * 1e3,
            }
            for name, cost in roofline.phases.items()
        },
    }
