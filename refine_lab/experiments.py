"""Experiments as notebooks run them: configurations of both arms, run directories, and what is measured of them after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from refine_lab.config import RefineConfig, TrainConfig, require
from refine_lab.custom_reward import reward_source
from refine_lab.data.batches import SequenceData
from refine_lab.data.recall import parse_kind
from refine_lab.data.sources import documents
from refine_lab.data.tokenizer import beginning_told
from refine_lab.draws import Draws
from refine_lab.evaluation import EVALUATION_SEED, RECALL_KINDS, fixed_targets, held_out_measures, recall_documents
from refine_lab.inputs import new_run, refuse_changes, resume_or_create, text_digests, text_inputs
from refine_lab.models.base import FastWeightLM
from refine_lab.models.hub import own_folder, shipped
from refine_lab.models.loading import load_model, load_tokenizer, manifest_of, prepared, resolve
from refine_lab.models.state import hidden_states_only
from refine_lab.ops.precision import autocast
from refine_lab.recipes import curriculum
from refine_lab.recipes import recipe as named_recipe
from refine_lab.rewards import reward_function
from refine_lab.run_groups import experiment_arms, flat_settings
from refine_lab.runs.run import Run, runs_dir
from refine_lab.selection import select_positions, selection_probabilities, shift, smooth
from refine_lab.step import next_token_stats
from refine_lab.types import RewardFunction

Reward = RewardFunction | str | None
"""A reward function of one's own, the name of one of ours, or None: the recipe's."""


def arms(
    recipe: str,
    seeds: Sequence[int],
    *,
    model: str | None = None,
    steps: int | None = None,
    reward: Reward = None,
    data: str | None = None,
    sequence_length: int | None = None,
    add_bos: bool | None = None,
    batch_size: int | None = None,
    num_chunks: int | None = None,
    rollout_length: int | None = None,
    nsp_coef: float | None = None,
    **others: Any,
) -> list[TrainConfig]:
    """Of each seed the SFT and the REFINE arm of a recipe, which differ in the method alone.

    None leaves the recipe's value; `others` are fields of `TrainConfig`. A batch of another size makes as many updates as
    the recipe's. Folders and files are written down as absolute paths, and a run as the checkpoint that is its last now.

    Raises ValueError for seeds that repeat, no steps and for every value that the configuration refuses.
    """
    require(len(set(seeds)) == len(seeds) > 0, "seeds", list(seeds), "at least one whole number, none twice")
    require(steps is None or steps >= 1, "steps", steps, "at least 1")
    name = "custom" if callable(reward) else reward
    if name is not None and not callable(reward):
        reward_function(name)
    method = given(reward=name, num_chunks=num_chunks, rollout_length=rollout_length, nsp_coef=nsp_coef)
    rows = given(sources=data and {located_source(data): 1.0}, sequence_length=sequence_length, add_bos=add_bos)
    others |= {"model": model and located_model(model), "steps": steps}
    configs = []
    for seed in seeds:
        for arm in ("sft", "refine"):
            config = named_recipe(recipe)(arm, seed)
            changes = given(**others) | {"data": replace(config.data, **rows)} | batch_sizes(config, batch_size)
            if config.method is not None:
                changes["method"] = replace(config.method, **method)
            configs.append(replace(config, **changes))
    return configs


def pretrain_stages(
    model: str,
    prose: str | None = None,
    *,
    recipe: str = "pretrain",
    steps: int | None = None,
    last_stage: int | None = None,
) -> list[TrainConfig]:
    """The stages of a curriculum of `recipes.CURRICULA` up to `last_stage`, each of `steps` batches where given.

    Raises ValueError for a curriculum or a stage that there is not and for no steps.
    """
    stages = curriculum(recipe)(located_model(model), prose and located_source(prose))
    last = len(stages) if last_stage is None else last_stage
    require(1 <= last <= len(stages), "last_stage", last_stage, f"from 1 to {len(stages)}")
    require(steps is None or steps >= 1, "steps", steps, "at least 1")
    return [replace(stage, **given(steps=steps)) for stage in stages[:last]]


def located_model(name: str) -> str:
    """`name` for every folder it is read from and all time: the absolute path of the model's folder where it is one."""
    bare = name.removeprefix("new:")
    if shipped(bare) or not own_folder(bare):
        return name
    return name[: -len(bare)] + str(resolve(bare).absolute())


