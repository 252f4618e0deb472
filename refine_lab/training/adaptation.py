"""Test-time training on one prompt or a batch: adapts the weights update by update and restores them (paper, section 4.4).

`adapted` is the context manager. `adapt` is the same as an iterator: it yields after each update, and adaptation ends
when the caller stops iterating.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import FrameType, TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from refine_lab.config import OptimizationConfig, RefineConfig, UpdateConfig
from refine_lab.data.batches import padded
from refine_lab.host import host
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, next_token_stats, train_step
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import hidden_states_only
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.ttt_config import TTTConfig as TTTConfig
from refine_lab.ttt_config import matching
from refine_lab.types import Batch, Rollouts
from refine_lab.validation import require
from refine_lab.workers import ALONE, Workers


@dataclass(frozen=True, eq=False, kw_only=True)
class Update:
    """The result of one step: its number from 1, its metrics, its rollouts (none for SFT), and its time.

    On one prompt a step is one update; on several prompts it goes through all of them (`metrics["updates"]`).
    """

    number: int
    metrics: dict[str, float]
    rollouts: Rollouts | None
    seconds: float
    tokens_per_second: float
    refine: RefineConfig | None
    "The method as adjusted to the prompt (see `fit_to_length`): a short prompt has fewer chunks, or a smaller margin."


@contextmanager
def adapted(
    model: FastWeightLM,
    prompt: Int[Tensor, "T"],
    config: TTTConfig,
    on_update: Callable[[Update], bool | None] = lambda update: None,
) -> Iterator[FastWeightLM]:
    """Adapts the model to the prompt's tokens inside a `with` block, and then restores it (see `preserve_weights`).

    `on_update` is called after each update; if it returns True, no more updates are made. Warns if the prompt is too
    short for the method, whose margin or number of chunks is then reduced. Raises ValueError, before anything is
    changed or copied, for a prompt that is not a row of token ids of the vocabulary or is too short, for a model whose
    weights are not float32 or float64, and if `parameters` matches no parameter.
    """
    adapter, batch = Adapter(model, config), padded_batch(model, [prompt])
    if sentence := fewer_chunks(config, len(prompt)):
        warnings.warn(sentence, stacklevel=3)
    with preserve_weights(model, config.parameters):
        for update in adapter.adapt(batch):
            if on_update(update):
                break
        yield model


def adapt(model: FastWeightLM, prompt: Int[Tensor, "T"], config: TTTConfig) -> Iterator[Update]:
    """Updates the model on the prompt and yields after each update; the weights stay updated (see `preserve_weights`)."""
    adapter = Adapter(model, config)
    yield from adapter.adapt(padded_batch(model, [prompt]))


class Adapter:
    """Adapts a model to successive batches of prompts with one optimizer, whose moments persist from batch to batch.

    Each step goes through the whole batch, with `mini_batch_size` prompts per update, by the training step of
    mid-training. A draw is keyed by the seed, the prompt's sequence id and the step's number on its batch alone.
    """

    def __init__(
        self,
        model: FastWeightLM,
        config: TTTConfig,
        *,
        mini_batch_size: int = 1,
        micro_batch_size: int = 1,
        workers: Workers = ALONE,
    ) -> None:
        """The `workers` share the prompts of each update.

        Raises ValueError if the model's weights are not float32 or float64, or if `parameters` matches no parameter.
        """
        wide = model.dtype in (torch.float32, torch.float64)
        require(
            wide,
            "the model's dtype",
            model.dtype,
            "float32 or float64: in lower precision, small updates are lost to rounding",
        )
        self.workers = workers
        self.model, self.config, self.trainable = model, config, trainable_parameters(model, config.parameters)
        shared = {item.name: getattr(config, item.name) for item in fields(OptimizationConfig)}
        self._update = UpdateConfig(**shared, mini_batch_size=mini_batch_size, micro_batch_size=micro_batch_size)
        self.optimizers = make_optimizers(model, self._update, list(self.trainable.values()))

    def adapt(self, batch: Batch) -> Iterator[Update]:
        """Updates the model on the prompts of a batch (see `padded_batch`) and yields after each step."""
        train_state, tokens = self._train_state(batch), int(host(batch.lengths).sum())
        for number in range(1, self.config.steps + 1):
            began = time.monotonic()
            with _gradients_of(self.model, self.trainable.values()):  # not across the yield: iteration may end there
                result = train_step(train_state, batch, Draws(seed=self.config.seed, step=number))
            if result.metrics.get("skipped_updates"):
                norm = result.metrics["grad_norm"]
                raise FloatingPointError(
                    f"training diverged (the gradient's norm is {norm}); try an lr below {self.config.lr}"
                )
            seconds = time.monotonic() - began
            yield Update(
                number=number,
                metrics=result.metrics,
                rollouts=result.rollouts,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                refine=train_state.config.refine,
            )
            if _enough(result.metrics, self.config):
                return

    def _train_state(self, batch: Batch) -> TrainState:
        """Returns the state that `train_step` needs. Raises ValueError for a prompt too short for a rollout."""
        refine = self.config.refine and fit_to_length(self.config.refine, *host(batch.lengths).tolist())
        reward = REWARDS[refine.reward] if refine is not None and refine.rolls_out else None
        config = replace(self._update, refine=refine)
        common = {"policy": self.model, "optimizers": self.optimizers, "workers": self.workers}
        return TrainState(**common, config=config, reward=reward)


def padded_batch(
    model: FastWeightLM, prompts: Sequence[Int[Tensor, "_"]], sequence_ids: tuple[int, ...] = (0,)
) -> Batch:
    """Returns prompts as a batch on the model's device, padded on the right, with the given `sequence_ids`.

    Raises ValueError for a prompt that is not a row of at least two token ids of the vocabulary, or exceeds the model's
    context.
    """
    for prompt in prompts:
        _check(model, prompt)
    with torch.inference_mode(False):  # gradients pass through nothing that was made in it
        return padded([prompt.cpu().numpy() for prompt in prompts], sequence_ids).to(model.device)


@contextmanager
def _gradients_of(model: FastWeightLM, trainable: Iterable[nn.Parameter]) -> Iterator[None]:
    """Enables gradients of `trainable` alone, in any mode of the caller; keeps neither them nor casts of the weights."""
    kept = {id(p) for p in trainable}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for p in frozen:
            p.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            yield
        for p in model.parameters():
            p.grad = None
        torch.clear_autocast_cache()
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _enough(metrics: dict[str, float], config: TTTConfig) -> bool:
    reward, loss = config.stop_at_reward, config.stop_at_loss
    return (reward is not None and metrics["reward_mean"] >= reward) or (
        loss is not None and metrics["ntp_loss"] <= loss
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """The model's prediction of each token of a prompt but the first."""

    entropies: Float[Tensor, "S"]
    "Entropy of the next-token distribution, in nats; entry i is the uncertainty about token i + 1. On the CPU."
    losses: Float[Tensor, "S"]
    "Loss -log p of that token, in nats."


