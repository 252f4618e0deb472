"""Random draws keyed by seed, step, sequence and purpose, so that they do not depend on batching or row order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draws:
    """A family of generators, one for every (seed, step, sequence, purpose).

    A draw for a sequence depends on these four alone: not on the other rows, its place in the batch, the micro-batch
    size, or the device.
    """

    seed: int
    step: int = 0

    def generator(self, sequence_id: int, purpose: str) -> torch.Generator:
        """Returns the CPU generator of one sequence and purpose, in its initial state."""
        key = f"{self.seed}/{self.step}/{sequence_id}/{purpose}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def uniforms(self, sequence_ids: Sequence[int], purpose: str, shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
        """Returns uniform numbers in [0, 1), float64, [len(sequence_ids), *shape], each row from its own generator."""
        rows = [torch.rand(shape, generator=self.generator(i, purpose), dtype=torch.float64) for i in sequence_ids]
        return torch.stack(rows)


def inverse_cdf(
    probabilities: Float[Tensor, "*rows choices"], uniforms: Float[Tensor, "*rows"]
) -> Int[Tensor, "*rows"]:
    """Returns the choice for each uniform number u: the first whose cumulative probability exceeds u. Integers [*rows].

    A choice of probability 0 is never drawn, even where rounding leaves the last cumulative sum below u.
    """
    cumulative = probabilities.double().cumsum(-1)
    points = (uniforms.to(cumulative) * cumulative[..., -1]).unsqueeze(-1)
    choices = torch.searchsorted(cumulative, points, right=True).squeeze(-1)
    possible = probabilities > 0
    last = possible.shape[-1] - 1 - possible.flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(choices, last)
