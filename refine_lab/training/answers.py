"""Answers to the examples of a task: decoded greedily, and scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.data.tasks.prompts import Example, end_of_text
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tasks.scores import exact_match, f1, recall
from refine_lab.models.base import FastWeightLM
from refine_lab.models.decoding import greedy_tokens


@torch.no_grad()
def answer(
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rule: AnswerRule,
    micro_batch_size: int = 8,
) -> list[str]:
    """The answer to each prompt: the most probable tokens, one by one, until the end of the text or as `rule` ends them.

    Of what is generated, `rule` takes a part for the answer. Prompts are read once, `micro_batch_size` of about equal length
    at a time; what stands beside a prompt changes nothing.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    written: dict[int, str] = {}
    for start in range(0, len(order), micro_batch_size):
        rows = order[start : start + micro_batch_size]
        texts = answers_to(policy, tokenizer, [examples[i].prompt_ids for i in rows], rule)
        written |= dict(zip(rows, texts, strict=True))
    return [written[i] for i in range(len(examples))]


@torch.no_grad()
def answers_to(
    policy: FastWeightLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], rule: AnswerRule
) -> list[str]:
    """As `answer`, of prompts given as tokens, all at once."""
    end = end_of_text(tokenizer)
    written: list[list[int]] = [[] for _ in prompts]
    texts: dict[int, str] = {}
    empty = [0] * len(prompts)  # tokens before the answer begins
    for chosen in greedy_tokens(policy, prompts):
        for row, token in enumerate(chosen[:, 0].tolist()):
            if row in texts:
                continue
            if token != end:
                written[row].append(token)
            text = str(tokenizer.decode(written[row], skip_special_tokens=True))
            if rule.empty(text):
                empty[row] = len(written[row])
            if token == end or rule.ended(text) or rule.full(len(written[row]), empty[row]):
                texts[row] = rule.cut(text)
        if len(texts) == len(prompts):
            break
    return [texts[row] for row in range(len(prompts))]


def answer_row(example: Example, answer: str, *, way: str, seed: int, seconds: float) -> dict[str, Any]:
    """A row of an `AnswerLog`: the example, what was answered, and its scores."""
    return {
        "name": example.name,
        "way": way,
        "seed": seed,
        "prompt_tokens": len(example.prompt_ids),
        "cut": example.cut,
        "question": example.question,
        "references": list(example.answers),
        "answer": answer,
        "exact_match": exact_match(answer, example.answers),
        "recall": recall(answer, example.answers),
        "f1": f1(answer, example.answers),
        "seconds": seconds,
    }


def side_by_side(answers: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """`count` examples with the answers of every way's first seed; those first in which the ways differ.

    `answers` has the columns of `COLUMNS`; the result `question`, `references` and a column a way, in the order they come.
    """
    first = answers.groupby("way")["seed"].transform("min")
    chosen = answers[answers["seed"] == first]
    facts = chosen.drop_duplicates("name").set_index("name")
    table = chosen.pivot(index="name", columns="way", values="answer").reindex(facts.index).dropna()
    table = table[list(dict.fromkeys(chosen["way"]))]
    differ = table.nunique(axis=1).gt(1)
    order = [*table.index[differ], *table.index[~differ]][:count]
    asked = facts.loc[order, ["question", "references"]].assign(
        references=facts.loc[order, "references"].map(" | ".join)
    )
    return asked.join(table.loc[order]).reset_index(drop=True)
