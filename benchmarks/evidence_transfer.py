"""Measures what the models of experiment 1 do on tasks and lengths that they were not trained on (experiment 5).

    python -m benchmarks.evidence_transfer --work DIR [--out docs/results] [--processes 2] [--hours 1]

DIR is a folder in which `benchmarks.evidence` executed experiment 1, or an empty one: models that it lacks are trained first,
as in experiment 1, and their rows in DIR/tables are compared with those of experiment 1. Then each model whose row is missing
is measured, and its row and items are added to the same tables. docs/log.md has the registration.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.evidence import RESULTS, Measures, execute, experiments, measure_in_turn
from refine_lab.data.batches import SequenceData
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.run import evaluate
from refine_lab.experiments.evidence import (
    BASE,
    KEYS,
    TABLE,
    EvidenceRun,
    measure,
    read_table,
    recorded,
)
from refine_lab.models import load_model
from refine_lab.models.loading import manifest_of
from refine_lab.runs.run import list_runs
from refine_lab.statistics.scores import evaluation_scores
from refine_lab.training.evaluation import recall_documents, recalled

RECALL, DOCUMENTS = "word-4", 200
"""Kind and number of the recall documents of 1,024 tokens: words instead of numbers, and four facts instead of one."""
NEEDLES = ("niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
"""RULER's needles in other forms than the planted facts: long values, several keys, several questions, several values."""
SAMPLES, LENGTH = 50, 1024
"""Number and length of the samples of each of `NEEDLES`, and length of the recall documents."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the executions of experiment 1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evidence.csv")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, each with one thread")
    parser.add_argument(
        "--hours", type=float, default=1.0, help="no group of trainings and no measurement starts after this time"
    )
    chosen = parser.parse_args()
    began = time.monotonic()
    missing = [run for run in experiments()["5"].runs if not recorded(chosen.out, run.key)]
    lacking = [origin(run) for run in missing if model_of(run, chosen.work) is None]
    if lacking:
        tables = chosen.work / "tables"
        execute(lacking, chosen.work, tables, chosen.processes, chosen.hours)
        if all((folder / TABLE).is_file() for folder in (tables, chosen.out)):
            print(compared(tables, chosen.out).to_string(index=False))

    def measured(run: EvidenceRun) -> Measures | None:
        model = model_of(run, chosen.work)
        if model is None:
            print(f"There is no finished run of {run.label} with seed {run.seed} in {chosen.work}.")
            return None
        return transfer(run, model, chosen.work / "transfer" / "-".join([run.label, str(run.seed)]))

    measure_in_turn(missing, chosen.out, chosen.hours - (time.monotonic() - began) / 3600, measured)


def origin(run: EvidenceRun) -> EvidenceRun:
    """Returns the run of experiment 1 that trains the model of a run of experiment 5."""
    return replace(run, experiment="1", sequence_length=EvidenceRun.sequence_length)


def model_of(run: EvidenceRun, work: Path) -> str | None:
    """Returns the model that a run of experiment 5 measures; None where `work` has no finished training of it."""
    config = origin(run).config
    if run.method == BASE:
        return config.model
    trained = [each for folder in sorted(work.glob("*/output")) for each in list_runs(folder)]
    return next((str(each.path) for each in trained if each.state == "finished" and each.config == config), None)


def compared(tables: Path, out: Path) -> pd.DataFrame:
    """Returns recall and next-token loss of the runs in one table, beside those of the same runs in the table of `out`."""
    columns = [*KEYS, "exact_recall", "ntp_loss"]
    again, first = (read_table(folder / TABLE)[columns] for folder in (tables, out))
    return again.merge(first, on=[*KEYS], suffixes=("", "_first"))


def transfer(run: EvidenceRun, model: str, folder: Path) -> Measures:
    """Measures a model: `experiments.evidence.measure` at the run's length, and the items of the other kinds of facts.

    The items are `recall word-4` (0 or 1 per document) and the scores of `NEEDLES` (0 to 1 per sample). `folder` keeps the
    results of the evaluation.
    """
    means, items = measure(run, model)
    policy, tokenizer = load_model(model)
    data = replace(run.config.data, recall={}, sequence_length=LENGTH)
    held_out = SequenceData(data, tokenizer, 0, "validation", manifest_of(model))
    asked = recall_documents(RECALL, DOCUMENTS, LENGTH, held_out)
    items[f"recall {RECALL}"] = [sum(right) / len(right) for right in recalled(policy, asked)]
    config = EvaluationConfig(model=model, tasks=NEEDLES, lengths=(LENGTH,), limit=SAMPLES)
    evaluate(config, folder, report=lambda line: None)
    for task in NEEDLES:
        items[task] = evaluation_scores({(run.label, run.seed): folder}, task, LENGTH)["score"].tolist()
    return means, items


if __name__ == "__main__":
    main()
