"""Losses and their gradients by hand."""

import math

import pytest
import torch

from refine_lab.method.losses import entropy_loss, kl_loss, ntp_loss, policy_loss

CLIP = {"clip_eps": 0.2, "dual_clip": 3.0}


def at_ratios(ratios: list[list[float]], advantages: list[float]) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Loss, metrics and d loss / d logprobs where the policy moved from probability 1/2 by these ratios."""
    old = torch.full((len(ratios), len(ratios[0])), math.log(0.5), dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    weights = torch.tensor(advantages, dtype=torch.float64)
    loss, metrics = policy_loss(logprobs, old, weights, **CLIP, num_tokens=old.numel())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), metrics, gradient


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # above 1 + eps and wanted: clipped
        (0.5, 2.0, -1.0, -1.0),  # below 1 - eps but wanted up: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below 1 - eps and unwanted: clipped
        (1.5, -2.0, 3.0, 3.0),  # above 1 + eps but wanted down: not clipped ...
        (2.9, -2.0, 5.8, 5.8),
        (4.0, -2.0, 6.0, 0.0),  # ... up to the dual clip
        (4.0, 2.0, -2.4, 0.0),  # which holds for negative advantages alone
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, gradient):
    value, metrics, slope = at_ratios([[ratio]], [advantage])
    assert value.item() == pytest.approx(loss)
    assert slope.item() == pytest.approx(gradient)
    clipped = gradient == 0 and advantage != 0
    assert metrics["clip_fraction"].item() == float(clipped)
    assert metrics["ratio_mean"].item() == pytest.approx(ratio)


def test_the_advantage_of_a_rollout_stands_on_all_its_tokens():
    value, metrics, gradient = at_ratios([[1.0, 1.1, 1.5], [0.9, 0.5, 4.0]], [1.0, -1.0])
    assert value.item() == pytest.approx((-1.0 - 1.1 - 1.2 + 0.9 + 0.8 + 3.0) / 6)
    assert gradient.tolist() == [pytest.approx([-1 / 6, -1.1 / 6, 0]), pytest.approx([0.9 / 6, 0, 0])]
    assert metrics["clip_fraction"].item() == pytest.approx(0.5)
    assert metrics["ratio_mean"].item() == pytest.approx(9.0 / 6)


def test_one_update_a_batch_has_the_policy_gradient():
    """With the old logprobs equal to the logprobs, even the same tensor, the gradient is -A / tokens."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    loss, metrics = policy_loss(logprobs, logprobs, torch.tensor([0.5, -1.5]), **CLIP, num_tokens=4)
    loss.backward()
    assert loss.item() == pytest.approx((-0.5 + 1.5) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.125, -0.125], [0.375, 0.375]]
    assert metrics["clip_fraction"].item() == 0
    assert metrics["ratio_mean"].item() == 1


def test_micro_batches_add_up_to_the_batch():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
    old = logprobs + 0.5 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    whole, metrics = policy_loss(logprobs, old, advantages, **CLIP, num_tokens=30)
    parts = [
        policy_loss(logprobs[i : i + 2], old[i : i + 2], advantages[i : i + 2], **CLIP, num_tokens=30)
        for i in (0, 2, 4)
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item())
    assert 0 < metrics["clip_fraction"].item() < 1
    for name, value in metrics.items():
        assert sum(part[name].item() for _, part in parts) == pytest.approx(value.item())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_vanished_old_probability_gives_a_finite_loss_and_no_nan(advantage):
    logprobs = torch.tensor([[-0.1]], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.tensor([[-500.0]]), torch.tensor([advantage]), **CLIP, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 if advantage > 0 else 3.0)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0


