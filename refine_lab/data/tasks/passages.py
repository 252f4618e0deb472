"""Parses prompts in the format of RULER and LongBench into passages and question."""

from __future__ import annotations

import re

from refine_lab.data.tasks.prompts import TextPrompt

PASSAGE = re.compile(r"^(?:Document|Passage) \d+:[ \t]*\n?", re.MULTILINE)
"""Heading of each passage."""
QUESTION = re.compile(r"^Question:", re.MULTILINE)
"""The last match marks the start of the question."""
ANSWER = re.compile(r"\s*Answer:\s*$")
"""The end of a prompt, which is not part of its question."""


def parse(name: str, text: str, answers: tuple[str, ...]) -> TextPrompt:
    """Returns the prompt with its passages and its question separated.

    Without `Document N:` or `Passage N:`, all text before the question is one document; without `Question:` there is no
    question.
    """
    start = max((match.start() for match in QUESTION.finditer(text)), default=len(text))
    question, documents = ANSWER.sub("", text[start:].removeprefix("Question:")).strip(), _documents(text[:start])
    return TextPrompt(
        name=name, text=text, question_start=start, answers=answers, question=question, documents=documents
    )


def _documents(text: str) -> tuple[str, ...]:
    """Returns the passages, without the instruction before the first one and its repetition after the last."""
    marks = list(PASSAGE.finditer(text))
    if not marks:
        return (text.strip(),)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    passages = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    body, _, last = passages[-1].rpartition("\n\n")
    if last in text[: marks[0].start()]:
        passages[-1] = body.strip()
    return tuple(passages)
