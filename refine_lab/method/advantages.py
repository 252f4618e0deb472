"""Advantages: rewards compared within their group (GRPO, Shao et al., 2024; RLOO, Ahmadian et al., 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refine_lab.validation import require

EPS = 1e-6
"""Added to the standard deviation, as in the release."""

ROUNDING = 4
"""Tolerance for equal quantities, in units in the last place (eps of the dtype times the largest magnitude).

The mean of five float32 cosines is within 2 eps of its exact value (at most 2.0 over 80,000 draws of 32 to 2,048
channels), so two rewards that are equal in exact arithmetic are within 4 eps of each other.
"""


def advantages(
    rewards: Float[Tensor, "R"],
    num_chunks: int,
    group_size: int,
    group_by: Literal["sequence", "prefix"],
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale_by_std: bool = True,
) -> Float[Tensor, "R"]:
    """A = (r - b) / (std(r) + 1e-6) over each group, std unbiased, [R] (paper, section 3.2, below eq. 9).

    The baseline b is the mean of the group's rewards (`mean`), or for each rollout the mean of the other rewards of its
    group (`leave_one_out`; RLOO, arXiv 2402.14740). A group of m rewards then has r - b = (r - mean(r)) m / (m - 1).
    Without `scale_by_std`, A = r - b. Only `leave_one_out` without `scale_by_std` gives a policy gradient whose
    expectation is the gradient of the expected reward: b then does not depend on the rollout.

    `rewards` are ordered row by row, position by position. A group holds all `num_chunks * group_size` rollouts of a
    sequence (`sequence`; the paper with n = 1), or the `group_size` rollouts of one position (`prefix`; what the
    release does with n > 1).

    The advantages of a group are exactly 0 if it holds a single rollout, which cannot be compared, or if its rewards
    are equal within rounding: max(r) - min(r) <= 4 eps max(|r|), with the eps of the rewards' dtype (1.2e-7 in float32,
    1e-3 in float16, 8e-3 in bfloat16). Without this threshold the last bit of a float32 reward near 1 gives an
    advantage of 0.1. A reward with finer differences must be returned in a wider dtype.

    Raises ValueError for `prefix` with a group of one, and for rewards that do not divide into rows.
    """
    comparable = group_by == "sequence" or group_size > 1
    require(comparable, "group_size", group_size, "at least 2 if group_by is 'prefix'")
    per_row = num_chunks * group_size
    require(len(rewards) % per_row == 0, "rewards", len(rewards), f"whole rows of {num_chunks} * {group_size}")
    groups = rewards.detach().double().view(-1, per_row if group_by == "sequence" else group_size)
    if groups.shape[1] == 1:
        return torch.zeros_like(rewards)
    spread = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)
    equal = spread <= ROUNDING * torch.finfo(rewards.dtype).eps * groups.abs().amax(1, keepdim=True)
    equal &= spread.isfinite()  # a reward that is not finite stays visible
    # Distances from a member, not the rewards themselves: where all are equal they are 0, and no mean can round.
    groups = groups - groups[:, :1]
    compared = groups - groups.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        compared = compared * (groups.shape[1] / (groups.shape[1] - 1))
    if scale_by_std:
        compared = compared / (groups.std(1, keepdim=True) + EPS)
    return torch.where(equal, 0, compared).flatten().to(rewards.dtype)
