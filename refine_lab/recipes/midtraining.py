"""Recipes for mid-training (paper, section 4.2): the paper's own, and one for a laptop."""

from __future__ import annotations

from refine_lab.config import DataConfig, TrainConfig
from refine_lab.recipes.paper import refine_of


def paper_midtrain(method: str = "refine", seed: int = 0) -> TrainConfig:
    """Mid-training of DeltaNet-1.3B as in the paper (section 4.2), with the same number of updates for both methods."""
    data = DataConfig(
        sources={"datasets:DKYoon/SlimPajama-6B": 1.0},  # release: Long-Data-Collections is gone
        sequence_length=16_384,  # table D.1
        rows="document",  # release: the first 16K tokens of a document
        min_tokens=16_384,  # release: documents of at least 16K tokens
        max_tokens=220_000_000,  # section 4.2: about 200M are trained on; with room for the held-out rows, ours
        validation_sequences=32,  # ours
    )
    return TrainConfig(
        recipe="paper_midtrain",
        model="fla-hub/delta_net-1.3B-100B",  # section 4.1
        refine=refine_of(method, "midtrain"),
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
        dtype="bfloat16",  # release, whose parameters and Adam moments are float32 too
        activation_checkpointing="blocks",  # ours: a row of 16,384 tokens in 80 GB
    )


def midtrain(method: str = "refine", seed: int = 0) -> TrainConfig:
    """Mid-training of `tiny-deltanet`: 163,840 tokens in half a minute on a laptop's CPU. Values without a source are ours."""
    data = DataConfig(  # max_tokens are enough for twenty runs, and are tokenised in seconds
        sequence_length=1024, recall={"number-1": 0.5}, max_tokens=4_000_000, validation_sequences=16
    )
    return TrainConfig(
        recipe="midtrain",
        model="tiny-deltanet",
        refine=refine_of(method, "midtrain"),
        data=data,
        steps=20,
        batch_size=8,
        mini_batch_size=8,
        micro_batch_size=8,
        lr=1e-4,  # docs/log.md; the paper's 1e-6 moves nothing within 20 updates
        weight_decay=0.01,  # table D.1
        eval_every=5,
        checkpoint_every=20,
        seed=seed,
    )
