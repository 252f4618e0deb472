"""GatedDeltaNet: its layer token by token, states as values, gradients, flash-linear-attention's names and files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.models.backbone import BackboneLM
from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from tests.factories.gated_deltanet import SIZES, make_policy
from tests.factories.step import EDGES, LENGTH, fast_gradients, make_batch, relative_errors
from tests.support.naive import naive_loss
from tests.support.refusals import refused
from tests.support.state_contract import (
    assert_a_pad_changes_nothing,
    assert_pieces_are_the_whole,
    assert_states_are_of_prefixes,
)

VARIANTS = {
    "plain": {},
    "no-gate": {"use_gate": False},
    "no-conv": {"use_short_conv": False},
    "negative": {"allow_neg_eigval": True},
    "grouped": {"num_v_heads": 4},
    "sigmoid": {"output_gate_activation": "sigmoid", "expand_v": 1.0},
    "conv-2": {"conv_size": 2, "tie_word_embeddings": True},
}


# -- the layer, token by token -------------------------------------------------------------------------------------------


def naive_layer(attn, x: Tensor) -> Tensor:
    """fla's layer for one sequence [T, D], written from its formulas: one token after the other, one head at a time."""
    config, weights = attn.config, attn.state_dict()
    key_heads, heads = config.num_heads, config.num_v_heads or config.num_heads

    def stream(name: str) -> Tensor:
        y = x @ weights[f"{name}_proj.weight"].T
        if config.use_short_conv:
            taps, padded = weights[f"{name}_conv1d.weight"][:, 0], F.pad(y, (0, 0, config.conv_size - 1, 0))
            y = torch.stack([(padded[t : t + config.conv_size].T * taps).sum(-1) for t in range(len(x))])
        return y * y.sigmoid()

    q, k = (stream(name).view(len(x), key_heads, config.head_dim) for name in "qk")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = stream("v").view(len(x), heads, -1)
    beta = (x @ weights["b_proj.weight"].T).sigmoid() * (2 if config.allow_neg_eigval else 1)
    rate = (1 + (x @ weights["a_proj.weight"].T + weights["dt_bias"]).exp()).log()
    decay = (-weights["A_log"].exp() * rate).exp()
    outputs = []
    for head in range(heads):
        of_key, state = head // (heads // key_heads), x.new_zeros(config.head_dim, v.shape[-1])
        for t in range(len(x)):
            state = decay[t, head] * state
            state = state + beta[t, head] * torch.outer(k[t, of_key], v[t, head] - state.T @ k[t, of_key])
            outputs.append(state.T @ q[t, of_key] / math.sqrt(config.head_dim))
    o = torch.stack(outputs).view(heads, len(x), -1).transpose(0, 1)
    o = o / (o.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights["o_norm.weight"]
    if config.use_gate:
        gate = x @ weights["g_proj.weight"].T
        gate = gate.sigmoid() if config.output_gate_activation == "sigmoid" else gate * gate.sigmoid()
        o = o * gate.view_as(o)
    return o.flatten(1) @ weights["o_proj.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_layer_is_that_of_its_formulas(fields):
    attn = make_policy(**fields).model.layers[0].attn
    attn.o_norm.weight.uniform_(0.5, 2)
    x = torch.randn(70, SIZES["hidden_size"], dtype=torch.float64)
    outputs, _ = attn(x.unsqueeze(0), ({}, {}))
    assert torch.allclose(outputs[0], naive_layer(attn, x), atol=1e-10)


def test_swish_and_silu_are_one():
    tokens = make_batch().tokens
    a, b = (make_policy(output_gate_activation=name).read(tokens).hidden_states for name in ("swish", "silu"))
    assert torch.equal(a, b)


# -- states as values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_state_at_is_the_state_of_the_prefix_read_alone(fields):
    assert_states_are_of_prefixes(make_policy(**fields), make_batch())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_reading_in_pieces_is_reading_at_once(fields):
    state = assert_pieces_are_the_whole(make_policy(**fields), make_batch().tokens[:1], [1, 2, 3, 60, 64, 1, 19])
    shapes = {x.shape[1:] for name, x in state.tensors.items() if name.endswith("recurrent_state")}
    heads, width = fields.get("num_v_heads", 2), round(8 * fields.get("expand_v", 2.0))
    assert shapes == {(heads, 8, width)}, "[H, dk, dv]"


def test_a_pad_changes_nothing():
    assert_a_pad_changes_nothing(make_policy(), make_batch())


@torch.no_grad()
def test_generate_is_greedy_decoding_from_the_whole_context():
    policy, tokens = make_policy().eval(), make_batch().tokens[:, :40]
    policy.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens)
    written = policy.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 40:]
    for step in range(6):
        context = torch.cat([tokens, written[:, :step]], 1)
        logits = policy.lm_head(policy.read(context).hidden_states[:, -1])
        assert torch.equal(logits.argmax(-1), written[:, step])


# -- gradients -----------------------------------------------------------------------------------------------------------

FULL = RefineConfig(reward="cosine", num_chunks=5, nsp_coef=0.7)
DETACHED = RefineConfig(reward="hybrid", num_chunks=5, nsp_coef=0.7, prefix_gradient="detached")
CASES = {"full": (FULL, {}), "detached": (DETACHED, {"num_v_heads": 4, "allow_neg_eigval": True})}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("refine, fields", CASES.values(), ids=CASES)
def test_gradients_equal_those_of_re_reading_every_prefix(refine, fields, dtype, bound):
    policy, batch = make_policy(0.05, dtype, **fields), make_batch((LENGTH, 97))
    generator = torch.Generator().manual_seed(3)
    rows = EDGES.numel() * refine.group_size
    shift = 0.6 * torch.randn(rows, refine.rollout_length, generator=generator, dtype=dtype)
    rollouts, _ = fast_gradients(policy, batch, refine, EDGES, shift=shift)
    reference = torch.autograd.grad(naive_loss(policy, batch, rollouts, refine), list(policy.parameters()))
    errors = relative_errors(policy, reference)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound, f"gradient of {worst} is off by {errors[worst]:.2e}"


def test_gradients_flow_through_a_state_into_its_prefix_and_no_further():
    policy, tokens = make_policy(), make_batch().tokens[:1]
    embedded = policy.model.embeddings(tokens).detach().requires_grad_()
    policy.model.embeddings.register_forward_hook(lambda *_: embedded)
    state = policy.read(tokens).state_at(torch.tensor([[70]]))
    sum(x.square().sum() for x in state.tensors.values()).backward()
    size = embedded.grad[0].norm(dim=-1)
    assert (size[:71] > 0).all() and (size[71:] == 0).all()


# -- weights drawn, flash-linear-attention's names and files -------------------------------------------------------------


def test_fresh_gates_are_flas():
    """exp(A_log) uniform in 0..16, softplus(dt_bias) log-uniform in 0.001..0.1."""
    policy = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**{**SIZES, "num_heads": 500, "head_dim": 2}))
    attn = policy.model.layers[0].attn
    strength, rate = attn.A_log.detach().exp(), F.softplus(attn.dt_bias.detach()).log()
    low, high = math.log(0.001), math.log(0.1)
    assert 0 < strength.min() < 0.5 and 15.5 < strength.max() <= 16 and abs(strength.mean() - 8) < 1
    assert low - 1e-3 < rate.min() < low + 0.2 and high - 0.2 < rate.max() < high + 1e-3
    assert abs(rate.mean() - (low + high) / 2) < 0.3
    assert not torch.equal(attn.A_log, policy.model.layers[1].attn.A_log)


@pytest.fixture
def fla():
    return pytest.importorskip("fla.models.gated_deltanet", reason="flash-linear-attention is not installed here")


def test_every_field_of_flas_configuration_is_ours_with_its_default(fla):
    theirs, ours = fla.GatedDeltaNetConfig().to_dict(), GatedDeltaNetConfig().to_dict()
    ignored = {"transformers_version", "architectures"}
    assert {n: v for n, v in theirs.items() if n not in ignored} == {n: v for n, v in ours.items() if n not in ignored}


FLA_VARIANTS = {**VARIANTS, "own-width": {"intermediate_size": None}}


def their_model(fla, fields):
    sizes = {**SIZES, "initializer_range": 0.2, **fields}
    return fla.GatedDeltaNetForCausalLM(fla.GatedDeltaNetConfig(**sizes)), sizes


@pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
@pytest.mark.parametrize("fields", FLA_VARIANTS.values(), ids=FLA_VARIANTS)
def test_files_of_ours_and_of_flas_hold_the_same_tensors(tmp_path, fla, fields):
    """Names, shapes, types and values, saved there and loaded here, and the other method round."""
    theirs, sizes = their_model(fla, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, info = GatedDeltaNetForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()), info
    ours = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes))
    ours.save_pretrained(tmp_path / "ours")
    there, info = fla.GatedDeltaNetForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for written, read in ((theirs, loaded), (ours, there)):
        expected, found = written.state_dict(), read.state_dict()
        assert {n: (x.shape, x.dtype) for n, x in expected.items()} == {n: (x.shape, x.dtype) for n, x in found.items()}
        assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_a_checkpoint_keeps_the_gates_it_was_saved_with(tmp_path):
    policy = make_policy(dtype=torch.float32)
    policy.save_pretrained(tmp_path)
    again = GatedDeltaNetForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, BackboneLM)
    tokens = make_batch().tokens
    assert torch.equal(again.read(tokens).hidden_states, policy.read(tokens).hidden_states)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 0), ("conv_size", 0), ("head_dim", 1.5), ("hidden_size", "abc"), ("hidden_ratio", "x"),
     ("norm_eps", None), ("expand_v", float("nan")), ("use_gate", "no"), ("vocab_size", True), ("num_v_heads", 0),
     ("num_v_heads", 8), ("pad_token_id", 32000), ("initializer_range", -1), ("bos_token_id", "<s>")],
)  # fmt: skip
def test_a_value_that_is_none_is_refused_by_name(field, value):
    with refused(f"GatedDeltaNetConfig.{field}", value):
        GatedDeltaNetConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("attn", {"layers": [0]}), ("attnres_block_size", 2), ("use_l2warp", True), ("hidden_act", "powlu"),
     ("output_gate_activation", "relu"), ("attn_mode", "fused_chunk")],
)  # fmt: skip
def test_a_field_that_is_not_built_is_refused_by_name(field, value):
    with refused(f"GatedDeltaNetConfig.{field}", value):
        GatedDeltaNetConfig(**{field: value})


def test_a_head_of_broken_width_is_refused():
    with refused("head_dim * expand_v", 12.5, "a whole number"):
        GatedDeltaNetConfig(head_dim=10, expand_v=1.25)
    assert GatedDeltaNetConfig(head_dim=100, expand_v=1.1).value_dim == 660, "100 * 1.1 is 110.00000000000001"


@pytest.mark.gpu
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_model_on_cuda_agrees_with_the_cpu(fields):
    """float32 weights on fla's bfloat16 kernels: hidden states and the states after three tokens a row."""
    policy, batch = make_policy(0.05, torch.float32, **fields), make_batch()
    positions = torch.tensor([[0, 62, 149], [1, 65, 96], [63, 64, 130]])
    found = []
    for device in ("cpu", "cuda"):
        there = batch.to(device)
        trace = policy.to(device).read(there.tokens, there.lengths)
        found.append((trace.hidden_states.detach().cpu(), trace.state_at(positions.to(device)).detach().to("cpu")))
    (expected, states), (hidden, taken) = found
    assert (hidden - expected).norm() < 3e-2 * expected.norm()
    for name, x in states.tensors.items():
        assert (taken.tensors[name] - x).norm() < 3e-2 * x.norm(), name


@pytest.mark.gpu
def test_our_layer_is_flas_on_cuda(fla):
    """The expected: fla's own forward, bfloat16."""
    theirs, sizes = their_model(fla, {"num_v_heads": 4, "head_dim": 32, "hidden_size": 64})
    ours = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes))
    ours.load_state_dict(theirs.state_dict())
    tokens = make_batch().tokens.cuda()
    theirs, ours = theirs.cuda().to(torch.bfloat16), ours.cuda()
    expected = theirs.model(tokens).last_hidden_state.float()
    assert (ours.read(tokens).hidden_states - expected).norm() < 5e-2 * expected.norm()
