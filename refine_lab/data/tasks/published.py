"""Reads SQuAD v2.0 and HotpotQA as published, and divides them so that no two splits share a paragraph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from refine_lab.data.files import existing_file
from refine_lab.data.tasks.splits import normalised
from refine_lab.text import quote, refuse_surrogates

EXPECTED = "SQuAD v2.0 (dev-v2.0.json) or HotpotQA's distractor setting (hotpot_dev_distractor_v1.json), as published"


@dataclass(frozen=True, kw_only=True)
class Published:
    """The content of a published file. A unit is never divided: an article of SQuAD, or a question of HotpotQA."""

    path: Path
    kind: Literal["squad", "hotpotqa"]
    units: tuple[Any, ...]

    def texts(self, unit: Any) -> tuple[list[str], list[str]]:
        """Returns a unit's answerable questions, in order, and its paragraphs."""
        if self.kind == "hotpotqa":
            return [unit["question"]], [f"{title}\n{''.join(sentences)}" for title, sentences in unit["context"]]
        asked = [qa["question"] for p in unit["paragraphs"] for qa in p["qas"] if not qa["is_impossible"]]
        return asked, [p["context"] for p in unit["paragraphs"]]

    def answers(self, unit: Any) -> list[str]:
        """Returns a unit's answers, in order."""
        if self.kind == "hotpotqa":
            return [unit["answer"]]
        return [answer["text"] for p in unit["paragraphs"] for qa in p["qas"] for answer in qa["answers"]]

    def content(self, units: Sequence[Any]) -> Any:
        """Returns the content of a file with only these units."""
        return list(units) if self.kind == "hotpotqa" else {"data": list(units)}

    def keep(self, kept: Sequence[bool]) -> Published:
        """Returns the file with only the answerable questions flagged in `kept`, in file order; all paragraphs of SQuAD
        stay.
        """
        flags = iter(kept)
        if self.kind == "hotpotqa":
            return replace(self, units=tuple(unit for unit in self.units if next(flags)))

        def paragraph(p: Any) -> Any:
            return {**p, "qas": [qa for qa in p["qas"] if not qa["is_impossible"] and next(flags)]}

        articles = tuple({**unit, "paragraphs": [paragraph(p) for p in unit["paragraphs"]]} for unit in self.units)
        return replace(self, units=articles)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Units joined by shared questions or paragraphs."""

    units: tuple[Any, ...]
    questions: int
    paragraphs: int


def read_published(path: Path) -> Published:
    """Reads a file of either data set, which is recognised by its content.

    Raises FileNotFoundError if there is no such file, and ValueError if it is neither.
    """
    existing_file(path, f"there is no file {str(path)!r} (TaskConfig.source or test_source)")
    try:
        data = path.read_bytes()
        content = json.loads(data)
        if b"\\ud" in data.lower():  # an escape of half of a surrogate pair, or of both halves
            refuse_surrogates(json.dumps(content, ensure_ascii=False), "the content")
        squad = isinstance(content, dict)
        units = tuple(content["data"] if squad else content)
        published = Published(path=path, kind="squad" if squad else "hotpotqa", units=units)
        for unit in units:
            published.texts(unit)
            published.answers(unit)
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
        raise ValueError(f"{str(path)!r} must be {EXPECTED}; it could not be read: {quote(error)}") from error
    return published


def divide(published: Published, wanted: Mapping[str, int]) -> dict[str, tuple[Any, ...]]:
    """Assigns units to splits so that each has at least the wanted number of questions, balancing the paragraphs.

    Units that share a paragraph or a question go to the same split. Raises ValueError if there are too few.
    """
    groups = sorted(_connected(published), key=lambda group: -group.questions)
    units: dict[str, tuple[Any, ...]] = dict.fromkeys(wanted, ())
    questions, paragraphs = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    needed = [name for name in wanted if wanted[name]]
    for group in groups if needed else ():
        # The largest groups go where most is lacking; when all have enough, paragraphs are evened out.
        lacking = [name for name in needed if questions[name] < wanted[name]]
        if lacking:
            name = min(lacking, key=lambda name: (questions[name] / wanted[name], -wanted[name]))
        else:
            name = min(needed, key=lambda name: paragraphs[name])
        units[name] += group.units
        questions[name] += group.questions
        paragraphs[name] += group.paragraphs
    if any(questions[name] < wanted[name] for name in needed):
        total, largest = sum(group.questions for group in groups), max((group.questions for group in groups), default=0)
        asked = ", ".join(f"{name} {count}" for name, count in wanted.items() if count)
        raise ValueError(
            f"{str(published.path)!r} has {total} questions that fit into a prompt, in {len(groups)} groups, no two of "
            f"which share a paragraph (the largest has {largest} questions); they cannot be divided into {asked} without "
            "sharing a document"
        )
    return units


def _connected(published: Published) -> Iterator[_Group]:
    from scipy.cluster.hierarchy import DisjointSet

    texts = [published.texts(unit) for unit in published.units]
    joined, first = DisjointSet(range(len(texts))), dict[str, int]()
    for unit, (questions, paragraphs) in enumerate(texts):
        for text in (*questions, *paragraphs):
            joined.merge(unit, first.setdefault(normalised(text), unit))
    for group in map(sorted, joined.subsets()):
        yield _Group(
            units=tuple(published.units[unit] for unit in group),
            questions=sum(len(texts[unit][0]) for unit in group),
            paragraphs=len({text for unit in group for text in texts[unit][1]}),
        )