@torch.no_grad()
def read_prompt(model: FastWeightLM, prompt: Int[Tensor, "T"]) -> Reading:
    """Returns entropy (eq. 5) and loss of every token of the prompt but the first, [T - 1] each, without changing the model.

    Computed in the caller's arithmetic (its autocast, if any). Raises ValueError for an invalid prompt.
    """
    batch = padded_batch(model, [prompt])
    with hidden_states_only():
        stats = next_token_stats(model, model.read(batch.tokens, batch.lengths), batch, entropy=True)
    return Reading(entropies=stats.entropies[0].float().cpu(), losses=-stats.logprobs[0].float().cpu())


def _check(model: FastWeightLM, prompt: Any) -> None:
    row = isinstance(prompt, Tensor) and prompt.ndim == 1 and prompt.dtype in (torch.int64, torch.int32)
    value = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, Tensor) else prompt
    require(row, "a prompt", value, "a row of token ids, a tensor [T] of whole numbers")
    require(len(prompt) >= 2, "a prompt's tokens", len(prompt), "at least 2: one to read and one to predict")
    last, ends = model.head.out_features - 1, [int(prompt.min()), int(prompt.max())]
    require(0 <= ends[0] and ends[1] <= last, "a prompt's tokens", ends, f"from 0 to {last}")
    limit = model.longest_context
    within = limit is None or len(prompt) <= limit
    require(within, "a prompt's tokens", len(prompt), f"at most {limit}, the maximum number of positions of this model")