def located_source(name: str) -> str:
    """`name` for every folder it is read from: the absolute path of the file or folder where it is one."""
    path = Path(name).expanduser()
    return name if name == "python" or not path.exists() else str(path.absolute())


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def batch_sizes(config: TrainConfig, batch_size: int | None) -> dict[str, int]:
    """The sizes of a batch, a mini-batch and a micro-batch, where the first is another than the recipe's."""
    if batch_size is None:
        return {}
    updates = config.batch_size // config.mini_batch_size
    whole = batch_size >= updates and batch_size % updates == 0
    require(whole, "batch_size", batch_size, f"a multiple of {updates}, the updates this recipe makes of a batch")
    mini = batch_size // updates
    return {
        "batch_size": batch_size,
        "mini_batch_size": mini,
        "micro_batch_size": min(config.micro_batch_size, mini),
    }


def runs_folder(output: str | None) -> Path:
    """Where a notebook's runs go: `output`, or what `runs.run.runs_dir` finds.

    Raises ValueError for a relative path or a file.
    """
    if output is None:
        return runs_dir()
    path = Path(output).expanduser()
    require(path.is_absolute(), "parameter output", output, "an absolute path, or none for the project's runs folder")
    require(path.is_dir() or not path.exists(), "parameter output", output, "a folder, or a place for one")
    return path


def create_runs(configs: Sequence[TrainConfig], folder: Path, reward: Reward = None) -> list[Run]:
    """A new run directory in `folder` for each configuration; those with a reward of one's own keep its source.

    Raises ValueError or FileNotFoundError, before anything is made, for a model, device or data that is not there.
    """
    check_inputs(configs)
    source = reward_source(reward) if callable(reward) else None
    inputs = [text_inputs(config.model, config.data, manifest_of(config.model)) for config in configs]
    own = [source if config.method is not None and config.method.reward == "custom" else None for config in configs]
    whole = zip(configs, own, inputs, strict=True)
    return [new_run(config, folder, reward_source=kept, inputs=begun) for config, kept, begun in whole]


def stage_runs(stages: Sequence[TrainConfig], folder: Path) -> list[Run]:
    """The runs of a curriculum, each of which starts from the last checkpoint of the one before.

    The newest run in `folder` with a stage's configuration is resumed; where there is none, one is made.

    Raises ValueError where the text of a resumed run has changed since the run began.
    """
    check_inputs(stages)
    manifest = manifest_of(stages[0].model)
    runs: list[Run] = []
    for stage in stages:
        config = replace(stage, model=str(runs[-1].path)) if runs else stage
        runs += resume_or_create([config], folder)
        refuse_changes(runs[-1], {"texts": text_digests(stage.data, manifest)})  # its model may have no checkpoint yet
    return runs


def check_inputs(configs: Sequence[TrainConfig]) -> None:
    """Of all the kinds of recall document and the models, and of the first the rest, which is the others'.

    Prints which special tokens documents begin with, where there are any.
    """
    for kind in (kind for config in configs for kind in config.data.recall):
        parse_kind(kind)
    for model, device, settings in {(c.model, c.device, tuple(sorted(c.model_settings.items()))) for c in configs}:
        prepared(model, device=device, settings=dict(settings))
    config = configs[0]
    manifest = manifest_of(config.model)
    for source in config.data.sources:
        if source != "python" and not source.startswith("datasets:"):
            next(documents(source, "train", manifest))
    if told := beginning_told(load_tokenizer(config.model), config.data.add_bos):
        print(told)


