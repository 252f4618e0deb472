"""Recipes: one function an experiment, returning a whole configuration. The only home of the paper's numbers.

Each value names its place: a table of the paper, `release` (the paper's code), or `ours`. The SFT arm of a recipe
differs from the REFINE arm in `method` alone: the same sequences, the same number of optimizer updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from refine_lab.config import DataConfig, RefineConfig, TrainConfig, require, unknown

Recipe = Callable[..., TrainConfig]
"""(arm, seed) -> TrainConfig; the arm is `sft` or `refine`."""


def paper_midtrain(arm: str = "refine", seed: int = 0) -> TrainConfig:
    """Mid-training of DeltaNet-1.3B as in the paper (section 4.2), with as many updates in either arm."""
    method = RefineConfig(
        num_chunks=8,  # c, tables 2 and D.1
        rollout_length=5,  # k, tables 2 and D.1
        group_size=1,  # n, tables 2 and D.1
        selection="entropy",  # table 7
        tau=1.0,  # section 3.2, below eq. 6
        smoothing_kernel=5,  # section 3.2: "kernel size k"
        entropy_index="release",  # release; eq. 5 reads otherwise
        margin=20,  # release
        temperature=1.0,  # table D.1
        reward="cosine",  # tables 2 and D.1
        group_by="sequence",  # section 3.2: "rewards from the same sequence"
        prefix_gradient="full",  # release
        ntp_coef=1.0,  # lambda_SFT, tables 2 and D.1
        nsp_coef=0.2,  # lambda_RL, tables 2 and D.1
        clip_eps=0.2,  # table D.1, "actor gradient clip", read as the ratio's
        dual_clip=3.0,  # release
        kl_coef=0.0,  # table D.1
        entropy_coef=0.0,  # table D.1
    )
    data = DataConfig(
        sources={"datasets:DKYoon/SlimPajama-6B": 1.0},  # release: Long-Data-Collections is gone
        sequence_length=16_384,  # table D.1
        min_tokens=16_384,  # release: documents of at least 16K tokens
        max_tokens=220_000_000,  # section 4.2: about 200M are trained on; with room for the held-out rows, ours
        validation_sequences=32,  # ours
    )
    return TrainConfig(
        recipe="paper_midtrain",
        model="fla-hub/delta_net-1.3B-100B",  # section 4.1
        method=_method(method, arm),
        data=data,
        steps=100,  # section 4.2
        batch_size=128,  # tables 2 and D.1
        mini_batch_size=32,  # table D.1
        micro_batch_size=1,  # ours: rows of 16,384 tokens
        optimizer="adamw",  # betas 0.9 and 0.999, table D.1
        lr=1e-6,  # tables 2 and D.1
        schedule="constant",  # release
        warmup_steps=0,  # release
        weight_decay=0.01,  # table D.1
        max_grad_norm=1.0,  # release
        eval_every=10,  # release
        checkpoint_every=20,  # release
        seed=seed,
        dtype="bfloat16",  # release; parameters and Adam moments stay float32, ours
        recompute="blocks",  # ours: a row of 16,384 tokens in 80 GB
    )


def paper_midtrain_release_updates(arm: str = "refine", seed: int = 0) -> TrainConfig:
    """`paper_midtrain` with the updates its release makes: SFT one a batch, REFINE four. Not a fair comparison."""
    config = replace(paper_midtrain(arm, seed), recipe="paper_midtrain_release_updates")
    return replace(config, mini_batch_size=config.batch_size) if arm == "sft" else config


def midtrain(arm: str = "refine", seed: int = 0) -> TrainConfig:
    """Mid-training of the embedded default: 204,800 tokens in minutes on a laptop's CPU. Ours where nothing is said."""
    method = RefineConfig(  # the paper's: tables 2 and D.1, with the release's reading of eq. 5
        num_chunks=8,
        rollout_length=5,
        smoothing_kernel=5,
        entropy_index="release",
        margin=20,
        reward="cosine",
        ntp_coef=1.0,
        nsp_coef=0.2,
    )
    data = DataConfig(
        sources={"python": 1.0},
        sequence_length=1024,
        recall={"word-1": 0.125, "word-4": 0.125},
        max_tokens=4_000_000,  # twenty runs' worth, tokenised in seconds
        validation_sequences=16,
    )
    return TrainConfig(
        recipe="midtrain",
        model="tiny-deltanet",
        method=_method(method, arm),
        data=data,
        steps=25,
        batch_size=8,
        mini_batch_size=8,
        micro_batch_size=8,
        lr=1e-4,  # docs/log.md; the paper's 1e-6 moves nothing within 25 updates
        weight_decay=0.01,  # table D.1
        eval_every=5,
        checkpoint_every=25,
        seed=seed,
    )


class Stage(NamedTuple):
    """A stage of a curriculum, as it stands in a table."""

    steps: int
    length: int  # tokens a row
    rows: int
    warmup: int
    prose: float  # share of the plain rows
    recall: dict[str, float]  # share of recall documents by kind
    window: int | None = None  # tokens that LaCT's attention sees; a chunk of its fast weights is as long, from 8 to 64


