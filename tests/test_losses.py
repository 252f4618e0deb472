"""Losses and their gradients by hand."""

import math

import pytest
import torch

from refine_lab.losses import entropy_loss, kl_loss, ntp_loss, policy_loss

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
    """exp(d) - d - 1 with d = log ref - log pi; its slope in log pi is 1 - exp(d)."""
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25)]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[math.log(0.25), math.log(0.25)]], dtype=torch.float64)
    loss = kl_loss(logprobs, reference, num_tokens=2)
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + math.log(2) - 1) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0.25, 0.0])


def test_kl_estimates_the_divergence():
    """Averaged over every token with its probability it is the divergence itself."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    each = [kl_loss(policy[i].log().view(1, 1), reference[i].log().view(1, 1), 1).item() for i in range(3)]
    expected = (policy * (policy / reference).log()).sum().item()
    assert sum(p * v for p, v in zip(policy.tolist(), each, strict=True)) == pytest.approx(expected)


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
