"""A search of settings of test-time training, SFT and REFINE (two more of it), measured on validation prompts alone.

    python -m benchmarks.search_ttt --model runs/RUN --json benchmarks/results/search_ttt_tiny-deltanet.json

`--model` is a run of post-training. Stage 1 is the same grid for both methods, learning rate and number of updates; stage 2
varies what belongs to a method around its best of stage 1; stage 3 gives REFINE the smaller changes that stage 2 gave SFT. Each
prompt is adapted on alone, asked, and undone. A trial is kept when it ends; started again, the search goes on from there.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import arguments
from benchmarks.search import REFINE, SEED, Settings, best_of, trials_of, tried, two_stages
from refine_lab.data.tasks.examples import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.experiments.configs import method_configs
from refine_lab.models import FastWeightLM
from refine_lab.training.adaptation import adapted
from refine_lab.training.evaluation import answer_measures
from refine_lab.training.loading import load_prompts
from refine_lab.ttt_config import TTTConfig, TTTRunConfig

RULE = AnswerRule(max_tokens=4, strip_leading=False)
"""How the recipe's questions are answered."""
VALIDATION = 100
"""Prompts; the splits of the task share none with those that are reported on."""
FIRST: list[Settings] = [
    {"lr": 1e-4, "steps": 4},
    {"lr": 3e-4, "steps": 4},
    {"lr": 1e-3, "steps": 4},
    {"lr": 3e-4, "steps": 8},
]

LESS: list[Settings] = [{"steps": 1}, {"lr": 5e-5}]
"""What helped SFT in its second stage, which is then tried with REFINE too."""


def second(method: str, best: Settings) -> list[Settings]:
    """Four more trials of a method around the best of its first."""
    changes: dict[str, list[Settings]] = {
        "sft": [{"lr": best["lr"] / 2}, {"steps": 1}, {"weight_decay": 0.1}, {"max_grad_norm": 0.3}],
        "refine": REFINE,
    }
    return [best | change for change in changes[method]]


def main() -> None:
    chosen = arguments(__doc__)
    trials = trials_of(chosen.json)
    config = config_of(chosen.model, "none", {})
    model, tokenizer, task = load_prompts(replace(config, task=replace(config.task, validation=VALIDATION)))
    print(task.report)

    def made(method: str, settings: Settings) -> None:
        ttt = config_of(chosen.model, method, settings).ttt
        tried(trials, chosen, method, settings, lambda: measured(model, tokenizer, task.validation, ttt), VALIDATION)

    made("none", {})
    two_stages(("sft", "refine"), FIRST, lambda method: second(method, best_of(trials, method, FIRST)), made)
    for change in LESS:
        made("refine", best_of(trials, "refine", FIRST) | change)
    for method in ("sft", "refine"):
        print(method, best_of(trials, method))


def config_of(model: str, method: str, settings: Settings) -> TTTRunConfig:
    """The recipe `per_prompt` with these settings."""
    return method_configs("per_prompt", [SEED], methods=[method], model=model, count=1, **settings)[0]


def measured(
    model: FastWeightLM, tokenizer: PreTrainedTokenizerBase, examples: tuple[Example, ...], ttt: TTTConfig | None
) -> dict[str, float]:
    """The measures of `answer_measures`, means over the prompts, each adapted on alone."""
    found: list[dict[str, float]] = []
    for example in examples:
        asked: dict[str, Any] = {"examples": [example], "rule": RULE}
        if ttt is None:
            found.append(answer_measures(model, tokenizer, **asked))
            continue
        with adapted(model, torch.tensor(example.prompt_ids), ttt):
            found.append(answer_measures(model, tokenizer, **asked))
    return {name: fmean(row[name] for row in found) for name in found[0]}


if __name__ == "__main__":
    main()
