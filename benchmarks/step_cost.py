"""Cost of a REFINE step against an SFT step and against the paper's own procedure, optimizer step included.

REFINE is measured with selection by entropy, as in the paper, and by memory, which reads short contexts as well.

CPU, float32, c 8, k 5: batches of 4 x 1,024 and 2 x 2,048 tokens, one update a batch, all interleaved in one process;
and four updates a batch on 8 x 1,024 tokens, as the paper has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common import REPEATS, arguments, interleaved, spread, summary, write
from benchmarks.paper_step import paper_step
from refine_lab.config import TrainConfig
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import FastWeightLM, load_model
from refine_lab.recipes import by_memory, midtrain
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.types import Batch

SHAPES = {1024: 4, 2048: 2}
"""Tokens of a row -> rows."""


def train_state(policy: FastWeightLM, method: str, rows: int, mini_batch: int) -> TrainState:
    config: TrainConfig = replace(
        midtrain(method), batch_size=rows, mini_batch_size=mini_batch, micro_batch_size=min(rows, 4), lr=1e-6
    )
    reward = REWARDS["cosine"] if config.rolls_out else None
    return TrainState(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)


def memory_state(policy: FastWeightLM, rows: int) -> TrainState:
    """Returns the state of REFINE by memory, otherwise as `refine`."""
    state = train_state(policy, "refine", rows, rows)
    window = max(state.config.refine.window, policy.attention_window(policy.config))
    refine = replace(by_memory(state.config.refine), window=window)
    return replace(state, config=replace(state.config, refine=refine))


def expected_state(
    policy: FastWeightLM,
    rows: int,
    selection: Literal["memory", "copy"],
    short_contexts: Literal["segments", "windows"] = "segments",
) -> TrainState:
    """Returns the state of the expected exact match at positions by memory or by copies."""
    state = train_state(policy, "expected", rows, rows)
    refine = replace(by_memory(state.config.refine, selection), short_contexts=short_contexts)
    return replace(state, config=replace(state.config, refine=refine))


def random_batch(policy: FastWeightLM, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.head.out_features, (rows, length), generator=generator)
    return Batch(tokens=tokens, lengths=torch.full((rows,), length), sequence_ids=tuple(range(rows)))


def measure(policy: FastWeightLM, length: int, rows: int, repeats: int, *, paper: bool = True) -> dict[str, Any]:
    """SFT, REFINE, REFINE by memory and, unless it is left out, the paper's own procedure on one batch."""
    batch = random_batch(policy, rows, length)
    sft, refine = (train_state(policy, method, rows, rows) for method in ("sft", "refine"))
    memory, turn = memory_state(policy, rows), iter(range(1_000_000))
    actions: dict[str, Callable[[], object]] = {
        "sft": lambda: train_step(sft, batch, Draws(seed=0, step=next(turn))),
        "refine": lambda: train_step(refine, batch, Draws(seed=0, step=next(turn))),
        "refine_memory": lambda: train_step(memory, batch, Draws(seed=0, step=next(turn))),
    }
    states = {
        "expected_memory": expected_state(policy, rows, "memory"),
        "expected_memory_windows": expected_state(policy, rows, "memory", "windows"),
        "expected_copy": expected_state(policy, rows, "copy"),
    }
    for name, state in states.items():
        actions[name] = lambda state=state: train_step(state, batch, Draws(seed=0, step=next(turn)))
    if paper:
        actions["paper"] = lambda: paper_step(refine, batch, Draws(seed=0, step=next(turn)))
    times = interleaved(actions, repeats)
    for name, values in times.items():
        print(f"{length:6d} tokens x {rows}  {name:24s}{spread(values)}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    names = [name for name in actions if name not in ("sft", "paper")]
    ratios = {f"{name}_over_sft": medians[name] / medians["sft"] for name in names}
    if paper:
        ratios["paper_over_refine"] = medians["paper"] / medians["refine"]
    return {**ratios, "sft_tokens_per_second": rows * length / medians["sft"], "seconds": summary(times)}


def measure_updates(policy: FastWeightLM, repeats: int) -> dict[str, Any]:
    """Four updates a batch in either method: the batch is rolled out before the first of them."""
    batch = random_batch(policy, 8, 1024)
    methods = {method: train_state(policy, method, 8, 2) for method in ("sft", "refine")}
    steps = {
        method: (lambda method=method: train_step(methods[method], batch, Draws(seed=0, step=1))) for method in methods
    }
    times = interleaved(steps, repeats)
    for name, values in times.items():
        print(f"  1024 tokens x 8, 4 updates  {name:8s}{spread(values)}")
    ratio = statistics.median(times["refine"]) / statistics.median(times["sft"])
    return {"refine_over_sft": ratio, "seconds": summary(times)}


def main() -> None:
    chosen = arguments(__doc__, REPEATS)
    repeats = chosen.repeats or 7
    policy, _ = load_model(chosen.model, device="cpu")
    figures = {str(length): measure(policy, length, rows, repeats) for length, rows in SHAPES.items()}
    figures["four_updates"] = measure_updates(policy, repeats)
    for name, values in figures.items():
        print(name, {key: round(value, 3) for key, value in values.items() if key != "seconds"})
    write(chosen.json, figures, model=Path(chosen.model).name, repeats=repeats, num_chunks=8, rollout_length=5)


if __name__ == "__main__":
    main()
