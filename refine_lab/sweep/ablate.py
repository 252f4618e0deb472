"""Ablations as grids: the cells behind each table and figure, and the measures of their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from refine_lab.experiments.compare import answers_of, per_seed
from refine_lab.experiments.configs import drop_none, method_configs
from refine_lab.experiments.midtrain import held_out_rows
from refine_lab.recipes import METHODS
from refine_lab.recipes.ablations import Ablation
from refine_lab.runs.run import Run
from refine_lab.sweep.cells import Cell
from refine_lab.sweep.configs import cell_configs
from refine_lab.sweep.grid import Grid
from refine_lab.sweep.runner import Sweep
from refine_lab.validation import MOST_TOKENS, require

SETTING = "refine: "
"""Prefix of the method name that the tables show for a setting; the setting's label follows it."""
LAST_STEPS = 5
"""Number of last batches over which the training reward is averaged."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What all cells of an ablation share."""

    seeds: Sequence[int]
    midtrain: Mapping[str, Any]
    "Parameters of the mid-training notebook, such as `recipe`, `model` and `steps`; None for the recipe's value."
    ttt: Mapping[str, Any]
    "Parameters of the notebook of test-time training."
    documents: int = 50
    "Documents of each kind on which recall is measured."
    document_tokens: int = 512

    def __post_init__(self) -> None:
        require(1 <= self.documents <= 10_000, "recall_documents", self.documents, "from 1 to 10,000")
        tokens = self.document_tokens
        require(16 <= tokens <= MOST_TOKENS, "recall_tokens", tokens, f"from 16 to {MOST_TOKENS:,}")


def midtrain_grids(chosen: Mapping[str, Ablation], scale: Scale) -> list[Grid]:
    """Returns the grids of mid-training: the recipe's setting with its SFT run, and REFINE with every other setting.

    The recipe's setting is the common reference of all ablations and is trained once. Test-time training starts from it.
    """
    settings = [_recipe_setting()]
    for ablation in chosen.values():
        if ablation.phase == "midtrain":
            settings += changes(ablation, scale).values()
    unique = [setting for number, setting in enumerate(settings) if setting not in settings[:number]]
    shared = {**drop_none(**scale.midtrain), "methods": ",".join(METHODS["midtrain"]), "seeds": list(scale.seeds)}
    return [{**shared, **setting} for setting in unique]


def ttt_grids(chosen: Mapping[str, Ablation], scale: Scale, models: Mapping[int, str]) -> list[Grid]:
    """Returns the grids of test-time training for the seeds in `models`, which names the model of each."""
    settings = [each for ablation in chosen.values() if ablation.phase == "ttt" for each in ablation.settings.values()]
    fixed = drop_none(**scale.ttt)
    return [{**fixed, **setting, "model": models[seed], "seeds": [seed]} for setting in settings for seed in models]


def changes(ablation: Ablation, scale: Scale) -> dict[str, dict[str, Any]]:
    """Returns, by label, the parameters in which a setting of mid-training differs from the recipe.

    Settings other than the recipe's train no SFT run, which would be the same as the recipe's.
    """
    values = drop_none(**{"recipe": "midtrain", **scale.midtrain})
    *_, config = method_configs(seeds=scale.seeds[:1], phase="midtrain", **values)
    found = {}
    for label, setting in ablation.settings.items():
        differing = {name: value for name, value in setting.items() if getattr(config.refine, name) != value}
        found[label] = {**differing, "sft": False} if differing else _recipe_setting()
    return found


def trained_models(result: Sweep, *, or_initial: bool = False) -> dict[int, str]:
    """Returns the run of REFINE with the recipe's setting for each seed.

    Seeds whose run has not finished are left out, or have the model that it starts from if `or_initial`.
    """
    found: dict[int, str] = {}
    for cell in result.cells:
        if cell.values["sft"]:
            (seed,) = cell.values["seeds"]
            runs = [run for run in cell.runs if run.config.refine is not None and run.state == "finished"]
            if runs or or_initial:
                found[seed] = str(runs[-1].path) if runs else cell_configs(cell)[-1].model
    return found


