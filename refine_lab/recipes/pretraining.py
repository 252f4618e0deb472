"""Recipes for pre-training: the curricula that trained the shipped models; all values are ours."""

from __future__ import annotations

from typing import NamedTuple

from refine_lab.config import DataConfig, TrainConfig


class Stage(NamedTuple):
    """A stage of a curriculum, as one table row."""

    steps: int
    length: int  # tokens a row
    rows: int
    recall: dict[str, float]  # fraction of recall documents by kind
    warmup: int = 20
    prose: float = 0.1  # fraction of the plain rows
    window: int | None = None  # tokens that LaCT's attention sees; a chunk of its fast weights is as long, from 8 to 64


def pretrain(model: str, prose: str | None = None) -> list[TrainConfig]:
    """The curriculum that made `tiny-deltanet`, stage by stage; all values are ours (docs/log.md explains them).

    `model` is `new:FOLDER`, a configuration and tokenizer; every stage continues from the previous one. `prose` is a
    folder of .txt files that make up roughly a tenth of the plain rows, beside the Python corpus.
    """
    stages = [
        Stage(500, 128, 32, {"pairs": 0.5, "number-1": 0.1}, warmup=50, prose=0.15),
        Stage(
            1200, 256, 16, {"pairs": 0.05, "word-1": 0.1, "word-4": 0.15, "number-1": 0.12, "number-2": 0.08}, 50, 0.15
        ),
        Stage(354, 512, 8, {"word-1": 0.06, "word-4": 0.1, "number-1": 0.1, "number-2": 0.06}, warmup=50, prose=0.05),
        Stage(120, 32, 128, {"pairs": 0.5}),  # few pairs at a time: here recall is learned
        Stage(400, 128, 32, {"pairs": 0.15, "word-1": 0.2, "word-4": 0.15, "number-1": 0.2}),
        Stage(600, 256, 16, {"pairs": 0.03, "word-1": 0.1, "word-4": 0.12, "number-1": 0.15, "number-2": 0.05}),
        Stage(500, 512, 8, {"word-1": 0.07, "word-4": 0.1, "number-1": 0.12, "number-2": 0.04}),
        Stage(1500, 1024, 4, {"word-1": 0.08, "word-4": 0.1, "number-1": 0.16, "number-2": 0.04}, prose=0.05),
    ]
    return _curriculum("pretrain", stages, model, prose, threads=2)


def pretrain_lact(model: str, prose: str | None = None) -> list[TrainConfig]:
    """The curriculum that made `tiny-lact`; all values are ours. `model` and `prose` are as for `pretrain`.

    Attention sees only two tokens at first and more later, so that the fast weights learn to bind a value to its key
    before attention can do so instead (docs/log.md describes the search). The total number of tokens is that of
    `pretrain`.
    """
    words = {"word-1": 0.05, "word-2": 0.1, "word-4": 0.15}
    recall_at_128 = {"pairs-number": 0.25, "word-1-d64": 0.1, **words, "number-1": 0.1}
    recall_at_256 = {"pairs-number": 0.05, "word-1": 0.1, "word-4": 0.2, "number-1": 0.15, "number-2": 0.05}
    stages = [
        Stage(500, 32, 32, {"pairs": 1.0}, warmup=30, prose=0.0, window=2),  # here facts are bound
        Stage(150, 32, 32, {"pairs": 1.0}, prose=0.0, window=8),
        Stage(200, 64, 32, {"pairs": 0.5, "word-1": 0.25, "number-1": 0.05}, window=16),
        Stage(160, 64, 32, {"pairs": 0.15, "pairs-is": 0.45, "word-1": 0.3}, window=16),
        Stage(160, 64, 32, {"pairs": 0.1, "pairs-is": 0.05, "pairs-word": 0.5, "word-2": 0.2}, window=16),
        Stage(200, 128, 24, {"pairs-word": 0.15, "word-1": 0.1, "word-2": 0.15, "word-4": 0.15}, window=32),
        Stage(250, 256, 16, {"pairs-word": 0.05, "word-1": 0.15, "word-4": 0.15, "number-1": 0.1}, window=64),
        Stage(300, 128, 32, recall_at_128, window=64),
        Stage(1000, 256, 16, recall_at_256, window=64),
        Stage(1000, 512, 8, {"word-1": 0.08, "word-4": 0.15, "number-1": 0.12, "number-2": 0.05}, window=64),
        Stage(2050, 1024, 4, {"word-1": 0.08, "word-4": 0.14}, prose=0.05, window=128),
    ]
    # from the weights of seed 1, of three tried, nothing was bound within 700 steps
    return _curriculum("pretrain_lact", stages, model, prose, threads=1, first_seed=2)


def _curriculum(
    name: str, stages: list[Stage], model: str, prose: str | None, *, threads: int, first_seed: int = 1
) -> list[TrainConfig]:
    """Returns a run for every stage, each with its own seed; the learning rate decays in the last one."""
    return [
        TrainConfig(
            recipe=f"{name}-{number}",
            model=model,
            model_settings={"window_size": size, "lact_chunk_size": min(max(8, size), 64)}
            if (size := stage.window)
            else {},
            refine=None,
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
