"""Finds and stores a model's post-training history.

Every checkpoint stores it in a separate file, so that a copy of the folder includes it. For an older run without that
file, it is reconstructed from the run's configuration, provided that its prompts have not changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from refine_lab.config import DataConfig, TaskConfig, from_json, to_json
from refine_lab.data.tasks.examples import load_splits
from refine_lab.data.tasks.prompts import Example, prompts_digest
from refine_lab.data.tasks.trained import UNTRAINED, History, Trained, row_key, source_digest
from refine_lab.models.hub import HubName, own_folder, resolve, shipped
from refine_lab.models.loading import manifest_of
from refine_lab.runs.files import read_json, write_json
from refine_lab.runs.run import Run

HISTORY = "trained_on.json"
"""File in a checkpoint that lists what the run and its predecessors were trained on."""

CONFIGS: dict[str, Any] = {"task": TaskConfig, "data": DataConfig}
"""Fields of `Trained` that are configurations."""


def history_of(model: str) -> History:
    """Returns the history of the model of that name: a run's last checkpoint or any folder.

    A shipped model, one on the hub and fresh weights have none. Raises ValueError for a damaged record.
    """
    if model.startswith("new:") or shipped(model):
        return History()
    if own_folder(model) is None:
        gone = () if HubName.parse(model) else (f"the folder {model!r} no longer exists",)
        return History(unknown=gone)
    folder = resolve(model)  # a run's last checkpoint
    if (folder / HISTORY).is_file():
        return _read(folder / HISTORY)
    run = _run_of(folder)
    if run is None:
        return History(unknown=(f"the folder {str(folder)!r} has no record of its training",))
    return _made_again(run, folder)


def after(history: History, run: Run, examples: Sequence[Example], train: Sequence[Example]) -> History:
    """Returns the history of a run's checkpoints: that of its initial model, and the run's own training on a task.

    `examples` are those of all splits, `train` those that the run trains on.
    """
    trained = Trained(
        run=run.name,
        task=run.config.task,
        data=run.config.data,
        prompts_digest=prompts_digest(examples),
        source_digest=source_digest(run.config.task),
        rows=frozenset(row_key(example) for example in train),
    )
    return replace(history, trained=(trained, *history.trained))


def save_history(history: History, folder: Path) -> None:
    """Writes `history` to a checkpoint's folder."""
    trained = [
        asdict(each)
        | {name: json.loads(to_json(getattr(each, name))) for name in CONFIGS}
        | {"rows": sorted(each.rows)}
        for each in history.trained
    ]
    write_json(folder / HISTORY, {"format_version": 1, "trained": trained, "unknown": list(history.unknown)})


def _read(path: Path) -> History:
    values = read_json(path)
    try:
        trained = [
            Trained(
                **each
                | {name: from_json(json.dumps(each[name]), f"{name} of {path}", kind) for name, kind in CONFIGS.items()}
                | {"rows": frozenset(each["rows"])}
            )
            for each in values["trained"]
        ]
        return History(trained=tuple(trained), unknown=tuple(values["unknown"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def _run_of(folder: Path) -> Run | None:
    """Returns the run that a folder is a checkpoint of."""
    if folder.parent.name != "checkpoints":
        return None
    with suppress(FileNotFoundError, ValueError):
        run = Run(folder.parent.parent)
        _ = run.config  # raises an error if it is damaged
        return run
    return None


def _made_again(run: Run, folder: Path) -> History:
    """Reconstructs the history of an older run by reloading its examples; they count if they are unchanged."""
    before, task = history_of(run.config.model), run.config.task
    if task is None:
        return before
    recorded = (run.inputs or {}).get("prompts_digest")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        splits = load_splits(task, tokenizer, run.config.data, manifest_of(str(folder)), UNTRAINED).examples
        found = after(before, run, [example for part in splits.values() for example in part], splits["train"])
        reason = f"the prompts that the run {run.name} was trained on have changed since"
    except (OSError, ValueError) as error:
        found, reason = None, f"the prompts that the run {run.name} was trained on cannot be loaded: {error}"
    if found is not None and recorded is None:
        reason = f"the run {run.name} has no record of its prompts, which may have changed since"
        return replace(found, unknown=(reason, *found.unknown))
    if found is not None and found.trained[0].prompts_digest == recorded:
        return found
    lost = Trained(
        run=run.name, task=task, data=run.config.data, prompts_digest=recorded, source_digest=None, rows=frozenset()
    )
    return History(trained=(lost, *before.trained), unknown=(reason, *before.unknown))
