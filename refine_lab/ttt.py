"""Test-time training: adapt a model to one prompt, answer, restore (paper, section 4.4).

    with adapted(model, prompt, config) as model:
        model.generate(prompt)            # the weights as the prompt has moved them
    model.generate(prompt)                # the weights as they were, bit for bit

`adapt` is the same as an iterator: it reports after each update, and whoever stops asking stops it.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType

import torch
from jaxtyping import Int
from torch import Tensor, nn

from refine_lab.config import Checked, DataConfig, RefineConfig, TrainConfig, require
from refine_lab.draws import Draws
from refine_lab.models.base import FastWeightLM
from refine_lab.optim import make_optimizers
from refine_lab.rewards import REWARDS
from refine_lab.step import Learner, train_step
from refine_lab.types import Batch, Rollouts


@dataclass(frozen=True, kw_only=True)
class TTTConfig(Checked):
    """How a model is adapted to a prompt."""

    method: RefineConfig | None = field(default_factory=lambda: RefineConfig(reward="binary", nsp_coef=0.4))
    "REFINE's settings (table 2: binary reward, weight 0.4), or none: SFT on the prompt."
    steps: int = 2
    "Updates, at most."
    lr: float = 1e-6
    "Learning rate of AdamW (table 2)."
    weight_decay: float = 0.01
    "Decoupled (table D.1)."
    max_grad_norm: float = 1.0
    "Gradients are scaled down to this norm."
    parameters: str = ".*"
    "A regular expression: parameters move where it is found in their names."
    stop_at_reward: float = float(2**53)
    "A mean reward after which no more updates are made; by default none."
    stop_at_loss: float = 0.0
    "A next-token loss, in nats, at or below which no more updates are made."
    seed: int = 0
    "Of every draw."

    def check(self) -> None:
        self._at_least(1, "steps")
        self._at_least(0, "weight_decay", "stop_at_loss", "seed")
        for name in ("lr", "max_grad_norm"):
            require(getattr(self, name) > 0, f"TTTConfig.{name}", getattr(self, name), "above 0")
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ValueError(
                f"TTTConfig.parameters must be a regular expression, got {self.parameters!r}: {error}"
            ) from None


@dataclass(frozen=True, eq=False, kw_only=True)
class Update:
    """What one update reports: its number from 1, the step's metrics, its rollouts (none for SFT), and its time."""

    number: int
    metrics: dict[str, float]
    rollouts: Rollouts | None
    seconds: float
    tokens_per_second: float
    num_chunks: int | None
    "Chunks rolled out from: fewer than asked for where the prompt has no room. None for SFT."


@contextmanager
def adapted(
    model: FastWeightLM,
    prompt: Int[Tensor, "T"],
    config: TTTConfig,
    on_update: Callable[[Update], object] = lambda update: None,
) -> Iterator[FastWeightLM]:
    """The model adapted to the prompt's tokens; afterwards it is what it was, whatever happened meanwhile.

    `on_update` is called after each update. Raises ValueError before anything is changed, for a prompt that is empty, too
    short to roll out from, or beyond the vocabulary, and for `parameters` that name none.
    """
    with restored(model, config.parameters):
        for update in adapt(model, prompt, config):
            on_update(update)
        yield model


def adapt(model: FastWeightLM, prompt: Int[Tensor, "T"], config: TTTConfig) -> Iterator[Update]:
    """Update the model on the prompt, and report after each update; nothing is undone here (see `restored`)."""
    learner = _learner(model, prompt, config)
    batch = Batch(tokens=prompt.unsqueeze(0), lengths=torch.tensor([len(prompt)]), sequence_ids=(0,)).to(model.device)
    method = learner.config.method
    for number in range(1, config.steps + 1):
        began = time.monotonic()
        result = train_step(learner, batch, Draws(seed=config.seed, step=number))
        seconds = time.monotonic() - began
        yield Update(
            number=number,
            metrics=result.metrics,
            rollouts=result.rollouts,
            seconds=seconds,
            tokens_per_second=len(prompt) / seconds,
            num_chunks=None if method is None else method.num_chunks,
        )
        enough = result.metrics.get("reward_mean", -1.0) >= config.stop_at_reward
        if enough or result.metrics["ntp_loss"] <= config.stop_at_loss:
            return


def _learner(model: FastWeightLM, prompt: Tensor, config: TTTConfig) -> Learner:
    """What `train_step` trains with: a batch is the one prompt, an optimizer begins without moments."""
    require(len(prompt) >= 2, "a prompt's tokens", len(prompt), "at least 2: one to read and one to predict")
    vocabulary = len(model.head_weight)
    inside = 0 <= int(prompt.min()) and int(prompt.max()) < vocabulary
    require(inside, "a prompt's tokens", [int(prompt.min()), int(prompt.max())], f"from 0 to {vocabulary - 1}")
    method = None if config.method is None else fitted(config.method, len(prompt))
    run = TrainConfig(
        recipe="ttt",
        method=method,
        data=DataConfig(sequence_length=max(len(prompt), 16)),
        steps=config.steps,
        batch_size=1,
        mini_batch_size=1,
        micro_batch_size=1,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
    )
    reward = None if method is None else REWARDS[method.reward]
    return Learner(policy=model, optimizers=make_optimizers(model, run), config=run, reward=reward)


def fitted(method: RefineConfig, length: int) -> RefineConfig:
    """The method with as many chunks of k + 1 tokens as a prompt of so many tokens has room for, at most its own.

    The margin gives way first, down to nothing: it belongs to long documents. Raises ValueError where not even one fits.
    """
    k = method.rollout_length
    for margin in dict.fromkeys((method.margin, 0)):
        for num_chunks in range(min(method.num_chunks, length // (k + 1)), 0, -1):
            found = replace(method, num_chunks=num_chunks, margin=margin)
            if found.fits(length):
                return found
    raise ValueError(f"a prompt of {length} tokens has no room for a rollout of {k}; it must have at least {k + 1}")


@contextmanager
def restored(model: nn.Module, parameters: str = ".*") -> Iterator[dict[str, nn.Parameter]]:
    """The parameters in whose names `parameters` is found; afterwards all are what they were, bit for bit.

    Only these can move meanwhile, and only they are kept aside. What is put back needs no memory that is not there yet, and an
    interrupt (Ctrl-C, a notebook's stop) waits until all is back.
    """
    named = dict(model.named_parameters())
    moved = {name: p for name, p in named.items() if re.search(parameters, name)}
    require(len(moved) > 0, "parameters", parameters, f"found in a name, such as {next(iter(named))!r}")
    flags = {name: p.requires_grad for name, p in named.items()}
    gradients = {name: p.grad for name, p in named.items()}
    kept = {name: p.detach().clone() for name, p in moved.items()}
    try:
        for name, p in named.items():
            p.requires_grad_(name in moved)
            p.grad = None
        yield moved
    finally:
        with _uninterrupted(), torch.no_grad():
            for name, p in named.items():
                p.requires_grad_(flags[name])
                p.grad = gradients[name]
                if name in kept:
                    p.copy_(kept[name])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT waits until the end. Python delivers it to the main thread alone: elsewhere there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[-1])
