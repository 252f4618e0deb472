"""All tasks by name, and groups of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from refine_lab.evaluation import books, long_ppl, longbench, next_sequence, niah, ruler_qa, short
from refine_lab.evaluation.benchmark import Benchmark
from refine_lab.validation import unknown

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for module in (niah, ruler_qa, longbench, books, short, next_sequence, long_ppl)
    for each in module.BENCHMARKS
}

GROUPS: dict[str, tuple[str, ...]] = {
    "niah": niah.PAPER_VARIANTS,
    "niah_all": tuple(niah.VARIANTS),
    "ruler_qa": tuple(each.name for each in ruler_qa.BENCHMARKS),
    "longbench": tuple(each.name for each in longbench.BENCHMARKS),
    "short": tuple(each.name for each in short.BENCHMARKS),
    "own": tuple(each.name for each in (*next_sequence.BENCHMARKS, *long_ppl.BENCHMARKS)),
    "all": tuple(BENCHMARKS),
}
"""Group -> its tasks; `niah` are the four rows of the paper's table 3."""


class Unit(NamedTuple):
    """One task at one length; the length is None for tasks whose samples have lengths of their own."""

    task: str
    length: int | None

    @property
    def name(self) -> str:
        """Returns the name of the unit's files."""
        return self.task if self.length is None else f"{self.task}-{self.length}"

    def __str__(self) -> str:
        return self.task if self.length is None else f"{self.task} at {self.length} tokens"


def chosen(tasks: Sequence[str]) -> list[str]:
    """Returns the names of tasks, with those of groups in place of the groups. Raises ConfigError for an unknown name."""
    found: dict[str, None] = {}
    for name in tasks:
        if name not in GROUPS and name not in BENCHMARKS:
            raise unknown("task", name, [*GROUPS, *BENCHMARKS])
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(found)


def units(tasks: Sequence[str], lengths: Sequence[int]) -> list[Unit]:
    """Returns the units of an evaluation, in the order of tasks and lengths."""
    return [
        Unit(name, length)
        for name in chosen(tasks)
        for length in (dict.fromkeys(lengths) if BENCHMARKS[name].by_length else (None,))
    ]
