"""A task: examples to train on, to validate and to test with, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.corpus import Manifest
from refine_lab.tasks.files import file_splits
from refine_lab.tasks.prompts import Example
from refine_lab.tasks.recall import recall_splits
from refine_lab.tasks.ruler_qa import ruler_splits
from refine_lab.tasks.splits import Report, report

__all__ = ["Example", "Task", "load_task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The examples of a task; the same for every run with its configuration and tokenizer."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    report: Report
    "What the splits hold and share."

    @property
    def examples(self) -> tuple[Example, ...]:
        """Of all splits."""
        return (*self.train, *self.validation, *self.test)


def load_task(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase, data: DataConfig, manifest: Manifest | None = None
) -> Task:
    """The examples that `config` asks for; recall documents are made in the text of `data`.

    Raises FileNotFoundError or ValueError, in one sentence, for a source that is not there or is none, for fewer examples
    than asked for, for a prompt over the limit where that is refused, and where two splits share a question or a document
    and `shared` is `refuse`.
    """
    splits, dropped, notes = _splits(config, tokenizer, data, manifest)
    found = report(splits, dropped, notes)
    if config.shared == "refuse" and any(found.shared):
        raise ValueError(f"{config.source!r}: {found.told}; only TaskConfig.shared 'allow' accepts that")
    return Task(
        train=tuple(splits["train"]), validation=tuple(splits["validation"]), test=tuple(splits["test"]), report=found
    )


def _splits(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase, data: DataConfig, manifest: Manifest | None
) -> tuple[dict[str, list[Example]], int, tuple[str, ...]]:
    """The examples of each split, how many prompts were left out for their length, and what else is to be told."""
    form, _, rest = config.source.partition(":")
    if form == "recall":
        return recall_splits(rest, config, tokenizer, data, manifest), 0, ()
    if form == "ruler":
        return ruler_splits(Path(rest).expanduser(), config, tokenizer)
    splits, dropped = file_splits(config, tokenizer)
    return splits, dropped, ()
