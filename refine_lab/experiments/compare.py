"""Compares runs of several methods: joined records, means with intervals, and paired differences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from refine_lab.data.tasks.items import items_of
from refine_lab.data.tasks.scores import SCORES
from refine_lab.experiments.run_groups import flat_settings, group_names
from refine_lab.models.loading import load_tokenizer
from refine_lab.recipes.methods import ORDER as ORDER
from refine_lab.runs.cards import FOLDER, read_cards
from refine_lab.runs.run import STARTED, Run
from refine_lab.runs.started import short
from refine_lab.statistics.means import mean_interval
from refine_lab.text import printable, shorten
from refine_lab.validation import ConfigError

READINGS = ("loss_before", "loss_after", "entropy_before", "entropy_after")
"""Measures of a prompt, in nats per token."""


NAMED_BY_METHOD = ("refine", "ttt", "ttt.refine")
"""Groups of settings that some methods lack."""


# -- records of runs ---------------------------------------------------------------------------------------------------


def metrics(runs: Iterable[Run]) -> pd.DataFrame:
    """Returns one row per batch of every run, with `method` (as named by `run_groups.group_names`) and `seed`."""
    return _joined(runs, Run.metrics)


def evaluations(runs: Iterable[Run]) -> pd.DataFrame:
    """Returns one row per evaluation of every run, with `method` and `seed` as in `metrics`."""
    return _joined(runs, Run.evaluations)


def last_rollouts(runs: Iterable[Run], steps: int = 5) -> pd.DataFrame:
    """Returns the rollouts of the last `steps` batches of every run with rollouts, with `method` and `seed` as in `metrics`."""

    def last(run: Run) -> pd.DataFrame:
        return run.rollouts(range(max(1, run.config.steps - steps + 1), run.config.steps + 1))

    return _joined((run for run in runs if run.config.rolls_out), last)


def joined_stages(runs: Sequence[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns `metrics` and `evaluations` of a curriculum as one run, with steps numbered across stages."""
    done, frames = 0, []
    for run in runs:
        pair = (run.metrics(), run.evaluations())
        frames.append([frame.assign(step=frame["step"] + done, method=run.config.method, seed=0) for frame in pair])
        done += run.config.steps
    train, held_out = (pd.concat(parts, ignore_index=True) for parts in zip(*frames, strict=True))
    return train, held_out


def tokenizer_of(run: Run) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a run's last checkpoint, or that of its initial model if there is no checkpoint.

    A model on the Hub is loaded only from the Hub's cache, since the run may come from another source.
    """
    return load_tokenizer(run.config.model if run.latest_checkpoint() is None else run.path, cached=True)


def names_of(runs: Sequence[Run]) -> list[str]:
    """Returns the name under which each run is averaged: its method, and any settings that distinguish the runs."""
    return group_names([(run.config.method, run.config, run.name) for run in runs])


def _joined(runs: Iterable[Run], read: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
    runs = list(runs)
    named = zip(runs, names_of(runs), strict=True)
    return pd.concat([read(run).assign(method=name, seed=run.config.seed) for run, name in named], ignore_index=True)


def config_differences(runs: Iterable[Run]) -> pd.DataFrame:
    """Returns the settings in which runs differ: one row per setting, one column per run, all strings; "–" for none.

    The first row is `method`, if the runs have several: it stands for the settings that some runs lack, such as `refine`
    for SFT. For another such group, one row marks the runs that have it ("set"). The group's own settings are
    rows only if the runs that have it differ.
    """
    flat = {run.name: {"method": run.config.method, **flat_settings(run.config)} for run in runs}
    if not flat:
        return pd.DataFrame({"setting": []})
    table = pd.DataFrame(flat).rename_axis("setting")
    group = table.index.str.rpartition(".").get_level_values(0)
    absent = table.index.intersection(group)  # groups that some runs lack
    table.loc[absent] = table.loc[absent].fillna("set")
    kept = (table.nunique(axis=1) > 1) | (table.isna().any(axis=1) & ~group.isin(absent))
    kept &= ~table.index.isin(NAMED_BY_METHOD)
    return table[kept].map(lambda value: value if pd.isna(value) else _unquoted(value)).fillna("–").reset_index()


def _unquoted(value: str) -> str:
    """Returns a setting's JSON as text: strings without quotes, null as `none`."""
    if value == "null":
        return "none"
    return str(json.loads(value)) if value.startswith('"') else value


