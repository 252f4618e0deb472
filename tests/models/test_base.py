"""Models: states as values, unequal rows, transformers' interface, flash-linear-attention's names."""

from __future__ import annotations

import pytest
import torch

from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, State, load_model
from tests.factories.loading import save_small_model
from tests.factories.step import make_batch, make_policy
from tests.support.refusals import naming, refused
from tests.support.state_contract import (
    assert_a_pad_changes_nothing,
    assert_pieces_are_the_whole,
    assert_states_are_of_prefixes,
    same,
)

VARIANTS = {
    "plain": {},
    "gate": {"use_gate": True},
    "no-conv": {"use_short_conv": False},
    "no-beta": {"use_beta": False},
    "negative": {"allow_neg_eigval": True},
    "relu-sum": {"qk_activation": "relu", "qk_norm": "sum"},
    "elu": {"qk_activation": "elu"},
    "identity": {"qk_activation": "identity"},
    "conv-2": {"conv_size": 2},
    "wide-values": {"expand_v": 2.0, "expand_k": 0.5},
}


def make_variant(**fields) -> DeltaNetForCausalLM:
    sizes = dict(hidden_size=24, num_heads=2, num_hidden_layers=2, intermediate_size=40, vocab_size=53)
    return DeltaNetForCausalLM(DeltaNetConfig(**sizes, initializer_range=0.2, **fields)).double()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_state_at_is_the_state_of_the_prefix_read_alone(fields):
    assert_states_are_of_prefixes(make_variant(**fields), make_batch())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_reading_in_pieces_is_reading_at_once(fields):
    assert_pieces_are_the_whole(make_variant(**fields), make_batch().tokens[:1], [1, 2, 3, 60, 64, 20])


def test_a_pad_changes_nothing():
    assert_a_pad_changes_nothing(make_policy(), make_batch())


def test_gradients_flow_through_a_state_into_its_prefix_and_no_further():
    policy, tokens = make_policy(), make_batch().tokens[:1]
    embedded = policy.model.embeddings(tokens).detach().requires_grad_()
    policy.model.embeddings.register_forward_hook(lambda *_: embedded)
    state = policy.read(tokens).state_at(torch.tensor([[70]]))
    sum(x.double().square().sum() for x in state.tensors.values()).backward()
    size = embedded.grad[0].norm(dim=-1)
    assert (size[:71] > 0).all() and (size[71:] == 0).all()
    assert not state.detach().tensors["0.recurrent_state"].requires_grad


def test_branching_mutates_nothing(tmp_path):
    policy, batch = make_policy(), make_batch()
    state = policy.read(batch.tokens, batch.lengths).final_state.detach()
    copies = {name: x.clone() for name, x in state.tensors.items()}
    with torch.no_grad():
        first = policy.read(batch.tokens[:, :5], state=state).hidden_states
        again = policy.read(batch.tokens[:, :5], state=state).hidden_states
    assert torch.equal(first, again)
    assert all(torch.equal(copies[name], x) for name, x in state.tensors.items())
    twice = State.stack([state, state]).select([0, 3])
    assert torch.equal(twice.tensors["0.recurrent_state"][0], twice.tensors["0.recurrent_state"][1])
    assert state.repeat(2).rows == 6 and torch.equal(state.repeat(2).lengths[:2], state.lengths[[0, 0]])
    state.save(tmp_path / "state.safetensors")
    assert same(State.load(tmp_path / "state.safetensors"), state, 0)


def test_positions_outside_a_row_are_refused():
    batch = make_batch()
    trace = make_policy().read(batch.tokens, batch.lengths)
    with refused("positions of row 1", [97], "from 0 to 96"):
        trace.state_at(torch.tensor([[3], [97], [4]]))


# -- transformers' interface -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_generate_is_greedy_decoding_whatever_the_padding():
    policy, tokens = make_policy().eval(), make_batch().tokens[:, :40]
    tokens[:, :7] = tokens[:, :7].clamp_min(1)
    mask = torch.ones_like(tokens)
    mask[1, :7], mask[2, :20] = 0, 0
    written = policy.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, 40:]
    for row in range(3):
        context = tokens[row][mask[row].bool()]
        for token in written[row]:
            logits = policy.lm_head(policy.read(context.unsqueeze(0)).hidden_states[0, -1])
            assert token == logits.argmax()
            context = torch.cat([context, token.view(1)])


@pytest.mark.parametrize("field, argument, kept", [(True, None, True), (False, None, False), (False, True, True)])
def test_use_cache_is_the_configurations_unless_the_call_says(field, argument, kept):
    policy = make_policy()
    policy.config.use_cache = field
    state = policy(torch.ones(1, 3, dtype=torch.long), use_cache=argument).past_key_values
    assert isinstance(state, State) == kept


