"""Selection by copies: positions whose next tokens also occur earlier in the row, outside a window. It needs no model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@torch.no_grad()
def copied_tokens(
    tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"], window: int, rollout_length: int
) -> Float[Tensor, "B T"]:
    """Returns how many of the k tokens after each position can be copied from outside the window, 0 to k, [B, T].

    This is the largest m <= k for which x_{t+1..t+m} occurs earlier in the row, the last time beginning more than
    `window` tokens before token t + 1. A continuation that also occurs within the window does not count, since the last
    tokens alone predict it.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    score, known = torch.zeros(tokens.shape, device=tokens.device), tokens.max() + 1
    same = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens)  # rows share no number
    for count in range(1, rollout_length + 1):
        inside = place + count <= lengths.unsqueeze(1)
        number = same * known + F.pad(tokens[:, count - 1 :], (0, count - 1))[:, : tokens.shape[1]]
        same, distance = _last_occurrence(number, inside)
        score = torch.where(inside & (distance > window), count, score)
    return F.pad(score[:, 1:], (0, 1))  # the score of token t + 1 is that of position t


def _last_occurrence(
    numbers: Int[Tensor, "B T"], inside: Bool[Tensor, "B T"]
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns consecutive numbers for equal entries, and how far back the last equal entry is; 0 if there is none.

    Entries that are not `inside` are equal to no other.
    """
    flat, real = numbers.flatten(), inside.flatten()
    order = torch.where(real, flat, -1).argsort(stable=True)
    ordered = flat[order]
    repeats = (ordered[1:] == ordered[:-1]) & real[order[1:]] & real[order[:-1]]
    ranks = F.pad((~repeats).long().cumsum(0), (1, 0))
    distances = torch.zeros_like(flat)
    distances[order[1:]] = torch.where(repeats, order[1:] - order[:-1], 0)
    return torch.empty_like(flat).scatter(0, order, ranks).view_as(numbers), distances.view_as(numbers)
