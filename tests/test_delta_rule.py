"""The delta rule against flash-linear-attention's naive recurrence: outputs, states, gradients, odd lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_step import learner_for, make_batch, make_policy

import refine_lab.models.deltanet as deltanet
from refine_lab.config import RefineConfig
from refine_lab.draws import Draws
from refine_lab.ops.delta_rule import UnitLowerInverse, chunk_delta_rule
from refine_lab.ops.fla_delta_rule import segmented_delta_rule
from refine_lab.step import train_step

naive = pytest.importorskip("fla.ops.delta_rule.naive", reason="flash-linear-attention is not installed here")

LENGTHS = (1, 2, 5, 63, 64, 65, 100, 130)
B, H, DK, DV = 2, 3, 8, 6


def make_inputs(length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    q, k = (F.normalize(torch.randn(B, length, H, DK, dtype=dtype), dim=-1) for _ in range(2))
    v, beta = torch.randn(B, length, H, DV, dtype=dtype), torch.rand(B, length, H, dtype=dtype)
    state = torch.randn(B, H, DK, DV, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, beta, state)]


def reference(q, k, v, beta, state):
    """fla's recurrence, which works head first and scales q itself."""
    q, k, v, beta = (x.transpose(1, 2) for x in (q * DK**0.5, k, v, beta))
    outputs, final = naive.delta_rule_recurrence(q, k, v, beta, initial_state=state)
    return outputs.transpose(1, 2), final


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((value - truth).norm() / truth.norm().clamp_min(1e-12)).detach())


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence_with_gradients(length):
    inputs = make_inputs(length)
    weight, state_weight = torch.randn(B, length, H, DV), torch.randn(B, H, DK, DV)
    results = []
    for function in (chunk_delta_rule, reference):
        outputs, states = function(*inputs)
        last = torch.full((B, 1), length - 1)
        final = states.at(last) if function is chunk_delta_rule else states
        loss = (outputs * weight).sum() + (final * state_weight).sum()
        results.append((outputs, final, *torch.autograd.grad(loss, inputs)))
    for name, ours, theirs in zip(("o", "S", "dq", "dk", "dv", "dbeta", "dS"), *results, strict=True):
        assert relative(ours, theirs) < 2e-6, f"{name} at length {length}"


@pytest.mark.parametrize("length", LENGTHS)
def test_the_state_at_any_position_is_the_final_state_of_the_tokens_up_to_it(length):
    q, k, v, beta, state = make_inputs(length)
    _, states = chunk_delta_rule(q, k, v, beta, state)
    positions = torch.tensor([0, length // 2, length - 1]).expand(B, -1)
    taken = states.at(positions).unflatten(0, (B, 3))
    for column, position in enumerate(positions[0].tolist()):
        stop = position + 1
        _, truth = reference(q[:, :stop], k[:, :stop], v[:, :stop], beta[:, :stop], state)
        assert relative(taken[:, column], truth) < 2e-6


def torch_kernel(q, k, v, beta, state):
    outputs, states = chunk_delta_rule(q, k, v, beta, state)
    return outputs, states.at(torch.full((len(q), 1), q.shape[1] - 1))


@pytest.mark.parametrize("length", (1, 31, 32, 33, 100))
def test_segments_on_a_kernel_that_returns_final_states_only(length):
    """The CUDA path's own logic, with the torch rule in the place of fla's kernel."""
    inputs = make_inputs(length, torch.float64)
    outputs, states = chunk_delta_rule(*inputs)
    segmented, pieces = segmented_delta_rule(*inputs, kernel=torch_kernel, segment_size=32)
    positions = torch.tensor([[0, length // 2], [length - 1, length // 3]])
    assert relative(segmented, outputs) < 1e-12
    truth, taken = states.at(positions), pieces.at(positions)
    assert relative(taken, truth) < 1e-6  # the segments' first state is float32, as the kernels' are
    weight = torch.randn_like(truth)
    grads = [torch.autograd.grad((x * weight).sum(), inputs[1:], retain_graph=True) for x in (truth, taken)]
    for name, a, b in zip(("dk", "dv", "dbeta", "dS"), *grads, strict=True):
        assert relative(b, a) < 1e-6, name


def test_a_token_of_beta_0_writes_nothing():
    q, k, v, beta, state = make_inputs(70)
    silent = beta.detach().clone()
    silent[:, 40:] = 0
    _, states = chunk_delta_rule(q, k, v, silent, state)
    before, after = states.at(torch.tensor([[39, 69]] * B)).unflatten(0, (B, 2)).unbind(1)
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("size", (1, 2, 4, 8, 16, 32, 64))
def test_the_inverse_of_a_chunk_with_its_gradient(size):
    keys = F.normalize(torch.randn(2, size, 5, dtype=torch.float64), dim=-1)
    lower = (keys @ keys.mT).tril(-1).requires_grad_()
    whole = torch.eye(size, dtype=torch.float64) + lower
    weight = torch.randn(2, size, size, dtype=torch.float64)
    assert torch.allclose(UnitLowerInverse.apply(lower), torch.linalg.inv(whole), atol=1e-10)
    if size > 1:
        (ours,) = torch.autograd.grad((UnitLowerInverse.apply(lower) * weight).sum(), lower)
        (theirs,) = torch.autograd.grad((torch.linalg.inv(whole) * weight).sum(), lower)
        assert torch.allclose(ours, theirs.tril(-1), atol=1e-9)


def test_the_inverse_stays_exact_where_all_keys_are_equal():
    """The worst case of a chunk: one key written 64 times with full strength."""
    lower = torch.ones(1, 64, 64).tril(-1)
    product = UnitLowerInverse.apply(lower) @ (torch.eye(64) + lower)
    assert torch.allclose(product[0], torch.eye(64), atol=1e-6)


def test_a_float32_model_runs_on_kernels_that_work_in_bfloat16(monkeypatch):
    """fla's kernel itself needs CUDA; here the torch rule stands in its place, with its types in and out."""
    fla = pytest.importorskip("fla.ops.delta_rule", reason="flash-linear-attention is not installed here")

    def kernel(q, k, v, beta, *, scale, initial_state, output_final_state):
        assert q.dtype == k.dtype == v.dtype == beta.dtype == torch.bfloat16 and scale == 1.0 and output_final_state
        outputs, state = torch_kernel(q.float(), k.float(), v.float(), beta.float(), initial_state)
        return outputs.to(q.dtype), state

    monkeypatch.setattr(fla, "chunk_delta_rule", kernel)
    policy, batch = make_policy(torch.float32), make_batch()
    truth = policy.read(batch.tokens, batch.lengths)
    monkeypatch.setattr(deltanet, "delta_rule", segmented_delta_rule)
    trace = policy.read(batch.tokens, batch.lengths)
    assert relative(trace.hidden_states, truth.hidden_states) < 3e-2
    positions = torch.tensor([[3, 80]] * 3)
    for name, value in trace.state_at(positions).tensors.items():
        assert relative(value, truth.state_at(positions).tensors[name]) < 3e-2, name
    policy.read(batch.tokens[:, :5], state=trace.final_state).hidden_states.sum().backward()
    assert policy.model.layers[0].attn.k_proj.weight.grad.norm() > 0


@pytest.mark.gpu
def test_a_float32_model_on_cuda_agrees_with_the_cpu():
    policy, batch = make_policy(torch.float32), make_batch()
    truth = policy.read(batch.tokens, batch.lengths)
    there = batch.to("cuda")
    trace = policy.cuda().read(there.tokens, there.lengths)
    assert relative(trace.hidden_states.cpu(), truth.hidden_states) < 3e-2, "hidden states, bfloat16 kernels"
    learner = learner_for(policy, RefineConfig(num_chunks=4, margin=5))
    assert train_step(learner, there, Draws(seed=0, step=1)).metrics["grad_norm"] > 0


@pytest.mark.gpu
def test_fla_kernels_agree_with_torch_on_cuda():
    inputs = [x.detach().cuda().requires_grad_() for x in make_inputs(700)]
    positions = torch.tensor([[0, 511, 512, 699]] * B, device="cuda")
    truth, states = chunk_delta_rule(*inputs)
    outputs, pieces = segmented_delta_rule(*inputs)
    assert relative(outputs.float(), truth) < 2e-2, "outputs, bfloat16"
    assert relative(pieces.at(positions).float(), states.at(positions)) < 2e-2, "states, bfloat16"
    grads = [
        torch.autograd.grad(s.at(positions).float().square().sum(), inputs[1:], retain_graph=True)
        for s in (states, pieces)
    ]
    for name, a, b in zip(("dk", "dv", "dbeta", "dS"), *grads, strict=True):
        assert relative(b.float(), a) < 5e-2, name
