"""Runs an evaluation task by task, saves each result as it completes, and reports progress and the remaining time."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_lab.data.tasks.items import FEWEST_ITEMS
from refine_lab.evaluation.benchmark import Missing, Setting
from refine_lab.evaluation.card import CardWriter
from refine_lab.evaluation.catalogue import BENCHMARKS, Unit, units
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.packages import versions
from refine_lab.evaluation.results import (
    as_json,
    begin,
    gap_record,
    read_unit,
    require_same,
    result_of,
    unit_record,
    write_results,
    write_unit,
)
from refine_lab.models.hub import Place, locate
from refine_lab.models.loading import manifest_of
from refine_lab.runs.cards import evaluated_run
from refine_lab.runs.checkpoints import wait_for_checkpoint
from refine_lab.runs.environment import environment
from refine_lab.runs.run import Run
from refine_lab.text import duration
from refine_lab.training.inputs import model_digests
from refine_lab.workers import ALONE, SharedError, Workers

REPORT_SECONDS = 10
"""Minimum number of seconds between two lines of progress within a task."""
USUAL_TOKENS = 2048
"""Tokens of a prompt that the estimate of the remaining time assumes for tasks of no fixed length."""

Report = Callable[[str], object]
"""Receives each line of progress."""


def evaluate(config: EvaluationConfig, out: Path, report: Report = print, workers: Workers = ALONE) -> dict[str, Any]:
    """Evaluates every task of `config` at every length and returns the content of `results.json` in the folder `out`.

    Tasks that an earlier call with the same settings has evaluated are not repeated. A task that cannot run is
    left empty with a message that says what is missing, and is tried again in the next call. If the model is a training run,
    a result card is written to its folder (`refine_lab.runs.cards`). Each of several `workers` calls this: they divide the
    prompts of every task among themselves, and the first one writes and reports.

    Raises ConfigError for an unknown task and for a folder with results of different settings, OSError if the folder cannot
    be written, and what `load_model` raises; then nothing is written. Raises SharedError if the workers have different
    models, or if one of them cannot do what the others do.
    """
    wanted = units(config.tasks, config.lengths)
    checkpoint, model = located(config, workers)
    digests = model_digests(model)
    settings = {**settings_of(config), "model_files": digests}
    _require_agreement({**settings, "units": [str(unit) for unit in wanted]}, workers)
    done = workers.from_first(lambda: _measured_before(out, settings, wanted))
    done = {unit: record for unit, record in zip(wanted, done, strict=True) if record is not None}
    lm = None if len(done) == len(wanted) else RefineLM(model, workers=workers, **config.reading)
    workers.from_first(lambda: begin(out, settings))
    card = CardWriter(config, checkpoint, out, report)
    about = {
        "config": dataclasses.asdict(config),
        "answers": "sampled" if config.sampled else "greedy",
        "model_files": digests,
        "versions": versions(),
        "environment": environment(config.device),
    }
    clock = _Clock(len(wanted), report if workers.first else lambda line: None)
    for number, unit in enumerate(wanted, start=1):
        if unit not in done:
            assert lm is not None
            done[unit] = measured(lm, unit, setting_of(config, lm, unit), out, clock)
        result = result_of([done[each] for each in wanted if each in done], about)
        if workers.first:
            clock.report_unit(number, unit, done[unit], wanted[number:], config)
            write_results(out, result)
            card.write(result)
    workers.wait()  # `torchrun` ends the first worker when another one has failed or left out a task
    return result


def located(config: EvaluationConfig, workers: Workers = ALONE) -> tuple[Place, str]:
    """Returns the place of the model and the name to load it by, which is that of a checkpoint if the model is a run.

    The run may still be training, so all workers take the checkpoint that the first one has found.
    """
    place = locate(config.model.removeprefix("new:"))
    found = None if config.model.startswith("new:") else evaluated_run(place.folder)
    if found is None:
        return place, config.model
    folder = place.folder.with_name(workers.from_first(lambda: place.folder.name))
    _, step = evaluated_run(folder) or found
    if folder != place.folder and step is not None:
        folder = wait_for_checkpoint(found[0], step)
    return Place(folder), str(folder)


def _require_agreement(settings: Mapping[str, Any], workers: Workers) -> None:
    """Raises SharedError, which names the first difference, unless all workers have the same settings and model."""
    first, *others = workers.gather_json(json.loads(as_json(settings)), "the settings")
    for rank, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                values = f"{first.get(name)!r} in worker 0, {other.get(name)!r} in worker {rank}"
                raise SharedError(f"{name} must be the same for all workers, got {values}")


def _measured_before(out: Path, settings: Mapping[str, Any], wanted: Sequence[Unit]) -> list[dict[str, Any] | None]:
    """Returns the records of units that are in `out`. Raises ConfigError if they have other settings."""
    require_same(out, settings)
    return [read_unit(out, unit) for unit in wanted]


def settings_of(config: EvaluationConfig) -> dict[str, Any]:
    """Returns what a unit's result depends on: all fields but the choice of tasks and lengths, and the device.

    The batch size matters only if the model adapts to batches.
    """
    others = {"tasks", "lengths", "device"}
    if config.ttt == "none" or config.ttt_per == "prompt":
        others.add("batch_size")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in others}


def setting_of(config: EvaluationConfig, lm: RefineLM, unit: Unit) -> Setting:
    """Returns what the samples of a unit depend on."""
    paths = {name: getattr(config, name) for name in ("data", "essays", "books")}
    return Setting(
        tokenizer=lm.tokenizer,
        seed=config.seed,
        limit=config.limit,
        length=unit.length,
        over_limit=config.over_limit,
        paper_rows=config.paper_rows,
        key_model=config.key_model or _started_from(config.model),
        manifest=manifest_of(config.model),
        **{name: None if path is None else Path(path).expanduser().resolve() for name, path in paths.items()},
    )


def _started_from(model: str) -> str | None:
    """Returns the model that a run started from, or None for a model that is not a run."""
    found = None if model.startswith("new:") else evaluated_run(locate(model).folder.absolute())
    return None if found is None else Run(found[0]).config.model


def measured(lm: RefineLM, unit: Unit, setting: Setting, out: Path, clock: _Clock) -> dict[str, Any]:
    """Measures one unit, writes its files and returns its record; a task that cannot run is left empty.

    Raises SharedError for a task that cannot run in some of the workers only.
    """
    began = time.monotonic()
    lm.on_batch, lm.unit = clock.within(unit), str(unit)
    try:
        found = BENCHMARKS[unit.task].measure(lm, setting)
    except Missing as missing:
        lm.workers.gather_json(None, f"{unit}: {missing}")
        record = gap_record(unit, str(missing))
        if lm.workers.first:
            write_unit(out, unit, record)
        return record
    lm.workers.gather_json(None, f"the end of {unit}")
    record = unit_record(unit, found, time.monotonic() - began)
    if lm.workers.first:
        write_unit(out, unit, record, found.rows)
    return record


class _Clock:
    """Reports progress, and estimates the remaining time from the tokens read so far."""

    def __init__(self, total: int, report: Report) -> None:
        self.total, self.report = total, report
        self.seconds, self.tokens = 0.0, 0

    def within(self, unit: Unit) -> Callable[[int, int], None]:
        """Returns a function that reports the progress of a unit, called with the completed and the total number."""
        began = last = time.monotonic()

        def on_batch(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= REPORT_SECONDS and done < total:
                last, left = now, (now - began) * (total - done) / done
                self.report(f"      {unit}: {done} of {total}, about {duration(left)} left for this task")

        return on_batch

    def report_unit(
        self, number: int, unit: Unit, record: dict[str, Any], left: Sequence[Unit], config: EvaluationConfig
    ) -> None:
        """Reports a unit that has been evaluated, loaded from its file, or skipped."""
        place = f"[{number}/{self.total}] {unit}"
        if record["status"] != "done":
            self.report(f"{place}: skipped: {record['reason']}")
            return
        metric = record["metrics"][record["main"]]
        spread = "" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}"
        self.seconds += record["seconds"]
        self.tokens += record["samples"] * (unit.length or USUAL_TOKENS)
        later = sum((each.length or USUAL_TOKENS) * (config.limit or record["samples"]) for each in left)
        rest = f"; about {duration(self.seconds * later / self.tokens)} left" if left else ""
        few = f", fewer than {FEWEST_ITEMS}" if record["different_samples"] < FEWEST_ITEMS else ""
        self.report(
            f"{place}: {record['main']} {metric['value']:.4f}{spread} ({record['samples']} samples, "
            f"{record['different_samples']} distinct{few}, "
            f"{duration(record['seconds'])}){rest}"
        )
