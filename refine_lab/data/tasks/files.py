"""Prompts and answers from a .parquet or .jsonl file, such as the paper's own files, read unchanged."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.files import json_lines, refuse_pointer
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import Example, encode, within_limit
from refine_lab.data.tasks.splits import Splits
from refine_lab.data.tasks.trained import UNTRAINED, History
from refine_lab.data.text import replace_surrogates
from refine_lab.validation import ConfigError

ANSWERS = "answer"
"""Default name of the answer column."""


def file_splits(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    skipped: History = UNTRAINED,
    add_bos: bool | None = None,
) -> Splits:
    """Splits a file's rows in order into test, validation and training, without rows that `skipped` was trained on.

    The first `test` rows are the test set, the next ones the validation set, and the rest are for training; if `test`
    is none, the test set is all rows except those that the other two need. Rows are named `<file>-<number>`, from 0.

    Raises FileNotFoundError or ValueError, in one sentence, for a missing or invalid file, a column that it lacks, a
    cell that does not hold text, too few rows, and an example without an answer outside the test set.
    """
    path = _existing(config)
    others, trained = config.train + config.validation, 0

    def untrained() -> Iterator[Example]:
        nonlocal trained
        for row in _rows(path, config):
            example = encode(parse(*row), tokenizer, add_bos)
            if skipped.holds(example):
                trained += 1
            else:
                yield example

    wanted = None if config.test is None else config.test + others
    taken, dropped = within_limit(untrained(), config, wanted)
    test = len(taken) - others if config.test is None else config.test
    if test < 0 or len(taken) < test + others:
        left_out = f" of at most {config.prompt_tokens} tokens" if dropped else ""
        left_out += f" that {skipped.names} was not trained on" if trained else ""
        raise ValueError(
            f"{str(path)!r} has {len(taken)} prompts{left_out}, too few for TaskConfig.train {config.train}, validation "
            f"{config.validation} and test {config.test}"
        )
    middle = test + config.validation
    splits = {"train": taken[middle:], "validation": taken[test:middle], "test": taken[:test]}
    for example in (*splits["train"], *splits["validation"]):
        if not example.answers:
            raise ValueError(
                f"{example.name!r} has no answer in column {config.answer_column or ANSWERS!r}; only a test set needs none"
            )
    return Splits(examples=splits, dropped=dropped, trained=trained)


def _existing(config: TaskConfig) -> Path:
    path = Path(config.source).expanduser()
    if path.suffix not in (".parquet", ".jsonl"):
        allowed = "'recall:KIND', 'ruler:FILE', or a .parquet or .jsonl file"
        raise ConfigError("TaskConfig.source", config.source, allowed)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} (TaskConfig.source or test_source)")
    return refuse_pointer(path)


def _rows(path: Path, config: TaskConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields name, prompt and answers of each row."""
    read = _parquet if path.suffix == ".parquet" else _jsonl
    column = config.answer_column or ANSWERS
    for number, row in enumerate(read(path, config)):
        name = f"{path.stem}-{number}"
        prompt = row.get(config.prompt_column)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"column {config.prompt_column!r} of {str(path)!r} must hold prompts as text, row {number + 1} holds {prompt!r}"
            )
        if prompt != (whole := replace_surrogates(prompt)):
            place = next(i for i, (one, other) in enumerate(zip(prompt, whole, strict=True)) if one != other)
            raise ValueError(
                f"column {config.prompt_column!r} of {name!r} holds half of a surrogate pair, which is no letter, at {place}"
            )
        yield name, prompt, _answers(row.get(column), path, number, column)


def _answers(value: Any, path: Path, number: int, column: str) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"column {column!r} of {str(path)!r} must hold an answer or a list of answers as text, row {number + 1} holds "
            f"{value!r}"
        )
    return tuple(text for text in texts if text.strip())


def _check_columns(where: str, names: list[str], config: TaskConfig) -> None:
    """Raises ValueError if the prompt column is missing, or the answer column where it is needed or possibly misspelt."""
    needed = config.answer_column is not None or config.train + config.validation > 0
    for field, column, wanted in (
        ("prompt_column", config.prompt_column, True),
        ("answer_column", config.answer_column or ANSWERS, needed),
    ):
        if column in names:
            continue
        near = difflib.get_close_matches(column, names, n=1)
        if wanted or near:
            hint = f"; did you mean {near[0]!r}?" if near else f": it has {', '.join(map(repr, names))}"
            sentence = f"{where} has no column {column!r} (TaskConfig.{field}){hint}"
            raise ConfigError(f"TaskConfig.{field}", column, ", ".join(map(repr, names)), sentence)


def _parquet(path: Path, config: TaskConfig) -> Iterator[Mapping[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        _check_columns(repr(str(path)), names, config)
        columns = [name for name in (config.prompt_column, config.answer_column or ANSWERS) if name in names]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no whole parquet file: {error}") from error


def _jsonl(path: Path, config: TaskConfig) -> Iterator[Mapping[str, Any]]:
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {str(path)!r} is no JSON object but {type(row).__name__}")
        _check_columns(f"line {number} of {str(path)!r}", list(row), config)
        yield row
