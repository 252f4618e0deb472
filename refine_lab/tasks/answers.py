"""Answers to the examples of a task: written greedily, scored, kept in files that a resumed run goes on from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.decoding import greedy_tokens
from refine_lab.models.base import FastWeightLM
from refine_lab.run_files import parquet_parts, write_parquet
from refine_lab.tasks.prompts import Example, end_of_text
from refine_lab.tasks.rules import AnswerRule
from refine_lab.tasks.scores import exact_match, f1, recall

COLUMNS = {
    "name": pa.string(),
    "way": pa.string(),
    "seed": pa.int64(),
    "prompt_tokens": pa.int32(),
    "cut": pa.int32(),
    "question": pa.string(),
    "references": pa.list_(pa.string()),
    "answer": pa.string(),
    "exact_match": pa.float32(),
    "recall": pa.float32(),
    "f1": pa.float32(),
    "seconds": pa.float64(),
}
"""Of a row, an example each; others may follow."""


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


class AnswerLog:
    """The answers of one way and seed in a folder of closed parquet files, `<first>-<last>.parquet` by row, from 0.

    A file is written whole under a temporary name and renamed, so that nobody reads half a one. A damaged file is passed
    over with a warning: what it held counts as unanswered, and other files keep theirs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def done(self) -> frozenset[str]:
        """The names of the examples that have an answer."""
        return frozenset(name for table in self._tables(["name"]) for name in table["name"].to_pylist())

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, as one file; each with the columns `COLUMNS`, and any others.

        Raises ValueError where a row lacks a column, or holds what is not of its type.
        """
        if not rows:
            return
        for row in rows:
            if missing := [name for name in COLUMNS if name not in row]:
                raise ValueError(f"an answer must have the columns {', '.join(COLUMNS)}; {missing[0]!r} is missing")
        others = [name for name in rows[0] if name not in COLUMNS]
        try:
            fixed = [pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()]
            free = [pa.array([row.get(name) for row in rows]) for name in others]
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"an answer holds a value of another type than its column: {error}") from None
        first = self._next()
        write_parquet(
            self.folder / f"{first}-{first + len(rows) - 1}.parquet",
            pa.table([*fixed, *free], names=[*COLUMNS, *others]),
        )

    def read(self) -> pd.DataFrame:
        """A row an answer, in the order written; where an example was answered again, the last."""
        tables = list(self._tables())
        if not tables:
            return pa.table({name: pa.array([], kind) for name, kind in COLUMNS.items()}).to_pandas()
        rows = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        return rows.drop_duplicates("name", keep="last").reset_index(drop=True)

    def cut(self, count: int) -> None:
        """Keep the first `count` rows written: for a run that goes on from an earlier checkpoint."""
        for first, last, path in parquet_parts(self.folder):
            if last < count:
                continue
            if first < count and (table := _table(path)) is not None:
                write_parquet(self.folder / f"{first}-{count - 1}.parquet", table.slice(0, count - first))
            path.unlink()

    @property
    def rows(self) -> int:
        """Rows written so far, the number to give `cut` later."""
        return self._next()

    def _next(self) -> int:
        return max((last for _, last, _ in parquet_parts(self.folder)), default=-1) + 1

    def _tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        tables = (_table(path, columns) for _, _, path in parquet_parts(self.folder))
        return (table for table in tables if table is not None)


def _table(path: Path, columns: list[str] | None = None) -> pa.Table | None:
    """What a file holds; None, with a warning, where it is damaged."""
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        warnings.warn(f"{path} is damaged, its answers count as not given: {error}", stacklevel=2)
        return None
