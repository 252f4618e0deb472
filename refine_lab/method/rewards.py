"""Rewards: how well a rollout matches the reference continuation (paper, equations 9, 11 and 12, and limitations).

A reward is a plain function of one `RewardInputs` that returns one number per rollout. To add one, write a function
here, list it in `REWARDS`, and add its name to `refine_lab.config.BUILT_IN_REWARDS`.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from refine_lab.host import host
from refine_lab.method.custom import contained, load_function, of_inputs
from refine_lab.types import RewardFunction, RewardInputs
from refine_lab.validation import unknown

LARGEST = 1e15
"""Largest absolute value of a reward: the squares of larger ones overflow when rewards are standardised."""


def cosine(inputs: RewardInputs) -> Float[Tensor, "R"]:
    """Cosine similarity of hidden states averaged over the k tokens (eq. 9), in [-1, 1], at least float32."""
    dtype = _wide(inputs)
    return F.cosine_similarity(inputs.hidden_states.to(dtype), inputs.target_hidden_states.to(dtype), dim=-1).mean(-1)


def binary(inputs: RewardInputs) -> Float[Tensor, "R"]:
    """The fraction of the k tokens that equal the reference token at their position (eq. 11), in [0, 1], at least float32."""
    return (inputs.rollout_ids == inputs.target_ids).to(_wide(inputs)).mean(-1)


def hybrid(inputs: RewardInputs) -> Float[Tensor, "R"]:
    """The sum of `cosine` and `binary` (eq. 12), in [-1, 2]."""
    return cosine(inputs) + binary(inputs)


def edit(inputs: RewardInputs) -> Float[Tensor, "R"]:
    """1 - d / k, in [0, 1], at least float32, where d is the edit distance of rollout and reference continuation.

    d is the minimum number of insertions, deletions and replacements (Levenshtein, 1966), so that a correct but shifted
    rollout keeps most of its reward. The paper's limitations suggest edit distance for long rollouts; this formula is
    ours.
    """
    length = inputs.rollout_ids.shape[1]
    places = torch.arange(length + 1, device=inputs.rollout_ids.device)
    distances = places.expand(len(inputs.rollout_ids), -1)  # [R, k + 1]: of no token and the first j of the target
    for number, token in enumerate(inputs.rollout_ids.unbind(1), start=1):
        replaced = distances[:, :-1] + (token.unsqueeze(1) != inputs.target_ids)
        row = F.pad(torch.minimum(replaced, distances[:, 1:] + 1), (1, 0), value=number)
        distances = (row - places).cummin(1).values + places  # an insertion adds 1 to the distance on the left
    return 1 - distances[:, -1].to(_wide(inputs)) / length


def exact(inputs: RewardInputs) -> Float[Tensor, "R"]:
    """1 if all k tokens equal the reference tokens at their positions, else 0, at least float32.

    Its expectation over rollouts at temperature 1 is p(x_{t+1..t+k} | x_{<=t}), the value that the estimator `expected`
    computes without rollouts (`refine_lab.method.estimators.expected_reward`). It is ours.
    """
    return (inputs.rollout_ids == inputs.target_ids).all(-1).to(_wide(inputs))


REWARDS: dict[str, RewardFunction] = {function.__name__: function for function in (cosine, binary, hybrid, edit, exact)}


def permuted(rewards: Float[Tensor, "R"], keys: Float[Tensor, "R"]) -> Float[Tensor, "R"]:
    """Returns the rewards, each moved to the rollout with the next larger key, and the last one to the first, [R].

    With random keys this is a control: the rewards are the same numbers as before, but none is that of its rollout. The
    order of the rollouts has no effect on which of them receives which reward.
    """
    order = keys.argsort(stable=True)
    return torch.empty_like(rewards).index_copy(0, order, rewards[order.roll(1)])


def reward_function(name: str, source: str | None = None) -> RewardFunction:
    """Returns the reward of that name, wrapped by `checked`; `custom` is the function that `source` defines.

    Raises ValueError for an unknown name, and for `custom` without a source.
    """
    if name == "custom":
        if source is None:
            raise ValueError("reward 'custom' needs the source of a function, got none")
        return checked(load_function("reward", source))
    if name not in REWARDS:
        raise unknown("reward", name, (*REWARDS, "custom"))
    return checked(REWARDS[name])


def checked(reward: RewardFunction) -> RewardFunction:
    """Wraps `reward` to run without gradients on copies of its inputs, and verifies its result: a finite float tensor [R].

    The wrapped function raises a ValueError that names the reward and describes the invalid result, and a RuntimeError
    that names it for any error inside it, including `SystemExit`. A process that the reward forks ends with the reward.
    """
    name, compute = getattr(reward, "__name__", repr(reward)), of_inputs(reward)

    @functools.wraps(compute)
    def run(inputs: RewardInputs) -> Tensor:
        copies = inputs.map(lambda x: x.detach().clone())  # a reward that writes into them changes no training
        rewards = contained("reward", name, lambda: compute(copies))
        count = len(inputs.rollout_ids)
        allowed = f"reward {name!r} must return one floating-point number per rollout, a tensor of shape [{count}]"
        if not isinstance(rewards, Tensor):
            raise ValueError(f"{allowed}, got {type(rewards).__name__}")
        if rewards.shape != (count,) or not rewards.is_floating_point():
            raise ValueError(f"{allowed}, got {rewards.dtype} of shape {list(rewards.shape)}")
        bad = ~(rewards.abs() <= LARGEST)
        if host(bad.any()):
            first = int(bad.nonzero()[0])
            value = float(rewards[first])
            limits = "finite" if not math.isfinite(value) else f"between -{LARGEST:g} and {LARGEST:g}"
            raise ValueError(f"reward {name!r} must be {limits}, got {value} for rollout {first}")
        return rewards.detach()

    return run


def _wide(inputs: RewardInputs) -> torch.dtype:
    return torch.promote_types(inputs.hidden_states.dtype, torch.float32)