def config_differences(runs: Iterable[Run]) -> pd.DataFrame:
    """The settings in which runs differ: a row a setting, a column a run, all texts; "–" where one has none.

    Of a group that some runs have none of, such as SFT of `method`, one row says who has it ("given"); its own settings are
    rows only where those who have it differ.
    """
    flat = {run.name: flat_settings(run.config) for run in runs}
    table = pd.DataFrame(flat).rename_axis("setting")
    group = table.index.str.rpartition(".").get_level_values(0)
    absent = table.index.intersection(group)  # groups that some have none of
    table.loc[absent] = table.loc[absent].fillna("given")
    kept = (table.nunique(axis=1) > 1) | (table.isna().any(axis=1) & ~group.isin(absent))
    return table[kept].fillna("–").reset_index()


def metrics(runs: Iterable[Run]) -> pd.DataFrame:
    """A row a batch of every run, with `arm` (as `run_groups.experiment_arms` names it) and `seed`."""
    return _joined((run, run.metrics()) for run in runs)


def evaluations(runs: Iterable[Run]) -> pd.DataFrame:
    """A row an evaluation of every run, with `arm` and `seed` as in `metrics`."""
    return _joined((run, run.evaluations()) for run in runs)


def stage_row(stage: TrainConfig) -> dict[str, Any]:
    """A stage of a curriculum in a line."""
    data = stage.data
    shares = (", ".join(f"{name} {share:g}" for name, share in part.items()) for part in (data.sources, data.recall))
    sizes = {"steps": stage.steps, "rows": stage.batch_size, "tokens a row": data.sequence_length}
    text, recall = shares
    return {"stage": stage.recipe, **sizes, "text": text, "recall": recall, "lr": stage.lr, "schedule": stage.schedule}


