"""Estimates how long the runs and evaluations of a `PaperPlan` take here, from a few timed steps of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from refine_lab.config import TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.evaluation.catalogue import units
from refine_lab.evaluation.results import read_unit
from refine_lab.experiments.paper_rows import phase_of
from refine_lab.experiments.paper_runs import PaperPlan, evaluations, midtrain_configs, posttrain_configs, ttt_configs
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models.decoding import greedy
from refine_lab.models.loading import manifest_of
from refine_lab.recipes import posttrain as laptop_posttrain
from refine_lab.rng import Draws
from refine_lab.runs.run import list_runs
from refine_lab.training.loading import load_policy
from refine_lab.training.optim import make_optimizers

START_SECONDS = 8.0
"""Seconds that a run needs besides its steps: starting a process, loading, and evaluations."""
ANSWER_TOKENS = {"niah": 128, "ruler": 32, "recall": 4}
"""Beginning of a task's name -> tokens of an answer."""
RECALL_QUESTIONS = 18
"""Questions about one document of each kind in the task `recall`."""
OTHER_TOKENS, OTHER_ANSWER = 2048, 64
"""Tokens of a sample and its answer that are assumed for tasks whose samples have lengths of their own."""
PROMPTS = 8
"""Prompts per batch of an evaluation."""


def estimate(plan: PaperPlan, folder: Path) -> pd.DataFrame:
    """Returns the minutes that each phase of `launch(plan, folder)` takes: `phase`, `work` (what is left), `minutes`.

    Two steps of each method, one forward pass over a batch and one greedy decoding are timed. The estimate is rough: it assumes
    that runs left over from an earlier call have not begun.
    """
    configs = midtrain_configs(plan) or posttrain_configs(replace(plan, chain=(4,)), plan.model, plan.seeds[0])
    rates = Rates(configs[-1])
    finished = [run for run in list_runs(folder) if run.state == "finished"]
    done = {phase: sum(phase_of(run) == phase for run in finished) for phase in ("midtrain", "posttrain", "ttt")}
    parts = [
        ("mid-training", _midtrain(plan, rates), done["midtrain"]),
        ("post-training", _posttrain(plan, rates), done["posttrain"]),
        ("test-time training", _ttt(plan, rates), done["ttt"]),
    ]
    lines = []
    for phase, seconds, finished_runs in parts:
        left = seconds[min(finished_runs, len(seconds)) :]
        lines.append({"phase": phase, "work": f"{len(left)} of {len(seconds)} runs", "minutes": sum(left) / 60})
    left, total, seconds = _evaluation(plan, folder, rates)
    lines.append({"phase": "evaluation", "work": f"{left} of {total} task measurements", "minutes": seconds / 60})
    frame = pd.DataFrame(lines)
    total_line = {"phase": "all", "work": "", "minutes": frame["minutes"].sum()}
    return pd.concat([frame, pd.DataFrame([total_line])], ignore_index=True)


class Rates:
    """Seconds per token of training and of forward passes, and per decoded token, with the model of a configuration."""

    def __init__(self, config: TrainConfig) -> None:
        self.policy, tokenizer = load_policy(config)
        data = SequenceData(config.data, tokenizer, config.seed, "train", manifest_of(config.model))
        rows = min(config.micro_batch_size, config.mini_batch_size)
        self.batch, self.config = data.batch(0, rows).to(self.policy.device), config
        tokens = int(self.batch.lengths.sum())
        self.refine = _timed(self._training("refine")) / tokens
        self.sft = _timed(self._training("sft")) / tokens
        with torch.no_grad():
            prompts = [row[:256].tolist() for row in self.batch.tokens]
            self.read = _timed(lambda: self.policy.read(self.batch.tokens, self.batch.lengths)) / tokens
            one, many = (_timed(lambda count=count: greedy(self.policy, prompts, count)) for count in (1, 17))
        self.decode = max(many - one, 1e-6) / 16

    def of(self, method: str) -> float:
        """Returns the seconds per token of one update by a method."""
        return self.refine if method.endswith("refine") else self.sft

    def _training(self, method: str) -> Callable[[], object]:
        rows = len(self.batch.lengths)
        sizes = {"batch_size": rows, "mini_batch_size": rows, "micro_batch_size": rows}
        config = replace(self.config, **sizes) if method == "refine" else replace(self.config, refine=None, **sizes)
        reward = None if config.refine is None else REWARDS[config.refine.reward]
        optimizers = make_optimizers(self.policy, replace(config, lr=1e-30))  # the weights stay as they are
        state = TrainState(policy=self.policy, optimizers=optimizers, config=config, reward=reward)
        return lambda: train_step(state, self.batch, Draws(seed=0, step=1))


