"""Executes the registered experiments on when REFINE pays, and prints their contrasts with intervals.

    python -m benchmarks.evidence --experiments 1,2 --work DIR [--out docs/results] [--processes 2] [--hours 1] [--dry-run]
    python -m benchmarks.evidence --report [--out docs/results]

Each run is one execution of notebooks/evidence.ipynb in DIR. Runs that stand in evidence.csv are skipped, interrupted
ones continue, and a row is added as soon as a run has been measured. docs/log.md has the registration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from refine_lab.experiments.evidence import (
    BASE,
    TABLE,
    EvidenceRun,
    Row,
    item_scores,
    parameters_of,
    questions_of,
    read_table,
    record,
    recorded,
)
from refine_lab.runs.environment import environment
from refine_lab.statistics.contrasts import compare_methods
from refine_lab.statistics.frontier import compare_frontiers
from refine_lab.statistics.holm import holm
from refine_lab.sweep.runner import sweep
from refine_lab.validation import ConfigError, require, unknown

ROOT = Path(__file__).parent.parent
NOTEBOOK, RESULTS = ROOT / "notebooks" / "evidence.ipynb", ROOT / "docs" / "results"
NOVELS = ROOT.parent / "shared" / "data" / "english_novels"
"""Text without planted facts; experiment 4 needs this folder."""
GROUP = 4
"""Runs of each process between two looks at the clock."""
MARGIN = {"exact_recall": 0.03, "ntp_loss": 0.005, "key_loss": 0.02, "answers": 0.03, "rest_change": 0.005}
"""Margins of equivalence, chosen before any run of their experiment: fractions of recall or right answers, nats per token."""


R = TypeVar("R", bound=Row)


class Experiment(NamedTuple):
    """A registered experiment: its question, its runs, and the contrasts of its primary measure."""

    question: str
    primary: str
    runs: Sequence[EvidenceRun]
    contrasts: Sequence[tuple[str, str]]
    "Pairs (method, against), as labels with the coefficient, such as `weighted 0.2`."


def _seeds(runs: Iterable[EvidenceRun], count: int) -> list[EvidenceRun]:
    """Returns every run with seeds 0 to count - 1, seed by seed, so that an unfinished experiment is balanced."""
    runs = list(runs)
    return [replace(run, seed=seed) for seed in range(count) for run in runs]


def _first() -> Experiment:
    methods = [
        ("sft", None),
        ("refine", None),
        ("expected_memory", 1.0),
        ("refine_memory", 1.0),
        ("weighted", 0.2),
        ("longce", None),
        ("dft", None),
        ("expected_entropy", 1.0),
        ("placebo", 1.0),
    ]
    runs = [EvidenceRun(experiment="1", method=method, coefficient=weight) for method, weight in methods]
    expected, sampled = "expected_memory 1", "refine_memory 1"
    against = ["sft", "weighted 0.2", sampled, "dft 1", "longce 1", "expected_entropy 1", "refine 0.2"]
    pairs = [(expected, name) for name in against] + [(sampled, "sft"), (sampled, "placebo 1"), ("refine 0.2", "sft")]
    return Experiment(
        "Which method raises the recall of planted facts at the same next-token loss?",
        "exact_recall",
        [EvidenceRun(experiment="1", method=BASE), *_seeds(runs, 8)],
        pairs,
    )


def _second() -> Experiment:
    runs = [
        EvidenceRun(experiment="2", method=method, coefficient=weight)
        for weight in (0.1, 0.3, 1.0, 3.0)
        for method in ("weighted", "expected_memory", "refine_memory")
    ]
    variance = [
        EvidenceRun(experiment="2", method="refine_memory", coefficient=1.0, group_size=size) for size in (2, 4, 32)
    ]
    other = [
        EvidenceRun(experiment="2", method="refine_memory", coefficient=1.0, scale_by_std=False),
        EvidenceRun(experiment="2", method="refine_memory", coefficient=1.0, reward="exact"),
    ]
    return Experiment(
        "Does one method's curve of recall against next-token loss lie above another's, and why do methods with rollouts do "
        "worse than those without?",
        "exact_recall",
        _seeds([*runs, *variance, *other], 3),
        [],
    )


def _third() -> Experiment:
    task = {"experiment": "3", "model": "tiny-lact", "recall": "number-1", "sequence_length": 512}
    methods = [("sft", None), ("weighted", 0.2), ("expected_memory", 1.0), ("refine_memory", 1.0)]
    runs = [EvidenceRun(method=method, coefficient=weight, **task) for method, weight in methods]  # type: ignore[arg-type]
    pairs = [("expected_memory 1", "sft"), ("refine_memory 1", "sft"), ("weighted 0.2", "sft")]
    base = EvidenceRun(method=BASE, **task)  # type: ignore[arg-type]
    return Experiment(
        "Do the results of experiment 1 hold for LaCT, where the facts may lie beyond its attention window?",
        "exact_recall",
        [base, *_seeds(runs, 4)],
        pairs,
    )


def _fourth() -> Experiment:
    methods = [("sft", None), ("weighted", 0.1), ("weighted", 0.2), ("expected_memory", 1.0), ("refine_memory", 1.0)]
    texts: list[str | None] = [None, str(NOVELS)]
    runs = [
        EvidenceRun(experiment="4", method=method, coefficient=weight, data=text, planted=False)
        for text in texts
        for method, weight in methods
    ]
    bases = [EvidenceRun(experiment="4", method=BASE, data=text, planted=False) for text in texts]
    pairs = [(name, "sft") for name in ("expected_memory 1", "weighted 0.1", "weighted 0.2", "refine_memory 1")]
    return Experiment(
        "Does selecting positions by memory also help on text without planted facts?",
        "key_loss",
        [*bases, *_seeds(runs, 4)],
        pairs,
    )


def _fifth() -> Experiment:
    methods = [
        ("sft", None),
        ("weighted", 0.2),
        ("refine", None),
        ("refine_memory", 1.0),
        ("expected_memory", 1.0),
    ]
    task = {"experiment": "5", "sequence_length": 2048}
    runs = [EvidenceRun(method=method, coefficient=weight, **task) for method, weight in methods]  # type: ignore[arg-type]
    base = EvidenceRun(method=BASE, **task)  # type: ignore[arg-type]
    pairs = [(name, "sft") for name in ("expected_memory 1", "refine_memory 1", "weighted 0.2", "refine 0.2")]
    return Experiment(
        "How well do the models of experiment 1 perform on facts and lengths that they were not trained on?",
        "exact_recall",
        [base, *_seeds(runs, 4)],
        pairs,
    )


def _sixth() -> Experiment:
    lengths = [
        EvidenceRun(experiment="6", method=method, coefficient=1.0, rollout_length=k, steps=20)
        for k in (1, 3, 5, 9, 16)
        for method in ("expected_memory", "refine_memory")
    ]
    rewards = [
        EvidenceRun(experiment="6", method="refine_memory", coefficient=1.0, reward=reward, steps=20)
        for reward in ("cosine", "hybrid", "edit", "exact")
    ]
    mean = EvidenceRun(experiment="6", method="expected_memory", coefficient=1.0, reward="binary", steps=20)
    return Experiment(
        "How do recall and loss depend on k and on the reward, with positions selected by memory?",
        "exact_recall",
        _seeds([*lengths, *rewards, mean], 3),
        [],
    )


def _eighth() -> Experiment:
    run = EvidenceRun(experiment="8", method="expected_memory_windows", coefficient=1.0)
    return Experiment(
        "Do short contexts from windows, which cost another reading, raise recall by more than those from segments?",
        "exact_recall",
        _seeds([run], 4),
        [],
    )


_EXPERIMENTS = {"1": _first, "2": _second, "3": _third, "4": _fourth, "5": _fifth, "6": _sixth, "8": _eighth}
"""The experiments by number. 5 trains nothing: `benchmarks.evidence_transfer` measures the models of experiment 1.

