"""Checks whether splits share a question or a document, and counts duplicates within each split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from refine_lab.data.tasks.prompts import Example

SHOWN = 3
"""Maximum number of shared texts that a report quotes, and of characters of each."""
SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The examples of a source by split, before any check."""

    examples: Mapping[str, list[Example]]
    "`train`, `validation` and `test`."
    dropped: int = 0
    "Number of prompts left out because they are too long."
    trained: int = 0
    "Number of prompts left out because the answering model was trained on them."
    notes: tuple[str, ...] = ()
    "Sentences specific to the source."


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The distinct texts that two splits share, as they appear in the first."""

    first: str
    second: str
    questions: tuple[str, ...]
    documents: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.questions or self.documents)


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Counts of one split."""

    examples: int
    questions: int
    "Number of examples in which a question is found."
    different_questions: int
    documents: int
    "Number of documents of all prompts."
    different_documents: int
    cut: int
    "Number of prompts whose middle was cut out."


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the splits of a task contain and share; `str(report)` is a paragraph."""

    splits: Mapping[str, SplitCounts]
    shared: tuple[Shared, ...]
    dropped: int
    "Number of prompts left out because they are too long."
    notes: tuple[str, ...] = ()
    "Sentences specific to the source."

    @property
    def shared_questions(self) -> int:
        return sum(len(pair.questions) for pair in self.shared)

    @property
    def shared_documents(self) -> int:
        return sum(len(pair.documents) for pair in self.shared)

    @property
    def told(self) -> str:
        """Returns a description of what is shared; empty if nothing is."""
        return "; ".join(_told(pair) for pair in self.shared if pair)

    def __str__(self) -> str:
        sentences = [_counted(name, counts) for name, counts in self.splits.items() if counts.examples]
        if self.dropped:
            sentences.append(f"{_many(self.dropped, 'prompt')} over the limit left out.")
        sentences += self.notes
        if self.told:
            sentences.append(f"{self.told}.")
        if not any(self.shared) and sum(c.examples > 0 for c in self.splits.values()) > 1:
            sentences.append("No question and no document is shared between splits.")
        return " ".join(sentences)


def report(splits: Mapping[str, Sequence[Example]], dropped: int = 0, notes: tuple[str, ...] = ()) -> Report:
    """Compares every two splits by the words of their questions and documents, ignoring case, punctuation and spacing."""
    texts = {name: _Texts(examples) for name, examples in splits.items()}
    return Report(
        splits={name: found.counts for name, found in texts.items()},
        shared=tuple(_shared(first, second, texts) for first, second in combinations(texts, 2)),
        dropped=dropped,
        notes=notes,
    )


def normalised(text: str) -> str:
    """Returns the words of a text in lower case, separated by single spaces; a text without words is kept."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


class _Texts:
    """The distinct questions and documents of a split: normalised text -> the text."""

    def __init__(self, examples: Sequence[Example]) -> None:
        questions = [e.question for e in examples if e.question.strip()]
        documents = [document for e in examples for document in e.documents if document.strip()]
        plain = {text: normalised(text) for text in {*questions, *documents}}
        self.questions = {plain[text]: text for text in reversed(questions)}
        self.documents = {plain[text]: text for text in reversed(documents)}
        self.counts = SplitCounts(
            examples=len(examples),
            questions=len(questions),
            different_questions=len(self.questions),
            documents=len(documents),
            different_documents=len(self.documents),
            cut=sum(e.cut > 0 for e in examples),
        )


def _shared(first: str, second: str, texts: Mapping[str, _Texts]) -> Shared:
    one, other = texts[first], texts[second]
    return Shared(
        first=first,
        second=second,
        questions=tuple(text for key, text in one.questions.items() if key in other.questions),
        documents=tuple(text for key, text in one.documents.items() if key in other.documents),
    )


def _counted(name: str, counts: SplitCounts) -> str:
    parts = [_many(counts.examples, "example")]
    for noun, number, different in (
        ("question", counts.questions, counts.different_questions),
        ("document", counts.documents, counts.different_documents),
    ):
        if number:
            repeats = "" if different == number else f" ({different} different)"
            parts.append(f"{_many(number, noun)}{repeats}")
    if counts.cut:
        parts.append(f"{counts.cut} cut in the middle")
    return f"{name}: {', '.join(parts)}."


def _told(pair: Shared) -> str:
    kinds = [
        (_many(len(texts), noun), texts)
        for noun, texts in (("question", pair.questions), ("document", pair.documents))
        if texts
    ]
    among = ", ".join(quoted(texts) for _, texts in kinds)
    return f"{pair.first} and {pair.second} share {' and '.join(words for words, _ in kinds)}, among them {among}"


def quoted(texts: Sequence[str]) -> str:
    """Returns the first `SHOWN` texts, shortened and quoted."""
    return ", ".join(repr(_shortened(text)) for text in texts[:SHOWN])


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."