def lineage(runs: Iterable[Run]) -> pd.DataFrame:
    """Returns one row per fork and per accepted change of runs: `run` and `event`, both strings."""
    rows = []
    for run in runs:
        try:
            rows += [(run.name, event) for event in _events(run)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            rows.append((run.name, f"{STARTED} is damaged"))
    return pd.DataFrame(rows, columns=["run", "event"])


CARD_COLUMNS = [
    *("run", "step", "date (UTC)", "task", "length", "metric", "value ± standard error"),
    *("samples (distinct)", "answers", "results"),
]


def evaluation_results(runs: Iterable[Run]) -> pd.DataFrame:
    """Returns one row per task and length of every evaluation in the runs' result cards, all strings; "–" for none.

    A task that could not run has its reason in place of the value. `results` is the folder of the full results, relative to the
    run directory.
    """
    rows: list[list[str]] = []
    for run in runs:
        try:
            rows += [[run.name, *map(_cell, row)] for card in read_cards(run.path) for row in _card_rows(card)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            rows.append([run.name, f"a file in {FOLDER} is damaged", *["–"] * (len(CARD_COLUMNS) - 2)])
    return pd.DataFrame(rows, columns=CARD_COLUMNS)


def _card_rows(card: Mapping[str, Any]) -> Iterator[list[Any]]:
    date = str(card["date"])[:16].replace("T", " ")
    answers = card["answers"] if card["ttt"] == "none" else f"{card['answers']}, after test-time {card['ttt']}"
    answers += f" with reward {card['ttt_reward']}" if card.get("ttt_reward") else ""
    for task in card["tasks"]:
        value, counts = shorten(f"not measured: {task.get('reason')}", 100), None
        if task["status"] == "done":
            spread = "" if task["stderr"] is None else f" ± {task['stderr']:.4f}"
            value, counts = f"{task['value']:.4f}{spread}", f"{task['samples']} ({task['different_samples']})"
        about = (card["step"], date, task["task"], task["length"], task["metric"])
        yield [*about, value, counts, answers, card["results"]]


def _cell(value: Any) -> str:
    return "–" if value is None else shorten(printable(str(value)))


def _events(run: Run) -> Iterator[str]:
    if (parent := run.parent) is not None:
        yield f"forked from {parent[0].name} after step {parent[1]}"
    for change in run.started.get("changes", []):
        values = f"from {short(change['before'])} to {short(change['now'])}"
        yield f"{change['name']} changed {values} after step {change['step']}"


def answers_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns one row per answer of several test-time training runs; `method` has a suffix for release updates."""
    return pd.concat([run.answers() for run in runs], ignore_index=True)


# -- measures ----------------------------------------------------------------------------------------------------------


def per_seed(answers: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per method and seed: `updates`, `items`, and the mean of each score over questions with references.

    `items` is the number of distinct questions (`data.tasks.items.items_of`).
    """
    grouped = answers.assign(item=items_of(answers)).groupby(["method", "seed"], sort=False)
    means = grouped[["updates", *SCORES]].mean()
    return means.assign(items=grouped["item"].nunique()).reset_index()


def per_prompt(answers: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per method and prompt, averaged over seeds; only prompts that every method has answered.

    The column `item` has the prompt's question (`data.tasks.items.items_of`).
    """
    shared = answers.groupby("name")["method"].nunique().eq(answers["method"].nunique())
    kept = answers.assign(item=items_of(answers))[answers["name"].map(shared)]
    return kept.groupby(["method", "name", "item"], sort=False)[[*SCORES, *READINGS]].mean().reset_index()


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean and spread of each measure over seeds, or over prompts if `rows` has a column `name`.

    `rows` has a row for each method and seed, or method and prompt: `method`, `seed` or `name`, and the measures. Returns
    a row for each method and measure: `method`, `measure`, `count` (rows of the method), `mean`, `std` (n - 1), and `low`
    and `high`, the ends of the 95 % interval by Student's t, NaN as in `mean_interval`. Raises ValueError if
    a method has two rows for one seed or prompt.
    """
    keys = ["method", _unit(rows)]
    repeated = rows.loc[rows.duplicated([key for key in keys if key in rows]), "method"].tolist()
    allowed = f"at most one for each method and {keys[1]}"
    sentence = f"rows must contain each method and {keys[1]} once; duplicated: {repeated[:1]}"
    if repeated:
        raise ConfigError("rows", repeated[:1], allowed, sentence)
    found = []
    for method, group in rows.groupby("method", sort=False):
        for measure in measures_of(rows):
            mean, low, high = mean_interval(group[measure].dropna().to_numpy())
            found.append((method, measure, len(group), mean, group[measure].std(ddof=1), low, high))
    return pd.DataFrame(found, columns=["method", "measure", "count", "mean", "std", "low", "high"])


def measures_of(rows: pd.DataFrame) -> list[str]:
    """Returns the columns of measures that have values: numbers, other than seeds, updates and counts."""
    numbers = rows.drop(columns=["seed", "updates", "items", "documents", "key_tokens"], errors="ignore").select_dtypes(
        "number"
    )
    return [str(name) for name in numbers if numbers[name].notna().any()]


def _unit(rows: pd.DataFrame) -> str:
    return "name" if "name" in rows else "seed"


def different_items(rows: pd.DataFrame) -> int | None:
    """Returns the number of distinct questions behind rows of `per_seed` or `per_prompt`; None for other rows."""
    if "item" in rows:
        return int(rows["item"].nunique())
    return int(rows["items"].max()) if "items" in rows else None
