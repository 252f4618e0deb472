"""The paper's settings for REFINE, and the methods that each phase compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from refine_lab.config import RefineConfig
from refine_lab.validation import require

Phase = Literal["pretrain", "midtrain", "posttrain", "ttt"]

METHODS: dict[Phase, tuple[str, ...]] = {
    "midtrain": ("sft", "refine"),  # section 4.2
    "posttrain": ("sft", "nested_sft", "nested_refine"),  # section 4.3
    "ttt": ("none", "sft", "refine"),  # section 4.4
}
"""The methods that a phase compares; nested ones make updates on the prompts before the update on the answers."""

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
    """Returns `REFINE` with `changes`, or None for a method without rollouts.

    Raises ConfigError for a method that the phase does not compare.
    """
    *others, last = map(repr, METHODS[phase])
    require(method in METHODS[phase], "method", method, f"{', '.join(others)} or {last}")
    return replace(REFINE, **changes) if method.endswith("refine") else None
