"""What the tests of ttt runs and others share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from refine_lab.config import RefineConfig
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.models.hub import SHIPPED
from refine_lab.runs.run import Run
from refine_lab.training.adaptation import TTTConfig
from refine_lab.training.inputs import inputs_of, resume_or_create
from refine_lab.ttt_config import TTTRunConfig
from tests.factories.step import VOCABULARY, make_policy

METHOD = RefineConfig(num_chunks=4, rollout_length=3, margin=4, reward="binary", nsp_coef=0.4)


RULE = AnswerRule(max_tokens=3)


TTT = TTTConfig(refine=METHOD, steps=2, lr=1e-3)


@cache
def model():
    """A tiny policy of random weights, and a tokenizer that knows its tokens and more."""
    return make_policy(torch.float32).eval(), AutoTokenizer.from_pretrained(SHIPPED / "tiny-deltanet")


def examples(count: int = 5, length: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, VOCABULARY, (length + i,), generator=generator).tolist() for i in range(count)]
    return [
        Example(
            name=f"made-{i}",
            prompt_ids=tuple(row),
            question_start=length - 9,
            answer_ids=(),
            answers=("word",),
            question="what?",
            documents=(),
        )
        for i, row in enumerate(rows)
    ]


def config_of(reset: str = "prompt", **changes: Any) -> TTTRunConfig:
    sizes = {} if reset == "prompt" else {"batch_size": 2, "mini_batch_size": 1, "ttt": replace(TTT, steps=1)}
    given: dict[str, Any] = {"recipe": "test", "ttt": TTT, "reset": reset, **sizes, **changes}
    base = TTTRunConfig(**given)
    return replace(base, task=replace(base.task, answer_tokens=3))


def made(folder: Path, config: TTTRunConfig, chosen: list[Example] | None = None) -> Run:
    chosen = examples() if chosen is None else chosen
    (run,) = resume_or_create([config], folder, inputs_of(config.model, chosen))
    return run
