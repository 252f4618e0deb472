"""A search of settings for every method of post-training, with as many trials each, measured on validation examples alone.

    python -m benchmarks.search --model tiny-deltanet --json benchmarks/results/search_tiny-deltanet.json

Stage 1 is the same grid for all methods: learning rate, and twice as many batches. Stage 2 varies what belongs to a
method around its best of stage 1. Stage 3 gives nested REFINE the fewer inner updates that stage 2
gave nested SFT. A trial is kept when it ends;
started again, the search goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, write
from refine_lab.config import TrainConfig
from refine_lab.data.tasks.batches import TaskData
from refine_lab.data.tasks.examples import Task
from refine_lab.experiments.configs import method_configs
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState
from refine_lab.recipes import METHODS
from refine_lab.rng import Draws
from refine_lab.runs.answers import RENAMED_COLUMNS
from refine_lab.training.evaluation import answer_measures
from refine_lab.training.loading import load_policy, load_training_task
from refine_lab.training.optim import make_optimizers
from refine_lab.training.posttraining import nested_step

POSTTRAIN = METHODS["posttrain"]
SEED = 100
"""Of every trial; no run that is reported has it."""
VALIDATION = 200
"""Examples; the splits of the task share none with those that are reported on."""
Settings = dict[str, Any]
FIRST: list[Settings] = [
    {"lr": 3e-4, "steps": 25},
    {"lr": 1e-3, "steps": 25},
    {"lr": 3e-3, "steps": 25},
    {"lr": 1e-3, "steps": 50},
]


REFINE: list[Settings] = [
    {"nsp_coef": 1.0},
    {"reward": "cosine"},
    {"rollout_length": 8, "num_chunks": 4},
    {"rollout_length": 3, "num_chunks": 16},
]
"""Changes of REFINE's settings in the second stage."""
FEWER: list[Settings] = [{"mini_batch_size": 8}, {"mini_batch_size": 16}]
"""Two inner updates a batch, and one."""


def second(method: str, best: Settings) -> list[Settings]:
    """Four more trials of a method around the best of its first."""
    changes: dict[str, list[Settings]] = {
        "sft": [{"lr": best["lr"] / 2}, {"lr": best["lr"] * 2}, {"weight_decay": 0.1}, {"max_grad_norm": 0.3}],
        "nested_sft": [{"lr": best["lr"] / 2}, {"lr": best["lr"] * 2}, *FEWER],
        "nested_refine": REFINE,
    }
    return [best | change for change in changes[method]]


def main() -> None:
    chosen = arguments(__doc__)
    trials = trials_of(chosen.json)
    task = load_training_task([config_of(chosen.model, POSTTRAIN[-1], FIRST[0])])
    print(task.report)

    def made(method: str, settings: Settings) -> None:
        tried(trials, chosen, method, settings, lambda: trained(config_of(chosen.model, method, settings), task))

    two_stages(POSTTRAIN, FIRST, lambda method: second(method, best_of(trials, method, FIRST)), made)
    for change in FEWER:
        made("nested_refine", FIRST[0] | change)
    for method in POSTTRAIN:
        print(method, best_of(trials, method))


def two_stages(
    methods: Iterable[str],
    first: list[Settings],
    second: Callable[[str], list[Settings]],
    trial: Callable[[str, Settings], None],
) -> None:
    """Makes the trials `first` of every method, then those that `second` returns for it."""
    for method in methods:
        for settings in first:
            trial(method, settings)
    for method in methods:
        for settings in second(method):
            trial(method, settings)


def config_of(model: str, method: str, settings: Settings) -> TrainConfig:
    settings = {"model": model, "validation": VALIDATION, "test": 1, **settings}
    return method_configs("posttrain", [SEED], methods=[method], **settings)[0]


def trials_of(file: Path) -> list[dict[str, Any]]:
    """The trials that were made before, under the present names of their measures."""
    trials = json.loads(file.read_text(encoding="utf-8"))["trials"] if file.exists() else []
    return [{str(RENAMED_COLUMNS.get(name, name)): value for name, value in trial.items()} for trial in trials]


def tried(
    trials: list[dict[str, Any]],
    chosen: Any,
    method: str,
    settings: Settings,
    trial: Callable[[], dict[str, float]],
    validation: int = VALIDATION,
) -> None:
    """Make a trial that has not been made, and write all. `validation` examples are measured."""
    if any((made["method"], made["settings"]) == (method, settings) for made in trials):
        return
    began = time.monotonic()
    measures = trial()
    trials.append({"method": method, "settings": settings, "seconds": time.monotonic() - began, **measures})
    print(method, settings, {name: round(value, 4) for name, value in measures.items()}, flush=True)
    half = chosen.json.with_suffix(".half")
    write(half, {"trials": trials}, model=Path(chosen.model).name, seed=SEED, validation=validation)
    half.replace(chosen.json)


def trained(config: TrainConfig, task: Task) -> dict[str, float]:
    """Post-training as the loop makes it; what is measured of the validation examples after the last batch."""
    policy, tokenizer = load_policy(config)
    reward = None if config.refine is None else REWARDS[config.refine.reward]
    train_state = TrainState(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)
    data = TaskData(task.train, config.seed, config.refine)
    for step in range(config.steps):
        nested_step(train_state, data.batch(step, config.batch_size), Draws(seed=config.seed, step=step + 1))
    return answer_measures(policy, tokenizer, task.validation, task.rule)


def best_of(trials: list[dict[str, Any]], method: str, among: list[Settings] | None = None) -> Settings:
    """The settings with the most answers that contain a reference; of several, that with the lowest answer loss."""
    own = [t for t in trials if t["method"] == method and (among is None or t["settings"] in among)]
    return max(own, key=lambda trial: (trial["contains_answer"], -trial["answer_loss"]))["settings"]


if __name__ == "__main__":
    main()
