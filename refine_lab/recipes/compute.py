"""SFT with as much compute as REFINE: more updates on more data, by the measured ratio of the costs of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from refine_lab.config import TrainConfig
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import require

C = TypeVar("C", bound=TrainConfig | TTTRunConfig)

STEP_COST = 1.25
"""Cost of a REFINE step over an SFT step, with one update per batch; tiny-deltanet, rows of 1,024 tokens, c 8, k 5, n 1."""

STEP_COST_PLANNED = 1.6
"""The same with several updates per batch, where a reading without gradient precedes the first (`benchmarks.step_cost`)."""


def compute_updates(config: C) -> C:
    """Returns `config` with `updates="compute"`: SFT makes as many more steps as REFINE's cost pays for.

    Other methods are unchanged. The number of steps is multiplied by the measured ratio of costs and rounded. SFT therefore
    also sees more data; in test-time training, where `steps` counts updates on a prompt, it sees the prompt more often. In
    post-training the update on the answers costs as much as a pass over the prompts and is the same for both methods, so
    that the ratio is the mean of the measured one and 1. The ratio is that of c 8, k 5 and n 1 without a search for
    places; more rollouts cost more. Raises ValueError if there are so few steps that rounding adds none.
    """
    changed = replace(config, updates="compute")
    if changed.method == config.method:
        return changed
    ratio = STEP_COST if config.batch_size == config.mini_batch_size else STEP_COST_PLANNED
    if isinstance(changed, TTTRunConfig):
        assert changed.ttt is not None
        return replace(changed, ttt=replace(changed.ttt, steps=_more(changed.ttt.steps, ratio)))
    return replace(changed, steps=_more(changed.steps, ratio if changed.task is None else (ratio + 1) / 2))


def _more(steps: int, ratio: float) -> int:
    more = round(steps * ratio)
    require(more > steps, "steps", steps, f"such that {ratio:.3g} times as many are at least one more")
    return more