def test_kl_by_hand():
    """r (exp(d) - d - 1) with d = log ref - log pi and r = pi / pi_old; its slope in log pi is -r d."""
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(0.25), math.log(0.25)]], dtype=torch.float64)
    reference = torch.tensor([[math.log(0.25), math.log(0.25)]], dtype=torch.float64)
    loss = kl_loss(logprobs, old, reference, num_tokens=2)
    loss.backward()
    assert loss.item() == pytest.approx(2 * (0.5 + math.log(2) - 1) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([2 * math.log(2) / 2, 0.0])


class Sequences:
    """All sequences of two tokens out of three, as a policy draws them that looks at the first for the second."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (3, (3, 3))]
        self.parameters = [x.requires_grad_() for x in logits]

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(first) [3] and log p(second | first) [3, 3]."""
        first, second = (x.log_softmax(-1) for x in self.parameters)
        return first, second

    @property
    def logprobs(self) -> torch.Tensor:
        """[9, 2]: of the first and of the second token of every sequence."""
        first, second = self.tables
        return torch.stack([first.repeat_interleave(3), second.flatten()], 1)

    def expected(self, losses: torch.Tensor) -> torch.Tensor:
        """The mean of the sequences' losses [9] over draws from this policy."""
        return (self.logprobs.sum(1).exp().detach() * losses).sum()


def gradients(value: torch.Tensor, policy: Sequences) -> torch.Tensor:
    return torch.cat(
        [x.flatten() for x in torch.autograd.grad(value, policy.parameters, retain_graph=True, materialize_grads=True)]
    )


def alone(loss, *tensors: torch.Tensor) -> torch.Tensor:
    """The loss of each row by itself, [R]."""
    rows = zip(*(x.split(1) for x in tensors), strict=True)
    return torch.stack([loss(*row, num_tokens=1) for row in rows])


def policies(updates: int) -> tuple[Sequences, Sequences, Sequences]:
    """A policy, the one that drew its tokens (itself before its first update, another after it), and a reference."""
    policy, moved, reference = Sequences(0), Sequences(1), Sequences(2)
    return policy, policy if updates == 1 else moved, reference


@pytest.mark.parametrize("updates", [1, 2])
def test_the_expected_gradient_of_kl_is_that_of_the_divergence(updates):
    """Over every sequence, weighted as pi_old draws it: value and gradient of the divergence at the states it visits."""
    policy, old, reference = policies(updates)
    found = old.expected(alone(kl_loss, policy.logprobs, old.logprobs.detach(), reference.logprobs))
    (first, second), (first_ref, second_ref) = policy.tables, reference.tables
    visited = old.tables[0].exp().detach()
    exact = (first.exp() * (first - first_ref)).sum()
    exact = exact + (visited.unsqueeze(1) * second.exp() * (second - second_ref)).sum()
    assert found.item() == pytest.approx(exact.item(), abs=1e-10)
    assert torch.allclose(gradients(found, policy), gradients(exact, policy), rtol=0, atol=1e-10)
    reverse = (first_ref.exp() * (first_ref - first)).sum()
    assert not torch.allclose(gradients(exact, policy)[:3], gradients(reverse, policy)[:3], atol=1e-2)  # k3's own


@pytest.mark.parametrize("updates", [1, 2])
def test_the_expected_gradient_of_the_policy_loss_is_that_of_the_expected_advantage(updates):
    """Where nothing is clipped: at the states that pi_old visits, the advantage of a sequence counted at each token."""
    policy, old, _ = policies(updates)
    advantages = torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def unclipped(logprobs, old_logprobs, advantage, num_tokens):
        return policy_loss(logprobs, old_logprobs, advantage, 1e6, 1e6, num_tokens)[0]

    found = old.expected(alone(unclipped, policy.logprobs, old.logprobs.detach(), advantages))
    (first, second), (first_old, second_old) = policy.tables, [x.detach() for x in old.tables]
    by_state = advantages.view(3, 3)
    at_first = first.exp() * (second_old.exp() * by_state).sum(1)  # the second token comes from pi_old
    at_second = first_old.exp().unsqueeze(1) * second.exp() * by_state
    exact = -(at_first.sum() + at_second.sum())
    assert torch.allclose(gradients(found, policy), gradients(exact, policy), rtol=0, atol=1e-10)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_expected_gradient_of_the_entropy_is_exact_at_the_states_that_are_visited(updates):
    policy, old, _ = policies(updates)
    first, second = policy.tables
    at_first, at_second = -(first.exp() * first).sum(), -(second.exp() * second).sum(1)
    entropies = torch.stack([at_first.expand(9), at_second.repeat_interleave(3)], 1)
    found = old.expected(alone(entropy_loss, entropies))
    exact = -at_first - (old.tables[0].exp().detach() * at_second).sum()
    assert found.item() == pytest.approx(exact.item(), abs=1e-10)
    assert torch.allclose(gradients(found, policy), gradients(exact, policy), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("logprob", "reference"), [(-0.1, -500.0), (-500.0, -0.1), (-0.1, -0.1)])
def test_kl_stays_finite_where_a_probability_vanishes(logprob, reference):
    """In float32 too, where exp(d) - d - 1 and its slope would cancel to nothing."""
    logprobs = torch.tensor([[logprob]], requires_grad=True)
    loss = kl_loss(logprobs, logprobs.detach(), torch.tensor([[reference]]), 1)
    loss.backward()
    difference = max(-20.0, min(20.0, reference - logprob))
    assert loss.item() == pytest.approx(math.expm1(difference) - difference, rel=1e-6)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(-difference)


def test_entropy_loss_rewards_spread():
    assert entropy_loss(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), num_tokens=4).item() == -3


def test_ntp_loss_by_hand_with_rows_of_unequal_length():
    """Rows of 3, 2 and 1 tokens have 2, 1 and 0 next tokens; pads may be anything."""
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, torch.nan], [torch.nan, torch.inf]], requires_grad=True)
    loss = ntp_loss(logprobs, torch.tensor([3, 2, 1]), num_tokens=3)
    loss.backward()
    assert loss.item() == pytest.approx(7 / 3)
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, -torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]) / 3)


def test_ntp_loss_is_the_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 7, 11, generator=generator)
    tokens = torch.randint(11, (2, 7), generator=generator)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert ntp_loss(logprobs, torch.tensor([7, 7]), num_tokens=12).item() == pytest.approx(expected.item(), rel=1e-6)
