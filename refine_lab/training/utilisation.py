"""How well a step uses a GPU: model FLOP/s utilisation (MFU) and peak memory, recorded with every step on CUDA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from refine_lab.host import host
from refine_lab.models.base import FastWeightLM
from refine_lab.models.delta_layers import DeltaRuleConfig
from refine_lab.models.lact import LaCTConfig
from refine_lab.types import Batch

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
}
"""Part of a device's name -> its FLOP/s in bfloat16 without sparsity, from the makers' data sheets."""


def flops_per_token(policy: FastWeightLM, length: int | float) -> float | None:
    """Returns the FLOPs that training on one token of a sequence of `length` tokens needs; None for other families.

    They are 6 per weight of a matrix that a token is multiplied with, and 3 times the forward of the layers' memory: 6 dk
    dv a head for the delta rule (read, write, query); for LaCT 18 d h a head (three products to apply the fast weights, six
    to update them) and 4 min(window, length / 2) D for the window. Newton-Schulz iterations, rollouts and what is
    computed twice to save memory do not count.
    """
    config: Any = policy.config
    if isinstance(config, LaCTConfig):
        memory = 18 * config.hidden_size * config.fast_width
        memory += 4 * min(config.window_size, length / 2) * config.hidden_size
    elif isinstance(config, DeltaRuleConfig):
        memory = 6 * config.key_dim // config.num_heads * config.value_dim  # type: ignore[attr-defined]
    else:
        return None
    embeddings: Any = policy.get_input_embeddings().weight
    matrices = sum(p.numel() for p in policy.parameters() if p.ndim == 2)
    matrices -= 0 if policy.lm_head.weight is embeddings else embeddings.numel()
    return float(6 * matrices + 3 * config.num_hidden_layers * memory)


def peak_flops() -> tuple[str | None, float | None]:
    """Returns the device's name in `PEAKS` and its FLOP/s; None for a device that is not in it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next(((part, peak) for part, peak in PEAKS.items() if part in name), (None, None))


class Utilisation:
    """Measures the time of a step and, on CUDA, its memory and utilisation."""

    def __init__(self, policy: FastWeightLM, devices: int = 1) -> None:
        self._policy, self._devices = policy, devices
        self._cuda, self._began = policy.device.type == "cuda", time.monotonic()

    def begin(self) -> None:
        """Begins a step."""
        self._began = time.monotonic()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._policy.device)

    def figures(self, read: Sequence[Batch]) -> dict[str, float]:
        """Returns `seconds` since `begin`, `tokens_per_second` and, on CUDA, `peak_memory_gib` and, if it is known, `mfu`.

        `read` are the sequences of the step, which all devices share. MFU = tokens * FLOPs per token / (seconds * devices *
        peak FLOP/s). The memory is that of this process's device.
        """
        seconds = time.monotonic() - self._began
        tokens, sequences = sum(int(host(part.lengths).sum()) for part in read), sum(len(part.lengths) for part in read)
        found = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if not self._cuda:
            return found
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._policy.device) / 2**30
        flops, (_, peak) = flops_per_token(self._policy, tokens / sequences), peak_flops()
        if flops is None or peak is None:
            return found
        return found | {"mfu": tokens * flops / (seconds * self._devices * peak)}
