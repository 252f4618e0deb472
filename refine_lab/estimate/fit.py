"""Says, before a run starts, that its step will not fit on the GPU, and which settings would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from refine_lab.config import TrainConfig
from refine_lab.estimate.step import GIB, estimate
from refine_lab.models.base import FastWeightLM
from refine_lab.validation import ConfigError

MARGIN = 1.1
"""Memory that a step is given, as a multiple of the estimate: allocators round up, and libraries need some too."""
ROUND = 256
"""Lengths of rows that are suggested are multiples of this number of tokens."""


def shortage(config: TrainConfig, model: Any, workers: int, available: float) -> str:
    """Returns a sentence about a step that needs more than `available` GiB of a GPU, with settings that fit.

    `model` is as in `estimate`. The result is empty if the step fits, and for what `estimate` refuses or cannot know:
    other families, methods and dtypes, and the rows of a task.
    """
    if config.task is not None:
        return ""
    share = config.mini_batch_size // workers

    def peak(part: str, rows: int, length: int) -> float:
        return MARGIN * (
            estimate(
                model,
                length,
                workers,
                method=config.refine or "sft",
                rows=rows,
                micro_batches=-(-share // rows),
                activation_checkpointing=part,
                sharding=config.sharding,
                optimizer=config.optimizer,
                dtype=config.dtype,
            ).peak
        )

    part, rows = config.activation_checkpointing, min(config.micro_batch_size, share)
    length = config.data.sequence_length
    try:
        needed = peak(part, rows, length)
    except ConfigError:
        return ""
    if needed <= available:
        return ""
    amounts = f"a step needs about {needed:.1f} GiB of the GPU with a margin, and {available:.1f} GiB can be used"
    change = " or ".join(_alone(peak, part, rows, length, available))
    change = change or _together(peak, part, rows, length, available)
    return f"This run will probably not fit: {amounts}. What would help: {change}."


def print_shortage(config: TrainConfig, policy: FastWeightLM, workers: int) -> None:
    """Prints the `shortage` of the policy's CUDA device, if there is any."""
    if sentence := shortage(config, policy, workers, available_memory(policy.device)):
        print(sentence, flush=True)


def available_memory(device: torch.device) -> float:
    """Returns the GiB of a CUDA device that this process can use: those that are free, and those that it already holds."""
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GIB


Peak = Callable[[str, int, int], float]


def _alone(peak: Peak, part: str, rows: int, length: int, available: float) -> Iterator[str]:
    """Yields single settings with which a step fits."""
    parts = ("none", "mlp", "blocks")
    for other in parts[parts.index(part) + 1 :]:
        if (needed := peak(other, rows, length)) <= available:
            yield f"set activation_checkpointing to {other!r} ({needed:.1f} GiB)"
            break
    for fewer in range(rows - 1, 0, -1):
        if (needed := peak(part, fewer, length)) <= available:
            yield f"set micro_batch_size to {fewer} ({needed:.1f} GiB)"
            break


def _together(peak: Peak, part: str, rows: int, length: int, available: float) -> str:
    """Returns settings that fit together: all blocks recomputed, one row at a time, and a shorter row if it must be."""
    longest = length if peak("blocks", 1, length) <= available else _longest(peak, length, available)
    if not longest:
        return "a GPU with more memory or, with sharding 'full', more GPUs"
    changes = {
        "activation_checkpointing to 'blocks'": part != "blocks",
        "micro_batch_size to 1": rows > 1,
        f"data.sequence_length to {longest:,}": longest < length,
    }
    settings = " and ".join(setting for setting, changed in changes.items() if changed)
    return f"set {settings} ({peak('blocks', 1, longest):.1f} GiB)"


def _longest(peak: Peak, length: int, available: float) -> int:
    """Returns the longest shorter row of which a step fits by itself with all blocks recomputed, or 0."""
    low, high = 0, -(-length // ROUND)  # the first fits, as far as is known, and the second does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = peak("blocks", 1, middle * ROUND) <= available
        except ConfigError:  # too short for the method: longer ones only
            fits = True
        low, high = (middle, high) if fits else (low, middle)
    try:
        return low * ROUND if low and peak("blocks", 1, low * ROUND) <= available else 0
    except ConfigError:
        return 0
