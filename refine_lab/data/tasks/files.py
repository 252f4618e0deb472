"""Prompts and answers from a .parquet or .jsonl file, such as the paper's own files, read unchanged."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.files import existing_file, json_lines, parquet_rows
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import Example, encode, within_limit
from refine_lab.data.tasks.splits import Splits
from refine_lab.data.tasks.trained import UNTRAINED, History
from refine_lab.text import quote, refuse_surrogates
from refine_lab.validation import ConfigError, path_of, require

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
    path = path_of("TaskConfig.source", config.source)
    allowed = "'recall:KIND', 'ruler:FILE', or a .parquet or .jsonl file"
    require(path.suffix in (".parquet", ".jsonl"), "TaskConfig.source", config.source, allowed)
    existing_file(path, f"there is no file {str(path)!r} (TaskConfig.source or test_source)")
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
    if bare := next((each for each in (*splits["train"], *splits["validation"]) if not each.answers), None):
        column = config.answer_column or ANSWERS
        raise ValueError(f"{bare.name!r} has no answer in column {column!r}; answers may be missing only in a test set")
    return Splits(examples=splits, dropped=dropped, trained=trained)


def _rows(path: Path, config: TaskConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields name, prompt and answers of each row."""
    column = config.answer_column or ANSWERS
    for number, row in enumerate(_read(path, config)):
        prompt = row.get(config.prompt_column)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"column {config.prompt_column!r} of {str(path)!r} must contain prompts as strings, but row {number + 1} holds "
                f"{quote(prompt)}"
            )
        answers = _answers(row.get(column), path, number, column)
        for name, text in ((config.prompt_column, prompt), *((column, answer) for answer in answers)):
            refuse_surrogates(text, f"column {name!r} of row {number + 1} of {str(path)!r}")
        yield f"{path.stem}-{number}", prompt, answers


def _answers(value: Any, path: Path, number: int, column: str) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"column {column!r} of {str(path)!r} must contain an answer or a list of answers as strings, but "
            f"row {number + 1} contains {quote(value)}"
        )
    return tuple(text for text in texts if text.strip())


def _columns(place: str, names: list[str], config: TaskConfig) -> list[str]:
    """Returns the columns to read of those that exist.

    Raises ConfigError if the prompt column is missing, or the answer column where it is needed or possibly misspelt.
    """
    needed = config.answer_column is not None or config.train + config.validation > 0
    columns = {"prompt_column": config.prompt_column, "answer_column": config.answer_column or ANSWERS}
    for field, column in columns.items():
        near = difflib.get_close_matches(column, names, n=1)
        if column not in names and (near or needed or field == "prompt_column"):
            listed = ", ".join(map(repr, names))
            hint = f"; did you mean {near[0]!r}?" if near else f": it has {listed}"
            sentence = f"{place} has no column {column!r} (TaskConfig.{field}){hint}"
            raise ConfigError(f"TaskConfig.{field}", column, listed, sentence)
    return [column for column in columns.values() if column in names]


def _read(path: Path, config: TaskConfig) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        yield from parquet_rows(path, lambda names: _columns(repr(str(path)), names, config))
        return
    for number, row in json_lines(path):
        place = f"line {number} of {str(path)!r}"
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object but {type(row).__name__}")
        _columns(place, list(row), config)
        yield row
