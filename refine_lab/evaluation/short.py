"""The short-context tasks of table E.1: the harness's own tasks, from local copies of Hub data sets or from the Hub itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

from refine_lab.evaluation.benchmark import Benchmark, Measured, Missing, Setting
from refine_lab.evaluation.harness_tasks import measure_task
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.packages import harness
from refine_lab.runs.durable import digest


class ShortTask(NamedTuple):
    """A task's folder in the harness, its data set on the hub, its metric in table E.1, and whether it is averaged."""

    folder: str
    dataset: str
    main: str
    averaged: bool


TASKS = {
    "piqa": ShortTask("piqa", "baber/piqa", "acc", True),
    "hellaswag": ShortTask("hellaswag", "Rowan/hellaswag", "acc_norm", True),
    "winogrande": ShortTask("winogrande", "allenai/winogrande", "acc", True),
    "arc_easy": ShortTask("arc", "allenai/ai2_arc", "acc", True),
    "arc_challenge": ShortTask("arc", "allenai/ai2_arc", "acc_norm", True),
    "wikitext": ShortTask("wikitext", "EleutherAI/wikitext_document_level", "word_perplexity", False),
    "lambada_openai": ShortTask("lambada", "EleutherAI/lambada_openai", "perplexity", False),
    "fda": ShortTask("fda", "hazyresearch/based-fda", "contains", False),
    "swde": ShortTask("swde", "hazyresearch/based-swde-v2", "contains", False),
}
AVERAGED = {name: task.main for name, task in TASKS.items() if task.averaged} | {"lambada_openai": "acc"}
"""Task -> metric of the six columns in the table's average."""


def layout(setting: Setting, dataset: str) -> Path | None:
    """Returns the folder that contains `dataset` (org/name) in the layout of the Hub, or None."""
    if setting.data is None:
        return None
    found = sorted(path for path in setting.data.rglob(dataset) if path.is_dir())
    return found[0].parents[1] if found else None


@contextlib.contextmanager
def local_files(folder: Path | None, dataset: str) -> Iterator[None]:
    """Lets the library `datasets` read a data set from a folder in the layout of the Hub; with None it queries the Hub.

    The library looks in the working directory first. Its cache identifies a local data set only by its name, so
    each content gets a separate cache.
    """
    from datasets import config

    if folder is None:
        yield
        return
    files = sorted(path for path in (folder / dataset).rglob("*") if path.is_file())
    content = hashlib.sha256("".join(f"{path.name} {digest(path)}" for path in files).encode()).hexdigest()[:24]
    cache = Path(config.HF_DATASETS_CACHE) / "refine_lab" / content
    before = Path.cwd()
    os.chdir(folder)
    try:
        with patch.object(config, "HF_DATASETS_CACHE", cache):
            yield
    finally:
        os.chdir(before)


def load_task(setting: Setting, name: str) -> tuple[Any, dict[str, Any]]:
    """Returns a task of the harness, and where its data come from. Raises `Missing` if they cannot be read."""
    task = TASKS[name]
    folder = layout(setting, task.dataset)
    tasks = harness("tasks")
    path = Path(str(tasks.__file__)).parent / task.folder
    needs = (
        f"{name!r} needs the data set {task.dataset}: download it from "
        f"https://huggingface.co/datasets/{task.dataset} into {task.dataset}/ inside the --data folder"
    )
    if folder is None and offline():
        raise Missing(needs)
    try:
        with local_files(folder, task.dataset):
            manager = tasks.TaskManager(include_defaults=False, include_path=str(path))
            found = manager.load([name])["tasks"][name]
    except Exception as error:  # the libraries raise errors of every kind for data that are missing or damaged
        sentence = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Missing(f"{needs} ({sentence})") from error
    return found, {"data": f"{task.dataset}, {'local files' if folder else 'from the Hub'}"}


def offline() -> bool:
    """Returns whether the environment forbids access to the Hub."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def measure(lm: RefineLM, setting: Setting, name: str) -> Measured:
    """Measures one task. Raises `Missing` without its data, and with test-time training for a task without contexts."""
    if name == "wikitext" and lm.ttt is not None:
        raise Missing("'wikitext' has no contexts to adapt to: evaluate it without test-time training")
    task, facts = load_task(setting, name)
    return measure_task(lm, task, setting, facts)


def short_average(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the average of the table's six accuracies, or None unless all of them have been measured."""
    done = {record["task"]: record["metrics"] for record in records if record["status"] == "done"}
    if not all(name in done for name in AVERAGED):
        return None
    return fmean(done[name][metric]["value"] for name, metric in AVERAGED.items())


BENCHMARKS = [
    Benchmark(
        name=name,
        group="short",
        main=task.main,
        measure=partial(measure, name=name),
        about=f"{task.main} (table E.1)",
    )
    for name, task in TASKS.items()
]
