"""Trains tiny models with two workers and with one: `python -m tests.support.two_workers some`, or `all`, or a folder.

It forks after the slow imports. The workers exchange by gloo on this machine. The output is one JSON object. For each case
it has the largest differences of gradients after one step, of weights after five and of metrics, and whether the rollouts
have the same tokens. With a folder, it executes the runs of `tests.support.shared_runs` instead.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refine_lab.config import RefineConfig, TaskConfig, TrainConfig
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import OptimizerUpdate, TrainState, train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, sharding
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.training.posttraining import nested_step
from refine_lab.types import PromptBatch
from refine_lab.workers import ALONE, Workers, whole
from tests.factories.hybrids import make as make_hybrid
from tests.factories.lact import make_lact
from tests.factories.step import make_batch
from tests.support.shared_runs import resumed

STEPS, LENGTHS = 5, (60, 37, 52, 45)


def delta_net(**fields: Any) -> DeltaNetForCausalLM:
    sizes = dict(hidden_size=24, num_heads=2, num_hidden_layers=2, intermediate_size=40, vocab_size=53)
    torch.manual_seed(0)
    return DeltaNetForCausalLM(DeltaNetConfig(**{**sizes, "initializer_range": 0.05, **fields})).double()


def hybrid() -> Any:
    torch.manual_seed(0)
    return make_hybrid("qwen3_5_text")


MODELS: dict[str, Callable[[], Any]] = {
    "DeltaNet": lambda: delta_net(tie_word_embeddings=False),
    "tied DeltaNet": lambda: delta_net(tie_word_embeddings=True),
    "LaCT": make_lact,
    "hybrid": hybrid,
}
REFINE = RefineConfig(num_chunks=2, rollout_length=3, margin=4, group_size=2, reward="hybrid")
TASK = dict(task=TaskConfig(train=8), nested=True)
METHODS: dict[str, dict[str, Any]] = {
    "SFT": dict(refine=None),
    "REFINE": dict(refine=REFINE),
    "nested": dict(refine=REFINE, **TASK),
    "several updates": dict(refine=REFINE, mini_batch_size=2),
    "placebo": dict(refine=replace(REFINE, placebo=True)),
    "Muon": dict(refine=None, optimizer="muon"),
    "recomputed blocks": dict(refine=REFINE, activation_checkpointing="blocks"),
    "memory": dict(refine=replace(REFINE, selection="memory", short_contexts="windows", window=20)),
    "bfloat16": dict(refine=REFINE, dtype="bfloat16"),
}
SOME = [
    *[("DeltaNet", method) for method in ("SFT", "REFINE", "nested", "several updates", "memory", "bfloat16")],
    ("tied DeltaNet", "REFINE"),
    ("LaCT", "nested"),
    ("hybrid", "REFINE"),
]
"""What is compared in the tests that always run. With `memory`, the second row has no short contexts, and the fourth has."""
UNKNOWN = 7
"""The token whose embedding is NaN in `not_finite`."""


@dataclass
class Result:
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]
    tokens: list[list[list[int]]]


def state_of(policy: Any, method: str, workers: Workers, *, sharded: bool) -> TrainState[TrainConfig]:
    defaults = dict(batch_size=4, mini_batch_size=4, micro_batch_size=1, lr=0.01, device="cpu")
    config = TrainConfig(recipe="test", **{**defaults, **METHODS[method]})
    checkpoint_activations(policy, config.activation_checkpointing)
    if sharded:
        sharding.shard(policy, workers)
    reward = REWARDS[config.refine.reward] if config.refine and config.refine.rolls_out else None
    optimizers = make_optimizers(policy, config)
    return TrainState(policy=policy, optimizers=optimizers, config=config, reward=reward, workers=workers)


def trained(model: str, method: str, workers: Workers, *, sharded: bool = False) -> Result:
    """Trains five steps from the same weights on the same batches."""
    policy = MODELS[model]()
    state = state_of(policy.float() if method == "bfloat16" else policy, method, workers, sharded=sharded)
    policy, config, result = state.policy, state.config, Result({}, {}, [], [])
    for step in range(1, STEPS + 1):
        batch, draws = make_batch(LENGTHS, seed=step), Draws(seed=0, step=step)
        if config.nested:
            prompts = PromptBatch(sequences=batch, prompt_lengths=batch.lengths - torch.tensor([2, 3, 1, 4]))
            found = nested_step(state, prompts, draws)
        else:
            found = train_step(state, batch, draws)
        result.metrics.append(found.metrics)
        result.tokens.append([] if found.rollouts is None else found.rollouts.tokens.tolist())
        if step == 1:
            parameters = policy.named_parameters()
            result.gradients = {name: whole(x.grad).clone() for name, x in parameters if x.grad is not None}
    result.weights = {name: x.clone() for name, x in sharding.full_state(policy).items()}
    return result


def difference(one: Result, other: Result) -> dict[str, Any]:
    def largest(a: dict[str, Any], b: dict[str, Any]) -> float:
        if a.keys() != b.keys():
            return math.inf
        return max(float((torch.as_tensor(a[name]) - torch.as_tensor(b[name])).abs().max()) for name in a)

    return {
        "gradients": largest(one.gradients, other.gradients),
        "weights": largest(one.weights, other.weights),
        "metrics": max(largest(a, b) for a, b in zip(one.metrics, other.metrics, strict=True)),
        "same_tokens": one.tokens == other.tokens,
        "rollouts": sum(map(len, one.tokens)),
    }


@contextmanager
def replaced(owner: Any, name: str, value: Any):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def without_the_heads_gradient(apply: Callable[..., Any]) -> Callable[..., Any]:
    def run(update: OptimizerUpdate) -> dict[str, float]:
        update._train_state.policy.lm_head.weight.grad = None
        return apply(update)

    return run


def compared(workers: Workers, chosen: list[tuple[str, str]]) -> dict[str, Any]:
    """Trains each pair of a model and a method with one worker and, in both ways, with two."""
    found: dict[str, Any] = {}
    for model, method in chosen:
        one = trained(model, method, ALONE)
        for name, sharded in (("DDP", False), ("FSDP2", True)):
            if sharded and method == "Muon":
                continue
            other = trained(model, method, workers, sharded=sharded)
            found[f"{name}, {model}, {method}"] = difference(one, other)
    return found


def broken(workers: Workers) -> dict[str, Any]:
    """Trains without what makes two workers right; the differences must show it."""
    one, found = trained("DeltaNet", "SFT", ALONE), dict[str, Any]()
    with replaced(Workers, "sum_gradients", lambda self, parameters: None):
        found["without the sum of gradients"] = difference(one, trained("DeltaNet", "SFT", workers))
    with replaced(OptimizerUpdate, "apply", without_the_heads_gradient(OptimizerUpdate.apply)):
        found["without the head's gradient"] = difference(one, trained("DeltaNet", "SFT", workers, sharded=True))
    with replaced(sharding, "_groups", lambda policy: ([block] for block in sharding.blocks_of(policy))):
        try:
            trained("DeltaNet", "SFT", workers, sharded=True)
        except ValueError as error:
            found["only the blocks sharded"] = str(error)
    return found


def not_finite(workers: Workers) -> dict[str, Any]:
    """Trains one step in which the loss of a single row, which the second worker reads, is NaN."""
    batch, found = make_batch(LENGTHS), {}
    tokens = batch.tokens.masked_fill(batch.tokens == UNKNOWN, 1)
    tokens[3, 5] = UNKNOWN
    for method in ("SFT", "REFINE", "several updates"):
        for name, sharded in (("DDP", False), ("FSDP2", True)):
            policy = delta_net(tie_word_embeddings=False)
            with torch.no_grad():
                policy.get_input_embeddings().weight[UNKNOWN] = torch.nan
            before = policy.lm_head.weight.detach().clone()
            state = state_of(policy, method, workers, sharded=sharded)
            result = train_step(state, replace(batch, tokens=tokens), Draws(seed=0, step=1))
            unchanged = torch.equal(whole(policy.lm_head.weight.detach()), before)
            skipped = result.metrics["skipped_updates"] / result.metrics["updates"]
            facts = {"skipped": skipped, "unchanged": unchanged, "rollouts": result.rollouts is not None}
            found[f"{name}, {method}"] = facts
    return found


def cases(workers: Workers, which: str) -> dict[str, Any]:
    if which == "some":
        found = {"compared": compared(workers, SOME), "broken": broken(workers), "not finite": not_finite(workers)}
        return found if workers.first else {}
    return {"compared": compared(workers, [(model, method) for model in MODELS for method in METHODS])}


@contextmanager
def forked() -> Iterator[Workers]:
    """Forks this process into two workers, of which only the first one goes on after the block."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = 0 if os.fork() else 1
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    yield Workers(rank, 2)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 1:
        os._exit(0)
    os.wait()


def main() -> None:
    which = sys.argv[1]
    with forked() as workers:
        found = cases(workers, which) if which in ("some", "all") else resumed(Path(which), workers)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