Experiment 7 is in `benchmarks.evidence_ttt` and `benchmarks.evidence_posttrain`.
"""


def experiments() -> dict[str, Experiment]:
    """Returns the registered experiments; a run that several ask for belongs to the first."""
    found, known = {}, set()
    for name, make in _EXPERIMENTS.items():
        experiment = make()
        own = [run for run in experiment.runs if run.key[1:] not in known]
        known |= {run.key[1:] for run in own}
        found[name] = experiment._replace(runs=own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", default="1", help="numbers, separated by commas")
    parser.add_argument("--work", type=Path, help="folder of the executions, which are resumed from it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evidence.csv")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--hours", type=float, default=1.0, help="no group of runs starts after this time")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that are missing and end")
    parser.add_argument("--report", action="store_true", help="print the means and contrasts of the table and end")
    chosen = parser.parse_args()
    try:
        picked = {name: _experiment(name) for name in chosen.experiments.split(",")}
        trains = chosen.report or "5" not in picked
        require(trains, "--experiments", "5", "others, since benchmarks.evidence_transfer measures experiment 5")
        if chosen.report:
            for name, experiment in picked.items():
                report(name, experiment, chosen.out)
            return
        missing = [run for each in picked.values() for run in each.runs if not recorded(chosen.out, run.key)]
        for run in missing:
            print(" ".join(run.key))
        print(f"{len(missing)} runs are missing.")
        if not chosen.dry_run:
            require(chosen.work is not None, "--work", chosen.work, "a folder")
            execute(missing, chosen.work, chosen.out, chosen.processes, chosen.hours)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")


def _experiment(name: str) -> Experiment:
    found = experiments()
    if name not in found:
        raise unknown("experiment", name, found)
    return found[name]


def execute(runs: Sequence[EvidenceRun], work: Path, out: Path, processes: int, hours: float) -> None:
    """Executes runs in their order, `processes` at a time, in groups of which none starts after `hours`.

    A group has several runs for each process, since a process that has finished its part waits for the end of the group.
    """
    end, size = time.monotonic() + hours * 3600, GROUP * processes
    grids = [{**parameters_of(run), "table": str(out.absolute())} for run in runs]
    for start in range(0, len(grids), size):
        if time.monotonic() > end:
            print(f"{len(grids) - start} runs are left for another time.")
            return
        sweep(NOTEBOOK, grids[start : start + size], work, processes=processes)


Measures = tuple[dict[str, Any], dict[str, list[float]]]
"""The means of the table's columns, and the items of each measure."""


