"""The runs that produce the table of evidence: their settings, what is measured after each, and the table with one row per run.

`notebooks/evidence.ipynb` trains and measures one run, and `benchmarks.evidence` executes it for every registered run.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from refine_lab.config import TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.recall import RecallDocument
from refine_lab.experiments.configs import drop_none, method_configs
from refine_lab.method.step import next_token_stats, split
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_tokenizer, manifest_of
from refine_lab.models.state import hidden_states_only
from refine_lab.ops.precision import autocast
from refine_lab.recipes.methods import CHANGES
from refine_lab.runs.durable import make_folder, replace_text
from refine_lab.runs.environment import environment
from refine_lab.runs.files import take_lock
from refine_lab.runs.run import Run
from refine_lab.training.evaluation import recall_documents, recalled
from refine_lab.training.key_tokens import WINDOW, key_tokens
from refine_lab.training.loading import load_policy
from refine_lab.training.rare_names import names_recalled, rare_names
from refine_lab.types import Batch
from refine_lab.validation import path_of, require, unknown

BASE = "base"
"""Name of the model before training, which is measured like a run."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    BASE: ("sft", {}),
    "sft": ("sft", {}),
    "longce": ("longce", {}),
    "dft": ("dft", {}),
    "weighted": ("weighted", {"selection": "memory"}),
    "expected_memory": ("expected", {"selection": "memory"}),
    "expected_memory_windows": ("expected", {"selection": "memory", "short_contexts": "windows"}),
    "expected_entropy": ("expected", {"selection": "entropy"}),
    "expected_copy": ("expected", {"selection": "copy"}),
    "refine": ("refine", {}),
    "refine_memory": ("refine_memory", CHANGES["refine_memory"]),
    "placebo": ("placebo", CHANGES["refine_memory"]),
}
"""Names of the evidence's methods -> the method of mid-training and the settings in which it differs from its recipe."""

DOCUMENTS = 600
"""Number of held-out recall documents; docs/log.md has the power computation."""
ROWS = 64
"""Number of held-out rows on which losses are measured."""
RECIPE: Mapping[str, Any] = {"steps": 60, "batch_size": 8, "eval_every": 20, "checkpoint_every": 20}
"""Settings of every run besides those of the recipe `midtrain`."""

COLUMNS = (
    *("experiment", "model", "task", "method", "coefficient", "seed", "exact_recall", "longppl", "ntp_loss"),
    *("key_tokens", "commit", "seconds"),
)
"""Columns of evidence.csv; recall from 0 to 1, losses in nats per token, seconds of training and measuring together."""
ITEM_COLUMNS = ("experiment", "model", "task", "method", "coefficient", "seed", "measure", "values")
"""Columns of evidence_items.csv: the values of one measure of one run, one per held-out document or row."""
KEYS = ("experiment", "model", "task", "method", "coefficient", "seed")
"""Columns that identify a run."""
TABLE, ITEMS = "evidence.csv", "evidence_items.csv"