def fit_to_length(refine: RefineConfig, *lengths: int) -> RefineConfig:
    """Returns the method adjusted to prompts of the given lengths.

    The margin, which is meant for long documents, is reduced first; the number of chunks only if some chunk would have
    fewer than k + 1 tokens. A method without positions is unchanged. Raises ValueError if not even one chunk has k + 1.
    """
    if not refine.has_places:
        return refine
    k, length = refine.rollout_length, min(lengths)
    if length < k + 1:
        raise ValueError(
            f"a prompt of {length} tokens is too short for a rollout of {k}; it must have at least {k + 1}"
        )
    num_chunks = min(refine.num_chunks, length // (k + 1))
    smaller = (replace(refine, num_chunks=num_chunks, margin=margin) for margin in range(refine.margin, -1, -1))
    return next(found for found in smaller if all(map(found.fits, lengths)))


def fewer_chunks(config: TTTConfig, *lengths: int) -> str | None:
    """Returns a sentence if the shortest length is too small for all chunks or for the margin, else None."""
    if config.refine is None or (refine := fit_to_length(config.refine, *lengths)) == config.refine:
        return None
    labels = {"num_chunks": "c", "margin": "the margin"}
    values = {label: (getattr(refine, name), getattr(config.refine, name)) for name, label in labels.items()}
    changes = (f"{label} is {value} and not {default}" for label, (value, default) in values.items() if value < default)
    return f"a prompt of {min(lengths)} tokens is too short for the method's settings, so {' and '.join(changes)}"


def trainable_parameters(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters with a name that matches `pattern`; tied ones once, under their first name."""
    names = dict(model.named_parameters(remove_duplicate=False))
    found = matching(pattern, (name for name, p in names.items() if p.requires_grad))
    matches = {id(names[name]) for name in found}
    allowed = (
        f"a regular expression that matches the name of at least one trainable parameter, such as {next(iter(names))!r}"
    )
    require(len(matches) > 0, "parameters", pattern, allowed)
    return {name: p for name, p in model.named_parameters() if id(p) in matches}


class preserve_weights:
    """A context that restores a model bit for bit on exit: weights, trainable flags, and gradients.

    It copies only the parameters that may be updated (see `TTTConfig.parameters`), and restoring needs no further
    memory. The model is restored after an exception, an exit and an out-of-memory error, and on an interrupt (Ctrl-C, a
    notebook's stop) at once, before KeyboardInterrupt is raised, whenever it occurs. With `on_interrupt=False` an
    interrupt is left alone, and the weights stay as they are until the context exits. Replacing the parameters' tensors
    is not undone (`model.half()`, `load_state_dict(assign=True)`). Several contexts for one model must be exited in
    reverse order.
    """

    def __init__(self, model: nn.Module, parameters: str = ".*", *, on_interrupt: bool = True) -> None:
        self.on_interrupt = on_interrupt
        self.parameters = list(model.parameters())
        self.trainable = list(trainable_parameters(model, parameters).values())

    def __enter__(self) -> None:
        self.flags = [(p, p.requires_grad, p.grad) for p in self.parameters]
        self.copies = [(p, p.detach().clone()) for p in self.trainable]
        self.handler = signal.getsignal(signal.SIGINT)
        # Python delivers an interrupt to the main thread alone
        in_main_thread = threading.current_thread() is threading.main_thread()
        self.handles = self.on_interrupt and in_main_thread and callable(self.handler)
        if self.handles:
            signal.signal(signal.SIGINT, self._interrupted)
        for p in self.parameters:
            p.grad = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._restore()
        finally:
            if self.handles:
                signal.signal(signal.SIGINT, self.handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        signal.signal(signal.SIGINT, self.handler)
        assert callable(self.handler)
        self.handler(number, frame)

    def _restore(self) -> None:
        """Restores everything, again if an exception (from a signal) interrupts it, which is raised afterwards."""
        interruption = None
        for _ in range(3):
            try:
                with torch.inference_mode(False), torch.no_grad():
                    for p, value in self.copies:
                        p.copy_(value)
                for p, takes_gradient, gradient in self.flags:
                    p.requires_grad_(takes_gradient)
                    p.grad = gradient
                torch.clear_autocast_cache()
                break
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption
