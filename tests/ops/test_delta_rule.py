"""The (gated) delta rule against the plain recurrence and fla's: outputs, states, gradients, odd lengths, strong decays."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import refine_lab.models.delta_layers as delta_layers
import refine_lab.ops.delta_rule as delta_rules
import refine_lab.ops.fla_delta_rule as fla_delta_rule
import tests.factories.hybrids as hybrids
from refine_lab.config import RefineConfig
from refine_lab.method.step import train_step
from refine_lab.models.families import family
from refine_lab.ops.delta_rule import ChunkedStates, UnitLowerInverse, chunk_delta_rule, delta_rule, log_decay
from refine_lab.ops.fla_delta_rule import SegmentedStates, segmented_delta_rule, serves
from refine_lab.ops.precision import unit_length
from refine_lab.rng import Draws
from tests.factories.step import make_batch, make_policy, train_state_for

LENGTHS = (1, 2, 5, 63, 64, 65, 100, 130)
B, H, DK, DV = 2, 3, 8, 6
NAMES = ("q", "k", "v", "beta", "state", "log gate")

GATES = {"none": None, "mild": 0.1, "strong": 20.0}
"""The strongest log gate is minus that; log gates are uniform from there to 0."""


def make_inputs(
    length: int, dtype: torch.dtype = torch.float32, gate: float | None = None, key_heads: int = H
) -> list[Tensor]:
    q, k = (F.normalize(torch.randn(B, length, key_heads, DK, dtype=dtype), dim=-1) for _ in range(2))
    v, beta = torch.randn(B, length, H, DV, dtype=dtype), torch.rand(B, length, H, dtype=dtype)
    inputs = [q, k, v, beta, torch.randn(B, H, DK, DV, dtype=dtype)]
    if gate is not None:
        inputs.append(-gate * torch.rand(B, length, H, dtype=dtype))
    return [x.requires_grad_() for x in inputs]


def recurrence(q, k, v, beta, state, log_gate=None) -> tuple[Tensor, Tensor]:
    """The definition, a token at a time: outputs and the state after every token [B, T, H, dk, dv]."""
    outputs, states = [], []
    for t in range(v.shape[1]):
        if log_gate is not None:
            state = state * log_gate[:, t].exp()[..., None, None]
        found = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].unsqueeze(-1) * (v[:, t] - found))
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).norm() / expected.norm().clamp_min(1e-12)).detach())


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("o", "S", *NAMES), ours, theirs, strict=False):
        assert relative(a, b) < tolerance, name


def results(outputs: Tensor, states: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, states and, of a fixed random weighting of both, the gradient in every input."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (outputs, states)]
    loss = (outputs * weights[0]).sum() + (states * weights[1]).sum()
    return [outputs, states, *torch.autograd.grad(loss, inputs)]


# -- chunks of plain torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("length", (*LENGTHS, 1000))
def test_chunks_equal_the_recurrence_with_gradients(length, gate):
    """Outputs, and the states after the first, a middle and the last token, in double precision."""
    inputs = make_inputs(length, torch.float64, gate)
    positions = torch.tensor([[0, length // 2, length - 1]] * B)
    outputs, states = chunk_delta_rule(*inputs)
    ours = results(outputs, states.at(positions), inputs)
    outputs, states = recurrence(*inputs)
    theirs = results(outputs, states[torch.arange(B).unsqueeze(-1), positions].flatten(0, 1), inputs)
    assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("gate", (None, 0.1, 3.0))
@pytest.mark.parametrize("length", (1, 2, 63, 64, 65, 100))
def test_float32_agrees_with_flas_own_recurrence(length, gate):
    plain = pytest.importorskip("fla.ops.delta_rule.naive", reason="flash-linear-attention is not installed here")
    gated = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    inputs = make_inputs(length, torch.float32, gate)
    outputs, states = chunk_delta_rule(*inputs)
    ours = results(outputs, states.at(torch.full((B, 1), length - 1)), inputs)
    q, k, v, beta, state, *log_gate = inputs
    if gate is None:  # head first, and it scales q itself
        heads_first = (x.transpose(1, 2) for x in (q * DK**0.5, k, v, beta))
        outputs, final = plain.delta_rule_recurrence(*heads_first, initial_state=state)
        outputs = outputs.transpose(1, 2)
    else:
        outputs, final = gated.naive_recurrent_gated_delta_rule(
            q, k, v, beta, log_gate[0], scale=1.0, initial_state=state, output_final_state=True
        )
    assert_close(ours, results(outputs, final, inputs), 4e-6)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_the_state_at_every_position_is_the_recurrences(gate):
    inputs = make_inputs(130, torch.float64, gate)
    _, states = chunk_delta_rule(*inputs)
    _, expected = recurrence(*inputs)
    taken = states.at(torch.arange(130).expand(B, -1)).unflatten(0, (B, 130))
    for position in range(130):
        assert relative(taken[:, position], expected[:, position]) < 1e-9, position


EACH = torch.arange(200).view(1, -1, 1)
STRONG = {
    "20 a token": torch.full((1, 200, 1), -20.0),
    "10,000 a token": torch.full((1, 200, 1), -1e4),
    "20 a token, then little": torch.where(EACH < 32, -20.0, -0.01),
    "much now and then": torch.where(EACH % 17 == 16, -90.0, -0.1),
}


@pytest.mark.parametrize("log_gate", STRONG.values(), ids=STRONG)
@pytest.mark.parametrize("length", (64, 100))
def test_strong_decay_overflows_nowhere_and_stays_exact_in_float32(length, log_gate):
    """The gates' gradients too: of such decays they are tiny beside the terms that they are the sum of."""
    inputs = [*make_inputs(length), log_gate[:, :length].expand(B, -1, H)]
    positions = torch.tensor([[0, 40, length - 1]] * B)
    found = []
    for dtype in (torch.float32, torch.float64):
        wide = [x.detach().to(dtype).requires_grad_() for x in inputs]
        outputs, states = chunk_delta_rule(*wide)
        found.append(results(outputs.to(torch.float64), states.at(positions).to(torch.float64), wide))
    assert all(x.isfinite().all() for x in found[0])
    assert_close(*found, 2e-6)


