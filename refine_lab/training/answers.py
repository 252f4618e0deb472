"""Answers to the examples of a task: decodes greedily and scores them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tasks.scores import contains_answer, exact_match, f1
from refine_lab.data.tokenizer import end_of_text
from refine_lab.models.base import FastWeightLM
from refine_lab.models.decoding import greedy_tokens
from refine_lab.workers import ALONE, Workers


@torch.no_grad()
def answer(
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rule: AnswerRule,
    micro_batch_size: int = 8,
    workers: Workers = ALONE,
) -> list[str]:
    """Returns the answer to each prompt, decoded greedily until the end of the text or as `rule` ends it.

    `rule` extracts the answer from the generated text. Prompts are read once, in groups of `micro_batch_size` with
    similar lengths, which the `workers` divide among themselves; other prompts in a group do not affect a result.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    groups = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]

    def texts_of(rows: list[int]) -> list[str]:
        return answers_to(policy, tokenizer, [examples[i].prompt_ids for i in rows], rule)

    texts = workers.map(texts_of, groups)
    written = dict(zip(chain.from_iterable(groups), chain.from_iterable(texts), strict=True))
    return [written[i] for i in range(len(examples))]


@torch.no_grad()
def answers_to(
    policy: FastWeightLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], rule: AnswerRule
) -> list[str]:
    """Answers prompts given as tokens in one batch, as `answer`."""
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


def answer_row(example: Example, answer: str, *, method: str, seed: int, seconds: float) -> dict[str, Any]:
    """Returns a row of an `AnswerLog`: the example, the answer, and its scores."""
    return {
        "name": example.name,
        "method": method,
        "seed": seed,
        "prompt_tokens": len(example.prompt_ids),
        "cut": example.cut,
        "question": example.question,
        "references": list(example.answers),
        "answer": answer,
        "exact_match": exact_match(answer, example.answers),
        "contains_answer": contains_answer(answer, example.answers),
        "f1": f1(answer, example.answers),
        "seconds": seconds,
    }


def side_by_side(answers: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """Returns `count` examples with the answers of every method's first seed; examples with different answers come first.

    `answers` has the columns of `COLUMNS`; the result has `question`, `references` and one column per method, in order
    of appearance.
    """
    first = answers.groupby("method")["seed"].transform("min")
    chosen = answers[answers["seed"] == first]
    facts = chosen.drop_duplicates("name").set_index("name")
    table = chosen.pivot(index="name", columns="method", values="answer").reindex(facts.index).dropna()
    table = table[list(dict.fromkeys(chosen["method"]))]
    differ = table.nunique(axis=1).gt(1)
    order = [*table.index[differ], *table.index[~differ]][:count]
    references = facts["references"].map(" | ".join)
    return facts[["question"]].assign(references=references).join(table).loc[order].reset_index(drop=True)
