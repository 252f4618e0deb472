"""Forks: a new run that continues from another run's checkpoint with different settings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.experiments.configs import setting_names, with_settings
from refine_lab.method.custom import reward_source, selection_source
from refine_lab.models.loading import manifest_of
from refine_lab.runs import durable
from refine_lab.runs.checkpoints import check_checkpoint, check_records, read_manifest
from refine_lab.runs.files import parquet_parts
from refine_lab.runs.run import Run
from refine_lab.runs.started import sources_of
from refine_lab.runs.writer import RunWriter
from refine_lab.training.inputs import text_inputs
from refine_lab.validation import ConfigError, path_of, require

FIXED = frozenset({"model", "model_settings", "kind", "nested"})
"""Fields that a fork shares with its parent, since the checkpoint depends on them."""


def fork(run: Run | Path | str, step: int, folder: Path | str | None = None, **changes: Any) -> Run:
    """Creates a run that continues from the checkpoint of a training run after `step`, with `changes` of its settings.

    The new run is stored in `folder` (default: that of its parent) and begins with the parent's checkpoint, optimizer
    moments and records up to that step. `changes` are fields of the configuration or of any configuration inside it;
    `reward` and `selection` may also be functions. `started.json` records the parent. Start it with `refine_lab.resume` or
    `refine_lab.run_in_turn`. Raises ConfigError for a step without a checkpoint and for a change that the checkpoint or
    the task does not allow.
    """
    run = run if isinstance(run, Run) else Run(run)
    require(run.kind == "train", "the kind of a run to fork", run.kind, "'train'")
    saved, config = dict(run.checkpoints()), run.config
    if not saved:
        raise ConfigError("step", step, "a step with a checkpoint", f"run {run.name} has no checkpoints to fork from")
    require(step in saved, "step", step, f"a step with a checkpoint ({', '.join(map(str, saved))})")
    fixed = FIXED if config.task is None else FIXED | setting_names(TaskConfig) | setting_names(DataConfig)
    for name in changes.keys() & fixed:
        raise ConfigError(name, changes[name], f"that of the parent, since a fork cannot change {name}")
    sources = sources_of(run.path)
    for kind, source_of in (("reward", reward_source), ("selection", selection_source)):
        if kind in changes and changes[kind] != "custom":
            sources[kind] = source_of(changes[kind]) if callable(changes[kind]) else None
            changes = {**changes, kind: "custom" if sources[kind] else changes[kind]}
        allowed = f"a function or the name of a {kind}, since the parent has no custom {kind}"
        require(sources[kind] is not None or changes.get(kind) != "custom", kind, "custom", allowed)
    config = with_settings(config, changes)
    require(config.steps > step, "steps", config.steps, f"above {step}, the step of the checkpoint")
    check_checkpoint(saved[step])
    if (manifest := read_manifest(saved[step])) is not None:
        check_records(run.path, manifest)
    inputs = run.inputs
    if inputs is not None and config.data.sources != run.config.data.sources:
        inputs = {**inputs, **text_inputs(config.model, config.data, manifest_of(config.model))}

    def copy(path: Path) -> None:
        with durable.publishing(path / "checkpoints" / saved[step].name) as checkpoint:
            shutil.copytree(saved[step], checkpoint, dirs_exist_ok=True)
        records = [run.path / "metrics.jsonl", *(part for _, _, part in parquet_parts(run.path / "rollouts"))]
        for record in filter(Path.is_file, records):
            durable.replace_bytes(path / record.relative_to(run.path), record.read_bytes())

    stored = {"reward_source": sources["reward"], "selection_source": sources["selection"]}
    folder = run.path.parent if folder is None else path_of("folder", folder).absolute()
    parent = {"run": os.path.join(os.pardir, os.path.relpath(run.path, folder)), "step": step}
    with RunWriter.create(config, folder, **stored, inputs=inputs, parent=parent, fill=copy) as writer:
        path = writer.path
    with RunWriter.open(path, step) as writer:  # drops the parent's records after the step
        writer.status("starting")
        return writer.run
