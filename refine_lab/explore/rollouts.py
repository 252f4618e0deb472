"""Rollouts from any position of a document, and their rewards.

Rollouts are stored with their hidden states, so that another reward, a shorter rollout or another grouping needs no
further model call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.explore.reading import DocumentReading
from refine_lab.method.advantages import advantages
from refine_lab.method.rewards import binary, checked, cosine, exact
from refine_lab.method.rollout import Branches, sample
from refine_lab.models import FastWeightLM, Trace
from refine_lab.rng import Draws
from refine_lab.statistics.means import varies
from refine_lab.types import RewardFunction, RewardInputs
from refine_lab.validation import require

PREFIX_TOKENS = 24
"""Number of final prefix tokens that a table shows."""
CORRELATED = {
    "entropy": ("entropy", "nats"),
    "exact-match rate": ("binary", "fraction of tokens"),
    "logprob of the reference": ("target_logprob", "nats"),
}
"""Quantities that rewards are correlated with: name -> column and unit."""
BLOCK = 8
"""Number of rollouts made together, fixed since float rounding depends on the number of rows and must not depend on n."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PrefixRollouts:
    """N rollouts of K tokens from one prefix, with the reference continuation; all on the CPU, hidden states in float32."""

    position: int  # of the prefix's last token; the first rollout token is at position + 1
    prefix_ids: Int[Tensor, "P"]  # the prefix's last tokens
    entropy: float  # of the policy at the position, in nats: the uncertainty about the first rollout token
    rollout_ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]  # at the sampling temperature
    hidden_states: Float[Tensor, "N K D"]  # with the rollout tokens as inputs (h^pred of equation 7)
    target_ids: Int[Tensor, "K"]
    target_logprobs: Float[Tensor, "K"]  # reference tokens at temperature 1, from the document's forward pass
    target_hidden_states: Float[Tensor, "K D"]  # from the first forward pass (eq. 8)

    @property
    def nbytes(self) -> int:
        """Returns the number of bytes of the tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    @property
    def shape(self) -> tuple[int, int]:
        """Returns N and K."""
        return len(self.rollout_ids), self.rollout_ids.shape[1]

    def first(self, n: int) -> PrefixRollouts:
        """Returns the first n rollouts."""
        names = ("rollout_ids", "logprobs", "hidden_states")
        return replace(self, **{name: getattr(self, name)[:n] for name in names})

    def inputs(self, k: int) -> RewardInputs:
        """Returns the reward inputs for the first k tokens."""
        n = len(self.rollout_ids)
        return RewardInputs(
            rollout_ids=self.rollout_ids[:, :k],
            target_ids=self.target_ids[:k].expand(n, -1),
            hidden_states=self.hidden_states[:, :k],
            target_hidden_states=self.target_hidden_states[:k].expand(n, -1, -1),
            logprobs=self.logprobs[:, :k],
        )


@torch.no_grad()
def rollouts_at(
    policy: FastWeightLM,
    reading: DocumentReading,
    trace: Trace,
    positions: Sequence[int],
    *,
    n: int = 8,
    k: int = 5,
    temperature: float = 1.0,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> list[PrefixRollouts]:
    """Makes `n` rollouts of `k` tokens from each position of a document, given its statistics and trace (see `read_document`).

    A rollout depends, bit for bit, only on the document, the seed, the temperature, its position and its own index. It
    does not depend on n, k or the other positions: each position's rollouts are made `BLOCK` at a time, token by token.
    `between` is called before each token; an exception that it raises ends the call. Raises ValueError for a position
    without k following tokens, and for an invalid n, k or temperature.
    """
    require(n >= 1, "n", n, "at least 1")
    require(k >= 1, "k", k, "at least 1")
    require(temperature > 0, "temperature", temperature, "above 0")
    last = len(reading.token_ids) - 1 - k
    outside = [position for position in positions if not 0 <= position <= last]
    require(not outside, "a position", outside[:1], f"from 0 to {last}: {k} reference tokens must follow it")
    found = []
    for position in map(int, positions):
        blocks = [_block(policy, trace, position, first, k, temperature, seed, between) for first in range(0, n, BLOCK)]
        rollout_ids, logprobs, hidden_states = (torch.cat(parts)[:n].cpu() for parts in zip(*blocks, strict=True))
        ids, after = torch.from_numpy(reading.token_ids).long(), slice(position + 1, position + 1 + k)
        found.append(
            PrefixRollouts(
                position=position,
                prefix_ids=ids[max(0, position + 1 - PREFIX_TOKENS) : position + 1],
                entropy=float(reading.entropies[position + 1]),
                rollout_ids=rollout_ids,
                logprobs=logprobs,
                hidden_states=hidden_states,
                target_ids=ids[after],
                target_logprobs=torch.from_numpy(reading.logprobs[after]),
                target_hidden_states=trace.hidden_states[0, after].float().cpu(),
            )
        )
    return found


def _block(
    policy: FastWeightLM,
    trace: Trace,
    position: int,
    first: int,
    k: int,
    temperature: float,
    seed: int,
    between: Callable[[], None],
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"], Float[Tensor, "N K D"]]:
    """Returns tokens, logprobs and hidden states of `BLOCK` rollouts, the index of whose first is `first`.

    They are made token by token, so that no value depends on later ones. Each rollout draws k uniform numbers from its
    own generator.
    """
    draws, samples = Draws(seed=seed), range(first, first + BLOCK)
    uniforms = torch.cat([draws.uniforms([position], f"rollout/{i}", (k,)) for i in samples])
    branches = Branches.of(trace, torch.tensor([[position]], device=trace.hidden_states.device), len(uniforms))
    columns = []
    for column in uniforms.split(1, dim=1):
        between()
        tokens = sample(policy, branches, column, temperature)
        stats = policy.head(branches.hidden_states, tokens.squeeze(1), temperature=temperature)
        read = policy.read(tokens, state=branches.state)
        branches = Branches(read.final_state, read.hidden_states[:, 0])
        columns.append((tokens.squeeze(1), stats.logprobs.float(), branches.hidden_states.float()))
    token_ids, logprobs, hidden_states = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))
    return token_ids, logprobs, hidden_states


def rollout_frame(
    rollouts: Sequence[PrefixRollouts],
    reward: RewardFunction,
    *,
    k: int | None = None,
    group_by: Literal["sequence", "prefix"] = "prefix",
) -> pd.DataFrame:
    """Returns one row per rollout with the columns of a run's rollouts (`runs.schema.COLUMNS`) and per-token `cosines`.

    `exact` is the reward of that name, and `target_probability` its expectation at temperature 1, p(next k tokens | prefix).
    `step` is 0. Only the first `k` tokens of each rollout count (None: the length of the shortest). Advantages compare
    the rollouts of a prefix, or all of them. Raises ValueError for no rollouts, for a k that exceeds their length, and
    as `rewards.checked` does.
    """
    require(len(rollouts) > 0, "rollouts", "none", "those of at least one position")
    longest = min(each.shape[1] for each in rollouts)
    k = longest if k is None else k
    require(1 <= k <= longest, "k", k, f"from 1 to {longest}, the tokens that were rolled out")
    inputs = RewardInputs.cat([each.inputs(k) for each in rollouts])
    of_row = [each for each in rollouts for _ in each.rollout_ids]
    frame = pd.DataFrame(
        {
            "step": 0,
            "sequence_id": 0,
            "position": [each.position for each in of_row],
            "sample_index": [index for each in rollouts for index in range(len(each.rollout_ids))],
            "prefix_ids": [each.prefix_ids.tolist() for each in of_row],
            "rollout_ids": inputs.rollout_ids.tolist(),
            "target_ids": inputs.target_ids.tolist(),
            "logprobs": inputs.logprobs.tolist(),
            "entropy": [each.entropy for each in of_row],
            "target_logprob": [float(each.target_logprobs[:k].sum()) for each in of_row],
            "cosines": F.cosine_similarity(inputs.hidden_states, inputs.target_hidden_states, dim=-1).tolist(),
            "cosine": cosine(inputs).numpy(),
            "binary": binary(inputs).numpy(),
            "exact": exact(inputs).numpy(),
            "target_probability": [float(each.target_logprobs[:k].sum().exp()) for each in of_row],
            "reward": checked(reward)(inputs).float().numpy(),
        }
    )
    groups = frame.groupby("sequence_id" if group_by == "sequence" else "position")["reward"]
    return frame.assign(advantage=groups.transform(_advantages))


def _advantages(rewards: pd.Series) -> Float[np.ndarray, "R"]:
    """Returns the advantages of the rollouts of one group; 0 for the only rollout of a group."""
    return advantages(torch.tensor(rewards.to_numpy()), 1, len(rewards), "sequence").numpy()


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns Pearson's r between rewards and other quantities over rollouts, one row each; NaN if one is constant.

    Columns are `with`, `r` and `rollouts`; the quantities are the entropy at the prefix, the fraction of exact tokens, and
    the reference continuation's logprob. Values count as constant if they are equal within rounding. `frame` is as
    returned by `rollout_frame`.
    """
    rows = []
    for name, (column, _) in CORRELATED.items():
        x, y = frame["reward"].to_numpy(), frame[column].to_numpy()
        r = float(np.corrcoef(x.astype(float), y.astype(float))[0, 1]) if varies(x) and varies(y) else np.nan
        rows.append({"with": name, "r": r, "rollouts": len(frame)})
    return pd.DataFrame(rows)
