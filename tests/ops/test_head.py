"""The sliced head against torch's own log-softmax: values, entropies, gradients, odd slices, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refine_lab.ops.head import HEAD_ROWS, TokenStats, token_stats

V, D = 17, 8


def make_inputs(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=dtype).requires_grad_() for n in (rows, V))
    return hidden, weight, torch.randint(V, (rows,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float = 1.0) -> TokenStats:
    """The whole logits at once."""
    logits = hidden @ weight.T / temperature
    logprobs = torch.log_softmax(logits, -1)
    taken = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return TokenStats(taken, -(logprobs.exp() * logprobs).sum(-1), logits.argmax(-1) == token_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("rows", [1, 5, HEAD_ROWS - 1, HEAD_ROWS, HEAD_ROWS + 1, 2 * HEAD_ROWS + 2])
def test_values_and_gradients_are_those_of_whole_logits(rows, temperature):
    inputs = make_inputs(rows)
    ours, theirs = token_stats(*inputs, temperature=temperature), reference(*inputs, temperature)
    assert torch.allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-12)
    assert torch.allclose(ours.entropies, theirs.entropies, rtol=0, atol=1e-12)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    weights = torch.randn(2, rows, dtype=torch.float64)
    for used in ((1, 0), (0, 1), (1, 1)):  # logprobs alone, entropies alone, both
        losses = [
            sum(on * (w * x).sum() for on, w, x in zip(used, weights, stats[:2], strict=True))
            for stats in (ours, theirs)
        ]
        grads = [torch.autograd.grad(loss, inputs[:2], retain_graph=True) for loss in losses]
        for name, a, b in zip(("hidden states", "weight"), *grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), f"gradient of {name}, {used}"


def test_one_output_alone_may_be_used():
    inputs = make_inputs(7)
    for field in (0, 1):
        ours, theirs = (torch.autograd.grad(f(*inputs)[field].sum(), inputs[:2]) for f in (token_stats, reference))
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_known_distributions():
    """Two equal logits among very small ones: p = 1/2 each, entropy log 2."""
    hidden, weight = torch.tensor([[1.0]]).double(), torch.tensor([[0.0], [0.0], [-1e4]]).double()
    stats = token_stats(hidden.expand(3, 1), weight, torch.tensor([0, 1, 2]))
    half = torch.tensor(2.0).double().log()
    assert torch.allclose(stats.logprobs, torch.stack([-half, -half, -1e4 - half]), atol=1e-12)
    assert torch.allclose(stats.entropies, half.expand(3), atol=1e-12)
    assert stats.is_top1.tolist() == [True, True, False]


def test_large_logits_neither_overflow_nor_lose_their_gradient():
    hidden, weight, ids = make_inputs(6, torch.float32)
    stats = token_stats(hidden * 300, weight, ids)
    expected = reference(hidden.double() * 300, weight.double(), ids)
    assert torch.allclose(stats.logprobs.double(), expected.logprobs, rtol=1e-5)
    assert torch.isfinite(stats.entropies).all() and (stats.entropies >= -1e-6).all()
    ours, theirs = (torch.autograd.grad(s.logprobs.sum(), hidden, retain_graph=True)[0] for s in (stats, expected))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3  # logits of 3,000 have errors of 2e-4


def test_without_entropies_the_logprobs_are_the_same_and_entropies_zero():
    inputs = make_inputs(HEAD_ROWS + 3)
    with_entropy, without = token_stats(*inputs), token_stats(*inputs, entropy=False)
    assert torch.equal(with_entropy.logprobs, without.logprobs)
    assert torch.equal(with_entropy.is_top1, without.is_top1)
    assert (without.entropies == 0).all()
    grads = [torch.autograd.grad(s.logprobs.sum(), inputs[:2]) for s in (with_entropy, without)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*grads, strict=True))


def test_no_rows_give_no_values():
    hidden, weight, ids = make_inputs(0)
    stats = token_stats(hidden, weight, ids)
    assert [len(x) for x in stats] == [0, 0, 0]


def test_under_autocast_logits_are_bfloat16_and_the_rest_float32():
    hidden, weight, ids = make_inputs(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats(hidden, weight, ids)
    assert stats.logprobs.dtype == stats.entropies.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = torch.log_softmax(logits, -1)
    assert torch.allclose(stats.logprobs, expected.gather(-1, ids.unsqueeze(-1)).squeeze(-1), atol=1e-6)
    assert torch.allclose(stats.entropies, -(expected.exp() * expected).sum(-1), atol=1e-6)
    grads = torch.autograd.grad(stats.logprobs.sum(), (hidden, weight))
    exact = torch.autograd.grad(reference(hidden, weight, ids).logprobs.sum(), (hidden, weight))
    for grad, other in zip(grads, exact, strict=True):
        assert grad.dtype == torch.float32
        assert float((grad - other).norm() / other.norm()) < 2e-2
