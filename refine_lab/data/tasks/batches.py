"""Batches of prompts with answers as a function of (seed, step), as in `data.batches`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from refine_lab.config import RefineConfig
from refine_lab.data.batches import epoch_order, padded
from refine_lab.data.tasks.examples import Example
from refine_lab.types import PromptBatch


class TaskData:
    """The training examples of a task, each once per epoch, in an order that depends on the seed."""

    def __init__(self, examples: Sequence[Example], seed: int, refine: RefineConfig | None = None) -> None:
        """Raises ValueError if there are no examples, one has no answer, or a prompt is too short for `refine`."""
        if not examples:
            raise ValueError("a task needs examples to train on, got none")
        if bare := [example.name for example in examples if not example.answer_ids]:
            got = f"{len(bare)} have none, first {bare[0]!r}"
            raise ValueError(f"every example that is trained on needs an answer; {got}")
        if short := [
            e for e in examples if refine is not None and refine.has_places and not refine.fits(len(e.prompt_ids))
        ]:
            raise ValueError(
                f"{len(short)} of {len(examples)} prompts are too short for the method's num_chunks, rollout_length and "
                f"margin, the first {short[0].name!r} with {len(short[0].prompt_ids)} tokens: remove them, or use fewer chunks"
            )
        self.examples, self.seed = examples, seed

    def batch(self, step: int, batch_size: int) -> PromptBatch:
        """Returns batch `step` (from 0); an epoch may end within it."""
        numbers, count = range(step * batch_size, (step + 1) * batch_size), len(self.examples)
        orders = (epoch_order(self.seed, number // count, count, "examples") for number in numbers)
        chosen = [self.examples[order[number % count]] for number, order in zip(numbers, orders, strict=True)]
        return prompt_batch(chosen, tuple(numbers))


def prompt_batch(examples: Sequence[Example], sequence_ids: tuple[int, ...]) -> PromptBatch:
    """Returns the examples as rows, padded on the right."""
    sequences = [np.array([*example.prompt_ids, *example.answer_ids]) for example in examples]
    lengths = torch.tensor([len(example.prompt_ids) for example in examples])
    return PromptBatch(sequences=padded(sequences, sequence_ids), prompt_lengths=lengths)
