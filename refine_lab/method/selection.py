"""Selection: the positions of a sequence from which rollouts start, given a score for each (paper, equations 5 and 6).

`entropies[b, i]` is the entropy of pi(. | x_{<=i}), the uncertainty about the token at i + 1, in nats. The scores of
other selections are computed in `places`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.config import RefineConfig, smallest_length
from refine_lab.host import host, to_device
from refine_lab.rng import Draws, inverse_cdf


def shift(entropies: Float[Tensor, "B T"], entropy_index: Literal["equation", "release"]) -> Float[Tensor, "B T"]:
    """H_t for every position t, [B, T].

    `release`: H_t is the uncertainty about x_{t+1}, the first token rolled out. `equation` (eq. 5): H_t is the
    uncertainty about x_t, the last token of the prefix; nothing precedes x_0, so H_0 = 0.
    """
    return entropies if entropy_index == "release" else F.pad(entropies[:, :-1], (1, 0))


def smooth(entropies: Float[Tensor, "B T"], lengths: Int[Tensor, "B"], kernel: int) -> Float[Tensor, "B T"]:
    """Returns the centred moving average of a row over `kernel` tokens (the next odd number if even), [B, T].

    Rows are zero-padded and every sum is divided by the kernel width, so values near the ends are smaller, as in the
    release's `avg_pool1d`. A kernel of 1 changes nothing. The release uses the rollout length as the kernel, and also
    pools over the padding of a row.
    """
    width = kernel + 1 - kernel % 2
    if width == 1:
        return entropies
    real = torch.arange(entropies.shape[1], device=entropies.device) < lengths.unsqueeze(1)
    zero_padded = torch.where(real, entropies, 0).unsqueeze(1)
    return F.avg_pool1d(zero_padded, width, stride=1, padding=width // 2).squeeze(1)


def selection_probabilities(
    scores: Float[Tensor, "B T"], lengths: Int[Tensor, "B"], config: RefineConfig
) -> Float[Tensor, "B T"]:
    """Returns the probability of each position within its chunk; every chunk sums to 1, float64 [B, T].

        p_i(t) = exp(H_t / tau) / sum over the eligible t' of chunk i of exp(H_t' / tau)    (eq. 6; `entropy`)

    with H the smoothed entropies in `scores`. `uniform` gives all eligible positions equal probability; `argmax` and
    `argmin` (table 7) give probability 1 to the first position with the highest or lowest unsmoothed H. `memory`, `copy`
    and `custom` use the scores themselves in place of H; for `memory`, a position with a score of -inf is not drawn,
    unless its chunk has no other, and then all are equal. A row's chunks hold `length // num_chunks` positions each; the
    remaining tail belongs to no chunk. A position is eligible if its prefix of t + 1 tokens has at least `margin` tokens,
    at least as many follow it, and all `rollout_length` tokens lie in the row. No gradient flows.

    Raises ValueError if a chunk has no eligible position, and if a score is not finite.
    """
    found = weighed(scores, lengths, config)
    found.check(config)
    return found.probabilities


class Weighed(NamedTuple):
    """The probabilities of positions, and for each the score that they are made of and whether it may be used."""

    probabilities: Float[Tensor, "B T"]
    scores: Float[Tensor, "B C L"]
    finite: Bool[Tensor, "B C L"]  # also where a position is not eligible

    def check(self, config: RefineConfig) -> None:
        """Raises ValueError, naming the first, if a score is not finite."""
        if self.finite.all():
            return
        row = int((~self.finite).flatten(1).any(1).nonzero()[0])
        what = "scores" if config.selection in ("memory", "copy", "custom") else "entropies"
        value = float(self.scores[row][~self.finite[row]][0])
        raise ValueError(f"{what} must be finite, got {value} in row {row}")


def weighed(scores: Float[Tensor, "B T"], lengths: Int[Tensor, "B"], config: RefineConfig) -> Weighed:
    """Returns `selection_probabilities`, which are NaN or arbitrary where a score is not finite, with what `check` needs."""
    if short := [length for length in host(lengths).tolist() if not config.fits(length)]:
        raise ValueError(
            f"a row of {short[0]} tokens has a chunk without a position to roll out from: num_chunks {config.num_chunks}, "
            f"rollout_length {config.rollout_length} and margin {config.margin} need at least {smallest_length(config)} tokens"
        )
    index, inside = _chunks(lengths, config.num_chunks, scores.shape[1])
    first, gap = config.ends
    eligible = inside & (index >= first) & (index <= (lengths - 1 - gap).view(-1, 1, 1))
    scores = scores.detach().double()
    if config.selection in ("entropy", "uniform", "argmax", "argmin"):
        scores = shift(scores, config.entropy_index)
    if config.selection == "entropy":
        scores = smooth(scores, lengths, config.smoothing_kernel)
    chunked = _take(scores, index)
    if config.selection == "memory":
        chunked, eligible = _known(chunked, eligible)
    raw, weights = chunked, _weights(chunked, eligible, config)
    # A running sum adds one by one on the CPU: unlike sum(), it is the same to the last bit however wide the batch is padded.
    chunked = weights / weights.cumsum(-1)[..., -1:]
    probabilities = torch.zeros_like(scores).scatter_add(1, index.flatten(1), chunked.flatten(1))
    return Weighed(probabilities, raw, raw.isfinite() | ~eligible)


def select_positions(
    probabilities: Float[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    sequence_ids: Sequence[int],
    draws: Draws,
    num_chunks: int,
) -> Int[Tensor, "B C"]:
    """Draws one position per chunk, t_i ~ p_i (eq. 6), [B, C]; a sequence's draw depends on nothing outside its row."""
    index, inside = _chunks(lengths, num_chunks, probabilities.shape[1])
    chunked = torch.where(inside, _take(probabilities, index), 0)
    uniforms = to_device(draws.uniforms(sequence_ids, "position", (num_chunks,)), probabilities.device)
    return index[..., 0] + inverse_cdf(chunked, uniforms)


