"""The two procedures that the gate compares: branching from states, and re-reading every prefix from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from refine_lab.config import RefineConfig
from refine_lab.method.losses import policy_loss
from refine_lab.method.rollout import Branches, read_rollouts
from refine_lab.models import FastWeightLM, State

GROUP = 2
"""Continuations per position: a greedy one and one of random tokens."""


class Probe(NamedTuple):
    """The gate's input: random text and continuations, and the positions where they branch off.

    It has two rows of unequal length; the second has all prefixes, the first those that fit it. The tokens beyond the
    first row's end must have no effect.
    """

    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    positions: Int[Tensor, "B C"]
    continuations: Int[Tensor, "R K"]

    @staticmethod
    def of(model: FastWeightLM, prefixes: Sequence[int], rollout_length: int, seed: int) -> Probe:
        """Returns the probe for prefix lengths in ascending order, on the model's device."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary, longest = model.head.out_features, prefixes[-1] + rollout_length
        short = prefixes[-2] + 1 if len(prefixes) > 1 else prefixes[0]
        tokens = torch.randint(vocabulary, (2, longest), generator=generator)
        positions = torch.tensor([[min(x, short) - 1 for x in prefixes], [x - 1 for x in prefixes]])
        continuations = torch.randint(vocabulary, (positions.numel() * GROUP, rollout_length), generator=generator)
        return Probe(*(x.to(model.device) for x in (tokens, torch.tensor([short, longest]), positions, continuations)))


@dataclass(frozen=True, eq=False)
class Branched:
    """All R branches as a training step makes them; `tokens` are their continuations.

    `hidden_states` begin at the prefix's last token, with the continuation read at once; `decoded` are the same without
    the last one, read token by token. `before` and `after` are the state that was branched from, copied before and
    inspected after branching; `final` is the state after each row.
    """

    rows: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    final: State
    prefixes: Int[Tensor, "R"]
    before: State
    after: State
    tokens: Int[Tensor, "R K"]
    hidden_states: Float[Tensor, "R S D"]
    decoded: Float[Tensor, "R K D"]
    logprobs: Float[Tensor, "R K"]
    advantages: Float[Tensor, "R"]

    @staticmethod
    def of(model: FastWeightLM, probe: Probe) -> Branched:
        trace = model.read(probe.tokens, probe.lengths)
        branches = Branches.of(trace, probe.positions, GROUP)
        before = branches.state.detach().map(torch.clone)
        tokens, decoded = _decode(model, branches.detach(), probe.continuations)
        read = read_rollouts(model, branches, tokens, 1.0)
        advantages = torch.randn(len(tokens), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return Branched(
            rows=probe.tokens,
            lengths=probe.lengths,
            final=trace.final_state.detach(),
            prefixes=(probe.positions + 1).flatten().repeat_interleave(GROUP),
            before=before,
            after=branches.state.detach(),
            tokens=tokens,
            hidden_states=torch.cat([branches.hidden_states.unsqueeze(1), read.hidden_states], 1),
            decoded=decoded,
            logprobs=read.logprobs,
            advantages=advantages.to(tokens.device),
        )

    def members(self, prefix: int) -> list[int]:
        """Returns the branches with one prefix length."""
        return (self.prefixes == prefix).nonzero().flatten().tolist()

    def row(self, branch: int) -> int:
        return branch * len(self.rows) // len(self.tokens)

    def whole(self, branch: int) -> Int[Tensor, "1 S"]:
        """Returns the prefix of a branch and its continuation."""
        prefix = self.rows[self.row(branch), : int(self.prefixes[branch])]
        return torch.cat([prefix, self.tokens[branch]]).unsqueeze(0)

    def loss(self, logprobs: Float[Tensor, "P K"], branches: Sequence[int], num_tokens: int) -> Float[Tensor, ""]:
        """Returns REFINE's policy loss (eq. 10) of the given branches, with the sampling policy as the policy."""
        refine, weights = RefineConfig(), self.advantages[list(branches)].to(logprobs.dtype)
        return policy_loss(logprobs, logprobs.detach(), weights, refine.clip_eps, refine.dual_clip, num_tokens)[0]


@torch.no_grad()
def _decode(model: FastWeightLM, branches: Branches, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes the first branch of each group greedily, the others by `tokens`; returns tokens and preceding hidden states."""
    state, hidden, read, before = branches.state, branches.hidden_states, [], []
    greedy = torch.arange(len(tokens), device=tokens.device) % GROUP == 0
    for column in tokens.unbind(1):
        if read:
            step = model.read(read[-1].unsqueeze(1), state=state)
            state, hidden = step.final_state, step.hidden_states[:, 0]
        before.append(hidden)
        read.append(torch.where(greedy, logits_of(model, hidden).argmax(-1), column))
    return torch.stack(read, 1), torch.stack(before, 1)


def logits_of(model: FastWeightLM, hidden_states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
    """Returns logits in at least float32 without the sliced head, so that the two procedures share little code."""
    logits = model.lm_head(hidden_states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Reread(NamedTuple):
    """A prefix and its continuation, read from scratch: values from the prefix's last token on, and the loss gradients."""

    hidden_states: Float[Tensor, "S D"]
    logits: Float[Tensor, "S V"]
    gradients: list[Tensor]


def reread(
    model: FastWeightLM, branched: Branched, branch: int, num_tokens: int, parameters: Sequence[nn.Parameter]
) -> Reread:
    """Runs the plain procedure for one branch."""
    hidden = model.read(branched.whole(branch)).hidden_states[0, int(branched.prefixes[branch]) - 1 :]
    logits = logits_of(model, hidden)
    logprobs = logits[:-1].log_softmax(-1).gather(-1, branched.tokens[branch].unsqueeze(-1)).T
    loss = branched.loss(logprobs, [branch], num_tokens)
    return Reread(hidden.detach(), logits.detach(), gradients(loss, parameters))


def gradients(loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter], keep: bool = False) -> list[Tensor]:
    """Returns the gradient of the loss for each parameter, zero if there is none; `.grad` is left unchanged."""
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(p) if x is None else x for p, x in zip(parameters, found, strict=True)]


def layer_outputs(model: FastWeightLM, tokens: Int[Tensor, "1 S"], state: State | None = None) -> list[Tensor]:
    """Returns the outputs of each of the model's layers in order, that of the last one after the final norm."""
    inputs: list[Tensor] = []
    trace = model.read_embeddings(model.get_input_embeddings()(tokens), None, state, inputs)
    return [*inputs[1:], trace.hidden_states]
