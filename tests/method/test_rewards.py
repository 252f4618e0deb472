"""Built-in rewards by hand, and what is held to be true of every reward."""

import os
import signal
import sys
from dataclasses import fields, replace

import pytest
import torch

from refine_lab.config import BUILT_IN_REWARDS, RefineConfig
from refine_lab.method.rewards import (
    REWARDS,
    binary,
    checked,
    cosine,
    edit,
    exact,
    hybrid,
    permuted,
    reward_function,
)
from refine_lab.ttt_config import TTTConfig
from refine_lab.types import RewardInputs
from tests.support.refusals import naming, refused
from tests.support.reward_examples import two_rollouts


def test_cosine_by_hand():
    assert cosine(two_rollouts()).tolist() == pytest.approx([(1 + 0) / 2, (0.6 - 1) / 2])


def test_binary_by_hand():
    assert binary(two_rollouts()).tolist() == [0.5, 0]


def test_hybrid_is_the_sum():
    assert hybrid(two_rollouts()).tolist() == pytest.approx([1.0, -0.2])


def test_exact_by_hand():
    rollouts, targets = torch.tensor([[1, 2, 3], [1, 2, 4], [0, 0, 0]]), torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    rewards = exact(with_ids(rollouts, targets))
    assert rewards.tolist() == [1, 0, 0] and rewards.dtype == torch.float32


def test_permuted_rewards_are_the_same_numbers_at_other_rollouts():
    rewards, keys = torch.arange(10.0), torch.rand(10, generator=torch.Generator().manual_seed(0))
    found = permuted(rewards, keys)
    assert sorted(found.tolist()) == rewards.tolist() and (found != rewards).all()
    assert permuted(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0.3, 0.1, 0.2])).tolist() == [7, 5, 6]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(permuted(rewards[order], keys[order]), found[order])


@pytest.mark.parametrize(
    ("rollout", "target", "distance"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 0),
        ([1, 2, 3, 4], [1, 9, 3, 4], 1),  # one token replaced
        ([2, 3, 4, 9], [1, 2, 3, 4], 2),  # shifted: one deleted, one inserted; no token is at its place
        ([4, 3, 2, 1], [1, 2, 3, 4], 4),
        ([5, 6, 7, 8], [1, 2, 3, 4], 4),
        ([1, 1, 1, 1], [1, 2, 1, 2], 2),
        ([7], [7], 0),
        ([7], [8], 1),
    ],
)
def test_edit_by_hand(rollout, target, distance):
    assert edit(with_ids(torch.tensor([rollout]), torch.tensor([target]))).tolist() == [1 - distance / len(rollout)]


@pytest.mark.parametrize("length", [1, 2, 5, 8, 33])
def test_edit_of_many_rollouts_is_the_recursion_of_levenshtein(length):
    ids = torch.randint(4, (2, 64, length), generator=torch.Generator().manual_seed(length))
    rewards = edit(with_ids(*ids))
    assert rewards.dtype == torch.float32 and len(rewards.unique()) > 1
    expected = [1 - levenshtein(a, b) / length for a, b in zip(*ids.tolist(), strict=True)]
    assert rewards.tolist() == pytest.approx(expected)


def with_ids(rollout_ids: torch.Tensor, target_ids: torch.Tensor) -> RewardInputs:
    hidden = torch.zeros(*rollout_ids.shape, 2)
    return RewardInputs(
        rollout_ids=rollout_ids,
        target_ids=target_ids,
        hidden_states=hidden,
        target_hidden_states=hidden,
        logprobs=hidden[..., 0],
    )


def levenshtein(a: list[int], b: list[int]) -> int:
    """The edit distance, cell by cell."""
    cells = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if 0 in (i, j)}
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            cells[i + 1, j + 1] = min(cells[i, j] + (x != y), cells[i, j + 1] + 1, cells[i + 1, j] + 1)
    return cells[len(a), len(b)]


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
    for name in BUILT_IN_REWARDS:
        assert TTTConfig(refine=RefineConfig(reward=name)).refine.reward == name


def test_unknown_rewards_are_refused_with_the_nearest():
    with refused("reward", "cosin"):
        reward_function("cosin")
    with naming(ValueError, "'custom'", "source"):
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
    ("result", "facts"),
    [
        (0.5, ["shape [2]", "float"]),
        (None, ["shape [2]", "NoneType"]),
        (torch.zeros(2, 5), ["torch.float32", [2, 5]]),
        (torch.zeros(()), ["torch.float32", []]),
        (torch.tensor([1, 2]), ["torch.int64", [2]]),
        (torch.tensor([0.0, torch.nan]), ["nan", "rollout 1"]),
        (torch.tensor([-torch.inf, 0.0]), ["-inf", "rollout 0"]),
    ],
)
def test_a_wrong_result_is_named(result, facts):
    with naming(ValueError, "'mine'", *facts):
        checked(returning(result))(two_rollouts())


def changes_its_inputs(inputs):
    inputs.map(torch.Tensor.zero_)
    return inputs.logprobs.sum(-1)


def test_a_reward_that_changes_its_inputs_changes_no_training():
    given = two_rollouts()
    assert checked(changes_its_inputs)(given).tolist() == [0.0, 0.0]
    for field in fields(given):
        assert torch.equal(getattr(given, field.name), getattr(two_rollouts(), field.name))


def stops(inputs):
    sys.exit(3)


def interrupts(inputs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("reward", "error"),
    [
        (lambda inputs: inputs.logprobs[:, 99], "IndexError"),
        (stops, "SystemExit: 3"),
        (interrupts, "KeyboardInterrupt"),
    ],
)
def test_an_error_in_a_reward_names_the_reward(reward, error):
    handler = signal.signal(signal.SIGINT, lambda number, frame: None)  # as in a run's process
    try:
        with naming(RuntimeError, f"reward {reward.__name__!r} raised {error}"):
            checked(reward)(two_rollouts())
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_interrupt_by_the_user_is_not_an_error_of_the_reward():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        checked(interrupts)(two_rollouts())


def test_a_reward_too_large_to_be_standardised_is_refused():
    with naming(ValueError, "between -1e+15 and 1e+15"):
        checked(lambda inputs: torch.full((len(inputs.rollout_ids),), 3e38))(two_rollouts())


def forks(inputs):
    os.fork()
    return inputs.logprobs.sum(-1)


def test_a_process_that_a_reward_forks_ends_with_the_reward():
    before = os.getpid()
    rewards = checked(forks)(two_rollouts())
    assert os.getpid() == before, "only this process returns"
    assert torch.equal(rewards, two_rollouts().logprobs.sum(-1))
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