def test_values_may_have_more_heads_than_keys():
    inputs = make_inputs(70, torch.float64, 0.3, key_heads=1)
    positions = torch.tensor([[3, 69]] * B)
    outputs, states = chunk_delta_rule(*inputs)
    ours = results(outputs, states.at(positions), inputs)
    repeated = [x.repeat_interleave(H, 2) if x.shape[2] == 1 else x for x in inputs[:4]]
    outputs, states = recurrence(*repeated, *inputs[4:])
    assert_close(ours, results(outputs, states[:, [3, 69]].flatten(0, 1), inputs), 1e-9)


def test_neighbouring_value_heads_share_a_key_head():
    q, k, v, beta, state, gate = make_inputs(5, torch.float64, 0.3)
    v, beta, state, gate = (
        torch.cat([x, x], 2 if x.ndim < 5 and x is not state else 1) for x in (v, beta, state, gate)
    )
    outputs, _ = chunk_delta_rule(q, k, v, beta, state, gate)
    alone, _ = recurrence(q[:, :, :1], k[:, :, :1], v[:, :, 1:2], beta[:, :, 1:2], state[:, 1:2], gate[:, :, 1:2])
    assert relative(outputs[:, :, 1:2], alone) < 1e-12


def test_a_token_of_beta_0_and_no_decay_leaves_the_state():
    q, k, v, beta, state, gate = (x.detach() for x in make_inputs(70, gate=1.0))
    beta[:, 40:], gate[:, 40:] = 0, 0
    for log_gate in (None, gate):
        _, states = chunk_delta_rule(q, k, v, beta, state, log_gate)
        before, after = states.at(torch.tensor([[39, 69]] * B)).unflatten(0, (B, 2)).unbind(1)
        assert torch.allclose(before, after, atol=1e-6)


