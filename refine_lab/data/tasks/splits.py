"""Checks whether splits share a question or a document, and counts duplicates within each split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from refine_lab.data.tasks.prompts import Example

QUOTED = 3
"""Maximum number of shared texts that a report quotes, and of characters of each."""
QUOTED_CHARACTERS = 80


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
    """The distinct texts that two splits share, as they appear in the first; `str(shared)` is a clause."""

    first: str
    second: str
    questions: tuple[str, ...]
    documents: tuple[str, ...]

    def __str__(self) -> str:
        kinds = [(noun, texts) for noun, texts in (("question", self.questions), ("document", self.documents)) if texts]
        counts = " and ".join(_many(len(texts), noun) for noun, texts in kinds)
        quotes = ", ".join(quoted(texts) for _, texts in kinds)
        return f"{self.first} and {self.second} share {counts}, among them {quotes}"


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Counts of one split; `str(counts)` lists them."""

    examples: int
    questions: int
    "Number of examples in which a question is found."
    different_questions: int
    documents: int
    "Number of documents of all prompts."
    different_documents: int
    cut: int
    "Number of prompts whose middle was cut out."

    def __str__(self) -> str:
        parts = [_many(self.examples, "example")]
        questions = ("question", self.questions, self.different_questions)
        documents = ("document", self.documents, self.different_documents)
        for noun, count, different in (questions, documents):
            if count:
                parts.append(_many(count, noun) + (f" ({different} distinct)" if different != count else ""))
        if self.cut:
            parts.append(f"{self.cut} cut in the middle")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What the splits of a task contain and share; `str(report)` is a paragraph."""

    splits: Mapping[str, SplitCounts]
    shared: tuple[Shared, ...]
    "The pairs of splits that share a text."
    dropped: int
    "Number of prompts left out because they are too long."
    notes: tuple[str, ...] = ()
    "Sentences specific to the source."

    def __str__(self) -> str:
        sentences = [f"{name}: {counts}." for name, counts in self.splits.items() if counts.examples]
        compared = len(sentences) > 1
        if self.dropped:
            sentences.append(f"{_many(self.dropped, 'prompt')} over the limit left out.")
        sentences += self.notes
        if self.shared:
            sentences.append(f"{'; '.join(map(str, self.shared))}.")
        elif compared:
            sentences.append("No question and no document is shared between splits.")
        return " ".join(sentences)


def report(splits: Mapping[str, Sequence[Example]], dropped: int = 0, notes: tuple[str, ...] = ()) -> SplitReport:
    """Compares every two splits by the words of their questions and documents, ignoring case, punctuation and spacing."""
    counts, texts = {}, {}
    for name, examples in splits.items():
        questions = [e.question for e in examples if e.question.strip()]
        documents = [document for e in examples for document in e.documents if document.strip()]
        texts[name] = (_distinct(questions), _distinct(documents))
        counts[name] = SplitCounts(
            examples=len(examples),
            questions=len(questions),
            different_questions=len(texts[name][0]),
            documents=len(documents),
            different_documents=len(texts[name][1]),
            cut=sum(e.cut > 0 for e in examples),
        )
    shared = []
    for first, second in combinations(texts, 2):
        pairs = zip(texts[first], texts[second], strict=True)
        questions, documents = (tuple(one[key] for key in one if key in other) for one, other in pairs)
        if questions or documents:
            shared.append(Shared(first=first, second=second, questions=questions, documents=documents))
    return SplitReport(splits=counts, shared=tuple(shared), dropped=dropped, notes=notes)


def _distinct(texts: Sequence[str]) -> dict[str, str]:
    """Returns normalised text -> the first text that has it."""
    plain = {text: normalised(text) for text in set(texts)}
    return {plain[text]: text for text in reversed(texts)}


def normalised(text: str) -> str:
    """Returns the words of a text in lower case, separated by single spaces; a text without words is kept."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def quoted(texts: Sequence[str]) -> str:
    """Returns the first `QUOTED` texts, shortened and quoted."""
    lines = (" ".join(text.split()) for text in texts[:QUOTED])
    longest = QUOTED_CHARACTERS
    return ", ".join(repr(line if len(line) <= longest else f"{line[: longest - 3]}...") for line in lines)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
