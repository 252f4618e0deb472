"""The scores that run directories hold: answers question by question, and held-out measures of the last common step."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from refine_lab.data.recall import RecallDocument
from refine_lab.data.tasks.scores import SCORES
from refine_lab.experiments.reference import scores_by_item, scores_by_seed
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.cards import FOLDER
from refine_lab.runs.durable import short_digest
from refine_lab.runs.files import read_parquet, write_parquet
from refine_lab.runs.run import Run

HELD_OUT = "held-out "
"""Beginning of the names of measures from a run's evaluations during training."""

RECALL = "recall.parquet"
"""File in a run's folder of evaluations with its answers to the questions of recall documents."""

TEST_ANSWERS = "answers/test"
"""Folder of a run with its answers to the test questions after post-training."""

ANSWERS = (*SCORES, "exact_recall", "loss_after", "entropy_after")
"""Measures of answers."""

FIRST = ("contains_answer", "exact_match", "long_ppl", "ntp_loss", "ntp_accuracy", "sampled_accuracy")
"""Measures of evaluations that come first, in this order."""

OTHER = ("step", "time", "seconds", "documents", "key_tokens")
"""Columns of evaluations that are no measure of a model, besides those of the gradient (`nsp_...`)."""


def store_recall(
    run: Run,
    answers: pd.DataFrame,
    documents: Mapping[str, Sequence[RecallDocument]],
    before: pd.DataFrame | None = None,
) -> None:
    """Stores a run's answers to recall questions; earlier ones are replaced.

    `answers` has `name` (kind and number of the document), `question` and `exact_recall`; `documents` has the documents of
    each kind. The file also has `step`, the checkpoint that answered, `tokens`, the length of the longest document of the
    kind, and `documents`, a digest of all documents of the kind. `before` are the answers of the model that the run started
    from, stored with step 0. Raises OSError if the run cannot be written.
    """
    answers = answers.assign(step=run.done)
    if before is not None and run.done > 0:
        answers = pd.concat([before.assign(step=0), answers], ignore_index=True)
    kinds = answers["name"].str.rpartition(" ")[0]
    tokens = {kind: max(len(document.tokens) for document in asked) for kind, asked in documents.items()}
    digests = {kind: _digest(asked) for kind, asked in documents.items()}
    columns = answers[["name", "question", "exact_recall", "step"]]
    columns = columns.assign(tokens=kinds.map(tokens), documents=kinds.map(digests))
    write_parquet(run.path / FOLDER / RECALL, pa.Table.from_pandas(columns, preserve_index=False))


def recall_by_step(run: Run) -> tuple[pd.DataFrame, frozenset[str]]:
    """Returns a run's stored exact recall, with the columns `step` and `exact_recall`, and the digests of the documents.

    Step 0 is the model that the run started from. Both are empty without stored answers of the last checkpoint. Raises
    OSError or ValueError for a damaged file.
    """
    path = run.path / FOLDER / RECALL
    table = read_parquet(path).to_pandas() if path.is_file() else pd.DataFrame()
    if not {"step", "documents"} <= {*table} or not (table["step"] == run.done).any():
        return pd.DataFrame(), frozenset()
    table = table[table["step"].isin([0, run.done])]
    means = table.groupby("step")["exact_recall"].mean().reset_index()
    return means, frozenset(table["documents"])


def _digest(documents: Sequence[RecallDocument]) -> str:
    return short_digest(hashlib.sha256(json.dumps([document.tokens for document in documents]).encode()))


def answer_files(run: Run) -> list[tuple[str, int]]:
    """Returns name and time of modification of each file with answers that were stored after training."""
    files = [*sorted((run.path / TEST_ANSWERS).glob("*.parquet")), run.path / FOLDER / RECALL]
    return [(file.name, file.stat().st_mtime_ns) for file in files if file.is_file()]


def stored_scores(runs: Sequence[Run], names: Sequence[str]) -> tuple[dict[str, pd.DataFrame], int | None]:
    """Returns scores by measure, as for `reference.differences_from`, and the step of the held-out measures, None without any.

    `names` are those under which the runs are compared. Answers are those of a test-time training run, or those that were
    stored after training by `experiments.posttrain.answer_test_prompts` or `experiments.midtrain.final_results`; the latter
    two are of a run's last checkpoint. Recall is compared only between runs that were asked the same documents. A held-out
    measure is taken at the last step at which every run that has evaluations was evaluated. Measures of a single name are
    left out. Raises OSError or ValueError for damaged files.
    """
    answers = [_answers(run).assign(method=name) for run, name in zip(runs, names, strict=True)]
    joined = pd.concat(answers, ignore_index=True)
    found = {
        measure: scores_by_item(joined[joined["name"].map(joined.groupby("name")["method"].nunique() > 1)], measure)
        for measure in ANSWERS
        if measure in joined and joined[measure].notna().any()
    }
    rows, step = _last_evaluations(runs, names)
    for measure in sorted(rows, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        found[f"{HELD_OUT}{measure}"] = scores_by_seed(rows[measure], measure)
    return {measure: table for measure, table in found.items() if table["method"].nunique() > 1}, step


def _answers(run: Run) -> pd.DataFrame:
    log = run.log if run.kind == "answer" else AnswerLog(run.path / TEST_ANSWERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged files, whose answers are missing
        found = log.read()
    if run.kind == "train" and "step" in found:  # an earlier version did not record which checkpoint answered
        found = found[found["step"].isna() | (found["step"] == run.done)].drop(columns="step")
    if len(found) or not (path := run.path / FOLDER / RECALL).is_file():
        return found
    recall = read_parquet(path).to_pandas()
    if not {"step", "tokens", "documents"} <= {*recall}:
        return found  # an earlier version did not record which checkpoint was asked which documents
    recall = recall[recall["step"] == run.done].assign(seed=run.config.seed)
    asked = {column: recall[column] + " of " + recall["documents"] for column in ("name", "question")}
    return recall.drop(columns=["step", "tokens", "documents"]).assign(**asked)


def _last_evaluations(runs: Sequence[Run], names: Sequence[str]) -> tuple[Mapping[str, pd.DataFrame], int | None]:
    """Returns, by measure, rows with `method`, `seed` and the measure at the last common step, and that step."""
    frames = []
    for run, name in zip(runs, names, strict=True):
        frame = run.evaluations() if run.kind == "train" else pd.DataFrame()
        if len(frame):
            frames.append(frame.drop_duplicates("step", keep="last").assign(method=name, seed=run.config.seed))
    if not frames:
        return {}, None
    common = set.intersection(*({*frame["step"]} for frame in frames))
    if not common:
        return {}, None
    step = int(max(common))
    rows = pd.concat([frame[frame["step"] == step] for frame in frames], ignore_index=True)
    numbers = [str(name) for name in rows.drop(columns=["method", "seed"]).select_dtypes("number")]
    measures = [name for name in numbers if name not in OTHER and not name.startswith("nsp_")]
    kept = {name: rows.loc[np.isfinite(rows[name].astype(float)), ["method", "seed", name]] for name in measures}
    return {name: table for name, table in kept.items() if len(table)}, step
