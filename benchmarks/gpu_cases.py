"""The cases of `benchmarks.gpu`: models at real shapes, and what is measured of each."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import interleaved, summary
from benchmarks.paper_step import paper_step
from refine_lab.estimate.models import PUBLISHED
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import DeltaNetForCausalLM, FastWeightLM
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.lact import LaCTForCausalLM
from refine_lab.ops.delta_rule import chunk_delta_rule, delta_rule
from refine_lab.ops.head import token_stats
from refine_lab.ops.kernels import SWITCH
from refine_lab.recipes import paper_midtrain
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.training.utilisation import flops_per_token, peak_flops
from refine_lab.types import Batch

LENGTHS = (16_384, 8192, 4096)
TOKENS = 65_536
"""Of a step: rows of 16,384 tokens are four of them."""
AT_ONCE = 16_384
"""Tokens of a micro-batch."""


def deltanet() -> DeltaNetForCausalLM:
    return DeltaNetForCausalLM(PUBLISHED["DeltaNet-1.3B"]())


def lact() -> LaCTForCausalLM:
    return LaCTForCausalLM(PUBLISHED["LaCT-760M"]())


MODELS: dict[str, Callable[[], FastWeightLM]] = {"deltanet-1.3b": deltanet, "lact-760m": lact}


# -- training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Rows of a step, their tokens, how many of them are in memory at once, and what the backward computes again."""

    rows: int
    length: int
    at_once: int
    activation_checkpointing: str = "none"


def train_state(
    policy: FastWeightLM, method: str, shape: Shape, dtype: str = "bfloat16", like: TrainState | None = None
) -> TrainState:
    """Of the paper's mid-training at that shape; with the optimizers of `like`, so that moments stand in memory once."""
    config = paper_midtrain(method)
    config = replace(
        config, batch_size=shape.rows, mini_batch_size=shape.rows, micro_batch_size=shape.at_once, dtype=dtype
    )
    reward = REWARDS["cosine"] if config.refine else None
    optimizers = like.optimizers if like else make_optimizers(policy, config)
    return TrainState(policy=policy, optimizers=optimizers, config=config, reward=reward)


def random_batch(policy: FastWeightLM, shape: Shape) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.config.vocab_size, (shape.rows, shape.length), generator=generator)
    lengths = torch.full((shape.rows,), shape.length)
    return Batch(tokens=tokens, lengths=lengths, sequence_ids=tuple(range(shape.rows))).to(policy.device)


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(policy: FastWeightLM, shape: Shape, repeats: int = 3, dtype: str = "bfloat16") -> dict[str, Any]:
    """An SFT and a REFINE step, in turn; the first of each apart, since kernels are compiled and tuned in it."""
    checkpoint_activations(policy, shape.activation_checkpointing)
    batch, turn, first, peaks = random_batch(policy, shape), iter(range(1_000_000)), {}, {}
    sft = train_state(policy, "sft", shape, dtype)
    methods = {"sft": sft, "refine": train_state(policy, "refine", shape, dtype, like=sft)}

    def step(method: str) -> None:
        train_step(methods[method], batch, Draws(seed=0, step=next(turn)))
        settle()

    for method in methods:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step(method)
        first[method] = time.perf_counter() - began
        peaks[method] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    times = interleaved({method: partial(step, method) for method in methods}, repeats)
    medians = {method: statistics.median(values) for method, values in times.items()}
    tokens, (name, peak) = shape.rows * shape.length, peak_flops()
    flops = flops_per_token(policy, shape.length)
    speeds = {method: tokens / seconds for method, seconds in medians.items()}
    return {
        "tokens_per_second": speeds,
        "mfu": {method: speed * flops / peak for method, speed in speeds.items()} if peak and flops else None,
        "peak": {"device": name, "flops_per_second": peak, "flops_per_token": flops},
        "memory_gib": peaks,
        "refine_over_sft": medians["refine"] / medians["sft"],
        "first_step_seconds": first,
        "tokens_of_a_step": tokens,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "seconds": summary(times),
    }


