"""The method's vocabulary: axis names and the values that its steps exchange.

Axis names, used in every shape of this package:

    B  sequences of a batch (rows)          D  hidden size
    T  tokens of the longest row            V  vocabulary
    C  target positions of a row (chunks)   H  heads
    N  rollouts of one position (group)     K  tokens of a rollout
    R  rollouts in all, R = B * C * N, ordered row by row, position by position

Rows are padded on the right; `lengths` gives the number of real tokens per row. A *position* t is the zero-based index
of the last token of a prefix: the prefix is `tokens[: t + 1]` and the first rollout token has index t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.host import derived, fetch, host, pinned, to_device


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences of unequal length, each with its own id.

    `tokens` [B, T], `lengths` [B] and `sequence_ids` [B]. A sequence keeps its id in every batch and at every place in
    it, so that its random draws can be keyed by it. On a device, the lengths keep their copy on the CPU (`host`).
    """

    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    sequence_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape
        if len(self.sequence_ids) != rows or self.lengths.shape != (rows,):
            counts = f"{len(self.lengths)} and {len(self.sequence_ids)}"
            raise ValueError(f"a batch of {rows} rows needs {rows} lengths and ids, got {counts}")
        lengths = host(self.lengths)
        if rows and not (1 <= int(lengths.min()) and int(lengths.max()) <= width):
            raise ValueError(f"lengths must be from 1 to {width}, got {lengths.tolist()}")

    def rows(self, start: int, stop: int) -> Batch:
        """Returns rows `start` to `stop`, cut to the longest of them."""
        lengths = derived(lambda x: x[start:stop], self.lengths)
        longest = int(host(lengths).max())
        tokens, ids = derived(lambda x: x[start:stop, :longest], self.tokens), self.sequence_ids[start:stop]
        return Batch(tokens=tokens, lengths=lengths, sequence_ids=ids)

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, tokens=to_device(self.tokens, device), lengths=to_device(self.lengths, device))

    def pinned(self, device: torch.device | str) -> Batch:
        """Returns the batch in pinned memory if `device` is CUDA."""
        return replace(self, tokens=pinned(self.tokens, device), lengths=pinned(self.lengths, device))

    @property
    def num_targets(self) -> int:
        """Returns the number of tokens that have a next token to predict, over all rows."""
        return int((host(self.lengths) - 1).sum())


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts with their answers: each row of `sequences` is a prompt of `prompt_lengths` tokens, then its answer."""

    sequences: Batch
    prompt_lengths: Int[Tensor, "B"]

    def __post_init__(self) -> None:
        if int((host(self.sequences.lengths) - host(self.prompt_lengths)).min()) < 1:
            raise ValueError("every prompt of a batch needs an answer of at least one token")

    def rows(self, start: int, stop: int) -> PromptBatch:
        prompts = derived(lambda x: x[start:stop], self.prompt_lengths)
        return PromptBatch(sequences=self.sequences.rows(start, stop), prompt_lengths=prompts)

    def to(self, device: torch.device | str) -> PromptBatch:
        prompts = to_device(self.prompt_lengths, device)
        return PromptBatch(sequences=self.sequences.to(device), prompt_lengths=prompts)

    def pinned(self, device: torch.device | str) -> PromptBatch:
        """Returns the batch in pinned memory if `device` is CUDA."""
        return PromptBatch(sequences=self.sequences.pinned(device), prompt_lengths=pinned(self.prompt_lengths, device))

    @property
    def prompts(self) -> Batch:
        """Returns the prompts alone, padded on the right."""
        longest = int(host(self.prompt_lengths).max())

        def cut(tokens: Tensor, lengths: Tensor) -> Tensor:
            inside = torch.arange(longest, device=tokens.device) < lengths.unsqueeze(1)
            return tokens[:, :longest] * inside

        tokens = derived(cut, self.sequences.tokens, self.prompt_lengths)
        return replace(self.sequences, tokens=tokens, lengths=self.prompt_lengths)

    @property
    def loss_mask(self) -> Bool[Tensor, "B T"]:
        """Returns which tokens belong to an answer."""
        width = self.sequences.tokens.shape[1]

        def inside(starts: Tensor, ends: Tensor) -> Tensor:
            places = torch.arange(width, device=starts.device)
            return (starts.unsqueeze(1) <= places) & (places < ends.unsqueeze(1))

        return derived(inside, self.prompt_lengths, self.sequences.lengths)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """R rollouts with their targets, rewards and advantages, ordered by row, then position, then index in the group."""

    positions: Int[Tensor, "B C"]
    tokens: Int[Tensor, "R K"]
    old_logprobs: Float[Tensor, "R K"]  # of the policy that sampled, at its temperature
    target_ids: Int[Tensor, "R K"]  # the reference continuation x_{t+1..t+k}
    entropies: Float[Tensor, "R"]  # of pi at the prefix, the uncertainty about the first token rolled out
    cosine: Float[Tensor, "R"]
    binary: Float[Tensor, "R"]
    rewards: Float[Tensor, "R"]  # the reward trained on; cosine and binary are kept beside it
    advantages: Float[Tensor, "R"]

    @property
    def group_size(self) -> int:
        return len(self.tokens) // self.positions.numel()

    def cpu(self) -> Rollouts:
        """Returns the rollouts on the CPU, in one transfer."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        fetch(*parts.values())
        return Rollouts(**{name: host(x) for name, x in parts.items()})

    def rows(self, start: int, stop: int) -> Rollouts:
        """Returns the rollouts of sequences `start` to `stop` of the batch."""
        per_row = self.positions.shape[1] * self.group_size
        cut = {f.name: getattr(self, f.name)[start * per_row : stop * per_row] for f in fields(self)}
        return Rollouts(**{**cut, "positions": derived(lambda x: x[start:stop], self.positions)})

    @staticmethod
    def cat(parts: Sequence[Rollouts]) -> Rollouts:
        """Concatenates the rollouts of several batches."""
        return Rollouts(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rollouts)})


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What is drawn for several rows before an update: positions, and the rollouts from them if the method samples any."""

    positions: Int[Tensor, "B C"]
    rollouts: Rollouts | None
    entropy_sum: Float[Tensor, ""] | None
    "Over all tokens that have a next one, in nats; None if entropies are not computed."

    def rows(self, start: int, stop: int) -> Plan:
        """Returns the plan of sequences `start` to `stop` of the batch."""
        rollouts = None if self.rollouts is None else self.rollouts.rows(start, stop)
        return replace(self, positions=derived(lambda x: x[start:stop], self.positions), rollouts=rollouts)

    @staticmethod
    def cat(parts: Sequence[Plan]) -> Plan:
        """Concatenates the plans of several batches."""
        rollouts = [part.rollouts for part in parts if part.rollouts is not None]
        sums = [part.entropy_sum for part in parts if part.entropy_sum is not None]
        positions = derived(lambda *x: torch.cat(x), *(part.positions for part in parts))
        joined = Rollouts.cat(rollouts) if rollouts else None
        return Plan(positions=positions, rollouts=joined, entropy_sum=torch.stack(sums).sum() if sums else None)


@dataclass(frozen=True, eq=False, kw_only=True)
class RewardInputs:
    """The inputs of a reward: R rollouts of K tokens with their reference continuations. No tensor has a gradient."""

    rollout_ids: Int[Tensor, "R K"]
    target_ids: Int[Tensor, "R K"]  # the reference continuation of each prefix
    hidden_states: Float[Tensor, "R K D"]  # final ones, after the final norm, with the rollout tokens as inputs (eq. 7)
    target_hidden_states: Float[Tensor, "R K D"]  # reference continuation, from the first forward pass (eq. 8)
    logprobs: Float[Tensor, "R K"]  # of the rollout tokens at the sampling temperature, in nats

    def map(self, function: Callable[[Tensor], Tensor]) -> RewardInputs:
        """Applies `function` to every tensor."""
        return RewardInputs(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def cat(parts: Sequence[RewardInputs]) -> RewardInputs:
        """Concatenates the inputs of several sets of rollouts."""
        return RewardInputs(**{f.name: torch.cat([getattr(x, f.name) for x in parts]) for f in fields(RewardInputs)})


@dataclass(frozen=True, eq=False, kw_only=True)
class SelectionInputs:
    """The inputs of a selection: what one forward pass tells about each token of B rows. No tensor has a gradient.

    Index t of `entropies` and `logprobs` belongs to the prediction of token t + 1 from the tokens up to t; both are 0
    from each row's last token on.
    """

    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]  # real tokens per row
    entropies: Float[Tensor, "B T"]  # in nats
    logprobs: Float[Tensor, "B T"]  # of the token itself, in nats
    rollout_length: int  # k: a rollout from position t covers the tokens t + 1 to t + k
    difference: Callable[[], Float[Tensor, "B T"]]  # computes `long_short_difference`

    @cached_property
    def long_short_difference(self) -> Float[Tensor, "B T"]:
        """The long-short difference of the same predictions, in nats, with one more forward pass (see `method.memory`)."""
        return self.difference()

    def detached(self) -> SelectionInputs:
        """Returns copies of the tensors, without gradients."""
        tensors = {name: getattr(self, name) for name in ("tokens", "lengths", "entropies", "logprobs")}
        return replace(self, **{name: x.detach().clone() for name, x in tensors.items()})


SelectionFunction = Callable[[SelectionInputs], Float[Tensor, "B T"]]
"""A selection returns one score per position; a position is drawn from each chunk by softmax(score / tau)."""

RewardFunction = Callable[[RewardInputs], Float[Tensor, "R"]]
"""A reward returns one number per rollout, in at least float32."""
