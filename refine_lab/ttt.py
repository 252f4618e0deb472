"""Test-time training: adapt a model to one prompt, answer, restore (paper, section 4.4).

    prompt = tokenizer(text, return_tensors="pt").input_ids        # [1, T]
    with adapted(model, prompt[0], TTTConfig()) as model:
        model.generate(prompt)                                     # with the weights as the prompt has moved them
    model.generate(prompt)                                         # with the weights as they were, bit for bit

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
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from refine_lab.config import Checked, DataConfig, RefineConfig, TrainConfig, require
from refine_lab.draws import Draws
from refine_lab.models.base import FastWeightLM
from refine_lab.optim import make_optimizers
from refine_lab.rewards import REWARDS
from refine_lab.step import Learner, StepResult, train_step
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
    "A regular expression: of the parameters that take gradients, those move in whose names it is found."
    stop_at_reward: float | None = None
    "A mean reward at or above which no more updates are made."
    stop_at_loss: float | None = None
    "A next-token loss, in nats, at or below which no more updates are made."
    seed: int = 0
    "Of every draw."
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Of the arithmetic (autocast); parameters and Adam moments keep the model's."

    def check(self) -> None:
        self._at_least(1, "steps")
        self._at_least(0, "weight_decay", "seed")
        for name in ("lr", "max_grad_norm"):
            require(getattr(self, name) > 0, f"TTTConfig.{name}", getattr(self, name), "above 0")
        try:
            re.compile(self.parameters)
        except re.error as error:
            sentence = f"TTTConfig.parameters must be a regular expression, got {self.parameters!r}: {error}"
            raise ValueError(sentence) from None
        if self.method is None:
            require(self.stop_at_reward is None, "TTTConfig.stop_at_reward", self.stop_at_reward, "none for SFT")
            return
        known = ", ".join(map(repr, REWARDS))
        require(self.method.reward in REWARDS, "TTTConfig.method.reward", self.method.reward, f"one of {known}")
        require(self.method.kl_coef == 0, "TTTConfig.method.kl_coef", self.method.kl_coef, "0: nothing to stay near to")


@dataclass(frozen=True, eq=False, kw_only=True)
class Update:
    """What one update reports: its number from 1, the step's metrics, its rollouts (none for SFT), and its time."""

    number: int
    metrics: dict[str, float]
    rollouts: Rollouts | None
    seconds: float
    tokens_per_second: float
    method: RefineConfig | None
    "As it fits the prompt (see `fitted`): a short one has fewer chunks, or a smaller margin."


@contextmanager
def adapted(
    model: FastWeightLM,
    prompt: Int[Tensor, "T"],
    config: TTTConfig,
    on_update: Callable[[Update], bool | None] = lambda update: None,
) -> Iterator[FastWeightLM]:
    """The model adapted to the prompt's tokens; afterwards it is what it was (see `Restored`).

    `on_update` is called after each update; where it returns True, no more are made. Raises ValueError before anything is
    changed or copied: for a prompt that is no row of tokens of the vocabulary, or too short, for a model whose weights are
    not float32 or float64, and for `parameters` that name none.
    """
    _learner(model, prompt, config)
    with Restored(model, config.parameters):
        for update in adapt(model, prompt, config):
            if on_update(update):
                break
        yield model


def adapt(model: FastWeightLM, prompt: Int[Tensor, "T"], config: TTTConfig) -> Iterator[Update]:
    """Update the model on the prompt, and report after each update; the weights stay moved (see `Restored`)."""
    learner, moving = _learner(model, prompt, config), _moving(model, config.parameters)
    batch = Batch(tokens=prompt.unsqueeze(0), lengths=torch.tensor([len(prompt)]), sequence_ids=(0,)).to(model.device)
    still = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in moving)]
    try:
        for p in still:
            p.requires_grad_(False)
        for number in range(1, config.steps + 1):
            began = time.monotonic()
            result = _step(learner, batch, Draws(seed=config.seed, step=number))
            seconds = time.monotonic() - began
            yield Update(
                number=number,
                metrics=result.metrics,
                rollouts=result.rollouts,
                seconds=seconds,
                tokens_per_second=len(prompt) / seconds,
                method=learner.config.method,
            )
            if _enough(result.metrics, config):
                return
    finally:
        for p in still:
            p.requires_grad_(True)


