"""Records which questions a model was post-trained on, so that a test does not ask them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.tasks.prompts import Example, prompts_digest
from refine_lab.data.tasks.splits import normalised
from refine_lab.validation import path_of


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one post-training run was trained on."""

    run: str
    "The run's name."
    task: TaskConfig
    data: DataConfig
    "The text in which its recall documents were made."
    prompts_digest: str | None
    "Digest of the examples of all splits (`tasks.prompts.prompts_digest`); none if it was not recorded."
    source_digest: str | None
    "Digest of the source file's bytes; none without a file."
    rows: frozenset[str]
    "`row_key` of every training example."

    def same_source(self, source: str) -> bool:
        """Returns whether the run's test prompts come from `source`: the same name, or a `ruler:FILE` of equal content."""
        if self.task.test_source is not None or source == self.task.source:
            return source == (self.task.test_source or self.task.source)
        other = replace(self.task, source=source)
        return self.task.form == other.form == "ruler" and source_digest(other) == self.source_digest is not None

    def same_splits(self, task: TaskConfig) -> bool:
        """Returns whether `task` has this run's examples and differs at most in how answers are written."""
        free = {name: getattr(self.task, name) for name in (*FREE_FIELDS, "source")}
        return replace(task, **free) == self.task and (task.source == self.task.source or self.same_source(task.source))


ANSWER_FIELDS = ("answer_tokens", "lines", "strip_leading")
"""Fields of `TaskConfig` that define how an answer is written."""
FREE_FIELDS = (*ANSWER_FIELDS, "shared")
"""Fields of `TaskConfig` that affect neither examples nor splits."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The post-training runs behind a model, from its last run back to the initial model."""

    trained: tuple[Trained, ...] = ()
    "The runs, most recent first."
    unknown: tuple[str, ...] = ()
    "Reasons, one clause each, why the list may be incomplete."

    def holds(self, example: Example) -> bool:
        """Returns whether an example was trained on, by its question, or by its whole prompt if no question is found."""
        return any(row_key(example) in each.rows for each in self.trained)

    def holds_question(self, question: str) -> bool:
        """Returns whether an example with this question was trained on."""
        return any(text_key(question) in each.rows for each in self.trained)

    @property
    def names(self) -> str:
        """Returns the runs as the subject of a sentence about a model."""
        return "the model of " + " after ".join(each.run for each in self.trained)

    def notes(self, task: TaskConfig, examples: Sequence[Example]) -> Iterator[str]:
        """Yields sentences on what is unknown when a model with this history answers `task`, whose examples are `examples`."""
        run = next((each for each in self.trained if each.same_splits(task)), None)
        if run is not None and run.prompts_digest not in (None, prompts_digest(examples)):
            yield f"The prompts have changed since {run.run} was trained on them: these are not its test prompts."
        if self.unknown and task.test_form != "recall":
            yield f"It is not known whether the model was trained on any of these prompts: {'; '.join(self.unknown)}."

    def matches(self, other: History) -> bool:
        """Returns whether both were trained on the same examples, by runs with the same tasks."""

        facts = attrgetter("task", "data", "prompts_digest", "rows")
        return [*map(facts, self.trained)] == [*map(facts, other.trained)]


UNTRAINED = History()
"""History of a model without known post-training runs."""


def row_key(example: Example) -> str:
    """Returns a digest of an example's question, or of its prompt without one, ignoring case, punctuation and spacing."""
    return text_key(example.question if example.question.strip() else "\n".join(example.documents))


def text_key(text: str) -> str:
    return hashlib.sha256(normalised(text).encode()).hexdigest()[:24]


def source_digest(task: TaskConfig) -> str | None:
    """Returns a digest of the bytes of the task's file; None without a file."""
    path = path_of("TaskConfig.source", task.source.removeprefix("ruler:"))
    if task.form == "recall" or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