@runtime_checkable
class Row(Protocol):
    """What a row of the table is about: anything with the values of `KEYS`."""

    @property
    def key(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class EvidenceRun:
    """One run of the evidence. None keeps the value of the method or the recipe."""

    experiment: str = "own"
    model: str = "tiny-deltanet"
    method: str = "sft"
    coefficient: float | None = None
    seed: int = 0
    recall: str = "number-1"
    "Kind of the recall documents; they are half of the rows, and what recall is measured on."
    planted: bool = True
    "Whether recall documents are among the rows that are trained on."
    data: str | None = None
    sequence_length: int = 1024
    lr: float | None = None
    steps: int | None = None
    group_size: int | None = None
    rollout_length: int | None = None
    reward: str | None = None
    scale_by_std: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in VARIANTS:
            raise unknown("method", self.method, VARIANTS)

    @property
    def label(self) -> str:
        """Returns the method's name with the settings in which this run differs from the method."""
        own = VARIANTS[self.method][1]
        parts = [self.method]
        for name, letter in (("group_size", "n"), ("rollout_length", "k"), ("steps", "steps"), ("lr", "lr")):
            value = getattr(self, name)
            parts += [] if value is None or value == own.get(name) else [f"{letter}{value:g}"]
        parts += [] if self.reward in (None, own.get("reward")) else [str(self.reward)]
        parts += ["unscaled"] if self.scale_by_std is False else []
        return "_".join(parts)

    @property
    def task(self) -> str:
        """Returns what the run is trained on and asked about: planted facts or a text, and the length of a row.

        It also names the text that planted facts are in, unless it is `python`, and the kind of facts that a run without
        planted ones is asked about, unless it is the default.
        """
        text = "python" if self.data is None else Path(self.data).name
        known = {"python"} if self.planted else {EvidenceRun.recall}
        names = [self.recall, text] if self.planted else [text, self.recall]
        shown = [names[0], *(name for name in names[1:] if name not in known)]
        return f"{' '.join(shown)} {self.sequence_length}"

    @property
    def key(self) -> tuple[str, ...]:
        """Returns the values of `KEYS` as they stand in the table."""
        refine = self.config.refine
        coefficient = "" if refine is None else f"{refine.nsp_coef:g}"
        return (self.experiment, self.model, self.task, self.label, coefficient, str(self.seed))

    @property
    def config(self) -> TrainConfig:
        """Returns the run's configuration. Raises ConfigError for a value that it rejects."""
        method, own = VARIANTS[self.method]
        names = ("model", "data", "sequence_length", "lr", "steps")
        chosen = drop_none(**{name: getattr(self, name) for name in names})
        settings = {name: getattr(self, name) for name in ("group_size", "rollout_length", "reward", "scale_by_std")}
        asked = drop_none(**settings, nsp_coef=self.coefficient)
        if asked.get("group_size") == 1 and "group_by" in own:
            own = {**own, "group_by": "sequence"}
        share = {self.recall: 0.5} if self.planted else {}
        settings = {**RECIPE, **own, **chosen, **asked, "recall": share}
        (config,) = method_configs("midtrain", [self.seed], phase="midtrain", methods=[method], **settings)
        for name, value in asked.items():
            applies = config.refine is not None and config.refine.uses(name) and getattr(config.refine, name) == value
            require(applies, name, value, f"none for {self.method!r}, which has no such setting")
        return config


# -- measures ------------------------------------------------------------------------------------------------------------


def measure(run: EvidenceRun, name: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Measures the model `name`, trained as `run` describes: the means of the table's columns, and their items.

    The items are `exact_recall` (0 or 1 for each of `DOCUMENTS` documents), `ntp_loss` (the mean loss of each of `ROWS` rows),
    `key_loss` (the same over its key tokens; rows without any are left out) and, for runs without planted facts,
    `rare_names` (0 or 1 for each later mention of a rare name, see `training.rare_names`). Documents, rows, key tokens and
    names are the same for every run of a task: the key tokens are chosen by the model that the run starts from.
    """
    config, held_out = run.config, _held_out(run)
    batch = held_out.validation()
    start, _ = load_policy(config)
    with autocast(start.device, config.dtype):
        keys = key_tokens(start, batch)
    del start
    policy, _ = load_policy(config, name)
    with autocast(policy.device, config.dtype):
        asked = _documents(run, held_out)
        right = [float(np.mean(answers)) for answers in recalled(policy, asked)]
        losses, key_sums = row_losses(policy, batch, keys)
        names = [] if run.planted else rare_names(load_tokenizer(config.model), batch, WINDOW)
        named = names_recalled(policy, batch, names)
    counts = keys.sum(1)
    targets = batch.lengths - 1
    total = int(counts.sum())
    means: dict[str, Any] = {
        "exact_recall": float(np.mean(right)),
        "ntp_loss": float(losses.sum() / targets.sum()),
        "longppl": float((key_sums.sum() / total).exp()) if total else None,
        "key_tokens": total,
    }
    some = counts > 0
    items = {
        "exact_recall": right,
        "ntp_loss": (losses / targets).tolist(),
        "key_loss": (key_sums[some] / counts[some]).tolist(),
    }
    if names:
        items["rare_names"] = [float(each) for each in named]
    return means, items


def questions_of(run: EvidenceRun) -> list[str]:
    """Returns the keys that each of the documents of `exact_recall` asks about; documents with the same keys are one item."""
    return [" ".join(each.key for each in document.questions) for document in _documents(run, _held_out(run))]


def _held_out(run: EvidenceRun) -> SequenceData:
    config = run.config
    data = replace(config.data, recall={}, validation_sequences=ROWS)
    return SequenceData(data, load_tokenizer(config.model), 0, "validation", manifest_of(config.model))


def _documents(run: EvidenceRun, held_out: SequenceData) -> list[RecallDocument]:
    return recall_documents(run.recall, DOCUMENTS, run.config.data.sequence_length, held_out)


@torch.no_grad()
def row_losses(
    policy: FastWeightLM, batch: Batch, keys: Bool[Tensor, "B S"], micro_batch_size: int = 4
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Returns the sum of the next-token losses of each row in nats, and that over its key tokens, float64 [B] each."""
    sums, key_sums = [], []
    for start, micro in split(batch, micro_batch_size):
        micro = micro.to(policy.device)
        with hidden_states_only():
            stats = next_token_stats(policy, policy.read(micro.tokens, micro.lengths), micro, entropy=False)
        width = stats.logprobs.shape[1]
        losses = -stats.logprobs.double().cpu()
        real = torch.arange(width) < (micro.lengths.cpu() - 1).unsqueeze(1)
        key = keys[start : start + len(losses), :width]
        sums.append(torch.where(real, losses, 0).sum(1))
        key_sums.append(torch.where(key, losses, 0).sum(1))
    return torch.cat(sums), torch.cat(key_sums)


# -- tables --------------------------------------------------------------------------------------------------------------


def recorded(folder: Path, key: tuple[str, ...]) -> bool:
    """Returns whether the table in `folder` has a row of the run with this key."""
    table = read_table(folder / TABLE)
    return bool(len(table)) and key in set(table[list(KEYS)].itertuples(index=False, name=None))


def record(folder: Path, run: Row, means: Mapping[str, Any], items: Mapping[str, list[float]], **facts: Any) -> None:
    """Adds the row of a run to the table in `folder`, and its items to the other table; a row that is there stays.

    `facts` are the columns `commit` and `seconds`. Both files are replaced as a whole while a lock is held, so that
    processes can add rows at the same time.
    """
    names = dict(zip(KEYS, run.key, strict=True))
    rows = [
        {**names, "measure": measure, "values": " ".join(f"{x:.6g}" for x in values)}
        for measure, values in items.items()
    ]
    with _locked(folder):
        if recorded(folder, run.key):
            return
        items_there = read_table(folder / ITEMS)  # an interrupted process may have added them without the row
        if not len(items_there) or run.key not in set(items_there[list(KEYS)].itertuples(index=False, name=None)):
            _add(folder / ITEMS, ITEM_COLUMNS, rows)
        _add(folder / TABLE, COLUMNS, [{**names, **means, **facts}])


def table_folder(name: str) -> Path:
    """Returns the folder of the tables. Raises ConfigError for a relative path or a file."""
    path = path_of("parameter table", name)
    require(path.is_absolute(), "parameter table", name, "an absolute path, or none for the folder for runs")
    require(path.is_dir() or not path.exists(), "parameter table", name, "a folder, or a path where one can be created")
    return path


def read_table(path: Path) -> pd.DataFrame:
    """Returns a table of the evidence with every cell as text; empty if there is no file."""
    if not path.is_file():
        return pd.DataFrame()
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def item_scores(folder: Path, measure: str, experiment: str | None = None) -> pd.DataFrame:
    """Returns the items of a measure as `method`, `coefficient`, `seed`, `item` and `score`, for `compare_methods`.

    The item is the number of the document or row. `experiment` keeps the runs of one experiment. Raises ConfigError for
    a measure that the table lacks.
    """
    table = read_table(folder / ITEMS)
    measures = sorted(set(table["measure"])) if len(table) else []
    if measure not in measures:
        raise unknown("measure", measure, measures)
    table = table[table["measure"] == measure]
    if experiment is not None:
        table = table[table["experiment"] == experiment]
        require(len(table) > 0, "experiment", experiment, f"one with runs in {folder / ITEMS}")
    parts = [
        pd.DataFrame({"score": [float(x) for x in row["values"].split()]}).assign(
            **{name: row[name] for name in KEYS}, item=range(len(row["values"].split()))
        )
        for _, row in table.iterrows()
    ]
    return pd.concat(parts, ignore_index=True).astype({"seed": int})


def _add(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.is_file():
        writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name)) for name in columns})
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    replace_text(path, before + text.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def _locked(folder: Path, seconds: float = 60.0) -> Iterator[None]:
    """Holds the lock of a folder, waiting for another process that holds it; raises RuntimeError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            lock = take_lock(folder)
            break
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    with lock:
        yield


def measure_and_record(run: EvidenceRun, folder: Path, trained: Sequence[Run]) -> None:
    """Measures a run and adds it to the tables in `folder`; `trained` is empty for the model before training."""
    began = time.monotonic()
    means, items = measure(run, str(trained[0].path) if trained else run.config.model)
    seconds = time.monotonic() - began + sum(float(each.metrics()["seconds"].sum()) for each in trained)
    commit = str(environment().get("commit") or "")[:10]
    make_folder(folder)
    record(folder, run, means, items, commit=commit, seconds=round(seconds))


def parameters_of(run: EvidenceRun) -> dict[str, Any]:
    """Returns the values of a run that are not None, as parameters of the notebook."""
    return drop_none(**{field.name: getattr(run, field.name) for field in fields(run)})