def measure_in_turn(runs: Sequence[R], out: Path, hours: float, measure: Callable[[R], Measures | None]) -> None:
    """Measures the runs that the table in `out` lacks, one after the other, and adds each row at once.

    None starts after `hours`; one whose measures are None is left out.
    """
    end, missing = time.monotonic() + hours * 3600, [run for run in runs if not recorded(out, run.key)]
    print(f"{len(missing)} rows are missing.")
    for number, run in enumerate(missing):
        if time.monotonic() > end:
            print(f"{len(missing) - number} rows are left for another time.")
            return
        began, found = time.monotonic(), measure(run)
        if found is not None:
            commit, seconds = str(environment().get("commit") or "")[:10], round(time.monotonic() - began)
            record(out, run, *found, commit=commit, seconds=seconds)
            print(f"{' '.join(run.key)}: {found[0]}, {seconds} s", flush=True)


def report(name: str, experiment: Experiment, out: Path) -> None:
    """Prints the mean of every measure by method, and the contrasts of the primary measure with their intervals."""
    table = read_table(out / TABLE)
    table = table[table["experiment"] == name] if len(table) else table
    print(f"\nExperiment {name}: {experiment.question}  ({len(table)} of {len(experiment.runs)} runs)")
    if not len(table):
        return
    groups = ["model", "task", "method", "coefficient"]
    numbers = table.assign(**{each: pd.to_numeric(table[each]) for each in ("exact_recall", "longppl", "ntp_loss")})
    means = numbers.groupby(groups, sort=False)[["exact_recall", "longppl", "ntp_loss"]].agg(["mean", "std"])
    print(means.assign(seeds=numbers.groupby(groups, sort=False).size()).round(4).to_string())
    for task in dict.fromkeys(table["task"]):
        questions = questions_of(next(run for run in experiment.runs if run.task == task))
        for measure in dict.fromkeys([experiment.primary, "ntp_loss", "key_loss"]):
            contrasts = contrasts_of(experiment, name, out, task, measure, questions)
            if len(contrasts):
                print(f"\n{task}: differences of {measure}")
                print(contrasts.round(4).to_string(index=False))
    if name == "2":
        print(frontiers(out).to_string(index=False))


