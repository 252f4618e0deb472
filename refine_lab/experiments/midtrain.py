"""Functions of the pre-training and mid-training notebooks: stages, held-out results, entropies of a document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_lab.config import RefineConfig, TrainConfig, to_json
from refine_lab.data.batches import SequenceData
from refine_lab.data.recall import RecallDocument, parse_kind
from refine_lab.experiments.compare import names_of
from refine_lab.experiments.configs import absolute_model, absolute_source, drop_none
from refine_lab.experiments.stored_scores import store_recall
from refine_lab.method.custom_selection import selection_function
from refine_lab.method.places import place_scores
from refine_lab.method.selection import select_positions, selection_probabilities, shift, smooth
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_tokenizer, manifest_of
from refine_lab.ops.precision import autocast
from refine_lab.recipes import recipe as named_recipe
from refine_lab.rng import Draws
from refine_lab.runs.files import read_json, write_json
from refine_lab.runs.run import Run
from refine_lab.runs.started import sources_of
from refine_lab.statistics.scores import NO_SEED
from refine_lab.training import evaluation, key_tokens
from refine_lab.training.adaptation import read_prompt
from refine_lab.training.loading import load_policy
from refine_lab.validation import require

Documents = Mapping[str, Sequence[RecallDocument]]
"""Recall documents by kind."""

MOST_RECALL_TOKENS = 2_048
"""Maximum length of the recall documents of `final_results`, unless it is given."""

SCORE_LABELS = {
    "memory": "gain of the next k tokens (nats)",
    "copy": "next tokens that can be copied",
    "custom": "score",
}
"""Selections that do not use the entropies, with the description of their scores."""


def pretrain_stages(
    model: str,
    prose: str | None = None,
    *,
    recipe: str = "pretrain",
    steps: int | None = None,
    last_stage: int | None = None,
) -> list[TrainConfig]:
    """Returns the stages of a curriculum up to `last_stage`, each with `steps` batches if given.

    Raises ValueError for an unknown curriculum or stage and for `steps` below 1.
    """
    stages = named_recipe(recipe, "pretrain").make(absolute_model(model), prose and absolute_source(prose))
    last = len(stages) if last_stage is None else last_stage
    require(1 <= last <= len(stages), "last_stage", last_stage, f"from 1 to {len(stages)}")
    require(steps is None or steps >= 1, "steps", steps, "at least 1")
    return [replace(stage, **drop_none(steps=steps)) for stage in stages[:last]]


def stage_row(stage: TrainConfig) -> dict[str, Any]:
    """Summarises a stage of a curriculum as one table row."""
    data = stage.data
    shares = {"text": data.sources, "recall": data.recall}
    texts = {key: ", ".join(f"{name} {share:g}" for name, share in part.items()) for key, part in shares.items()}
    sizes = {"steps": stage.steps, "rows": stage.batch_size, "tokens per row": data.sequence_length}
    return {"stage": stage.recipe, **sizes, **texts, "lr": stage.lr, "schedule": stage.schedule}


class FinalResults(NamedTuple):
    """The measures of the base model and of every run's model on the same held-out data."""

    rows: list[dict[str, Any]]
    "A row per model: `method`, `seed` (None for the base), `updates`, and the measures."
    answers: pd.DataFrame
    "A row per model and question of a recall document: `method`, `seed`, `name`, `question` and `exact_recall`."