def _step(learner: Learner, batch: Batch, draws: Draws) -> StepResult:
    """One update, whatever mode the caller is in; neither its gradients nor casts of the weights before it are kept."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(batch.tokens.device.type, enabled=False):
        result = train_step(learner, batch, draws)
    for p in learner.policy.parameters():
        p.grad = None
    torch.clear_autocast_cache()
    return result


def _enough(metrics: dict[str, float], config: TTTConfig) -> bool:
    reward, loss = config.stop_at_reward, config.stop_at_loss
    rewarded = reward is not None and metrics["reward_mean"] >= reward
    return rewarded or (loss is not None and metrics["ntp_loss"] <= loss)


def _learner(model: FastWeightLM, prompt: Tensor, config: TTTConfig) -> Learner:
    """What `train_step` trains with: a batch is the one prompt, an optimizer begins without moments."""
    _check(model, prompt)
    _moving(model, config.parameters)
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
        dtype=config.dtype,
    )
    reward = None if method is None else REWARDS[method.reward]
    return Learner(policy=model, optimizers=make_optimizers(model, run), config=run, reward=reward)


def _check(model: FastWeightLM, prompt: Any) -> None:
    row = isinstance(prompt, Tensor) and prompt.ndim == 1 and prompt.dtype in (torch.int64, torch.int32)
    shown = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, Tensor) else prompt
    require(row, "a prompt", shown, "a row of token ids, a tensor [T] of whole numbers")
    require(len(prompt) >= 2, "a prompt's tokens", len(prompt), "at least 2: one to read and one to predict")
    last, ends = len(model.head_weight) - 1, [int(prompt.min()), int(prompt.max())]
    require(0 <= ends[0] and ends[1] <= last, "a prompt's tokens", ends, f"from 0 to {last}")
    wide = model.dtype in (torch.float32, torch.float64)
    require(wide, "the model's dtype", model.dtype, "float32 or float64: smaller weights swallow small updates")


def fitted(method: RefineConfig, length: int) -> RefineConfig:
    """The method as it fits a prompt of so many tokens.

    Its margin shrinks first, which belongs to long documents; there are fewer chunks only where not all have k + 1 tokens.
    Raises ValueError where not even one has.
    """
    k = method.rollout_length
    if length < k + 1:
        raise ValueError(f"a prompt of {length} tokens has no room for a rollout of {k}; it must have at least {k + 1}")
    num_chunks = min(method.num_chunks, length // (k + 1))
    smaller = (replace(method, num_chunks=num_chunks, margin=margin) for margin in range(method.margin, -1, -1))
    return next(found for found in smaller if found.fits(length))


def _moving(model: nn.Module, parameters: str) -> list[nn.Parameter]:
    """The parameters that take gradients and in one of whose names `parameters` is found, tied ones once."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {id(p): p for name, p in named.items() if p.requires_grad and re.search(parameters, name)}
    allowed = f"found in the name of a parameter that takes gradients, such as {next(iter(named))!r}"
    require(len(found) > 0, "parameters", parameters, allowed)
    return list(found.values())


class Restored:
    """Leaving this context, a model is what it was, bit for bit: weights, what takes gradients, and gradients.

    Kept aside are the parameters that can move (see `TTTConfig.parameters`) and nothing else. What is put back needs no
    memory that is not there yet. It is put back after an exception, an exit and lack of memory, and on an interrupt
    (Ctrl-C, a notebook's stop) at once, before the KeyboardInterrupt is raised: no moment is too early or too late for
    one. Not undone is what puts other tensors in the parameters' place (`model.half()`, `load_state_dict(assign=True)`).
    """

    def __init__(self, model: nn.Module, parameters: str = ".*") -> None:
        self.parameters = list(model.parameters())
        self.moving = _moving(model, parameters)

    def __enter__(self) -> None:
        self.flags = [(p, p.requires_grad, p.grad) for p in self.parameters]
        self.kept = [(p, p.detach().clone()) for p in self.moving]
        self.before = signal.getsignal(signal.SIGINT)
        # Python delivers an interrupt to the main thread alone
        self.listens = threading.current_thread() is threading.main_thread() and callable(self.before)
        if self.listens:
            signal.signal(signal.SIGINT, self._interrupted)
        for p in self.parameters:
            p.grad = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._put_back()
        finally:
            if self.listens:
                signal.signal(signal.SIGINT, self.before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._put_back()
        signal.signal(signal.SIGINT, self.before)
        assert callable(self.before)
        self.before(number, frame)

    def _put_back(self) -> None:
        """All of it, again where an exception comes in between (that of a signal), which is raised afterwards."""
        raised = None
        for _ in range(3):
            try:
                with torch.inference_mode(False), torch.no_grad():
                    for p, value in self.kept:
                        p.copy_(value)
                for p, takes_gradient, gradient in self.flags:
                    p.requires_grad_(takes_gradient)
                    p.grad = gradient
                torch.clear_autocast_cache()
                break
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised
