"""A step of every method with every family that runs on the CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from refine_lab.config import RefineConfig
from refine_lab.method.step import train_step
from refine_lab.models import FastWeightLM
from refine_lab.recipes.methods import CHANGES
from refine_lab.rng import Draws
from tests.factories import gated_deltanet, hybrids, lact
from tests.factories.step import make_batch, make_policy, train_state_for

FAMILIES = (
    "delta_net",
    "gated_deltanet",
    "lact_swiglu",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "olmo_hybrid",
)
METHODS = {
    name: replace(RefineConfig(num_chunks=3, margin=5), window=16, **changes) for name, changes in CHANGES.items()
}


def policy_of(family: str) -> FastWeightLM:
    torch.manual_seed(0)
    if family == "delta_net":
        return make_policy()
    if family == "gated_deltanet":
        return gated_deltanet.make_policy(std=0.05)
    return lact.make_lact(initializer_range=0.05) if family == "lact_swiglu" else hybrids.make(family)


def weights_after(family: str, refine: RefineConfig | None) -> torch.Tensor:
    """All weights after a step in micro-batches of two rows and one."""
    policy = policy_of(family)
    state = train_state_for(policy, refine, micro_batch_size=2)
    state = replace(state, optimizers=[torch.optim.SGD(policy.parameters(), lr=1.0)])  # moves by the gradient
    result = train_step(state, make_batch((60, 41, 55)), Draws(seed=5, step=1))
    assert "skipped_updates" not in result.metrics
    assert (result.rollouts is not None) == (refine is not None and refine.rolls_out)
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_moves_the_weights_in_a_way_of_its_own(family):
    moved = [weights_after(family, refine) for refine in (None, *METHODS.values())]
    for (name, one), (other, two) in combinations(zip(("sft", *METHODS), moved, strict=True), 2):
        assert one.isfinite().all() and (one - two).abs().max() > 1e-10, f"{name} and {other}"
