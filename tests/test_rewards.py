"""Built-in rewards by hand, and what is held to be true of every reward."""

from dataclasses import fields, replace

import pytest
import torch
from reward_examples import two_rollouts

from refine_lab.config import BUILT_IN_REWARDS, RefineConfig
from refine_lab.rewards import REWARDS, binary, checked, cosine, hybrid, reward_function
from refine_lab.types import RewardInputs


def test_cosine_by_hand():
    assert cosine(two_rollouts()).tolist() == pytest.approx([(1 + 0) / 2, (0.6 - 1) / 2])


def test_binary_by_hand():
    assert binary(two_rollouts()).tolist() == [0.5, 0]


def test_hybrid_is_the_sum():
    assert hybrid(two_rollouts()).tolist() == pytest.approx([1.0, -0.2])


def test_cosine_of_bfloat16_is_taken_in_float32_and_of_float64_in_float64():
    given = two_rollouts()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        changes = {name: getattr(given, name).to(dtype) for name in ("hidden_states", "target_hidden_states")}
        rewards = cosine(replace(given, **changes))
        assert rewards.dtype == expected
        assert rewards.tolist() == pytest.approx([0.5, -0.2], abs=1e-6)


@pytest.mark.parametrize("name", BUILT_IN_REWARDS)
def test_no_gradient_passes_through_a_reward(name):
    given = two_rollouts()
    given.hidden_states.requires_grad_()
    given.logprobs.requires_grad_()
    assert not reward_function(name)(given).requires_grad


def test_the_configuration_knows_the_names_of_all_rewards():
    assert tuple(REWARDS) == BUILT_IN_REWARDS
    for name in (*BUILT_IN_REWARDS, "custom"):
        assert RefineConfig(reward=name).reward == name


def test_unknown_rewards_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'cosin'; did you mean 'cosine'"):
        reward_function("cosin")
    with pytest.raises(ValueError, match="'custom' needs the source"):
        reward_function("custom")


def test_inputs_are_joined_in_their_order():
    first, second = two_rollouts(), two_rollouts().map(lambda x: x + 1)
    both = RewardInputs.cat([first, second])
    for field in fields(RewardInputs):
        expected = [*getattr(first, field.name), *getattr(second, field.name)]
        assert torch.equal(getattr(both, field.name), torch.stack(expected))


def returning(result):
    def mine(inputs):
        return result

    return mine


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (0.5, "reward 'mine' must return .* shape .2., got float"),
        (None, "got NoneType"),
        (torch.zeros(2, 5), r"got torch.float32 of shape \[2, 5\]"),
        (torch.zeros(()), r"got torch.float32 of shape \[\]"),
        (torch.tensor([1, 2]), r"got torch.int64 of shape \[2\]"),
        (torch.tensor([0.0, torch.nan]), "must be finite, got nan for rollout 1"),
        (torch.tensor([-torch.inf, 0.0]), "must be finite, got -inf for rollout 0"),
    ],
)
def test_a_wrong_result_is_named(result, message):
    with pytest.raises(ValueError, match=message):
        checked(returning(result))(two_rollouts())


def changes_its_inputs(inputs):
    inputs.map(torch.Tensor.zero_)
    return inputs.logprobs.sum(-1)


def test_a_reward_that_changes_its_inputs_changes_no_training():
    given = two_rollouts()
    assert checked(changes_its_inputs)(given).tolist() == [0.0, 0.0]
    for field in fields(given):
        assert torch.equal(getattr(given, field.name), getattr(two_rollouts(), field.name))


def test_an_error_in_a_reward_reaches_the_caller():
    with pytest.raises(IndexError):
        checked(lambda inputs: inputs.logprobs[:, 99])(two_rollouts())
