"""A sample document: a short text in whole sentences with planted facts, and a question about one of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from refine_lab.data.recall import WORD_FACT, WORD_QUESTION

TEXT = Path(__file__).with_name("sample.txt")
"""The text: the handbook of an invented harbour, written for this project, whose paragraphs are followed by `FACTS`."""
FACTS = {
    "path": "kernel",
    "image": "file",
    "line": "graph",
    "hand": "width",
    "user": "block",
    "code": "child",
    "size": "token",
    "node": "point",
}
"""Key and value of each fact, in order. The keys are among those that no recall document of training uses."""
ANSWERED, ASKED = "image", "hand"
"""Keys of the question that stands with its answer before the last paragraph, and of the question after the document."""


class Sample(NamedTuple):
    """A text, a question about it, and the answer in the text."""

    document: str
    question: str
    answer: str


def sample_document() -> Sample:
    """Returns a text of ten paragraphs and eight facts, with a question about one fact.

    Facts and questions are worded as in recall documents (`data.recall`). The text is the same in every installation,
    and nothing in it is drawn at random. It has about 1,600 tokens for the included models.
    """
    paragraphs = TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    after = [WORD_FACT.format(key=key, value=f" {value}") for key, value in FACTS.items()]
    after += [f"{WORD_QUESTION.format(key=ANSWERED)} {FACTS[ANSWERED]}.", ""]
    document = "\n\n".join(f"{text}\n{line}".strip() for text, line in zip(paragraphs, after, strict=True))
    return Sample(document, "\n" + WORD_QUESTION.format(key=ASKED), f" {FACTS[ASKED]}")
