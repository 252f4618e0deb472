"""Reads run directories and evaluations as rows of the paper's tables: which methods trained a model, and its scores.

A run's row follows from its directory alone: its own method and settings, and those of the run whose checkpoint it began
with. Mid-training, post-training and test-time training therefore form one row if each begins with the one before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from refine_lab.config import RefineConfig
from refine_lab.data.tasks.items import items_of
from refine_lab.experiments.configs import absolute_model
from refine_lab.recipes.paper import METHODS, REFINE
from refine_lab.recipes.paper_results import PHASES
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.files import read_json
from refine_lab.runs.run import Run, list_runs
from refine_lab.statistics.scores import sample_items, unit_samples
from refine_lab.validation import require

EVERY_SEED = -1
"""Placeholder seed of a measurement that all seeds share, such as one of the model before training."""
QUESTIONS = "questions"
"""Task of the answers in run directories: the test questions of post-training."""
HELD_OUT, ROLLOUTS = "held_out", "rollouts"
"""Task names for the logged metrics of a training run: on held-out text, and of the training rollouts."""
SETTINGS = ("reward", "selection", "tau", "num_chunks", "rollout_length", "group_size", "group_by", "entropy_index")
"""REFINE's settings that distinguish rows."""
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "midtrain": {},
    "posttrain": {"reward": "hybrid"},
    "ttt": {"reward": "binary"},
}
"""Phase -> the paper's settings that differ from those of mid-training (table D.1)."""
LONGBENCH_METRICS = {"longbench_triviaqa": "accuracy"}
"""Task -> its metric in table 5, where that is not the task's main one."""
LABELS = {"sft": "SFT", "refine": "REFINE", "nested_sft": "nested SFT", "nested_refine": "nested REFINE"}
SCALE: Sequence[str] = ("steps", "batch_size", "sequence_length")

FIELDS = (
    *(*PHASES, "setting", "seed", "task", "metric", "main", "length"),
    *("value", "stderr", "samples", "different", "scores"),
)
"""Columns of `measured`; `scores` has the item and the score of every sample, or None where they were not recorded."""


class Row(NamedTuple):
    """A row of the paper's tables: the method of each phase, and the settings that differ from the paper's."""

    midtrain: str = "none"
    posttrain: str = "none"
    ttt: str = "none"
    setting: str = ""

    @property
    def label(self) -> str:
        """Returns the row's name in tables and figures."""
        if self == RANDOM:
            return "random weights"
        names = [LABELS.get(self.midtrain, self.midtrain), LABELS.get(self.posttrain, self.posttrain)]
        parts = [name for name, method in zip(names, self, strict=False) if method != "none"]
        parts += [f"TTT {LABELS.get(self.ttt, self.ttt)}"] if self.ttt != "none" else []
        return (" → ".join(parts) or "base") + (f" ({self.setting})" if self.setting else "")


RANDOM = Row("random")
"""The row of a model with the base's configuration and random weights, named `new:MODEL`."""


# -- runs --------------------------------------------------------------------------------------------------------------


def all_runs(folder: Path) -> list[Run]:
    """Returns the finished runs of `folder`, and of the folders `output` below it, in which sweeps keep theirs."""
    folders = [folder, *sorted(path for path in folder.rglob("output") if path.is_dir())]
    return [run for each in folders for run in list_runs(each) if run.state == "finished"]


def rows_of_runs(runs: Sequence[Run], base: str) -> dict[Path, Row]:
    """Returns the row of each run by the run's path; runs of other models and of other orders of phases have none."""
    found = {run.path: _row_of(run, runs, absolute_model(base)) for run in runs}
    return {path: row for path, row in found.items() if row is not None}


def _row_of(run: Run, runs: Sequence[Run], base: str) -> Row | None:
    parent = run_of_model(run.config.model, runs)
    before = _initial(run.config.model, base) if parent is None else _row_of(parent, runs, base)
    phase = phase_of(run)
    later = PHASES[PHASES.index(phase) :]
    if (
        before is None
        or (before == RANDOM and phase != "ttt")
        or any(getattr(before, name) != "none" for name in later)
    ):
        return None
    settings = ", ".join(filter(None, [before.setting, setting_of(run, phase)]))
    return before._replace(**{phase: run.config.method}, setting=settings)