def _timed(work: Callable[[], object]) -> float:
    """Returns the seconds of the second call."""
    work()
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _midtrain(plan: PaperPlan, rates: Rates) -> list[float]:
    return [
        START_SECONDS + config.steps * config.batch_size * config.data.sequence_length * rates.of(config.method)
        for config in midtrain_configs(plan)
    ]


def _posttrain(plan: PaperPlan, rates: Rates) -> list[float]:
    if not plan.posttrain_methods:
        return []
    found = []
    for config in posttrain_configs(plan, plan.model, plan.seeds[0]):
        task = config.task or laptop_posttrain().task
        assert task is not None
        inner = rates.of(config.method) if config.nested else 0.0
        steps = config.steps * config.batch_size * task.prompt_tokens * (inner + rates.sft)
        found.append(START_SECONDS + steps + (task.test or 0) * _answer(rates, task.prompt_tokens, "recall"))
    return found * len(plan.seeds)


def _ttt(plan: PaperPlan, rates: Rates) -> list[float]:
    if not plan.posttrain_methods:
        return []
    configs = ttt_configs(plan, plan.model, plan.seeds[0], ["none", *plan.ttt_methods])
    seconds = {}
    for config in configs:
        count, tokens = config.count or config.task.test or 0, config.task.prompt_tokens
        updates = 0 if config.ttt is None else config.ttt.steps
        each = updates * tokens * rates.of(config.method) + tokens * rates.read * 2 + 4 * rates.decode
        seconds[config.method] = START_SECONDS + count * each
    plain = [seconds["none"]] * (2 + len(plan.seeds))  # random weights, the base, and SFT mid-training
    return plain + [seconds[method] for method in plan.ttt_methods] * len(plan.seeds)


def _evaluation(plan: PaperPlan, folder: Path, rates: Rates) -> tuple[int, int, float]:
    """Returns how many tasks at one length are left, how many there are, and the seconds of those that are left."""
    names = {(method, seed): f"{method}-s{seed}" for method in plan.midtrain_methods for seed in plan.seeds}
    later = {(method, seed): f"{method}-s{seed}" for method in plan.posttrain_methods for seed in plan.seeds}
    left, total, seconds = 0, 0, 0.0
    for config, out in evaluations(plan, folder, names, later):
        wanted = units(config.tasks, config.lengths)
        missing = [unit for unit in wanted if read_unit(out, unit) is None]
        left, total = left + len(missing), total + len(wanted)
        seconds += sum(_task(plan, rates, unit.task, unit.length) for unit in missing)
    return left, total, seconds


def _task(plan: PaperPlan, rates: Rates, task: str, length: int | None) -> float:
    samples = plan.samples or 500
    questions = RECALL_QUESTIONS if task == "recall" else 1
    return samples * questions * _answer(rates, length or OTHER_TOKENS, task)


def _answer(rates: Rates, tokens: int, task: str) -> float:
    """Returns the seconds of one prompt: one forward pass, and its part of the decoding of a batch."""
    answer = _first((value for name, value in ANSWER_TOKENS.items() if task.startswith(name)), OTHER_ANSWER)
    return tokens * rates.read + answer * rates.decode / PROMPTS


def _first(values: Iterable[int], default: int) -> int:
    return next(iter(values), default)