@pytest.mark.parametrize("mask", ([[0], [1]], [[0, 0], [0, 1]]))
def test_a_row_without_a_token_is_refused(mask):
    mask = torch.tensor(mask)
    with refused("attention_mask", "row 0"):
        make_policy()(torch.ones_like(mask), attention_mask=mask)


@torch.no_grad()
def test_generate_samples_and_goes_on_from_a_state():
    policy, tokens = make_policy().eval(), make_batch().tokens[:1, :40]
    torch.manual_seed(3)
    a = policy.generate(tokens, max_new_tokens=20, do_sample=True, top_k=0)
    torch.manual_seed(4)
    b = policy.generate(tokens, max_new_tokens=20, do_sample=True, top_k=0)
    assert not torch.equal(a, b)
    state = policy.read(tokens[:, :-1]).final_state
    greedy = policy.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(policy.generate(tokens, past_key_values=state, max_new_tokens=8, do_sample=False), greedy)


def test_generate_stops_at_a_string(tmp_path):
    policy, tokenizer = load_model(save_small_model(tmp_path))
    prompt = tokenizer("def f(", return_tensors="pt")["input_ids"]
    free = policy.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    stop = tokenizer.decode(free[:3])
    cut = policy.generate(prompt, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert stop in tokenizer.decode(cut[0, prompt.shape[1] :])
    assert cut.shape[1] < prompt.shape[1] + 12


@torch.no_grad()
def test_forward_returns_logits_loss_and_a_state():
    policy, batch = make_policy(), make_batch()
    labels = batch.tokens.clone()
    for row, length in enumerate(batch.lengths.tolist()):
        labels[row, length:] = -100
    mask = (labels != -100).long()
    output = policy(batch.tokens, attention_mask=mask, labels=labels)
    trace = policy.read(batch.tokens, batch.lengths)
    logits = policy.lm_head(trace.hidden_states)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert output.loss == pytest.approx(expected.item(), abs=1e-10)
    assert torch.allclose(output.logits[1, :97], logits[1, :97], atol=1e-10)
    assert same(output.past_key_values, trace.final_state)


# -- states in files, and flash-linear-attention's configuration ------------------------------------------------------


def test_a_file_that_is_no_state_is_refused(tmp_path):
    (tmp_path / "state").write_bytes(b"garbage")
    with naming(ValueError, tmp_path / "state"):
        State.load(tmp_path / "state")
    State({"x": torch.zeros(3, 2)}, torch.tensor([4, 4])).save(tmp_path / "state")
    with pytest.raises(ValueError, match="its tensors do not have one row per sequence"):
        State.load(tmp_path / "state")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 0), ("conv_size", 0), ("hidden_size", "abc"), ("hidden_ratio", "x"), ("norm_eps", None),
     ("expand_k", float("nan")), ("use_gate", "no"), ("vocab_size", True), ("pad_token_id", 32000), ("expand_v", 0)],
)  # fmt: skip
def test_a_size_that_is_none_is_refused_by_name(field, value):
    with refused(f"DeltaNetConfig.{field}", value):
        DeltaNetConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [("attn", {"layers": [0]}), ("attnres_block_size", 2), ("use_l2warp", True), ("use_output_norm", False),
     ("hidden_act", "powlu"), ("qk_norm", "none"), ("qk_activation", "tanh"), ("attn_mode", "fused_chunk")],
)  # fmt: skip
def test_a_field_that_is_not_built_is_refused_by_name(field, value):
    with refused(f"DeltaNetConfig.{field}", value):
        DeltaNetConfig(**{field: value})


def test_every_field_of_flas_configuration_is_ours_with_its_default():
    fla = pytest.importorskip("fla.models.delta_net", reason="flash-linear-attention is not installed here")
    theirs, ours = fla.DeltaNetConfig().to_dict(), DeltaNetConfig().to_dict()
    ignored = {"transformers_version", "architectures"}
    assert {n: v for n, v in theirs.items() if n not in ignored} == {n: v for n, v in ours.items() if n not in ignored}


@pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_tensor_names_and_shapes_are_flas(fields):
    fla = pytest.importorskip("fla.models.delta_net", reason="flash-linear-attention is not installed here")
    sizes = dict(hidden_size=24, num_heads=2, num_hidden_layers=2, vocab_size=53)
    theirs = fla.DeltaNetForCausalLM(fla.DeltaNetConfig(**sizes, **fields)).state_dict()
    ours = DeltaNetForCausalLM(DeltaNetConfig(**sizes, **fields)).state_dict()
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}
