"""Test-time training on 4,096 tokens, the model loaded: seconds until the first step is reported, and of each step after."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch

from benchmarks.common import REPEATS, arguments, summary, write
from refine_lab.models import FastWeightLM, load_model
from refine_lab.recipes import ttt_per_prompt
from refine_lab.training.adaptation import adapted
from refine_lab.ttt_config import TTTConfig

TOKENS, STEPS = 4096, 4


def main() -> None:
    chosen = arguments(__doc__, REPEATS)
    repeats = chosen.repeats or 5
    model, _ = load_model(chosen.model, device="cpu")
    prompt = torch.randint(model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    figures = {}
    for method in ("refine", "sft"):
        config = ttt_per_prompt(method).ttt
        assert config is not None
        first, later = _times(model, prompt, config, repeats)
        figures[method] = {"first_step": first[0], "later_steps": statistics.median(later)} | {
            "seconds": summary({"first": first, "later": later})
        }
        print(f"{method:>6}: first step {first[0]:.2f} s, a step after {figures[method]['later_steps']:.2f} s")
    write(chosen.json, figures, model=chosen.model, repeats=repeats, tokens=TOKENS, steps=STEPS)


def _times(
    model: FastWeightLM, prompt: torch.Tensor, config: TTTConfig, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds from the call to the first report, nothing warmed up, and from report to report after."""
    first, later = [], []
    for _ in range(repeats):
        reports = [time.perf_counter()]
        with adapted(model, prompt, config, lambda _: reports.append(time.perf_counter())):  # noqa: B023
            gaps = [after - before for before, after in pairwise(reports)]
        first.append(gaps[0])
        later += gaps[1:]
    return first, later


if __name__ == "__main__":
    main()
