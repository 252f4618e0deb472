"""Recipes for post-training with nested REFINE (paper, section 4.3): the paper's own, and ones for a laptop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refine_lab.config import DataConfig, TaskConfig, TrainConfig
from refine_lab.recipes.paper import refine_of


def paper_posttrain(method: str = "nested_refine", seed: int = 0) -> TrainConfig:
    """Post-training of DeltaNet-1.3B on RULER's SQuADQA as in the paper (section 4.3); nested SFT updates as often."""
    task = TaskConfig(
        source="ruler:dev-v2.0.json",  # table C.1: SQuADQA, made from SQuAD v2.0; or HotpotQA
        prompt_tokens=4096,  # table C.1: 4K, 8K or 16K
        answer_tokens=32,  # RULER
        train=1600,  # table C.1
        validation=0,
        test=200,  # table C.1
    )
    return TrainConfig(
        recipe="paper_posttrain",
        model="fla-hub/delta_net-1.3B-100B",  # the paper's: mid-trained before
        task=task,
        **_of_method(method),
        steps=25,  # ours: one epoch; the authors' log ends at 24
        batch_size=64,  # table 2
        mini_batch_size=16,  # table D.1
        micro_batch_size=1,  # ours
        lr=1e-6,  # table 2
        weight_decay=0.01,  # table D.1
        checkpoint_every=5,  # ours
        seed=seed,
        dtype="bfloat16",  # release, whose parameters and Adam moments are float32 too
        activation_checkpointing="blocks",  # ours
    )


def posttrain(method: str = "nested_refine", seed: int = 0) -> TrainConfig:
    """Post-training of `tiny-deltanet` on recall questions, in minutes on a CPU. Values without a source are ours."""
    task = TaskConfig(  # asked in words that pre-training did not use
        source="recall:word-12", prompt_tokens=512, answer_tokens=4, train=400, validation=50, test=200
    )
    return TrainConfig(
        recipe="posttrain",
        model="tiny-deltanet",
        data=DataConfig(sources={"python": 1.0}, sequence_length=512, max_tokens=4_000_000),
        task=task,
        **_of_method(method),
        steps=25,  # one epoch
        batch_size=16,
        mini_batch_size=4,  # four inner updates, as in the paper
        micro_batch_size=8,
        lr=3e-4,  # of 3e-4 and 1e-3, by SFT on validation examples (docs/log.md)
        weight_decay=0.01,  # table D.1
        eval_every=5,
        checkpoint_every=25,
        seed=seed,
    )


def posttrain_searched(method: str = "nested_refine", seed: int = 0) -> TrainConfig:
    """`posttrain` of tiny-deltanet, with each method's best settings from a search on validation examples (docs/log.md)."""
    config = replace(posttrain(method, seed), recipe="posttrain_searched")
    if method == "sft":
        return replace(config, lr=1e-3, steps=50, max_grad_norm=0.3)
    return replace(config, mini_batch_size=16)  # one inner update


def posttrain_searched_lact(method: str = "nested_refine", seed: int = 0) -> TrainConfig:
    """`posttrain` of tiny-lact, with each method's best settings from a search on validation examples (docs/log.md)."""
    config = replace(posttrain(method, seed), recipe="posttrain_searched_lact", model="tiny-lact")
    if method == "sft":
        return replace(config, lr=6e-4)
    if config.refine is None or config.refine.method not in ("refine", "placebo"):
        return config  # the search was for REFINE's reward
    return replace(config, refine=replace(config.refine, reward="cosine"))


def _of_method(method: str) -> dict[str, Any]:
    return {"nested": method != "sft", "refine": refine_of(method, "posttrain", reward="hybrid")}  # table 2, eq. 12
