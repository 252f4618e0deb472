"""LaCT against a reading that knows no chunks but the definition: whole sequences, dense masks, torch's own gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from refine_lab.models import State
from refine_lab.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM
from refine_lab.ops.lact import Rule, newton_schulz
from tests.factories.lact import CHUNK, make_lact
from tests.support.refusals import naming, refused
from tests.support.state_contract import same

VARIANTS = {
    "plain": {"use_momentum": False},
    "momentum": {},
    "muon": {"use_muon": True},
    "prenorm": {"ttt_prenorm": True},
    "prenorm-muon": {"ttt_prenorm": True, "use_muon": True},
    "nope": {"ttt_nope": True, "no_v_silu": True},
    "low-rank": {"w0_w2_low_rank": 3},
    "norms": {"attn_qk_norm": True, "qkv_bias": True, "learnable_ttt_scale": False},
    "wide": {"inter_multi": 2.0, "use_muon": True},
    "narrow": {"inter_multi": 0.5, "qkv_silu": False},
    "rates": {"lr_dim": 12},
    "long-window": {"window_size": 40},
    "window-of-one": {"window_size": 1},
}


# -- by definition -------------------------------------------------------------------------------------------------------


def turned(x, positions, base):
    """Rotary embedding by complex numbers: channels i and i + d/2 are one number."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1])
    angles = (positions.float().unsqueeze(-1) * rates).unsqueeze(1)
    turn = torch.complex(angles.cos().double(), angles.sin().double())
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


def network(weights, x):
    w0, w1, w2 = weights
    return (F.silu(x @ w0.T) * (x @ w2.T)) @ w1.T


def one_head(attn, q, k, v, rates, gate, head):
    """Outputs [T, d] of one head's fast weights, each chunk by those after the chunks before it."""
    config = attn.config
    start = [w()[head] if isinstance(w, torch.nn.Module) else w[head] for w in (attn.w0, attn.w1, attn.w2)]
    norms = [w.norm(dim=-1, keepdim=True) for w in start]
    weights, sums, outputs, previous = start, start, [], [0, 0, 0]
    for begin in range(0, len(q), config.lact_chunk_size):
        chunk = slice(begin, begin + config.lact_chunk_size)
        outputs.append(network(weights, q[chunk]))
        leaves = [w * 1 for w in weights]
        steps = []
        for index in range(3):  # each matrix by a gradient of its own, since each has its own rates
            rate = rates[chunk, index * config.lr_dim : (index + 1) * config.lr_dim]
            steps.append(weighted_gradient(leaves, k[chunk], v[chunk], rate, index))
        if config.use_momentum:
            steps = [step + gate[chunk].mean() * old for step, old in zip(steps, previous, strict=True)]
            previous = steps
        if config.use_muon:
            steps = [orthogonal(step) for step in steps]
        sums = [w + s for w, s in zip(sums if config.ttt_prenorm else weights, steps, strict=True)]
        weights = [w / (w.norm(dim=-1, keepdim=True) + 1e-5) * n for w, n in zip(sums, norms, strict=True)]
    return torch.cat(outputs)


def weighted_gradient(weights, k, v, rate, index):
    """d/dw sum_t <f(k_t), v_t>, the term of token t scaled, channel by channel of the matrix's input, with its rate."""
    if rate.shape[1] == 1:
        value = lambda w: ((network([*weights[:index], w, *weights[index + 1 :]], k) * v).sum(-1) * rate[:, 0]).sum()  # noqa: E731
        return torch.func.grad(value)(weights[index])
    total = 0
    for t in range(len(k)):
        value = lambda w, t=t: network([*weights[:index], w, *weights[index + 1 :]], k[t]) @ v[t]  # noqa: E731
        total = total + torch.func.grad(value)(weights[index]) * rate[t]
    return total


def orthogonal(x):
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / (y.norm() + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ):  # fmt: skip
        square = y @ y.T
        y = a * y + b * square @ y + c * square @ square @ y
    return y.T if x.shape[0] > x.shape[1] else y


