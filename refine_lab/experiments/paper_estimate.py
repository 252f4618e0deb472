"""Estimates how long the runs and evaluations of a `PaperPlan` take here, from a few timed steps of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from refine_lab.config import TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.evaluation.catalogue import units
from refine_lab.evaluation.results import read_unit
from refine_lab.experiments.estimate import Rates, answering_rates, start_seconds, training_rates
from refine_lab.experiments.paper_rows import phase_of
from refine_lab.experiments.paper_runs import PaperPlan, evaluations, midtrain_configs, posttrain_configs, ttt_configs
from refine_lab.models.decoding import greedy
from refine_lab.models.loading import manifest_of
from refine_lab.runs.run import list_runs
from refine_lab.training.loading import load_policy
from refine_lab.ttt_config import TTTRunConfig

ANSWER_TOKENS = {"niah": 128, "ruler": 32, "recall": 4}
"""Prefix of a task's name -> tokens of an answer."""
RECALL_QUESTIONS = 18
"""Questions about one document of each kind in the task `recall`."""
OTHER_TOKENS, OTHER_ANSWER = 2048, 64
"""Assumed tokens per sample, and per answer, for tasks whose samples vary in length."""
PROMPTS = 8
"""Prompts per batch of an evaluation."""


def estimate(plan: PaperPlan, folder: Path) -> pd.DataFrame:
    """Returns the minutes that each phase of `launch(plan, folder)` takes: `phase`, `work` (what is left), `minutes`.

    One run of each method and phase, a forward pass over a batch and a greedy decoding are timed in part, with the model
    before training. The estimate is rough: it assumes that runs left over from an earlier call have not begun.
    """
    configs = midtrain_configs(plan) or posttrain_configs(replace(plan, chain=(4,)), plan.model, plan.seeds[0])
    reading = Reading(configs[-1])
    finished = [run for run in list_runs(folder) if run.state == "finished"]
    lines = []
    for phase, name, seconds in (
        ("midtrain", "mid-training", _seconds(midtrain_configs(plan))),
        ("posttrain", "post-training", _posttrain(plan, reading)),
        ("ttt", "test-time training", _ttt(plan)),
    ):
        left = seconds[sum(phase_of(run) == phase for run in finished) :]
        lines.append({"phase": name, "work": f"{len(left)} of {len(seconds)} runs", "minutes": sum(left) / 60})
    units_left, total, seconds = _evaluation(plan, folder, reading)
    lines.append({"phase": "evaluation", "work": f"{units_left} of {total} task measurements", "minutes": seconds / 60})
    lines.append({"phase": "all", "work": "", "minutes": sum(line["minutes"] for line in lines)})
    return pd.DataFrame(lines)


class Reading:
    """Seconds per token of forward passes, and per decoded token of a batch, with the model of a configuration."""

    @torch.no_grad()
    def __init__(self, config: TrainConfig) -> None:
        policy, tokenizer = load_policy(config)
        data = SequenceData(config.data, tokenizer, config.seed, "train", manifest_of(config.model))
        batch = data.batch(0, min(config.micro_batch_size, config.mini_batch_size)).to(policy.device)
        prompts = [row[:256].tolist() for row in batch.tokens]
        self.token = _timed(lambda: policy.read(batch.tokens, batch.lengths)) / int(batch.lengths.sum())
        one, many = (_timed(lambda count=count: greedy(policy, prompts, count)) for count in (1, 17))
        self.decoded = max(many - one, 1e-6) / 16

    def answer(self, tokens: int, task: str) -> float:
        """Returns the seconds of one prompt: one forward pass, and its part of the decoding of a batch."""
        answers = (value for name, value in ANSWER_TOKENS.items() if task.startswith(name))
        return tokens * self.token + next(answers, OTHER_ANSWER) * self.decoded / PROMPTS


def _timed(work: Callable[[], object]) -> float:
    """Returns the seconds of the second call."""
    work()
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _seconds(configs: Sequence[TrainConfig | TTTRunConfig]) -> list[float]:
    """Returns the seconds of each run; runs of one method have the same speed."""
    rates: dict[str, Rates] = {}
    for config in configs:
        if config.method not in rates:
            timed = training_rates(config) if isinstance(config, TrainConfig) else answering_rates(config)
            rates[config.method] = timed
    return [start_seconds() + rates[config.method].seconds(config) for config in configs]


def _posttrain(plan: PaperPlan, reading: Reading) -> list[float]:
    """Returns the seconds of each run of post-training with the answers to its test questions."""
    if not plan.posttrain_methods:
        return []
    configs = posttrain_configs(plan, plan.model, plan.seeds[0])
    tasks = [config.task for config in configs if config.task is not None]
    answers = [(task.test or 0) * reading.answer(task.prompt_tokens, "recall") for task in tasks]
    return [sum(pair) for pair in zip(_seconds(configs), answers, strict=True)] * len(plan.seeds)


def _ttt(plan: PaperPlan) -> list[float]:
    if not plan.posttrain_methods:
        return []
    configs = ttt_configs(plan, plan.model, plan.seeds[0], ["none", *plan.ttt_methods])
    plain, *adapted = _seconds(configs)
    # the answers without adaptation are those of random weights, the base, and SFT mid-training
    return [plain] * (2 + len(plan.seeds)) + adapted * len(plan.seeds)


def _evaluation(plan: PaperPlan, folder: Path, reading: Reading) -> tuple[int, int, float]:
    """Returns how many tasks at one length are left, how many there are, and the seconds of those that are left."""
    names = {(method, seed): f"{method}-s{seed}" for method in plan.midtrain_methods for seed in plan.seeds}
    later = {(method, seed): f"{method}-s{seed}" for method in plan.posttrain_methods for seed in plan.seeds}
    left, total, seconds = 0, 0, 0.0
    for config, out in evaluations(plan, folder, names, later):
        wanted = units(config.tasks, config.lengths)
        missing = [unit for unit in wanted if read_unit(out, unit) is None]
        left, total = left + len(missing), total + len(wanted)
        seconds += sum(_task(plan, reading, unit.task, unit.length) for unit in missing)
    return left, total, seconds


def _task(plan: PaperPlan, reading: Reading, task: str, length: int | None) -> float:
    samples = plan.samples or 500
    questions = RECALL_QUESTIONS if task == "recall" else 1
    return samples * questions * reading.answer(length or OTHER_TOKENS, task)
