"""Checks memory and two training steps of REFINE on random weights, as the paper's mid-training makes them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refine_lab.doctor.fault import Fault
from refine_lab.doctor.memory import GIB, MARGIN, Estimate, free_memory, usage_of
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import FastWeightLM
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.recipes import paper_midtrain
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.types import Batch

SHORT = 256
"""Tokens of the shorter of the two steps that memory is estimated from; windowed attention needs two windows."""

LARGER = "use a smaller model, or a device with more memory"


@dataclass(frozen=True, eq=False)
class Training:
    """A model with random weights in training: one row at a time, by the paper's recipe of mid-training."""

    state: TrainState

    @staticmethod
    def of(policy: FastWeightLM, activation_checkpointing: str) -> Training:
        config = replace(
            paper_midtrain("refine"),
            batch_size=1,
            mini_batch_size=1,
            micro_batch_size=1,
            dtype="bfloat16" if policy.device.type == "cuda" else "float32",
            activation_checkpointing=activation_checkpointing,
        )
        assert config.refine is not None
        checkpoint_activations(policy, activation_checkpointing)
        reward = REWARDS[config.refine.reward]
        return Training(
            TrainState(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)
        )

    @property
    def policy(self) -> FastWeightLM:
        return self.state.policy

    def batch(self, length: int) -> Batch:
        """Returns one row of random tokens."""
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(self.policy.head.out_features, (1, length), generator=generator)
        return Batch(tokens=tokens, lengths=torch.tensor([length]), sequence_ids=(0,)).to(self.policy.device)


def estimate_memory(training: Training, length: int) -> Estimate:
    """Returns the estimate for rows of up to `length` tokens, from two steps that are shorter where possible."""
    window = training.policy.attention_window(training.policy.config)
    short = min(max(SHORT, 2 * window), length // 2)
    train_step(training.state, training.batch(short), Draws(seed=0, step=1))  # creates the moments
    found = [usage_of(training.state, training.batch(n), Draws(seed=0, step=2))[0] for n in (short, 2 * short)]
    return Estimate(*found)


def check_memory(training: Training, length: int, free: int | None = None) -> tuple[Estimate, str]:
    """Returns the estimate and a sentence about it; `free` bytes are those of the device unless given.

    Raises Fault, which names settings that fit, if the estimate with its margin is above what is free.
    """
    free = free_memory(training.policy.device) + _held(training) if free is None else free
    try:
        estimate = estimate_memory(training, length)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise Fault(f"even a short step runs out of memory ({reason}): {LARGER}") from error
    needed = estimate.bytes(length)
    amounts = f"a step on one row of {length:,} tokens needs about {_gib(needed)}, and {_gib(free)} can be used"
    if needed * MARGIN <= free:
        return estimate, amounts
    raise Fault(f"{amounts}: {' or '.join(_advice(training, estimate, length, free)) or LARGER}")


def _advice(training: Training, estimate: Estimate, length: int, free: int) -> Iterator[str]:
    """Yields settings with which a step fits into `free` bytes."""
    part = training.policy.RECOMPUTABLE[-1]
    if training.state.config.activation_checkpointing != part:
        saving = estimate_memory(Training.of(training.policy, part), length).bytes(length)
        if saving * MARGIN <= free:
            yield f"set activation_checkpointing to {part!r}, which needs about {_gib(saving)},"
    if (longest := estimate.longest(free)) >= SHORT:
        yield f"use rows of at most {longest:,} tokens"


def _held(training: Training) -> int:
    """Returns the bytes that the model already holds, which are part of the estimate and no longer free."""
    return sum(x.numel() * x.element_size() for x in training.policy.parameters())


def check_steps(training: Training, length: int, estimate: Estimate) -> str:
    """Makes two steps and returns their losses, the speed of the second, and the peak memory of the first.

    Raises Fault for a step that is skipped because its loss or gradient is not finite, and if no weight changes.
    """
    policy, batch = training.policy, training.batch(length)
    before = [_start(p).clone() for p in policy.parameters()]
    usage, first = usage_of(training.state, batch, Draws(seed=0, step=3))
    _require_trained(first, 1)
    began = time.perf_counter()
    second = train_step(training.state, batch, Draws(seed=0, step=4)).metrics  # numbers: the device has finished
    seconds = time.perf_counter() - began
    _require_trained(second, 2)
    if all(map(torch.equal, before, map(_start, policy.parameters()))):
        raise Fault("two steps changed no weight: check that the parameters require gradients")
    losses = f"{first['ntp_loss']:.3f} and {second['ntp_loss']:.3f} nats a token"
    memory = f"{_gib(usage.peak)} at most ({_gib(estimate.bytes(length))} estimated)"
    return f"losses of {losses}; {seconds:.1f} s a step, {length / seconds:,.0f} tokens/s; {memory}"


def _start(parameter: Tensor) -> Tensor:
    """Returns the first weights of a parameter, so that comparing them needs no memory."""
    return parameter.detach().flatten()[:1000]


def _require_trained(metrics: Mapping[str, float], number: int) -> None:
    loss, norm = metrics["ntp_loss"], metrics["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm) and norm > 0):
        raise Fault(
            f"step {number} has the loss {loss:g} and the gradient norm {norm:g}: run the step in float32 and with "
            "REFINE_KERNELS unset to find which part of the arithmetic overflows"
        )


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2g} GiB" if size < GIB else f"{size / GIB:.1f} GiB"