def joined_stages(runs: Sequence[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`metrics` and `evaluations` of a curriculum as if it were one run: steps counted on from stage to stage."""
    done, frames = 0, []
    for run in runs:
        pair = (run.metrics(), run.evaluations())
        frames.append([frame.assign(step=frame["step"] + done, arm=run.config.arm, seed=0) for frame in pair])
        done += run.config.steps
    train, held_out = (pd.concat(parts, ignore_index=True) for parts in zip(*frames, strict=True))
    return train, held_out


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer in a run's last checkpoint, or where there is none yet that of its model."""
    return load_tokenizer(run.config.model if run.latest_checkpoint() is None else run.path)


def last_rollouts(runs: Iterable[Run], steps: int = 5) -> pd.DataFrame:
    """The rollouts of the last `steps` batches of every REFINE run, with `arm` and `seed` as in `metrics`."""
    last = ((run, run.config.steps) for run in runs if run.config.method is not None)
    return _joined((run, run.rollouts(range(max(1, step - steps + 1), step + 1))) for run, step in last)


def _joined(frames: Iterable[tuple[Run, pd.DataFrame]]) -> pd.DataFrame:
    pairs = list(frames)
    arms = _arms_of([run for run, _ in pairs])
    parts = [frame.assign(arm=arm, seed=run.config.seed) for (run, frame), arm in zip(pairs, arms, strict=True)]
    return pd.concat(parts, ignore_index=True)


def _arms_of(runs: Sequence[Run]) -> list[str]:
    """The arm that each run is averaged under: runs of other settings are another."""
    return experiment_arms([(run.config.arm, run.config, run.name) for run in runs])


def final_results(runs: Sequence[Run], num_documents: int = 50, num_tokens: int = 512) -> list[dict[str, Any]]:
    """The base model and every run's, measured on the same held-out text, targets and facts; a line is printed of each.

    Recall is asked of `num_documents` documents of `num_tokens` tokens. The base is the model that the first run started with.
    What cannot be measured with this tokenizer or these rows is left out, and a sentence printed of it.
    """
    config = runs[0].config
    method = next((run.config.method for run in runs if run.config.method), RefineConfig())
    models = [("base", None, 0, config.model)]
    named = zip(runs, _arms_of(runs), strict=True)
    models += [(arm, r.config.seed, int(r.metrics()["updates"].iloc[-1]), str(r.path)) for r, arm in named]
    held_out, kinds, rows = None, [], []
    for arm, seed, updates, name in models:
        policy, tokenizer = load(name, config)
        if held_out is None:
            held_out = _held_out(config, tokenizer)
            kinds = _kinds_to_ask(held_out, num_documents, num_tokens)
            _tell_of_rewards(method, config.data.sequence_length)
        with autocast(policy.device, config.dtype):
            measured = held_out_measures(
                policy,
                held_out,
                num_chunks=method.num_chunks,
                rollout_length=method.rollout_length,
                kinds=kinds,
                documents=num_documents,
                document_tokens=num_tokens,
            )
        rows.append({"arm": arm, "seed": seed, "updates": updates, **measured})
        print(f"{arm}{'' if seed is None else f' s{seed}'}:", ", ".join(f"{k} {v:.4f}" for k, v in measured.items()))
    return rows


def _kinds_to_ask(held_out: SequenceData, num_documents: int, num_tokens: int) -> list[str]:
    """The kinds of recall document that this tokenizer and text make; of each other a sentence is printed."""
    kinds = []
    for kind in RECALL_KINDS:
        try:
            recall_documents(kind, num_documents, num_tokens, held_out)
        except ValueError as error:
            print(f"Recall of {kind} is left out: {error}.")
        else:
            kinds.append(kind)
    return kinds


def _tell_of_rewards(method: RefineConfig, length: int) -> None:
    chunks = method.num_chunks
    if not fixed_targets(chunks, method.rollout_length).fits(length):
        print(f"Rewards are left out: rows of {length} tokens have no room for rollouts from {chunks} chunks.")


def load(name: str, config: TrainConfig) -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    logging.disable_progress_bar()  # a widget for each of a second's work, blank where the notebook is only read
    return load_model(name, device=config.device, seed=config.seed, settings=config.model_settings)


def _held_out(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> SequenceData:
    rows = replace(config.data, recall={})  # recall is asked in documents of its own
    return SequenceData(rows, tokenizer, config.seed, "validation", manifest_of(config.model))


@torch.no_grad()
def entropies_of_document(run: Run) -> dict[str, Any]:
    """What `widgets.figures.entropy_profile` draws: the first held-out row, as the model of a REFINE run reads it.

    Raises ValueError for a run of the SFT arm, which selects nothing.
    """
    config = run.config
    method = config.method
    if method is None:
        raise ValueError(f"run {run.name} is SFT, which selects no positions; give it one of REFINE")
    policy, tokenizer = load(str(run.path), config)
    batch = _held_out(config, tokenizer).validation().rows(0, 1)
    there = batch.to(policy.device)
    with autocast(policy.device, config.dtype), hidden_states_only():
        stats = next_token_stats(policy, policy.read(there.tokens, there.lengths), there, entropy=True)
    entropies = F.pad(stats.entropies.cpu(), (0, 1))  # nothing is uncertain after the last token: nothing follows
    probabilities = selection_probabilities(entropies, batch.lengths, method)
    draws = Draws(seed=EVALUATION_SEED)
    positions = select_positions(probabilities, batch.lengths, batch.sequence_ids, draws, method.num_chunks)
    indexed = shift(entropies, method.entropy_index)
    size = batch.tokens.shape[1] // method.num_chunks
    return {
        "entropies": indexed[0].numpy(),
        "smoothed": _smoothed(indexed, batch.lengths, method),
        "positions": positions[0].tolist(),
        "chunk_borders": [size * chunk for chunk in range(method.num_chunks + 1)],
        "tokens": [tokenizer.decode([token]) for token in batch.tokens[0].tolist()],
    }


def _smoothed(entropies: torch.Tensor, lengths: torch.Tensor, method: RefineConfig) -> Any:
    kernel = method.smoothing_kernel if method.selection == "entropy" else 1
    return smooth(entropies, lengths, kernel)[0].numpy()
