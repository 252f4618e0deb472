"""Recipes for test-time training (paper, section 4.4): the paper's own, and ones that reset the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.recipes.paper import refine_of
from refine_lab.ttt_config import TTTConfig, TTTRunConfig


def ttt_per_prompt(method: str = "refine", seed: int = 0) -> TTTRunConfig:
    """Test-time training of `tiny-deltanet` on single prompts, with resets. Values without a source are ours."""
    return TTTRunConfig(
        recipe="per_prompt",
        model="tiny-deltanet",
        ttt=_ttt(method, seed, steps=4, lr=1e-4),  # the paper's 1e-6 moves nothing within four updates
        # as `posttrain`
        task=TaskConfig(source="recall:word-12", prompt_tokens=512, answer_tokens=4, train=0, test=40),
        data=DataConfig(sources={"python": 1.0}, sequence_length=512, max_tokens=4_000_000),
        reset="prompt",
        adapt_on="prompt",  # section 4.4: "on the prompt"
        seed=seed,
    )


def ttt_per_prompt_searched(method: str = "refine", seed: int = 0) -> TTTRunConfig:
    """`ttt_per_prompt` of tiny-deltanet with the best settings of a search on validation prompts (docs/log.md)."""
    config = replace(ttt_per_prompt(method, seed), recipe="per_prompt_searched")
    return config if config.ttt is None else replace(config, ttt=replace(config.ttt, steps=1))


def ttt_per_prompt_searched_lact(method: str = "refine", seed: int = 0) -> TTTRunConfig:
    """`ttt_per_prompt` of tiny-lact, with each method's best settings from a search on validation prompts (docs/log.md)."""
    config = replace(ttt_per_prompt(method, seed), recipe="per_prompt_searched_lact", model="tiny-lact")
    if config.ttt is None:
        return config
    if config.ttt.refine is None:
        return replace(config, ttt=replace(config.ttt, lr=5e-5))
    refine = replace(config.ttt.refine, rollout_length=8, num_chunks=4)
    return replace(config, ttt=replace(config.ttt, lr=3e-4, refine=refine))


def ttt_paper(method: str = "refine", seed: int = 0) -> TTTRunConfig:
    """Test-time training as in the paper: batches of prompts, weights never reset, equal numbers of updates for both."""
    return TTTRunConfig(
        recipe="paper",
        model="fla-hub/delta_net-1.3B-100B",  # the paper's: post-trained before
        ttt=_ttt(method, seed, steps=1, lr=1e-6, dtype="bfloat16"),  # table 2; release
        # table C.1
        task=TaskConfig(source="ruler:dev-v2.0.json", prompt_tokens=4096, answer_tokens=32, train=0, test=200),
        batch_size=8,  # table D.1
        mini_batch_size=4,  # table D.1: two updates a batch
        micro_batch_size=1,  # ours
        reset="never",  # release
        adapt_on="prompt",  # section 4.4
        seed=seed,
    )


def _ttt(method: str, seed: int, **settings: Any) -> TTTConfig | None:
    refine = refine_of(method, "ttt", reward="binary", nsp_coef=0.4)  # tables 2 and D.1, eq. 11
    return None if method == "none" else TTTConfig(refine=refine, seed=seed, weight_decay=0.01, **settings)  # table D.1
