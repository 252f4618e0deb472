"""Advantages: rewards standardised within their group (GRPO; Shao et al., 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6
"""Added to the standard deviation, as in the release."""


def advantages(
    rewards: Float[Tensor, "R"], num_chunks: int, group_size: int, group_by: Literal["sequence", "prefix"]
) -> Float[Tensor, "R"]:
    """A = (r - mean(r)) / (std(r) + 1e-6) over each group, std unbiased, [R] (paper, section 3.2, below eq. 9).

    `rewards` are ordered row by row, position by position. A group holds all `num_chunks * group_size` rollouts of a
    sequence (`sequence`; the paper with n = 1), or the `group_size` rollouts of one position (`prefix`; what the
    release does with n > 1). Equal rewards give exactly 0, and so does a group of one: it has nothing to compare with.

    Raises ValueError for `prefix` with a group of one, and for rewards that do not divide into rows.
    """
    if group_by == "prefix" and group_size == 1:
        raise ValueError(
            "group_by 'prefix' compares the rollouts of one position: group_size must be at least 2, got 1"
        )
    per_row = num_chunks * group_size
    if len(rewards) % per_row:
        raise ValueError(f"rewards must come in whole rows of {num_chunks} * {group_size}, got {len(rewards)}")
    groups = rewards.detach().double().view(-1, per_row if group_by == "sequence" else group_size)
    if groups.shape[1] == 1:
        return torch.zeros_like(rewards)
    # Distances from a member, not the rewards themselves: where all are equal they are 0, and no mean can round.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + EPS)).flatten().to(rewards.dtype)
