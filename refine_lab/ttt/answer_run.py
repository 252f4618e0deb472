"""Answers what a run of test-time training has left, with lines of progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from refine_lab.models.base import FastWeightLM
from refine_lab.tasks.examples import Task
from refine_lab.tasks.scores import SCORES
from refine_lab.ttt.records import TTTRun
from refine_lab.ttt.runs import Progress, run_prompts

SECONDS_BETWEEN_LINES = 5.0


def answer_run(
    run: TTTRun,
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stop: Callable[[], object] = lambda: None,
) -> None:
    """Answer what is unanswered of a run, with a line of progress every few seconds, until `stop` returns anything true."""
    name = f"{run.config.way} s{run.config.seed}"
    printed = time.monotonic()

    def report(progress: Progress) -> bool:
        nonlocal printed
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            left = "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
            print(f"{name}: prompt batch {progress.batch} of {progress.batches}{left}", flush=True)
        return bool(stop())

    run_prompts(run, model, tokenizer, task.test, task.rule, report)
    answers = run.answers()
    scored = [score for score in SCORES if answers[score].notna().any()]
    means = "".join(f", {score} {answers[score].mean():.3f}" for score in scored)
    print(f"{name}: {len(answers)} answers{means}", flush=True)
