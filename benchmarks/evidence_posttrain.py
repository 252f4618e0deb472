"""Post-trains on prompts in which earlier questions have answers, and counts right answers (experiment 7).

    python -m benchmarks.evidence_posttrain --work DIR [--out docs/results] [--hours 1]

In these prompts REFINE can be rewarded for recalling a fact, since most questions are followed by their answers. Runs are kept
in DIR and continue from their checkpoints; rows that are in the tables are skipped. docs/log.md has the registration.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pandas as pd

from benchmarks.evidence import RESULTS, Measures, measure_in_turn
from refine_lab.config import TrainConfig
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.posttrain import final_answers, task_runs
from refine_lab.runs.queue import require_finished, run_in_turn
from refine_lab.training.loading import load_training_task

KIND = "word-12-q6"
"""Twelve facts, five answered questions, and the question that is asked."""
METHODS = ("sft", "nested_sft", "nested_weighted", "nested_expected", "nested_refine", "nested_refine_memory")


@dataclass(frozen=True, kw_only=True)
class PostRun:
    """One row of experiment 7: a method of post-training and a seed."""

    method: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """Returns the values of `experiments.evidence.KEYS`."""
        return ("7", "tiny-deltanet", f"post-training on {KIND} 512", self.method, "", str(self.seed))

    @property
    def config(self) -> TrainConfig:
        """Returns the run's configuration: the recipe `posttrain` on prompts of `KIND`."""
        (config,) = method_configs("posttrain", [self.seed], methods=[self.method], task=f"recall:{KIND}")
        return config


def runs() -> list[PostRun]:
    """Returns the registered rows, seed by seed."""
    return [PostRun(method=method, seed=seed) for seed in range(3) for method in METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evidence.csv")
    parser.add_argument("--hours", type=float, default=1.0, help="no run starts after this time")
    chosen = parser.parse_args()
    measure_in_turn(runs(), chosen.out, chosen.hours, partial(measure, work=chosen.work))


def measure(run: PostRun, work: Path) -> Measures:
    """Trains a run, and returns its share of right answers, the last next-token loss of the prompts, and its items."""
    answers, loss = train_and_answer(run.config, work)
    return {"exact_recall": float(answers["exact_match"].mean()), "ntp_loss": loss}, {
        "answers": answers["exact_match"].tolist()
    }


def train_and_answer(config: TrainConfig, work: Path) -> tuple[pd.DataFrame, float | None]:
    """Trains a run, or continues it; returns its answers in the order of the test prompts, and the last loss of the prompts.

    SFT on the answers alone has no such loss. Raises RuntimeError for a run that fails.
    """
    task = load_training_task([config])
    trained = task_runs([config], task, work)
    run_in_turn(trained, detach=False)
    require_finished(trained)
    answers, metrics = final_answers(trained[0], task), trained[0].metrics()
    loss = float(metrics["ntp_loss"].iloc[-1]) if "ntp_loss" in metrics else None
    return answers.set_index("name").loc[[example.name for example in task.test]], loss


@cache
def questions_asked() -> list[str]:
    """Returns the question of each test prompt, which are the items: prompts with the same question are one item."""
    return [example.question for example in load_training_task([runs()[0].config]).test]


if __name__ == "__main__":
    main()