def final_results(
    runs: Sequence[Run], kinds: Sequence[str] | None = None, num_documents: int = 200, num_tokens: int | None = None
) -> FinalResults:
    """Evaluates the base model and every run's model on the same held-out text, targets and facts, and prints one line each.

    A run's answers are also stored in its directory, where the run monitor finds them (`stored_scores.store_recall`).
    Recall uses `num_documents` documents of `num_tokens` tokens of each kind; `documents` is the number of distinct ones.
    None stands for the kinds of the runs' recall documents and their length, at most 2,048 tokens, or `RECALL_KINDS` and
    512 tokens if the runs have none. The base is the model that the runs start from, with a seed only if they start from
    several; that of the first run chooses the key tokens of LongPPL for all models. Measures that this tokenizer or these
    rows do not support are omitted, with a printed notice. Raises ConfigError for an unknown kind.
    """
    config = runs[0].config
    refine = next((run.config.refine for run in runs if run.config.refine), RefineConfig())
    targets = {"num_chunks": refine.num_chunks, "rollout_length": refine.rollout_length}
    bases = {run.config.model: run.config.seed for run in reversed(runs)}
    models: list[tuple[str, int | None, int, str]] = [
        ("base", None if len(bases) == 1 else seed, 0, model) for model, seed in reversed(bases.items())
    ]
    for run, method in zip(runs, names_of(runs), strict=True):
        models.append((method, run.config.seed, int(run.metrics()["updates"].iloc[-1]), str(run.path)))
    held_out = _held_out(config, load_tokenizer(config.model))
    documents = documents_to_ask(config, held_out, kinds, num_documents, num_tokens)
    if not evaluation.fixed_targets(**targets).fits(length := int(held_out.validation().lengths.min())):
        chunks = refine.num_chunks
        print(f"Rewards are skipped: rows of {length} tokens are too short for rollouts from {chunks} chunks.")
    keys, rows, answers, own = _key_tokens(config, held_out), [], [], {str(run.path): run for run in runs}
    untrained: dict[str, pd.DataFrame] = {}
    for method, seed, updates, name in models:
        measured, right = _measures_of(config, name, held_out, documents, **targets, key_tokens=keys)
        rows.append({"method": method, "seed": seed, "updates": updates, **_distinct(documents), **measured})
        answers.append(right.assign(method=method, seed=NO_SEED if seed is None else seed))
        untrained.setdefault(name, right)
        if (run := own.get(name)) is not None and len(right):
            store_recall(run, right, documents, before=untrained[run.config.model])
        values = (f"{name} {x:.4f}" if isinstance(x, float) else f"{name} {x}" for name, x in measured.items())
        print(f"{method}{'' if seed is None else f' s{seed}'}:", ", ".join(values))
    return FinalResults(rows, pd.concat(answers, ignore_index=True))


def documents_to_ask(
    config: TrainConfig,
    held_out: SequenceData,
    kinds: Sequence[str] | None = None,
    num_documents: int = 200,
    num_tokens: int | None = None,
) -> Documents:
    """Returns the recall documents of `final_results` by kind, and prints a sentence about each kind that is not supported."""
    trained = config.data.recall
    num_tokens = num_tokens or (min(config.data.sequence_length, MOST_RECALL_TOKENS) if trained else 512)
    found = {}
    for kind in kinds or [*trained] or evaluation.RECALL_KINDS:
        parse_kind(kind)
        try:
            found[kind] = evaluation.recall_documents(kind, num_documents, num_tokens, held_out)
        except ValueError as error:
            print(f"Recall of {kind} is skipped: {error}.")
    return found


def measures(
    policy: FastWeightLM, held_out: SequenceData, documents: Documents, **settings: Any
) -> tuple[dict[str, float], pd.DataFrame]:
    """Returns the measures of a model, and a row for each question of `documents`: `name`, `question`, `exact_recall`.

    `settings` as in `held_out_measures`.
    """
    measured, questions = evaluation.held_out_measures(policy, held_out, **settings), []
    for kind, asked in documents.items():
        pairs = list(zip(asked, evaluation.recalled(policy, asked), strict=True))
        found = [
            {"name": f"{kind} {number}", "question": f"{kind} {question.key}", "exact_recall": float(right)}
            for number, (document, answers) in enumerate(pairs)
            for question, right in zip(document.questions, answers, strict=True)
        ]
        length = max(len(document.tokens) for document in asked)
        measured[f"exact recall {kind} at {length}"] = fmean(row["exact_recall"] for row in found)
        questions += found
    return measured, pd.DataFrame(questions, columns=["name", "question", "exact_recall"])


def _distinct(documents: Documents) -> dict[str, int]:
    """Returns the number of distinct documents of a kind, the smallest one, as `documents`; nothing without a kind."""
    counts = [len({tuple(document.tokens) for document in asked}) for asked in documents.values()]
    return {"documents": min(counts)} if counts else {}


