"""Batches of prompts with answers as a function of (seed, step), as in `data.batches`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from refine_lab.config import RefineConfig
from refine_lab.data.batches import padded
from refine_lab.data.tasks.examples import Example
from refine_lab.rng import Draws
from refine_lab.types import Lessons


class TaskData:
    """The training examples of a task, each once per epoch, in an order that depends on the seed."""

    def __init__(self, examples: Sequence[Example], seed: int, method: RefineConfig | None = None) -> None:
        """Raises ValueError if there are no examples, one has no answer, or a prompt is too short for `method`."""
        if not examples:
            raise ValueError("a task needs examples to train on, got none")
        if bare := [example.name for example in examples if not example.answer_ids]:
            raise ValueError(
                f"every example that is trained on needs an answer; {len(bare)} have none, first {bare[0]!r}"
            )
        if short := [e for e in examples if method is not None and not method.fits(len(e.prompt_ids))]:
            raise ValueError(
                f"{len(short)} of {len(examples)} prompts have no room for the method's num_chunks, rollout_length and margin, "
                f"the first {short[0].name!r} with {len(short[0].prompt_ids)} tokens: leave them out, or set fewer chunks"
            )
        self.examples, self.seed = examples, seed

    def batch(self, step: int, batch_size: int) -> Lessons:
        """Returns batch `step` (from 0); an epoch may end within it."""
        numbers = range(step * batch_size, (step + 1) * batch_size)
        chosen = []
        for number in numbers:
            epoch, place = divmod(number, len(self.examples))
            chosen.append(self.examples[_order(self.seed, epoch, len(self.examples))[place]])
        return lessons(chosen, tuple(numbers))


def lessons(examples: Sequence[Example], sequence_ids: tuple[int, ...]) -> Lessons:
    """Returns the examples as rows, padded on the right."""
    prompts = [np.array(example.prompt_ids) for example in examples]
    whole = [np.array([*example.prompt_ids, *example.answer_ids]) for example in examples]
    return Lessons(prompts=padded(prompts, sequence_ids), whole=padded(whole, sequence_ids))


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = Draws(seed=seed, step=epoch).generator(0, "examples")
    return torch.randperm(count, generator=generator).tolist()