def midtrain_rows(chosen: Mapping[str, Ablation], scale: Scale, result: Sweep) -> pd.DataFrame:
    """Returns a row per ablation, setting and seed with the measures of its finished run on the same held-out data.

    Columns: `ablation`, `method` (`refine: SETTING`, and `sft` and `base` in every ablation), `setting`, `default`
    (whether it is the recipe's), `seed`, the measures of `held_out_rows`, and `reward_mean` and `reward_std` of the
    last batches. Each run is evaluated once, and its measures are stored in its directory.
    """
    finished = {cell.name: [run for run in cell.runs if run.state == "finished"] for cell in result.cells}
    runs = [run for each in finished.values() for run in each]
    if not runs:
        return pd.DataFrame()
    recall = {"documents": scale.documents, "document_tokens": scale.document_tokens}
    measured = held_out_rows(runs, result.out, **recall)
    rows = []
    for name, ablation in chosen.items():
        if ablation.phase != "midtrain":
            continue
        rows.append({"ablation": name, "method": "base", "seed": -1, **measured["base"]})
        sft = [run for each in finished.values() for run in each if run.config.refine is None]
        labelled = [("sft", run, {}) for run in sft]
        for label, setting in changes(ablation, scale).items():
            facts = {"setting": label, "default": setting == _recipe_setting()}
            cells = cells_with(result, {**drop_none(**scale.midtrain), **setting})
            runs = [run for cell in cells for run in finished[cell.name] if run.config.refine is not None]
            labelled += [(SETTING + label, run, facts) for run in runs]
        for method, run, facts in labelled:
            own = {"ablation": name, "method": method, "seed": run.config.seed, **facts}
            rows.append({**own, **measured[str(run.path)], **_last_rewards(run)})
    return pd.DataFrame(rows)


def ttt_rows(chosen: Mapping[str, Ablation], scale: Scale, result: Sweep | None) -> pd.DataFrame:
    """Returns a row per ablation of test-time training, setting and seed with the mean scores of the answers.

    Columns as in `midtrain_rows`; the methods `none` and `sft` are the same in every cell, and are counted once.
    """
    rows = []
    for name, ablation in chosen.items():
        if ablation.phase != "ttt" or result is None:
            continue
        for label, setting in ablation.settings.items():
            for cell in cells_with(result, {**drop_none(**scale.ttt), **setting}):
                runs = [run for run in cell.runs if run.state == "finished"]
                for values in _scores(runs):
                    values["method"] = values["method"] if values["method"] in ("none", "sft") else SETTING + label
                    (values["seed"],) = cell.values["seeds"]
                    own = {"setting": label, "default": False} if values["method"].startswith(SETTING) else {}
                    rows.append({"ablation": name, **values, **own})
    frame = pd.DataFrame(rows)
    return frame.drop_duplicates(["ablation", "method", "seed"], ignore_index=True) if len(frame) else frame


def _scores(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the mean scores of the answers by method, and the mean loss of the prompts after adaptation."""
    if not runs:
        return []
    answers = answers_of(runs)
    losses = answers.groupby("method")["loss_after"].mean()
    scores = per_seed(answers)
    rows = scores.assign(loss_after=scores["method"].map(losses)).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def reward_curves(chosen: Mapping[str, Ablation], scale: Scale, result: Sweep, name: str = "k") -> pd.DataFrame:
    """Returns the metrics of the runs of one ablation, with `method` (`refine: SETTING`) and `seed` (figure E.3)."""
    frames = []
    for label, setting in changes(chosen[name], scale).items() if name in chosen else []:
        for cell in cells_with(result, {**drop_none(**scale.midtrain), **setting}):
            runs = [run for run in cell.runs if run.config.refine is not None]
            frames += [run.metrics().assign(method=SETTING + label, seed=run.config.seed) for run in runs]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def sweep_folder(runs: Path) -> Path:
    """Returns the folder of the ablations' cells inside a folder of runs."""
    return runs / "ablate"


def _recipe_setting() -> dict[str, Any]:
    return {"sft": True}


def cells_with(result: Sweep, setting: Mapping[str, Any]) -> list[Cell]:
    """Returns the cells with these values, whose other settings of REFINE are the notebook's defaults."""
    varied = {name for cell in result.cells for name, value in cell.values.items() if value != _default(cell, name)}
    free = varied - {"seeds", "model", "methods"} - setting.keys()
    return [
        cell
        for cell in result.cells
        if all(cell.values[name] == value for name, value in setting.items())
        and all(cell.values[name] == _default(cell, name) for name in free)
    ]


def _default(cell: Cell, name: str) -> Any:
    return cell.notebook.parameters[name].default


def _last_rewards(run: Run) -> dict[str, float]:
    last = run.metrics().tail(LAST_STEPS)
    return {name: float(last[name].mean()) for name in ("reward_mean", "reward_std") if name in last}