def test_the_log_gate_is_that_of_the_definition():
    a, a_log, dt_bias = torch.randn(2, 5, H), torch.randn(H), torch.randn(H)
    expected = -a_log.exp() * (1 + (a + dt_bias).exp()).log()
    assert torch.allclose(log_decay(a, a_log, dt_bias), expected, atol=1e-6)
    halves = [x.bfloat16() for x in (a, a_log, dt_bias)]
    assert torch.equal(log_decay(*halves), log_decay(*(x.float() for x in halves)))


def test_half_precision_inputs_are_computed_in_float32():
    halves = [x.detach().bfloat16() for x in make_inputs(70, gate=0.3)]
    expected, _ = chunk_delta_rule(*(x.float() for x in halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = delta_rule(*halves)
    assert torch.equal(outputs, expected)


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


# -- segments on kernels that return final states only -------------------------------------------------------------------


def torch_kernel(q, k, v, beta, log_gate, state, unit=False, scale=1.0):
    """The torch rule in the place of fla's kernels."""
    q, k = (unit_length(q), unit_length(k)) if unit else (q, k)
    q = q * scale
    outputs, states = chunk_delta_rule(q, k, v, beta, state, log_gate)
    return outputs, states.at(torch.full((len(q), 1), q.shape[1] - 1))


@pytest.mark.parametrize("gate, key_heads", [(None, H), (0.3, H), (20.0, H), (0.3, 1)])
@pytest.mark.parametrize("length", (1, 31, 32, 33, 100))
def test_segments_equal_chunks(length, gate, key_heads):
    """The CUDA path's own logic."""
    inputs = make_inputs(length, torch.float64, gate, key_heads)
    positions = torch.tensor([[0, length // 2], [length - 1, length // 3]])
    found = []
    for rule in (lambda *x: segmented_delta_rule(*x, kernel=torch_kernel, segment_size=32), chunk_delta_rule):
        outputs, states = rule(*inputs)
        found.append(results(outputs, states.at(positions), inputs))
    assert_close(*found, 1e-9)


@pytest.mark.parametrize("length", (16, 70))
def test_keys_that_the_kernel_scales_have_the_states_of_scaled_keys(length):
    """Keys are stored as they come, and the kernel divides them by their lengths again where a state is asked for."""
    inputs, positions = make_inputs(length, torch.float64), torch.tensor([[0, length // 2], [length - 1, 3]])
    found = []
    for rule in (delta_rule, partial(segmented_delta_rule, kernel=torch_kernel, segment_size=32)):
        q, k, *rest = inputs
        outputs, states = rule(q * 3, k * 5, *rest, unit=True, scale=0.25)
        found.append(results(outputs, states.at(positions), inputs))
    assert_close(*found, 1e-9)
    outputs, _ = chunk_delta_rule(unit_length(q) * 0.25, unit_length(k), *rest)
    assert relative(found[0][0], outputs) < 1e-5


@pytest.mark.parametrize("gate", (None, 0.3))
def test_segments_start_from_nothing(gate):
    q, k, v, beta, state, *log_gate = make_inputs(70, gate=gate)
    expected, _ = chunk_delta_rule(q, k, v, beta, torch.zeros_like(state), *log_gate)
    outputs, _ = segmented_delta_rule(q, k, v, beta, None, *log_gate, kernel=torch_kernel, segment_size=32)
    assert relative(outputs, expected) < 1e-6


def stand_in(monkeypatch, gated: bool) -> None:
    """In the place of fla's kernel, which needs CUDA: the torch rule, which checks the types that come in."""
    package = "fla.ops.gated_delta_rule" if gated else "fla.ops.delta_rule"
    fla = pytest.importorskip(package, reason="flash-linear-attention is not installed here")

    def kernel(q, k, v, *, beta, scale, use_qk_l2norm_in_kernel, initial_state, output_final_state, g=None):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and output_final_state
        assert beta.dtype == (torch.float32 if gated else torch.bfloat16) and initial_state.dtype == torch.float32
        assert (g is not None and g.dtype == torch.float32) if gated else g is None
        qkv = (x.float() for x in (q, k, v))
        outputs, state = torch_kernel(*qkv, beta.float(), g, initial_state, use_qk_l2norm_in_kernel, scale)
        return outputs.to(q.dtype), state

    monkeypatch.setattr(fla, "chunk_gated_delta_rule" if gated else "chunk_delta_rule", kernel)


def test_a_float32_model_runs_on_kernels_that_work_in_bfloat16(monkeypatch):
    stand_in(monkeypatch, gated=False)
    policy, batch = make_policy(torch.float32), make_batch()
    expected = policy.read(batch.tokens, batch.lengths)
    monkeypatch.setattr(delta_layers, "delta_rule", segmented_delta_rule)
    trace = policy.read(batch.tokens, batch.lengths)
    assert relative(trace.hidden_states, expected.hidden_states) < 3e-2
    positions = torch.tensor([[3, 80]] * 3)
    for name, value in trace.state_at(positions).tensors.items():
        assert relative(value, expected.state_at(positions).tensors[name]) < 3e-2, name
    policy.read(batch.tokens[:, :5], state=trace.final_state).hidden_states.sum().backward()
    assert policy.model.layers[0].attn.k_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("key_heads", (H, 1))
def test_the_gated_kernel_gets_its_gates_in_float32(monkeypatch, key_heads):
    stand_in(monkeypatch, gated=True)
    inputs = make_inputs(600, gate=0.05, key_heads=key_heads)
    positions = torch.tensor([[0, 511, 512, 599]] * B)
    outputs, states = segmented_delta_rule(*inputs, segment_size=512)
    ours = results(outputs, states.at(positions), inputs)
    outputs, states = chunk_delta_rule(*inputs)
    assert_close(ours, results(outputs, states.at(positions), inputs), 3e-2)


# -- where fla refuses a gate ----------------------------------------------------------------------------------------------

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)


@pytest.mark.parametrize(
    ("capability", "version", "refused"),
    [
        *[(HOPPER, version, True) for version in ("3.4.0", "3.4", "3.5.1", "3.6.0", "3.6.0+git1234", "3.7.0")],
        *[(HOPPER, version, False) for version in ("3.3.1", "3.7.1", "3.8.0", "4.0.0")],
        *[(capability, "3.6.0", False) for capability in (AMPERE, (8, 9), BLACKWELL, (12, 0))],
    ],
)
def test_a_gate_is_refused_on_hopper_with_some_versions_of_triton(capability, version, refused):
    assert fla_delta_rule.refuses_gate(capability, version) is refused


@pytest.fixture
def cuda_with(monkeypatch):
    """Have the choice of the rule see a CUDA device of some capability and a version of Triton; kernels are stood in for."""
    triton = pytest.importorskip("triton", reason="Triton is not installed here")
    pytest.importorskip("fla", reason="flash-linear-attention is not installed here")

    def given(capability: tuple[int, int], version: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(delta_rules, "serves", lambda device, gated: serves(torch.device("cuda:0"), gated=gated))
        monkeypatch.setattr(delta_rules, "segmented_delta_rule", partial(segmented_delta_rule, kernel=torch_kernel))
        fla_delta_rule._warn_once.cache_clear()

    return given


@pytest.mark.parametrize(
    ("capability", "version", "gate", "kernel"),
    [
        (HOPPER, "3.6.0", 0.3, False),
        (HOPPER, "3.6.0", None, True),  # DeltaNet has no gate
        (HOPPER, "3.7.1", 0.3, True),
        (HOPPER, "3.3.1", 0.3, True),
        (AMPERE, "3.6.0", 0.3, True),
    ],
)
def test_the_rule_takes_flas_kernel_but_where_fla_refuses_it(cuda_with, recwarn, capability, version, gate, kernel):
    cuda_with(capability, version)
    inputs = make_inputs(100, gate=gate)
    positions = torch.tensor([[5, 99]] * B)
    for _ in range(2):
        outputs, states = delta_rule(*inputs)
        assert isinstance(states, SegmentedStates if kernel else ChunkedStates)
    plain, chunks = chunk_delta_rule(*inputs)
    ours, theirs = (results(*pair, inputs) for pair in ((outputs, states.at(positions)), (plain, chunks.at(positions))))
    assert_close(ours, theirs, 1e-5)
    said = [str(warning.message) for warning in recwarn]
    sentence = (
        "the gated delta rule runs in plain torch, slower than fla's kernel, because fla refuses that kernel's backward on "
        "Hopper with Triton 3.6.0: install Triton 3.7.1 or later"
    )
    assert said == ([] if kernel else [sentence])


@pytest.mark.parametrize(
    ("model_type", "kernel"), [("delta_net", True), ("gated_deltanet", False), ("qwen3_next", False)]
)
def test_models_with_a_gate_train_in_torch_on_such_a_pair(cuda_with, monkeypatch, model_type, kernel):
    cuda_with(HOPPER, "3.6.0")
    sizes = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=40, vocab_size=53)
    if model_type == "qwen3_next":
        policy = hybrids.make(model_type, torch.float32)
    else:
        config_class, model_class = family(model_type)
        policy = model_class(config_class(**sizes, num_heads=2))
    used = []
    rule = delta_rules.segmented_delta_rule
    monkeypatch.setattr(delta_rules, "segmented_delta_rule", lambda *x, **form: used.append(1) or rule(*x, **form))
    with nullcontext() if kernel else pytest.warns(UserWarning, match="the gated delta rule runs in plain torch"):
        policy.read(make_batch().tokens).hidden_states.sum().backward()
    assert bool(used) is kernel
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in policy.named_parameters() if "k_proj" in n)


# -- on CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_float32_model_on_cuda_agrees_with_the_cpu():
    policy, batch = make_policy(torch.float32), make_batch()
    expected = policy.read(batch.tokens, batch.lengths)
    there = batch.to("cuda")
    trace = policy.cuda().read(there.tokens, there.lengths)
    assert relative(trace.hidden_states.cpu(), expected.hidden_states) < 3e-2, "hidden states, bfloat16 kernels"
    train_state = train_state_for(policy, RefineConfig(num_chunks=4, margin=5))
    assert train_step(train_state, there, Draws(seed=0, step=1)).metrics["grad_norm"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("gate, key_heads", [(None, H), (0.05, H), (0.05, 1), (20.0, H)])
def test_fla_kernels_agree_with_torch_on_cuda(gate, key_heads):
    """bfloat16 against float32."""
    if not serves(torch.device("cuda"), gated=gate is not None):
        pytest.skip("fla refuses the gated backward here")
    inputs = [x.detach().cuda().requires_grad_() for x in make_inputs(700, gate=gate, key_heads=key_heads)]
    positions = torch.tensor([[0, 511, 512, 699]] * B, device="cuda")
    expected, states = chunk_delta_rule(*inputs)
    outputs, pieces = segmented_delta_rule(*inputs, segment_size=512)
    assert relative(outputs, expected) < 2e-2, "outputs"
    assert relative(pieces.at(positions), states.at(positions)) < 2e-2, "states"
    grads = [
        torch.autograd.grad(s.at(positions).square().sum(), inputs[1:], retain_graph=True) for s in (states, pieces)
    ]
    for name, a, b in zip(NAMES[1:], *grads, strict=False):
        assert relative(b, a) < 5e-2, name