def pretrain(model: str, prose: str | None = None) -> list[TrainConfig]:
    """The curriculum that made `tiny-deltanet`, stage by stage; all values ours (docs/log.md tells why).

    `model` is `new:FOLDER`, a configuration and tokenizer; every stage goes on from the one before. `prose` is a folder of
    .txt files that takes a tenth or so of the plain rows beside the Python corpus.
    """
    stages = [
        Stage(500, 128, 32, 50, 0.15, {"pairs": 0.5, "number-1": 0.1}),
        Stage(
            1200, 256, 16, 50, 0.15, {"pairs": 0.05, "word-1": 0.1, "word-4": 0.15, "number-1": 0.12, "number-2": 0.08}
        ),
        Stage(354, 512, 8, 50, 0.05, {"word-1": 0.06, "word-4": 0.1, "number-1": 0.1, "number-2": 0.06}),
        Stage(120, 32, 128, 20, 0.1, {"pairs": 0.5}),  # few pairs at a time: here recall is learned
        Stage(400, 128, 32, 20, 0.1, {"pairs": 0.15, "word-1": 0.2, "word-4": 0.15, "number-1": 0.2}),
        Stage(
            600, 256, 16, 20, 0.1, {"pairs": 0.03, "word-1": 0.1, "word-4": 0.12, "number-1": 0.15, "number-2": 0.05}
        ),
        Stage(500, 512, 8, 20, 0.1, {"word-1": 0.07, "word-4": 0.1, "number-1": 0.12, "number-2": 0.04}),
        Stage(1500, 1024, 4, 20, 0.05, {"word-1": 0.08, "word-4": 0.1, "number-1": 0.16, "number-2": 0.04}),
    ]
    return _curriculum("pretrain", stages, model, prose, threads=2)


def pretrain_lact(model: str, prose: str | None = None) -> list[TrainConfig]:
    """The curriculum that made `tiny-lact`; all values ours. `model` and `prose` as for `pretrain`.

    Attention sees two tokens at first, then more: so the fast weights learn to bind a value to its key before attention
    can do without them (docs/log.md has the search). As many tokens in all as `pretrain`.
    """
    stages = [
        Stage(500, 32, 32, 30, 0.0, {"pairs": 1.0}, window=2),  # here facts are bound
        Stage(150, 32, 32, 20, 0.0, {"pairs": 1.0}, window=8),
        Stage(200, 64, 32, 20, 0.1, {"pairs": 0.5, "word-1": 0.25, "number-1": 0.05}, window=16),
        Stage(160, 64, 32, 20, 0.1, {"pairs": 0.15, "pairs-is": 0.45, "word-1": 0.3}, window=16),
        Stage(160, 64, 32, 20, 0.1, {"pairs": 0.1, "pairs-is": 0.05, "pairs-word": 0.5, "word-2": 0.2}, window=16),
        Stage(200, 128, 24, 20, 0.1, {"pairs-word": 0.15, "word-1": 0.1, "word-2": 0.15, "word-4": 0.15}, window=32),
        Stage(250, 256, 16, 20, 0.1, {"pairs-word": 0.05, "word-1": 0.15, "word-4": 0.15, "number-1": 0.1}, window=64),
        Stage(
            300, 128, 32, 20, 0.1, window=64,
            recall={"pairs-number": 0.25, "word-1-d64": 0.1, "word-1": 0.05, "word-2": 0.1, "word-4": 0.15, "number-1": 0.1},
        ),
        Stage(
            1000, 256, 16, 20, 0.1, window=64,
            recall={"pairs-number": 0.05, "word-1": 0.1, "word-4": 0.2, "number-1": 0.15, "number-2": 0.05},
        ),
        Stage(1000, 512, 8, 20, 0.1, {"word-1": 0.08, "word-4": 0.15, "number-1": 0.12, "number-2": 0.05}, window=64),
        Stage(2050, 1024, 4, 20, 0.05, {"word-1": 0.08, "word-4": 0.14}, window=128),
    ]  # fmt: skip
    # from the weights of seed 1, of three tried, nothing was bound within 700 steps
    return _curriculum("pretrain_lact", stages, model, prose, threads=1, first_seed=2)


def _curriculum(
    name: str, stages: list[Stage], model: str, prose: str | None, *, threads: int, first_seed: int = 1
) -> list[TrainConfig]:
    """Every stage as a run, with a seed of its own; the learning rate falls in the last."""
    return [
        TrainConfig(
            recipe=f"{name}-{number}",
            model=model,
            model_settings=_windows(stage.window),
            method=None,
            data=DataConfig(
                sources={"python": 1 - stage.prose, prose: stage.prose} if prose and stage.prose else {"python": 1.0},
                sequence_length=stage.length,
                recall=stage.recall,
                validation_sequences=max(8, 16_384 // stage.length),
            ),
            steps=stage.steps,
            batch_size=stage.rows,
            mini_batch_size=stage.rows,
            micro_batch_size=stage.rows,
            optimizer="muon",
            lr=4e-3,
            schedule="linear" if number == len(stages) else "constant",
            warmup_steps=stage.warmup,
            weight_decay=0.01,
            eval_every=100,
            checkpoint_every=100,
            seed=first_seed + number - 1,
            threads=threads,
        )
        for number, stage in enumerate(stages, start=1)
    ]


def _windows(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size": window, "lact_chunk_size": min(max(8, window), 64)}


RECIPES: dict[str, Recipe] = {
    "midtrain": midtrain,
    "paper_midtrain": paper_midtrain,
    "paper_midtrain_release_updates": paper_midtrain_release_updates,
}

Curriculum = Callable[[str, str | None], list[TrainConfig]]
"""(model, prose) -> one configuration a stage."""

CURRICULA: dict[str, Curriculum] = {
    "pretrain": pretrain,
    "pretrain_lact": pretrain_lact,
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises ValueError that names the nearest and all there are."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def curriculum(name: str) -> Curriculum:
    """The curriculum of that name; raises ValueError as `recipe` does."""
    if name not in CURRICULA:
        raise unknown("curriculum", name, CURRICULA)
    return CURRICULA[name]


def _method(method: RefineConfig, arm: str) -> RefineConfig | None:
    require(arm in ("sft", "refine"), "arm", arm, "'sft' or 'refine'")
    return method if arm == "refine" else None