def paper(policy: FastWeightLM, shape: Shape, repeats: int = 1, dtype: str = "bfloat16") -> dict[str, Any]:
    """The released procedure (see `paper_step`) and ours on the same row, one update each."""
    checkpoint_activations(policy, shape.activation_checkpointing)
    batch, refine, turn = (
        random_batch(policy, shape),
        train_state(policy, "refine", shape, dtype),
        iter(range(1_000_000)),
    )

    def ours() -> None:
        train_step(refine, batch, Draws(seed=0, step=next(turn)))
        settle()

    def theirs() -> None:
        with refine.autocast():
            paper_step(refine, batch, Draws(seed=0, step=next(turn)))
        settle()

    times = interleaved({"refine": ours, "paper": theirs}, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = shape.rows * shape.length
    return {
        "paper_over_refine": medians["paper"] / medians["refine"],
        "tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()},
        "tokens_of_a_step": tokens,
        "seconds": summary(times),
    }


# -- kernels -------------------------------------------------------------------------------------------------------------


def switched(names: str, action: Callable[[], object]) -> Callable[[], None]:
    """The action with the kernels of those names on, waited for."""

    def run() -> None:
        os.environ[SWITCH] = names
        action()
        settle()
        os.environ[SWITCH] = ""

    return run


def compared(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, Any]:
    """Seconds of each, and which was the quickest."""
    times = interleaved(actions, repeats, warmups=2)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"quickest": min(medians, key=lambda name: medians[name]), "seconds": summary(times)}


def head_kernel(rows: int = 16_384, width: int = 2048, vocabulary: int = 32_000, repeats: int = 10) -> dict[str, Any]:
    """Logprobs, entropies and both gradients of a row's tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(rows, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device=device)

    def both() -> None:
        stats = token_stats(hidden, weight, ids)
        torch.autograd.grad(stats.logprobs.sum() + stats.entropies.sum(), (hidden, weight))

    return compared({"torch": switched("", both), "kernel": switched("head", both)}, repeats)


def delta_inputs(rows: int, length: int, heads: int, width: int) -> list[torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(rows, length, heads, width, device=device) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x, dim=-1).requires_grad_() for x in (q, k))
    beta = torch.rand(rows, length, heads, device=device).requires_grad_()
    return [q, k, v.requires_grad_(), beta, torch.zeros(rows, heads, width, width, device=device).requires_grad_()]


def chunk_kernel(length: int = 16_384, heads: int = 16, width: int = 128, repeats: int = 5) -> dict[str, Any]:
    """One layer of DeltaNet-1.3B: outputs, the states after eight tokens, and the gradients of both."""
    inputs = delta_inputs(1, length, heads, width)
    positions = torch.arange(8, device=inputs[0].device).unsqueeze(0) * (length // 8) + 37

    def both(rule: Callable[..., Any]) -> None:
        outputs, states = rule(*inputs)
        torch.autograd.grad(outputs.sum() + states.at(positions).sum(), inputs)

    return compared(
        {
            "torch": switched("", partial(both, chunk_delta_rule)),
            "kernel": switched("chunks", partial(both, chunk_delta_rule)),
            "default": switched("", partial(both, delta_rule)),  # fla's kernels, segment by segment
        },
        repeats,
    )


def short_reads(length: int, rows: int = 64, heads: int = 16, width: int = 128, repeats: int = 20) -> dict[str, Any]:
    """What rollouts read: a few tokens of many rows, in torch and on fla's kernels."""
    from refine_lab.ops.fla_delta_rule import segmented_delta_rule

    inputs = delta_inputs(rows, length, heads, width)

    def both(rule: Callable[..., Any]) -> None:
        torch.autograd.grad(rule(*inputs)[0].sum(), inputs)

    actions = {"torch": switched("", partial(both, chunk_delta_rule))}
    if torch.cuda.is_available():
        actions["fla"] = switched("", partial(both, segmented_delta_rule))
    return compared(actions, repeats)


# -- all of them ---------------------------------------------------------------------------------------------------------


def model_case(measure: Callable[..., dict[str, Any]], model: str, shape: Shape) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        policy = MODELS[model]()
    return measure(policy, shape)


def _cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what measures it, in the order they are run: what matters most first."""
    training: dict[str, Callable[[], dict[str, Any]]] = {}
    for length in LENGTHS:
        for part in ("none", "blocks", "mlp"):
            for model in MODELS:
                shape = Shape(
                    rows=TOKENS // length, length=length, at_once=AT_ONCE // length, activation_checkpointing=part
                )
                if part != "mlp" or length == LENGTHS[0]:
                    training[f"{model}/{length}/train/recompute-{part}"] = partial(model_case, train, model, shape)
    kernels: dict[str, Callable[[], dict[str, Any]]] = {"kernels/head": head_kernel, "kernels/chunks": chunk_kernel}
    kernels |= {f"kernels/short-{length}": partial(short_reads, length) for length in (1, 5, 16, 64)}
    papers = {
        f"{model}/{length}/paper": partial(
            model_case, paper, model, Shape(rows=1, length=length, at_once=1, activation_checkpointing="blocks")
        )
        for length in reversed(LENGTHS)
        for model in MODELS
    }
    return kernels | training | papers


CASES = _cases()


def run_case(name: str) -> dict[str, Any]:
    return CASES[name]()
