"""Defines a benchmark: how its samples are generated and scored, and what its result contains."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_lab.data.corpus import Manifest


class Missing(ValueError):
    """Raised for a task that cannot run; the sentence names what is missing and where to get it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the samples of a task depend on."""

    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    limit: int | None = None
    "Number of samples (the first ones); none: the number used in the paper."
    length: int | None = None
    "Length (prompt plus answer, in tokens), for tasks that have no fixed length."
    data: Path | None = None
    "Folder that contains the files of the benchmarks, at any depth."
    essays: Path | None = None
    "File or folder with Paul Graham's essays, for RULER's haystacks."
    books: Path | None = None
    "Folder of .txt files."
    over_limit: str = "cut_middle"
    "Whether the middle of a prompt that is too long is cut out (cut_middle), or the sample is dropped (drop)."
    paper_rows: bool = False
    "Whether the last incomplete batch of eight samples of a LongBench task is dropped, as in the paper."
    key_model: str | None = None
    "Model that selects the key tokens of LongPPL; none: the evaluated model itself."
    manifest: Manifest | None = None
    "Files of the Python corpus, whose validation split the model was not trained on."


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric with its standard error over samples, which is none for a single sample."""

    value: float
    stderr: float | None
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of one task at one length."""

    metrics: Mapping[str, Metric]
    count: int
    "Number of samples."
    items: int
    "Number of distinct samples; a question that is asked twice counts once."
    facts: Mapping[str, Any] = field(default_factory=dict)
    "Where the samples come from, and how many were cut or left out."
    rows: Sequence[Mapping[str, Any]] = ()
    "One row per sample: its name, prompt, answer, references and metrics."


MeasureFunction = Callable[[Any, Setting], Measured]
"""Evaluates a `RefineLM`. Raises `Missing` if the task cannot run."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task that can be chosen by name."""

    name: str
    group: str
    "Where the task comes from: ruler, longbench, books, short or own."
    main: str
    "Name of the metric that tables show."
    measure: MeasureFunction
    by_length: bool = False
    "Whether the samples are generated at a given length."
    about: str = ""
    "A sentence about the task."


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Seeds the global `random`, from which the harness draws, by `key`, and restores its state afterwards."""
    state = random.getstate()
    random.seed(" ".join(map(str, key)))
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the error of a block that reads a damaged or unsuitable file into `Missing`, which names the file."""
    try:
        yield
    except Missing:
        raise
    except KeyError as error:
        raise Missing(f"{str(path)!r} has no column {error}") from error
    except (OSError, ValueError, TypeError) as error:
        sentence = str(error).strip().partition("\n")[0]
        raise Missing(f"{str(path)!r} cannot be read: {sentence}") from error


def find_file(setting: Setting, patterns: Sequence[str], where: str) -> Path:
    """Returns the first file below the data folder whose path matches one of `patterns`.

    Raises `Missing` if there is none; `where` is where to get it.
    """
    names = " or ".join(patterns)
    if setting.data is None:
        raise Missing(f"{names} not found, since no data folder is set: pass one with --data; {where}")
    for pattern in patterns:
        if found := sorted(path for path in setting.data.rglob(pattern) if path.exists()):
            return found[0]
    raise Missing(f"the folder {str(setting.data)!r} contains no file matching {names}; {where}")