def held_out_rows(
    runs: Sequence[Run], folder: Path, *, documents: int = 50, document_tokens: int = 512
) -> dict[str, dict[str, float | int]]:
    """Evaluates the base model and every run's model on the same held-out text, targets and facts.

    Returns the measures by the run's path, and those of the first run's initial model as `base`, which chooses the key
    tokens of LongPPL. The targets are those of `fixed_targets(8, 5)`, whatever the runs were trained with. Each model is
    evaluated once: the measures are stored as `held_out.json` in the run's directory, and those of the base in `folder`.
    Measures that are not finite are left out. `documents` is the number of distinct recall documents.
    """
    config = runs[0].config
    held_out = _held_out(config, load_tokenizer(config.model))
    asked = documents_to_ask(config, held_out, evaluation.RECALL_KINDS, documents, document_tokens)
    recall: dict[str, Any] = {"documents": documents, "document_tokens": document_tokens, "kinds": [*asked]}
    keys = cache(lambda: _key_tokens(config, held_out))
    chosen = {"key_tokens_by": config.model, "key_threshold": key_tokens.THRESHOLD}
    places = [("base", config.model, folder), *((str(run.path), str(run.path), run.path) for run in runs)]
    found = {}
    for key, name, place in places:
        settings = {**recall, **chosen, "model": name, "data": json.loads(to_json(replace(config.data, recall={})))}
        settings |= {} if key == "base" else {"step": Run(place).done}
        path = place / "held_out.json"
        stored = read_json(path) if path.is_file() else {}
        if stored.get("settings") != settings:
            measured, _ = _measures_of(config, name, held_out, asked, key_tokens=keys())
            stored = {"settings": settings, "measures": {k: x for k, x in measured.items() if math.isfinite(x)}}
            write_json(path, stored)
        found[key] = {**_distinct(asked), **stored["measures"]}
    return found


def _measures_of(config: TrainConfig, name: str, *args: Any, **settings: Any) -> tuple[dict[str, float], pd.DataFrame]:
    """Returns the `measures` of the model `name`, in the arithmetic of a run's configuration."""
    policy, _ = load_policy(config, name)
    with autocast(policy.device, config.dtype):
        return measures(policy, *args, **settings)


def _key_tokens(config: TrainConfig, held_out: SequenceData) -> Bool[Tensor, "B S"]:
    """Returns the key tokens of the held-out rows, chosen by the model that a run starts from."""
    policy, _ = load_policy(config)
    with autocast(policy.device, config.dtype):
        return key_tokens.key_tokens(policy, held_out.validation())


def _held_out(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> SequenceData:
    rows = replace(config.data, recall={})  # recall is asked in documents of its own
    return SequenceData(rows, tokenizer, config.seed, "validation", manifest_of(config.model))


def entropies_of_document(run: Run) -> dict[str, Any]:
    """Returns the data of `widgets.figures.plots.entropy_profile`: the first held-out row, read by a REFINE run's model.

    Raises ValueError for a run of SFT, which selects no positions.
    """
    config, refine = run.config, run.config.refine
    if refine is None:
        raise ValueError(f"run {run.name} uses SFT, which selects no positions; pass a REFINE run")
    policy, tokenizer = load_policy(config, str(run.path))
    batch = _held_out(config, tokenizer).validation().rows(0, 1)
    with autocast(policy.device, config.dtype):
        reading = read_prompt(policy, batch.tokens[0])
        batch = batch.to(policy.device)
        entropies = F.pad(reading.entropies, (0, 1)).unsqueeze(0).to(policy.device)  # no token follows the last one
        source = sources_of(run.path)["selection"]
        selection = selection_function(source) if refine.selection == "custom" else None
        logprobs, draws = -reading.losses.unsqueeze(0).to(policy.device), Draws(seed=evaluation.EVALUATION_SEED)
        scores = place_scores(policy, batch, entropies, logprobs, refine, draws, selection)
    probabilities = selection_probabilities(scores, batch.lengths, refine)
    positions = select_positions(probabilities, batch.lengths, batch.sequence_ids, draws, refine.num_chunks)
    indexed, label = shift(entropies, refine.entropy_index), SCORE_LABELS.get(refine.selection)
    kernel = refine.smoothing_kernel if refine.selection == "entropy" else 1
    shown = smooth(indexed, batch.lengths, kernel) if label is None else scores.masked_fill(scores.isinf(), torch.nan)
    size = batch.tokens.shape[1] // refine.num_chunks
    return {
        "entropies": indexed[0].cpu().numpy(),
        "smoothed": shown[0].cpu().numpy(),
        "label": label or "smoothed",
        "positions": positions[0].tolist(),
        "chunk_borders": [size * chunk for chunk in range(refine.num_chunks + 1)],
        "tokens": [tokenizer.decode([token]) for token in batch.tokens[0].tolist()],
    }