def _chunks(
    lengths: Int[Tensor, "B"], num_chunks: int, width: int
) -> tuple[Int[Tensor, "B C L"], Bool[Tensor, "B C L"]]:
    """Returns the positions of each chunk, and which are valid; L is the longest chunk that a row of `width` can have."""
    size = (lengths // num_chunks).view(-1, 1, 1)
    offset = torch.arange(width // num_chunks, device=lengths.device)
    start = torch.arange(num_chunks, device=lengths.device).unsqueeze(1) * size
    return (start + offset).clamp(max=width - 1), (offset < size).expand(-1, num_chunks, -1)


def _take(values: Float[Tensor, "B T"], index: Int[Tensor, "B C L"]) -> Float[Tensor, "B C L"]:
    return values.gather(1, index.flatten(1)).view(index.shape)


def _known(
    scores: Float[Tensor, "B C L"], eligible: Bool[Tensor, "B C L"]
) -> tuple[Float[Tensor, "B C L"], Bool[Tensor, "B C L"]]:
    """Leaves out positions with a score of -inf; in a chunk with no others, all eligible ones get the score 0."""
    known = eligible & (scores != -torch.inf)
    found = known.any(-1, keepdim=True)
    return torch.where(found | (scores != -torch.inf), scores, 0), torch.where(found, known, eligible)


def _weights(
    scores: Float[Tensor, "B C L"], eligible: Bool[Tensor, "B C L"], config: RefineConfig
) -> Float[Tensor, "B C L"]:
    """Returns unnormalised probabilities of the positions of every chunk."""
    if config.selection == "uniform":
        return eligible.to(scores)
    signed = (-scores if config.selection == "argmin" else scores).masked_fill(~eligible, -torch.inf)
    if config.selection in ("argmax", "argmin"):
        return F.one_hot(signed.argmax(-1), scores.shape[-1]).to(scores)
    return ((signed - signed.amax(-1, keepdim=True)) / config.tau).exp()