def layer_by_definition(attn, x):
    config, length = attn.config, len(x)
    positions = torch.arange(length)
    q, k, v = attn.qkv(x).chunk(3, -1)
    if config.attn_qk_norm:
        q, k = attn.q_norm(q), attn.k_norm(k)
    heads = lambda y: y.view(length, config.num_attn_heads, -1)  # noqa: E731
    turn = lambda y: turned(heads(y), positions, config.rope_theta)  # noqa: E731
    scores = torch.einsum("ihd,jhd->hij", turn(q), turn(k)) / math.sqrt(config.hidden_size / config.num_attn_heads)
    distance = positions[:, None] - positions
    scores = scores.masked_fill((distance < 0) | (distance >= config.window_size), -math.inf)
    attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), heads(v)).flatten(1)

    fast = [q * attn.qk_scale[:, 0] + attn.qk_offset[:, 0], k * attn.qk_scale[:, 1] + attn.qk_offset[:, 1], v]
    if config.qkv_silu:
        fast = [F.silu(y) if i < 2 or not config.no_v_silu else y for i, y in enumerate(fast)]
    split = lambda y: y.view(length, config.num_lact_heads, -1)  # noqa: E731
    for i in (0, 1):
        fast[i] = (split(fast[i]) / (split(fast[i]).norm(dim=-1, keepdim=True) + 1e-5)).flatten(1)
        if not config.ttt_nope:
            fast[i] = turn(fast[i]).flatten(1)
    rates = F.softplus(attn.lr_proj(x) + math.log(math.expm1(0.001))).view(length, config.num_lact_heads, -1)
    gate = attn.momentum_proj(x) if config.use_momentum else torch.zeros(length, config.num_lact_heads)
    recalled = []
    for head in range(config.num_lact_heads):
        y = one_head(attn, *(split(part)[:, head] for part in fast), rates[:, head], gate[:, head], head)
        y = attn.ttt_norm(y)
        if config.learnable_ttt_scale:
            y = y * F.silu(attn.ttt_scale_proj(x)[:, head : head + 1])
        recalled.append(y)
    return attn.o_proj(attended + torch.cat(recalled, -1))


def hidden_by_definition(policy, tokens):
    x = policy.model.embeddings(tokens)
    for layer in policy.model.layers:
        x = x + layer_by_definition(layer.attn, layer.attn_norm(x))
        x = x + layer.mlp(layer.mlp_norm(x)[None])[0]
    return policy.model.norm(x)


