"""Write attribution against finite differences, and erasing against a recurrence token by token, for every family."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from refine_lab.explore.attribution import agreement, write_attribution
from refine_lab.explore.erasing import erase, erasing_effects, erasing_factors
from refine_lab.explore.states import recorded, written
from refine_lab.explore.targets import Target, score_target
from refine_lab.method.rollout import Branches
from refine_lab.models import FastWeightLM, State
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.writes import scaled_writes
from tests.factories.parity import make
from tests.support.refusals import refused

EVERY = ("deltanet", "gated-deltanet", "lact-momentum", "qwen3-next", "qwen3.5", "olmo-hybrid")
TARGET = Target(position=140, token_ids=(3, 7, 11))
CONTRAST = dataclasses.replace(TARGET, against=(5,))


def document(length: int = 150) -> torch.Tensor:
    return torch.randint(0, 53, (length,), generator=torch.Generator().manual_seed(1))


def value(policy: FastWeightLM, factors: dict, target: Target = CONTRAST) -> float:
    """The target with the given factors, by an ordinary reading of the prefix."""
    with torch.no_grad(), scaled_writes(factors):
        trace = policy.read(document()[None, :141])
    with torch.no_grad():
        return float(score_target(policy, Branches.of(trace, torch.tensor([[140]]), 1), target).logprobs)


@pytest.mark.parametrize("family", EVERY)
def test_effects_equal_finite_differences(family: str) -> None:
    policy, step, random = make(family, torch.float64), 1e-4, np.random.default_rng(0)
    found = write_attribution(policy, document(), CONTRAST)
    assert found.value == pytest.approx(value(policy, {}), abs=1e-12)
    for number, part in enumerate(found.parts):
        effects = found.effects[number, : part.heads]
        assert np.isnan(found.effects[number, part.heads :]).all()
        tokens = np.argsort(-np.abs(effects).sum(0))[:3]
        for token in (*tokens.tolist(), int(random.integers(141))):
            head = int(random.integers(part.heads))
            around = []
            for change in (step, -step):
                factor = torch.ones(1, 141, part.heads, dtype=torch.float64)
                factor[0, token, head] += change
                around.append(value(policy, {part.key: factor}))
            difference = (around[0] - around[1]) / (2 * step)
            assert difference == pytest.approx(effects[head, token], rel=1e-6, abs=1e-10)  # rounding of the difference
    assert np.abs(np.nan_to_num(found.effects)).max() > 1e-4


@pytest.mark.parametrize("family", EVERY)
def test_erasing_equals_a_recurrence_without_these_writes(family: str) -> None:
    policy, tokens = make(family, torch.float64), document()
    groups = ((63,), (64,), (61, 65), (0, 100), (127, 128, 129))  # on, before and after the borders of chunks
    state: State | None = None
    steps = []
    with torch.no_grad():
        for position, token in enumerate(tokens):
            switched = erasing_factors(policy, [[0] if position in group else [] for group in groups], 1)
            with scaled_writes(switched):
                step = policy.read(token.expand(len(groups), 1), state=state)
            state = step.final_state
            steps.append(step.hidden_states[:, 0])
        intact = policy.read(tokens[None])
        for group, expected in zip(groups, torch.stack(steps, 1), strict=True):
            hidden = erase(policy, intact, tokens, group).hidden_states[0]
            assert torch.allclose(hidden, expected, atol=1e-10, rtol=0)
            changed = (hidden - intact.hidden_states[0]).abs().amax(-1)
            assert not changed[: min(group)].any() and changed[min(group) :].max() > 1e-6


@pytest.mark.parametrize("family", EVERY)
def test_effects_of_groups_are_those_of_erasing_each_alone(family: str) -> None:
    policy, tokens = make(family, torch.float64), document()
    trace = policy.read(tokens[None])
    groups = [[5], [63, 64], [0], [100, 3], [139]]
    effects = erasing_effects(policy, trace, tokens, TARGET, groups)
    intact = value(policy, {}, TARGET)
    for group, effect in zip(groups, effects, strict=True):
        mask = torch.ones(1, 141)
        mask[0, group] = 0
        every = {part.key: mask.unsqueeze(-1).expand(-1, -1, part.heads) for part in policy.memory_parts}
        assert effect == pytest.approx(value(policy, every, TARGET) - intact, abs=1e-10)


@pytest.mark.parametrize("family", EVERY)
def test_states_after_erasing_are_those_of_a_reading_without_the_writes(family: str) -> None:
    policy, tokens = make(family, torch.float64), document()
    with torch.no_grad():
        without = erase(policy, policy.read(tokens[None]), tokens, [70])
        with scaled_writes(erasing_factors(policy, [[70]], 150)):
            whole = policy.read(tokens[None])
        places = torch.tensor([[149, 20, 69, 70, 100]])
        states, expected = without.state_at(places), whole.state_at(places)
        asked = torch.full((5, 2), 7)
        read = policy.read(asked, state=states).hidden_states
        assert torch.equal(states.lengths, expected.lengths)
        assert torch.allclose(read, policy.read(asked, state=expected).hidden_states, atol=1e-10, rtol=0)


def test_heads_restrict_erasing_and_sums() -> None:
    policy, tokens = make("deltanet", torch.float64), document()
    found = write_attribution(policy, tokens, TARGET)
    cell = (1, "recurrent_state", 0)
    np.testing.assert_allclose(found.by_token([cell]), np.abs(found.effects[1, 0]))
    np.testing.assert_allclose(found.by_cell()[1, 0], np.abs(found.effects[1, 0]).sum())
    np.testing.assert_allclose(found.by_token(), np.abs(found.effects).sum((0, 1)))
    assert found.top(2) == np.argsort(-found.by_token(), kind="stable")[:2].tolist()
    one = erase(policy, policy.read(tokens[None]), tokens, [80], [cell])
    state, intact = one.state_at(torch.tensor([[80]])), policy.read(tokens[None]).state_at(torch.tensor([[80]]))
    changed = (state.tensors["1.recurrent_state"] - intact.tensors["1.recurrent_state"]).abs().amax((0, 2, 3))
    assert changed[0] > 1e-6 and changed[1] < 1e-12
    assert torch.allclose(state.tensors["0.recurrent_state"], intact.tensors["0.recurrent_state"], atol=1e-12)


def test_the_gradient_predicts_most_of_what_erasing_does() -> None:
    policy, tokens = make("deltanet", torch.float64), document()
    found = write_attribution(policy, tokens, TARGET)
    groups = [[token] for token in range(100, 141)]
    effects = erasing_effects(policy, policy.read(tokens[None]), tokens, TARGET, groups)
    agreed = agreement(found, groups, effects)
    assert agreed.r > 0.9 and agreed.same_sign > 0.8
    assert np.isnan(agreement(found, groups[:2], effects[:2]).r)


def test_gates_leave_a_fraction_of_every_write() -> None:
    policy, tokens = make("gated-deltanet", torch.float64), document()
    with recorded(policy, "log_gate") as gates:
        policy.read(tokens[None, :141])
    found = write_attribution(policy, tokens, TARGET)
    for layer in (0, 1):
        expected = torch.stack([gates[layer][token + 1 :].sum(0).exp() for token in (0, 100, 139, 140)], 1)
        np.testing.assert_allclose(found.retained[layer][:, [0, 100, 139, 140]], expected, rtol=1e-4, atol=1e-30)
    assert (write_attribution(make("deltanet", torch.float64), tokens, TARGET).retained == 1).all()


def test_hybrids_report_the_write_strengths_of_their_linear_layers() -> None:
    policy = make("qwen3-next", torch.float64)
    with written(policy) as strengths:
        policy.read(document()[None])
    assert [*strengths] == [0, 1, 2] and {tuple(x.shape) for x in strengths.values()} == {(150, 4)}
    assert all(0 < x.min() and x.max() < 1 for x in strengths.values())


def test_the_model_is_left_as_it_is() -> None:
    policy, tokens = make("lact-momentum", torch.float64), document()
    weights = {name: x.clone() for name, x in policy.state_dict().items()}
    before = policy.read(tokens[None])
    write_attribution(policy, tokens, TARGET)
    erase(policy, before, tokens, [3, 90])
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())
    assert all(torch.equal(x, weights[name]) for name, x in policy.state_dict().items())
    assert torch.equal(policy.read(tokens[None]).hidden_states, before.hidden_states)


def test_bad_requests_are_refused_by_name() -> None:
    policy, tokens = make("deltanet", torch.float32), document()
    trace = policy.read(tokens[None])
    with refused("position", 150, "from 1 to 149"):
        write_attribution(policy, tokens, dataclasses.replace(TARGET, position=150))
    with refused("a target token", [53], "from 0 to 52"):
        write_attribution(policy, tokens, Target(position=9, token_ids=(53,)))
    with refused("an erased token", [150], "from 0 to 149"):
        erase(policy, trace, tokens, [3, 150])
    for bad in (-1, 141):
        with refused("an erased token", [bad], "from 0 to 140, the target's position"):
            erasing_effects(policy, trace, tokens, TARGET, [[2], [5, bad]])
    with refused("the erased tokens", "none", "at least one token"):
        erase(policy, trace, tokens, [])
    with refused("a head", (0, "recurrent_state", 2), "one of the model's memory_parts"):
        erase(policy, trace, tokens, [3], [(0, "recurrent_state", 2)])
    checkpoint_activations(policy, "blocks")
    with refused("activation_checkpointing", "on", "'none' for attribution"):
        write_attribution(policy, tokens, TARGET)