def _initial(model: str, base: str) -> Row | None:
    """Returns the row of a model that no run has trained; None for one with another configuration than the base's."""
    if absolute_model(model.removeprefix("new:")) != base:
        return None
    return RANDOM if model.startswith("new:") else Row()


def phase_of(run: Run) -> str:
    """Returns the phase that a run belongs to."""
    if run.kind == "answer":
        return "ttt"
    return "midtrain" if run.config.task is None else "posttrain"


def run_of_model(model: str, runs: Sequence[Run]) -> Run | None:
    """Returns the run whose last checkpoint, or whose folder, a model's name is; None if there is none.

    If the runs have been moved, the run of the same name counts, provided that there is only one.
    """
    path = Path(model.removeprefix("new:"))
    named = [run for run in runs if run.name in path.parts]
    run = next((run for run in named if run.path in (path, *path.parents)), named[0] if len(named) == 1 else None)
    last = f"step-{run.config.steps}" if run is not None and run.kind == "train" else ""
    return run if run is not None and path.name in (run.name, last) else None


def setting_of(run: Run, phase: str) -> str:
    """Returns the settings of REFINE in which a run differs from the paper's, as in `reward=binary, num_chunks=2`."""
    refine: RefineConfig | None = run.config.ttt and run.config.ttt.refine if phase == "ttt" else run.config.refine
    if refine is None:
        return ""
    usual = {**{name: getattr(REFINE, name) for name in SETTINGS}, **DEFAULTS[phase]}
    before = "" if phase == "midtrain" else f"{phase}."
    changed = [name for name in SETTINGS if getattr(refine, name) != usual[name]]
    return ", ".join(f"{before}{name}={getattr(refine, name)}" for name in changed)


def run_of_setting(run: Run) -> str:
    """Returns a name for a mid-training run's evaluation: its method and settings, as in `refine-num_chunks_2`."""
    return "-".join([run.config.method, *setting_of(run, "midtrain").replace("=", "_").split(", ")])


def of_scale(runs: Sequence[Run], **scale: int | None) -> list[Run]:
    """Returns the runs without those of mid-training that have other `steps`, `batch_size` or `sequence_length`.

    None allows any value. Raises ConfigError if mid-training runs of several scales remain, since they are not comparable.
    """
    kept, found = [], set()
    for run in runs:
        if phase_of(run) == "midtrain":
            here: dict[str, int] = dict(zip(SCALE, scale_of(run), strict=True))
            if any(value is not None and value != here[name] for name, value in scale.items()):
                continue
            found.add(scale_of(run))
        kept.append(run)
    sizes = "; ".join(f"{steps} steps of {rows} x {tokens}" for steps, rows, tokens in sorted(found))
    allowed = "of one scale: set steps, batch_size and sequence_length"
    require(len(found) <= 1, "the mid-training runs", sizes, allowed)
    return kept


def scale_of(run: Run) -> tuple[int, int, int]:
    """Returns a mid-training run's steps, sequences per batch, and tokens per sequence."""
    return run.config.steps, run.config.batch_size, run.config.data.sequence_length


# -- measurements ------------------------------------------------------------------------------------------------------


def paper_runs(folder: Path, base: str, **scale: int | None) -> dict[Path, tuple[Run, Row]]:
    """Returns the finished runs below `folder` that began with `base`, each with its row, by path (see `of_scale`)."""
    runs = of_scale(all_runs(folder), **scale) if folder.is_dir() else []
    rows = rows_of_runs(runs, base)
    return {run.path: (run, rows[run.path]) for run in runs if run.path in rows}


