"""Parts that run again in the backward: the same gradients to the last bit, the same states, and less kept in between."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from refine_lab.config import RefineConfig
from refine_lab.method.step import train_step
from refine_lab.models import FastWeightLM
from refine_lab.models.activation_checkpointing import checkpoint_activations, runs_again
from refine_lab.rng import Draws
from refine_lab.types import Batch
from tests.factories.parity import FAMILIES, make
from tests.factories.step import make_batch, make_policy, train_state_for
from tests.support.refusals import refused

METHOD = RefineConfig(num_chunks=4, margin=5, group_size=2)


def step_gradients(policy: FastWeightLM, batch: Batch, dtype: str = "float32") -> list[torch.Tensor]:
    """Of one REFINE step whose optimizer moves nothing that matters: weights come back as they were."""
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    train_state = train_state_for(policy, METHOD, micro_batch_size=2, dtype=dtype)
    train_step(train_state, batch, Draws(seed=0, step=1))
    policy.load_state_dict(before)
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, "float32") for name in FAMILIES), ("deltanet", "bfloat16"), ("lact-muon", "bfloat16")],
)
@pytest.mark.parametrize("part", ("mlp", "blocks"))
def test_a_refine_step_has_the_same_gradients_to_the_last_bit(family, part, dtype):
    policy, batch = make(family, torch.float32), make_batch()
    plain = step_gradients(policy, batch, dtype)
    checkpoint_activations(policy, part)
    again = step_gradients(policy, batch, dtype)
    assert len(plain) == len(again) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("part", ("mlp", "blocks"))
def test_states_are_the_same_with_their_gradients(part):
    policy, batch = make_policy(), make_batch()
    positions = torch.tensor([[0, 63, 90]] * 3)
    results = []
    for which in ("none", part):
        checkpoint_activations(policy, which)
        state = policy.read(batch.tokens, batch.lengths).state_at(positions)
        hidden = policy.read(batch.tokens[:, :3].repeat_interleave(3, 0), state=state).hidden_states
        results.append(
            (state, torch.autograd.grad(hidden.square().sum(), list(policy.parameters()), allow_unused=True))
        )
    (expected, grads), (state, again) = results
    assert all(torch.equal(state.tensors[name], x) for name, x in expected.tensors.items())
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(again, grads, strict=True))


def kept(policy: FastWeightLM, batch: Batch) -> int:
    """Bytes that a reading keeps for its backward, beside the weights."""
    weights = {x.untyped_storage().data_ptr() for x in policy.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        alive.append(storage)  # so that no address is given away twice
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        policy.read(batch.tokens, batch.lengths)
    return sum(sizes.values())


def test_less_is_kept_the_more_runs_again():
    policy, batch = make_policy(torch.float32), make_batch()
    sizes = []
    for part in ("none", "mlp", "blocks"):
        checkpoint_activations(policy, part)
        sizes.append(kept(policy, batch))
    assert sizes[0] > 1.1 * sizes[1] > 2 * sizes[2] > 0


def test_asking_again_replaces_and_none_takes_it_back():
    policy = make_policy(torch.float32)
    block = policy.model.layers[0]
    for part, inner, outer in (("mlp", True, False), ("blocks", False, True), ("none", False, False)):
        checkpoint_activations(policy, part)
        assert [runs_again(x) for x in (block.mlp, block)] == [inner, outer]
        for module in (block.mlp, block):  # never twice around
            once = vars(module).get("forward_once", module.forward)
            assert once.__func__ is type(module).forward


@pytest.mark.parametrize("part", ("mlp", "blocks"))
def test_a_copy_runs_its_own_blocks(part):
    policy, batch = make_policy(torch.float32), make_batch()
    checkpoint_activations(policy, part)
    copy = deepcopy(policy).double()
    hidden = copy.read(batch.tokens, batch.lengths).hidden_states
    hidden.square().sum().backward()
    assert hidden.dtype == torch.float64
    assert all(p.grad is None for p in policy.parameters())
    assert all(p.grad is not None for p in copy.model.layers[0].parameters())


def test_a_part_that_is_none_is_refused():
    policy = make_policy(torch.float32)
    with refused("activation_checkpointing", "all"):
        checkpoint_activations(policy, "all")
    with refused("TrainConfig.activation_checkpointing", "all", "one of 'none', 'mlp', 'blocks'"):
        replace(train_state_for(policy, None).config, activation_checkpointing="all")
