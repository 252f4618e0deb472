"""Writes the result card of an evaluated run, which the run monitor shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.results import as_json
from refine_lab.models.hub import Place
from refine_lab.runs.cards import evaluated_run, write_card


class CardWriter:
    """Writes the card of one evaluation after each task, unless the model is not a run or the run cannot be written."""

    def __init__(self, config: EvaluationConfig, model: Place, out: Path, report: Callable[[str], object]) -> None:
        trained = not config.model.startswith("new:") and model.hub is None
        self.run = evaluated_run(model.folder.absolute()) if trained else None
        self.config, self.out, self.report = config, out, report

    def write(self, result: Mapping[str, Any]) -> None:
        """Writes the card of the results so far; reports once if the run cannot be written."""
        if self.run is None:
            return
        path, step = self.run
        try:
            write_card(path, self.out, json.loads(as_json(card_of(self.config, step, result))))
        except OSError as error:
            self.report(f"The result card for this evaluation could not be written to {path}: {error.strerror}.")
            self.run = None


def card_of(config: EvaluationConfig, step: int | None, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a card: main figures and counts of each task, how they were measured, versions and date."""
    software = {name: result["environment"][name] for name in ("refine_lab", "torch", "commit")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "answers": result["answers"],
        **{name: getattr(config, name) for name in ("ttt", "ttt_reward", "limit", "seed")},
        "tasks": [task_figures(unit) for unit in result["units"]],
        "figures": result["figures"],
        "versions": {**software, "lm_eval": result["versions"]["lm_eval"]},
    }


def task_figures(unit: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the main figure of a task at a length with its standard error and counts, or why it could not run."""
    named = {"task": unit["task"], "length": unit["length"], "metric": unit["main"], "status": unit["status"]}
    if unit["status"] != "done":
        return {**named, "reason": unit["reason"]}
    figure = unit["metrics"][unit["main"]]
    counts = {name: unit[name] for name in ("samples", "different_samples")}
    return {**named, "value": figure["value"], "stderr": figure["stderr"], **counts}