def measured(
    folder: Path, base: str, *, samples: int | None = None, **scale: int | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns everything that was measured inside `folder`, as lines with `FIELDS`, and the tasks that could not run.

    Only the `paper_runs` count, and evaluations with `samples` as their limit (None: any). A later measurement replaces an
    earlier one of the same row and seed. The second frame has `task`, `length` and `reason`. Raises ConfigError as
    `of_scale`, and for evaluations with different settings.
    """
    found = paper_runs(folder, base, **scale)
    runs, rows = [run for run, _ in found.values()], {path: row for path, (_, row) in found.items()}
    lines = [*_records(runs, rows), *_answers(runs, rows)]
    evaluated, missing = _evaluations(folder, base, runs, rows, samples)
    frame = pd.DataFrame([*lines, *evaluated], columns=list(FIELDS))
    keys = [*Row._fields, "seed", "task", "metric", "length"]
    frame = frame.drop_duplicates(keys, keep="last").reset_index(drop=True)
    reasons = pd.DataFrame(missing, columns=["task", "length", "reason"]).drop_duplicates()
    return frame, reasons.reset_index(drop=True)


def _line(row: Row, seed: int, task: str, metric: str, value: float, **others: Any) -> dict[str, Any]:
    unset = {"main": True, "length": "", "stderr": np.nan, "samples": 0, "different": 0, "scores": None}
    return {**row._asdict(), "seed": seed, "task": task, "metric": metric, "value": value, **unset, **others}


def _records(runs: Sequence[Run], rows: Mapping[Path, Row]) -> Iterator[dict[str, Any]]:
    """Yields held-out loss and accuracy before and after each mid-training run, and the mean of its rewards."""
    for run in runs:
        if phase_of(run) != "midtrain":
            continue
        row, seed, evaluations, metrics = rows[run.path], run.config.seed, run.evaluations(), run.metrics()
        for metric in ("ntp_accuracy", "ntp_loss"):
            main = {"main": metric == "ntp_accuracy"}
            first, last = evaluations[metric].iloc[0], evaluations[metric].iloc[-1]
            if evaluations["step"].iloc[0] == 0:
                yield _line(Row(), seed, HELD_OUT, metric, float(first), **main)
            yield _line(row, seed, HELD_OUT, metric, float(last), **main)
        for metric in ("cosine_mean", "cosine_std"):
            if metric in metrics:
                main = {"main": metric == "cosine_mean"}
                yield _line(row, seed, ROLLOUTS, metric, float(metrics[metric].mean()), **main)


def _answers(runs: Sequence[Run], rows: Mapping[Path, Row]) -> Iterator[dict[str, Any]]:
    """Yields the fraction of test questions whose answer contains a reference, over the questions that every row answered."""
    groups: dict[tuple[str, int], list[tuple[Row, int, pd.DataFrame]]] = {}
    for row, seed, source, frame in _answered(runs, rows):
        groups.setdefault(source, []).append((row, seed, frame))
    for (_, tokens), members in groups.items():
        shared = set.intersection(*(set(frame["name"]) for *_, frame in members))
        for row, seed, frame in members:
            kept = frame[frame["name"].isin(shared)]
            scores = kept["contains_answer"].dropna()
            if len(scores):
                stderr = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else np.nan
                items = items_of(kept).loc[scores.index]
                facts = {"length": str(tokens), "samples": len(scores), "different": items.nunique()}
                facts["scores"] = pd.DataFrame({"item": items, "score": scores})
                yield _line(row, seed, QUESTIONS, "contains_answer", float(scores.mean()), stderr=stderr, **facts)


def _answered(
    runs: Sequence[Run], rows: Mapping[Path, Row]
) -> Iterator[tuple[Row, int, tuple[str, int], pd.DataFrame]]:
    """Yields row, seed, source of the questions and answers: of post-training and its initial model, then of test time."""
    for run in sorted(runs, key=lambda run: run.kind == "answer"):
        row, task, seed = rows[run.path], run.config.task, run.config.seed
        if task is None:
            continue
        source = (task.test_source or task.source, task.prompt_tokens)
        if run.kind == "answer":
            parent = run_of_model(run.config.model, runs)
            yield row, EVERY_SEED if parent is None else seed, source, run.answers()
            continue
        before = row._replace(posttrain="none", setting="")
        for part, of in (("base", before), ("test", row)):
            frame = AnswerLog(run.path / "answers" / part).read()
            if len(frame):
                yield of, EVERY_SEED if of == Row() else seed, source, frame


# -- evaluations -------------------------------------------------------------------------------------------------------

FREE = (
    *("model", "tasks", "lengths", "device", "batch_size", "data", "essays"),
    *("ttt", "ttt_per", "ttt_steps", "ttt_lr", "ttt_reward"),
)
"""Fields of an evaluation's configuration in which those of one table may differ."""


def _evaluations(
    folder: Path, base: str, runs: Sequence[Run], rows: Mapping[Path, Row], samples: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines, missing, settings = [], [], {}
    for path in sorted(folder.rglob("results.json"), key=lambda path: path.stat().st_mtime):
        result = read_json(path)
        config = result.get("config", {})
        place = _place(config, absolute_model(base), runs, rows) if "units" in result else None
        if place is None or (samples is not None and config.get("limit") != samples):
            continue
        key = json.dumps({name: value for name, value in config.items() if name not in FREE}, sort_keys=True)
        settings[key] = path.parent.name
        found, reasons = _units(result, *place, path.parent)
        lines, missing = [*lines, *found], [*missing, *reasons]
    folders = ", ".join(settings.values())
    require(len(settings) <= 1, "the evaluations", folders, "of the same samples, seed and rules: set samples")
    return lines, missing


def _place(
    config: Mapping[str, Any], base: str, runs: Sequence[Run], rows: Mapping[Path, Row]
) -> tuple[Row, int] | None:
    """Returns the row and seed of an evaluated model, or None for a model that belongs to no row."""
    model, ttt = str(config.get("model")), str(config.get("ttt", "none"))
    run = run_of_model(model, runs)
    if run is None:
        row, seed = _initial(model, base), EVERY_SEED
    else:
        row, seed = rows[run.path], run.config.seed
    if row is None or (ttt != "none" and row.ttt != "none"):
        return None
    reward = config.get("ttt_reward") or DEFAULTS["ttt"]["reward"]
    changed = f"ttt.reward={reward}" if reward != DEFAULTS["ttt"]["reward"] else ""
    setting = ", ".join(filter(None, [row.setting, changed]))
    return row._replace(ttt=ttt if ttt in METHODS["ttt"] else "none", setting=setting), seed


def _units(
    result: Mapping[str, Any], row: Row, seed: int, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines, missing = [], []
    for unit in result["units"]:
        length = "" if unit["length"] is None else str(unit["length"])
        if unit["status"] != "done":
            missing.append({"task": unit["task"], "length": length, "reason": unit["reason"]})
            continue
        facts = {"length": length, "samples": unit["samples"], "different": unit["different_samples"]}
        samples = unit_samples(folder, unit["task"], unit["length"])
        for name, metric in unit["metrics"].items():
            spread = np.nan if metric["stderr"] is None else metric["stderr"]
            facts |= {"main": name == unit["main"], "stderr": spread}
            if metric["value"] is not None:
                scores = _scores(samples, name, metric["value"])
                lines.append(_line(row, seed, unit["task"], name, metric["value"], **facts, scores=scores))
    return [*lines, *_averages(result, lines, row, seed)], missing


def _scores(samples: pd.DataFrame | None, metric: str, value: float) -> pd.DataFrame | None:
    """Returns the item and score of every sample, unless the metric is not the mean of its scores, such as a perplexity."""
    if samples is None or metric not in samples or not np.isclose(samples[metric].mean(), value, rtol=1e-5, atol=1e-7):
        return None
    return pd.DataFrame({"item": sample_items(samples), "score": samples[metric].astype(float)})


def _averages(
    result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], row: Row, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the averages of tables 5 and E.1, if all their columns were measured."""
    short = result.get("figures", {}).get("short_average")
    if short is not None:
        yield _line(row, seed, "short", "average", short)
    scores = {
        line["task"]: line
        for line in lines
        if line["task"].startswith("longbench_")
        and (line["metric"] == LONGBENCH_METRICS[line["task"]] if line["task"] in LONGBENCH_METRICS else line["main"])
    }
    if len(scores) == 12:
        values, errors = ([line[name] for line in scores.values()] for name in ("value", "stderr"))
        counts = {name: sum(line[name] for line in scores.values()) for name in ("samples", "different")}
        stderr = float(np.sqrt(np.square(errors).sum()) / 12)
        yield _line(row, seed, "longbench", "average", float(np.mean(values)), stderr=stderr, **counts)
