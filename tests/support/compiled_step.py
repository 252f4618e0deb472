"""The compiled step of a single token: it traces as one graph, and its static buffers hold what `read` would return.

Run by tests/models/test_decode_step.py in a process of its own, which does not check shapes at run time: torch.compile
cannot trace these checks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from weakref import WeakKeyDictionary

import pytest
import torch

from refine_lab.method import rollout
from refine_lab.method.rollout import Branches, sample
from refine_lab.models import FastWeightLM, decode_step
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.writes import scaled_writes
from tests.factories import gated_deltanet, lact
from tests.factories.step import make_batch, make_policy

POLICIES: dict[str, Callable[[], FastWeightLM]] = {
    "delta_net": make_policy,
    "gated_deltanet": lambda: gated_deltanet.make_policy(std=0.05),
}


def branches_of(policy: FastWeightLM, group_size: int = 2) -> Branches:
    batch = make_batch()
    with torch.no_grad():
        return Branches.of(policy.read(batch.tokens, batch.lengths), torch.tensor([[3, 40]] * 3), group_size)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiles on the CPU, without generating code; the list receives the number of tokens of every step."""
    steps: list[int] = []
    graph = decode_step.compiled("aot_eager")
    monkeypatch.setattr(decode_step, "compiled", lambda: lambda *a: (steps.append(len(a[2])), graph(*a))[1])
    monkeypatch.setattr(decode_step, "DEVICE", "cpu")
    return steps


def uniforms(branches: Branches) -> torch.Tensor:
    shape = len(branches.hidden_states), 5
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", POLICIES)
def test_rollouts_of_the_compiled_step_are_those_of_read(family, on_the_cpu, monkeypatch):
    torch.manual_seed(0)
    policy = POLICIES[family]()
    checkpoint_activations(policy, "blocks")
    branches = branches_of(policy)
    with torch.no_grad():
        decode = decode_step.Decoder(policy, branches.state, branches.hidden_states)
        state, tokens = branches.state, torch.arange(12) % 7
        for _ in range(3):
            trace = policy.read(tokens.unsqueeze(1), state=state)
            state = trace.final_state
            assert (decode(tokens) - trace.hidden_states[:, 0]).abs().max() < 1e-10
        assert decode._step is not None
    for name, tensor in state.tensors.items():
        assert (decode._step.buffers[name] - tensor).abs().max() < 1e-10, name
    compiled = sample(policy, branches, uniforms(branches), 1.0)
    assert on_the_cpu == [12] * 7
    monkeypatch.setattr(decode_step, "DEVICE", "cuda")
    assert torch.equal(sample(policy, branches, uniforms(branches), 1.0), compiled) and len(on_the_cpu) == 7
    assert rollout.Decoder is decode_step.Decoder


def test_the_step_follows_weights_that_are_updated_in_place(on_the_cpu):
    torch.manual_seed(0)
    policy = make_policy()
    branches = branches_of(policy)
    tokens = torch.arange(12) % 7
    with torch.no_grad():
        before = decode_step.Decoder(policy, branches.state, branches.hidden_states)(tokens).clone()
        for parameter in policy.parameters():
            parameter.mul_(1.1)
        after = decode_step.Decoder(policy, branches.state, branches.hidden_states)(tokens)
        expected = policy.read(tokens.unsqueeze(1), state=branches.state).hidden_states[:, 0]
    assert (after - expected).abs().max() < 1e-10 < (after - before).abs().max()


def test_more_forms_than_torch_compiles_by_itself_and_no_more_than_the_most(on_the_cpu, monkeypatch):
    """Three policies of three numbers of rollouts are nine graphs of one function, of which torch allows eight."""
    monkeypatch.setattr(decode_step, "_STEPS", WeakKeyDictionary())
    monkeypatch.setattr(decode_step, "MOST_STEPS", 9)
    policies = [make_policy() for _ in range(4)]
    with torch.no_grad():
        for number, policy in enumerate(policies):
            for group_size in (1, 2, 3):
                branches = branches_of(policy, group_size)
                decode = decode_step.Decoder(policy, branches.state, branches.hidden_states)
                tokens = torch.arange(len(branches.hidden_states)) % 7
                expected = policy.read(tokens.unsqueeze(1), state=branches.state).hidden_states[:, 0]
                assert (decode(tokens) - expected).abs().max() < 1e-10
                assert (decode._step is None) == (number == 3)
    assert len(on_the_cpu) == 9


def test_the_state_is_copied_no_sooner_than_it_is_needed(on_the_cpu, monkeypatch):
    monkeypatch.setattr(decode_step, "static_step", None)  # a call would fail
    policy = make_policy()
    branches = branches_of(policy)
    assert sample(policy, branches, uniforms(branches)[:, :1], 1.0).shape == (12, 1)


def test_what_cannot_be_compiled_is_read(on_the_cpu, monkeypatch):
    policy = make_policy()
    with torch.no_grad():
        state = branches_of(policy).state
        assert decode_step.compiles(policy, state)
        assert decode_step.compiles(copy.deepcopy(policy), state)
        with scaled_writes({(0, "recurrent_state"): torch.ones(12, 1, 2)}):
            assert not decode_step.compiles(policy, state)
        other = lact.make_lact()
        assert not decode_step.compiles(other, branches_of(other).state)
        monkeypatch.setenv(decode_step.SWITCH, "0")
        assert not decode_step.compiles(policy, state)
        monkeypatch.delenv(decode_step.SWITCH)
    assert not decode_step.compiles(policy, state)  # gradients are enabled
