"""Creates the run directories of an experiment, or resumes those with the same configuration and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from refine_lab.config import TrainConfig
from refine_lab.data.recall import parse_kind
from refine_lab.data.sources import check_source
from refine_lab.data.tasks.examples import Example
from refine_lab.data.tokenizer import describe_beginning
from refine_lab.experiments.configs import Reward, Selection
from refine_lab.method.custom import reward_source, selection_source
from refine_lab.method.memory import check_window
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_tokenizer, manifest_of, prepared
from refine_lab.runs.environment import display_path
from refine_lab.runs.run import Run, runs_dir
from refine_lab.training.answering import batches_of, check_prompts
from refine_lab.training.inputs import inputs_of, refuse_changes, resume_or_create, text_digests, text_inputs
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import path_of, require

NOTES = 5
"""Maximum number of notes printed about prompts too short for the method."""


def runs_folder(output: str | None) -> Path:
    """Returns the folder of a notebook's runs: `output`, or `runs.run.runs_dir()`.

    Raises ValueError for a relative path or a file.
    """
    if output is None:
        return runs_dir()
    path = path_of("parameter output", output)
    require(path.is_absolute(), "parameter output", output, "an absolute path, or none for the project's runs folder")
    require(
        path.is_dir() or not path.exists(),
        "parameter output",
        output,
        "a folder, or a path where one can be created",
    )
    return path


def create_runs(
    configs: Sequence[TrainConfig], folder: Path, reward: Reward = None, selection: Selection = None
) -> list[Run]:
    """Creates a new run directory in `folder` for each configuration; the sources of custom functions are stored.

    Raises as `text_runs`.
    """
    return text_runs(configs, folder, reward, selection, fresh=True)


def function_sources(config: TrainConfig, reward: Reward = None, selection: Selection = None) -> dict[str, str | None]:
    """Returns `reward_source` and `selection_source` of a run: those of the custom functions that its configuration uses.

    `reward` and `selection` are functions, or names of built-in ones.
    """
    refine, found = config.refine, dict[str, str | None](reward_source=None, selection_source=None)
    if refine is not None and refine.reward == "custom" and callable(reward):
        found["reward_source"] = reward_source(reward)
    if refine is not None and refine.selection == "custom" and callable(selection):
        found["selection_source"] = selection_source(selection)
    return found


def text_runs(
    configs: Sequence[TrainConfig],
    folder: Path,
    reward: Reward = None,
    selection: Selection = None,
    *,
    fresh: bool = False,
) -> list[Run]:
    """Returns, for each configuration, the newest run in `folder` with it and the same text, model and functions, or a new run.

    Prints the step from which each run continues. `fresh` creates new runs only. Raises ValueError or
    FileNotFoundError, before anything is created, for a missing model, device or data.
    """
    check_inputs(configs)
    inputs = [text_inputs(config.model, config.data, manifest_of(config.model)) for config in configs]
    sources = [function_sources(config, reward, selection) for config in configs]
    runs: list[Run] = []
    for config, own, each in zip(configs, sources, inputs, strict=True):
        runs += resume_or_create([config], folder, each, fresh=fresh, **own)
    if not fresh:
        print_progress(runs)
    return runs


def print_progress(runs: Sequence[Run]) -> None:
    """Prints where each run is stored, and whether it is finished, in progress, or from which step it continues."""
    for run in runs:
        if (state := run.state) == "finished":
            progress = "is finished"
        elif run.alive:
            progress = f"is in progress at step {run.status.step} of {run.steps}"
        elif state == "waiting" and not run.done:
            progress = "starts at step 1"
        else:
            progress = f"continues from step {run.done} of {run.steps}"
        print(f"{display_path(run.path)} {progress}")


def stage_runs(stages: Sequence[TrainConfig], folder: Path) -> list[Run]:
    """Returns the runs of a curriculum, resumed or new, each of which starts from the previous one's last checkpoint.

    Raises ValueError if the text of a resumed run has changed since it began.
    """
    check_inputs(stages)
    manifest = manifest_of(stages[0].model)
    runs: list[Run] = []
    for stage in stages:
        config = replace(stage, model=str(runs[-1].path)) if runs else stage
        runs += resume_or_create([config], folder)
        refuse_changes(runs[-1], {"texts": text_digests(stage.data, manifest)})  # its model may have no checkpoint yet
    return runs


def ttt_runs(
    configs: Sequence[TTTRunConfig],
    model: FastWeightLM,
    examples: Sequence[Example],
    folder: Path,
    *,
    fresh: bool = False,
) -> list[Run]:
    """Returns, for each test-time training configuration, the run in `folder` to resume, or a new run; `fresh`: all new.

    Prints which prompts are already answered, which are dropped, and which are too short for all chunks. Raises
    ValueError, before anything is created, for prompts that cannot be used.
    """
    notes = {note: None for config in configs for note in check_prompts(model, config, examples)}
    size = configs[0].batch_size
    if left_out := len(batches_of(examples, size)[1]):
        reason = f"since the last batch has fewer than {size} prompts"
        print(f"{left_out} of {len(examples)} prompts are skipped, {reason}.")
    for note in [*notes][:NOTES]:
        print(f"{note}.")
    if len(notes) > NOTES:
        print(f"The same applies to {len(notes) - NOTES} more prompts.")
    runs = []
    for config in configs:
        runs += resume_or_create([config], folder, inputs_of(config.model, examples), fresh=fresh)
        done = len(runs[-1].log.done)
        print(f"{display_path(runs[-1].path)}" + (f": {done} prompts already answered" if done else ""))
    return runs


def check_inputs(configs: Sequence[TrainConfig]) -> None:
    """Checks the recall kinds and models of every config, and the data sources of the first, since all share them.

    Prints which special tokens documents begin with, if any. Raises ValueError or FileNotFoundError for what is
    missing.
    """
    for kind in (kind for config in configs for kind in config.data.recall):
        parse_kind(kind)
    for model, device, settings in {(c.model, c.device, tuple(sorted(c.model_settings.items()))) for c in configs}:
        _, of_model, model_class, _ = prepared(model, device=device, settings=dict(settings))
        for config in configs:
            if (config.model, dict(config.model_settings)) == (model, dict(settings)):
                check_window(config.refine, model_class, of_model)
    config = configs[0]
    for source in config.data.sources:
        check_source(source, manifest_of(config.model))
    if first_tokens := describe_beginning(load_tokenizer(config.model), config.data.add_bos):
        print(first_tokens)