def contrasts_of(
    experiment: Experiment, name: str, out: Path, task: str, measure: str, questions: Sequence[str] | None = None
) -> pd.DataFrame:
    """Returns the registered contrasts of a measure over the seeds that both methods have; empty where none has two.

    Holm's correction counts every registered contrast of the experiment, in all of its tasks, known or not.
    `questions` are the items of the documents of `exact_recall` (`experiments.evidence.questions_of`); None: every
    document is an item.
    """
    scores = item_scores(out, measure, name)
    if measure == "exact_recall" and questions is not None:
        scores = scores.assign(item=scores["item"].map(dict(enumerate(questions))))
    scores = scores[scores["task"] == task]
    scores = scores.assign(method=(scores["method"] + " " + scores["coefficient"]).str.strip())
    registered = len(experiment.contrasts) * max(1, len({run.task for run in experiment.runs}))
    return paired_contrasts(scores, experiment.contrasts, MARGIN[measure], registered)


def paired_contrasts(
    scores: pd.DataFrame, pairs: Sequence[tuple[str, str]], margin: float, registered: int | None = None
) -> pd.DataFrame:
    """Returns the rows of `compare_methods` for pairs of methods, over the seeds that both have; empty where none has two.

    Holm's correction counts `registered` contrasts, known or not (None: as many as `pairs`).
    """
    tables = []
    for method, against in pairs:
        seeds = [set(scores.loc[scores["method"] == each, "seed"]) for each in (method, against)]
        if len(shared := seeds[0] & seeds[1]) >= 2:
            kept = scores["method"].isin([method, against]) & scores["seed"].isin(shared)
            tables.append(compare_methods(scores[kept], [(method, against)], margin=margin))
    if not tables:
        return pd.DataFrame()
    found, registered = pd.concat(tables, ignore_index=True), registered or len(pairs)
    p_values = np.append(found["p"].to_numpy(float), np.ones(registered - len(found)))  # those not known yet count
    return found.assign(p_holm=holm(p_values)[: len(found)])


def frontiers(out: Path) -> pd.DataFrame:
    """Returns the differences of the frontiers of recall against next-token loss (experiment 2).

    Runs that experiment 1 registered belong to them too, but no other runs. A coefficient counts with the seeds that all
    of them have. A method with a single such coefficient has no frontier yet.
    """
    table, names = read_table(out / TABLE), ("expected_memory", "weighted", "refine_memory")
    table = table[table["experiment"].isin(["1", "2"])]
    table = table[(table["task"] == "number-1 1024") & table["method"].isin(names) & table["seed"].isin(list("012"))]
    table = table[table["coefficient"].isin(["0.1", "0.3", "1", "3"])]
    table = table.groupby(["method", "coefficient"]).filter(lambda rows: len(rows) == 3)
    table = table.groupby("method").filter(lambda rows: rows["coefficient"].nunique() > 1)
    numbers = ("exact_recall", "ntp_loss", "coefficient", "seed")
    rows = table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})
    pairs = combinations([name for name in names if name in set(rows["method"])], 2)
    return pd.DataFrame(
        [{"method": one, "against": other, **compare_frontiers(rows, one, other)} for one, other in pairs]
    )


if __name__ == "__main__":
    main()
