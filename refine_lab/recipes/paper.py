"""The paper's settings for REFINE, and those of the other methods that are compared with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refine_lab.config import RefineConfig
from refine_lab.recipes.methods import METHODS as METHODS
from refine_lab.recipes.methods import Phase, changes_of, known_method, split_updates
from refine_lab.validation import require

REFINE = RefineConfig(
    num_chunks=8,  # c, tables 2 and D.1
    rollout_length=5,  # k, tables 2 and D.1
    group_size=1,  # n, tables 2 and D.1
    selection="entropy",  # table 7
    tau=1.0,  # section 3.2, below eq. 6
    smoothing_kernel=5,  # section 3.2: "kernel size k"
    entropy_index="release",  # release; eq. 5 reads otherwise
    margin=20,  # release
    temperature=1.0,  # table D.1
    reward="cosine",  # tables 2 and D.1, for mid-training
    group_by="sequence",  # section 3.2: "rewards from the same sequence"
    prefix_gradient="full",  # release
    ntp_coef=1.0,  # lambda_SFT, tables 2 and D.1
    nsp_coef=0.2,  # lambda_RL, tables 2 and D.1, for mid-training and post-training
    clip_eps=0.2,  # table D.1, "actor gradient clip", read as the ratio's
    dual_clip=3.0,  # release
    kl_coef=0.0,  # table D.1
    entropy_coef=0.0,  # table D.1
)
"""REFINE as in mid-training; the other phases change the reward and its weight."""


def refine_of(method: str, phase: Phase, **changes: Any) -> RefineConfig | None:
    """Returns `REFINE` with `changes` and those of the method, or None for a method without a next-sequence loss.

    Raises ConfigError for a method that is unknown in the phase, and for one with another number of updates, which
    `release_updates` and `compute_updates` set.
    """
    name = known_method(method, phase)
    require(
        split_updates(name)[1] is None,
        "method",
        method,
        f"{split_updates(name)[0]!r}, whose updates are set afterwards",
    )
    own = changes_of(name)
    return None if own is None else replace(REFINE, **{**changes, **own})
