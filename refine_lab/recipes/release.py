"""The unequal numbers of updates in the paper's released code, where SFT makes fewer than REFINE: not a fair comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from refine_lab.config import TrainConfig
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import require

C = TypeVar("C", bound=TrainConfig | TTTRunConfig)

RELEASED = "as in the paper's released code"


def release_updates(config: C) -> C:
    """Returns `config` with `updates="release"`: SFT makes the release's fewer updates, other methods are unchanged.

    SFT, and in post-training nested SFT on the prompts, makes one update per batch. In test-time training that resets
    the weights after each prompt, it makes half of the steps. Raises ValueError if there is only one update, which
    cannot be omitted.
    """
    changed = replace(config, updates="release")
    if changed.method == config.method:
        return changed
    if isinstance(changed, TTTRunConfig) and changed.ttt is not None and changed.reset == "prompt":
        steps = changed.ttt.steps
        require(steps > 1, "steps", steps, f"at least 2, so that SFT can make half as many, {RELEASED}")
        return replace(changed, ttt=replace(changed.ttt, steps=steps // 2))
    several = "so that a batch has several updates, which are replaced by a single one for SFT"
    allowed = f"less than batch_size {config.batch_size}, {several}, {RELEASED}"
    require(config.mini_batch_size < config.batch_size, "mini_batch_size", config.mini_batch_size, allowed)
    return replace(changed, mini_batch_size=config.batch_size)