def tokens_of(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(53, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_are_the_definitions(fields):
    policy, tokens = make_lact(**fields), tokens_of(53)
    weights = torch.randn(53, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = []
    for hidden in (policy.read(tokens[None]).hidden_states[0], hidden_by_definition(policy, tokens)):
        policy.zero_grad()
        (hidden * weights).sum().backward()
        grads.append(
            (hidden.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-9, rtol=1e-9)
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[1][1].items():
        assert grad.abs().max() > 0 or "ttt_scale" in name, name
        torch.testing.assert_close(
            grads[0][1][name], grad, atol=1e-9 * float(grad.abs().max()) + 1e-12, rtol=1e-9, msg=name
        )


@pytest.mark.parametrize("length", (1, 2, 15, 16, 17, 32, 33, 100))
def test_every_length_is_the_definitions(length):
    policy, tokens = make_lact(use_muon=True), tokens_of(length)
    hidden = policy.read(tokens[None]).hidden_states[0]
    torch.testing.assert_close(hidden, hidden_by_definition(policy, tokens), atol=1e-9, rtol=0)


# -- the state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_going_on_from_any_position_is_reading_at_once(fields):
    policy, tokens = make_lact(**fields), torch.stack([tokens_of(80, seed) for seed in (1, 2)])
    trace = policy.read(tokens)
    positions = torch.tensor([[0, 14, 15, 16, 30, 31], [32, 47, 48, 5, 15, 40]])
    state, k = trace.state_at(positions), 19  # crosses one border, or two
    rest = torch.stack([tokens[b, p + 1 : p + 1 + k] for b in range(2) for p in positions[b].tolist()])
    expected = torch.stack([trace.hidden_states[b, p + 1 : p + 1 + k] for b in range(2) for p in positions[b].tolist()])
    torch.testing.assert_close(policy.read(rest, state=state).hidden_states, expected, atol=1e-9, rtol=0)
    single = []
    for token in rest.split(1, 1):
        step = policy.read(token, state=state)
        state = step.final_state
        single.append(step.hidden_states)
    torch.testing.assert_close(torch.cat(single, 1), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("pieces", ([1] * 53, [16, 16, 21], [15, 1, 1, 36], [5, 48], [32, 0, 21]))
def test_pieces_of_any_length_are_the_whole(pieces):
    policy, tokens = make_lact(use_muon=True), tokens_of(53)[None]
    whole, state, hidden = policy.read(tokens), None, []
    for piece in tokens.split(pieces, 1):
        if piece.shape[1]:
            trace = policy.read(piece, state=state)
            state = trace.final_state
            hidden.append(trace.hidden_states)
    torch.testing.assert_close(torch.cat(hidden, 1), whole.hidden_states, atol=1e-9, rtol=0)
    final = whole.final_state
    for part, other in ((state.tensors, final.tensors), (state.shared, final.shared)):
        assert part.keys() == other.keys()
        for name, x in part.items():
            torch.testing.assert_close(x, other[name], atol=1e-9, rtol=0, msg=name)


def test_gradients_through_pieces_are_those_of_the_whole():
    policy, tokens = make_lact(use_muon=True, ttt_prenorm=True), tokens_of(53)[None]
    weights = torch.randn(1, 53, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for pieces in ([53], [7, 9, 1, 30, 6]):
        policy.zero_grad()
        state, hidden = None, []
        for piece in tokens.split(pieces, 1):
            trace = policy.read(piece, state=state)
            state = trace.final_state
            hidden.append(trace.hidden_states)
        (torch.cat(hidden, 1) * weights).sum().backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-9 * float(grad.abs().max()), rtol=0, msg=name)


def test_branches_of_a_chunk_share_its_fast_weights():
    policy, tokens = make_lact(), torch.stack([tokens_of(64, seed) for seed in (1, 2)])
    state = policy.read(tokens).state_at(torch.tensor([[17, 20, 31, 40], [17, 18, 19, 20]]))
    assert state.rows == 8 and len(state.shared["0.w0"]) == 3  # row 0: chunks 1 and 2; row 1: chunk 1
    assert state.sources.tolist() == [0, 0, 0, 2, 1, 1, 1, 1]
    many = state.repeat(5)
    assert many.rows == 40 and many.shared["0.w0"].data_ptr() == state.shared["0.w0"].data_ptr()
    again = policy.read(torch.zeros(40, 3, dtype=torch.long), state=many).final_state
    assert len(again.shared["0.w0"]) == 3 + 5  # the copies of chunk 1's last token cross into chunks of their own
    both = State.stack([state.select([3]), state.select([0, 5])])
    expected = policy.read(tokens[[0, 0, 1], :2], state=state.select([3, 0, 5])).hidden_states
    torch.testing.assert_close(
        policy.read(tokens[[0, 0, 1], :2], state=both).hidden_states, expected, atol=1e-12, rtol=0
    )


def test_a_state_is_a_value(tmp_path):
    policy, tokens = make_lact(), tokens_of(64)[None]
    state = policy.read(tokens).state_at(torch.tensor([[3, 20]])).detach()
    kept = {name: x.clone() for part in (state.tensors, state.shared) for name, x in part.items()}
    with torch.no_grad():
        first = policy.read(tokens[[0, 0], :30], state=state).hidden_states
        for parameter in policy.parameters():
            parameter.add_(0.1)
        for parameter in policy.parameters():
            parameter.sub_(0.1)
    for part in (state.tensors, state.shared):
        assert all(torch.equal(kept[name], x) for name, x in part.items())
    state.select([1, 0]).save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    assert same(loaded, state.select([1, 0]), 0) and torch.equal(loaded.sources, state.sources[[1, 0]])
    with torch.no_grad():
        torch.testing.assert_close(
            policy.read(tokens[[0, 0], :30], state=loaded).hidden_states, first[[1, 0]], atol=1e-9, rtol=0
        )


def test_a_parameter_that_moves_leaves_a_snapshot_alone():
    policy, tokens = make_lact(), tokens_of(8)[None]
    with torch.no_grad():
        state = policy.read(tokens).final_state
        before = state.shared["0.w0"].clone()
        policy.model.layers[0].attn.w0.add_(1.0)
    assert torch.equal(state.shared["0.w0"], before)


def test_a_pad_enters_no_fast_weight():
    policy, tokens = make_lact(use_muon=True), torch.stack([tokens_of(70, seed) for seed in (1, 2, 3)])
    lengths = torch.tensor([70, 33, 16])
    states = []
    for filler in (0, 9):
        padded = torch.where(torch.arange(70) < lengths[:, None], tokens, filler)
        states.append(policy.read(padded, lengths).final_state)
    assert same(*states, 0) and all(torch.equal(x, states[1].shared[n]) for n, x in states[0].shared.items())
    for row, length in enumerate(lengths.tolist()):
        alone = policy.read(tokens[row : row + 1, :length]).final_state
        rest = tokens_of(20, 4)[None]
        expected = policy.read(rest, state=alone).hidden_states
        found = policy.read(rest, state=states[0].select([row])).hidden_states
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@torch.no_grad()
def test_the_state_does_not_grow():
    policy, state, sizes = make_lact(), None, []
    for _ in range(6):
        state = policy.read(tokens_of(CHUNK)[None], state=state).final_state
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1


# -- Muon, and what is refused -------------------------------------------------------------------------------------------


def test_newton_schulz_makes_a_matrix_nearly_orthogonal():
    x = torch.randn(4, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for y in (newton_schulz(x), newton_schulz(x.mT).mT):
        singular = torch.linalg.svdvals(y)
        assert 0.6 < singular.min() and singular.max() < 1.3
    assert newton_schulz(x).dtype == torch.float64


def test_newton_schulz_in_bfloat16_is_the_released_one():
    """Step by step in bfloat16, as the release computes it whatever the model's dtype."""
    x = torch.randn(3, 10, 14, generator=torch.Generator().manual_seed(0))
    y = x.bfloat16()
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ):  # fmt: skip
        square = y @ y.transpose(1, 2)
        y = a * y + (b * square + c * square @ square) @ y
    assert torch.equal(newton_schulz(x, torch.bfloat16), y.float())
    assert not torch.equal(newton_schulz(x), y.float())
    exact, released = (make_lact(use_muon=True, muon_dtype=dtype) for dtype in (None, "bfloat16"))
    gap = exact.read(tokens_of(40)[None]).hidden_states - released.read(tokens_of(40)[None]).hidden_states
    assert torch.equal(gap[:, :CHUNK], torch.zeros_like(gap[:, :CHUNK])) and 1e-5 < gap[:, CHUNK:].std() < 0.1


@pytest.mark.parametrize("inner", [16, 24, 8], ids=["square", "wide", "narrow"])
def test_an_update_in_bfloat16_orthogonalises_as_released(inner):
    """The release turns what is tall and nothing else: another method round, other roundings are magnified."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    steps = {"w0": draw(2, 3, inner, 16), "w1": draw(2, 3, 16, inner), "w2": draw(2, 3, inner, 16)}
    found = Rule(64, True, False, torch.bfloat16)._orthogonal(steps)
    for name, x in steps.items():
        assert torch.equal(found[name], newton_schulz(x, torch.bfloat16)), name


def test_float32_states_of_a_bfloat16_model_keep_the_norms_of_their_rows():
    policy = make_lact(fp32_states=True).bfloat16()
    state = policy.read(tokens_of(40)[None]).final_state
    first = policy.model.layers[0].attn.w0.float().norm(dim=-1)
    assert state.shared["0.w0"].dtype == torch.float32
    torch.testing.assert_close(state.shared["0.w0"][0].norm(dim=-1), first, rtol=1e-4, atol=0)


def test_a_tensor_that_is_missing_draws_nothing_but_itself(tmp_path):
    policy = make_lact()
    weights = {name: x for name, x in policy.state_dict().items() if name != "model.layers.0.attn.qk_scale"}
    policy.save_pretrained(tmp_path, state_dict=weights)
    again = LaCTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.model.layers[0].attn.lr_proj.bias, policy.model.layers[0].attn.lr_proj.bias)
    assert torch.equal(again.model.layers[0].attn.qk_scale, torch.ones(24, 2, dtype=torch.float64))


def test_a_state_of_others_is_refused():
    policy, tokens = make_lact(), tokens_of(20)[None]
    state = policy.read(tokens).final_state
    with refused("the rows of a state", 1, "2"):
        policy.read(tokens[[0, 0]], state=state)
    other = DeltaNetForCausalLM(
        DeltaNetConfig(hidden_size=24, num_heads=2, num_hidden_layers=2, vocab_size=53)
    ).double()
    with naming(ValueError, "state", ["recurrent_state"]):
        other.read(tokens, state=state)
    with naming(ValueError, "state", ["pending_kv", "window_k"]):
        policy.read(tokens, state=other.read(tokens).final_state)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lact_chunk_size": 0}, "LaCTConfig.lact_chunk_size"),
        ({"window_size": None}, "LaCTConfig.window_size"),
        ({"num_lact_heads": 5}, "hidden_size 24"),
        ({"num_attn_heads": 8}, "LaCTConfig.num_attn_heads"),
        ({"ttt_loss_type": "l2"}, "LaCTConfig.ttt_loss_type"),
        ({"muon_dtype": "float16"}, "LaCTConfig.muon_dtype"),
        ({"lr_dim": 5}, "LaCTConfig.lr_dim"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(fields, field):
    (value,) = fields.values()
    with refused(field, value):
        make_lact(**fields)


def test_fresh_weights_begin_with_the_rates_asked_for():
    policy = LaCTForCausalLM(LaCTConfig(hidden_size=24, num_attn_heads=2, num_lact_heads=2, num_hidden_layers=1,
                                        intermediate_size=32, vocab_size=53, initial_rates=[1, 10, 0.5],
                                        initial_scale=1.0)).double()  # fmt: skip
    attn = policy.model.layers[0].attn
    rates = attn._rates(torch.zeros(1, 1, 24, dtype=torch.float64))[0, 0, :, :3]
    torch.testing.assert_close(rates, torch.tensor([[1, 10, 0.5]] * 2, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert (attn.ttt_scale_proj.bias == 1).all()
    with refused("LaCTConfig.initial_rates", [1, 0, 1]):
        LaCTConfig(initial_rates=[1, 0, 1])
