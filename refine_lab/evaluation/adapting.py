"""Test-time training on the prompts of a batch before they are answered; the weights are restored afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from refine_lab.evaluation.config import ReadingConfig
from refine_lab.models.base import FastWeightLM
from refine_lab.recipes.testtime import ttt_per_prompt
from refine_lab.training.adaptation import Adapter, fewer_chunks, padded_batch, preserve_weights
from refine_lab.ttt_config import TTTConfig


def ttt_settings(reading: ReadingConfig) -> TTTConfig | None:
    """Returns the configuration of test-time training: that of the recipe `per_prompt` with the settings `ttt_*`."""
    config = ttt_per_prompt(reading.ttt, reading.seed).ttt
    if config is None:
        return None
    config = config if reading.ttt_steps is None else replace(config, steps=reading.ttt_steps)
    config = config if reading.ttt_lr is None else replace(config, lr=reading.ttt_lr)
    if reading.ttt_reward is None or config.refine is None:
        return config
    return replace(config, refine=replace(config.refine, reward=reading.ttt_reward))


def fewest_tokens(config: TTTConfig) -> int:
    """Returns the minimum length of a prompt that can be adapted to."""
    return 2 if config.refine is None or not config.refine.has_places else config.refine.rollout_length + 1


@contextmanager
def adapted_to(
    policy: FastWeightLM, prompts: Sequence[Sequence[int]], config: TTTConfig | None, counts: Counter[str]
) -> Iterator[None]:
    """Adapts the model jointly to all `prompts` inside a `with` block, and then restores it bit for bit.

    Prompts that are too short for the method are skipped; `counts` counts them and the prompts with fewer chunks.
    """
    if config is None:
        yield
        return
    used = [list(prompt) for prompt in prompts if len(prompt) >= fewest_tokens(config)]
    counts["not adapted, too short"] += len(prompts) - len(used)
    if not used:
        yield
        return
    counts["adapted"] += len(used)
    counts["adapted with fewer chunks"] += sum(fewer_chunks(config, len(prompt)) is not None for prompt in used)
    batch = padded_batch(policy, [torch.tensor(prompt) for prompt in used], tuple(range(len(used))))
    with preserve_weights(policy, config.parameters):
        for _ in Adapter(policy, config, mini_batch_size=len(used)).adapt(batch):
            pass
        yield
