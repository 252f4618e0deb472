"""transformers' conventions, in every family: pads, masks, embeddings, beams, checkpointing, and refusals by name."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from refine_lab.models import FastWeightLM, State
from tests.factories.step import make_policy as make_deltanet
from tests.factories.transformers_contract import FAMILIES, VOCABULARY, tokens_of
from tests.support.refusals import naming, refused


@pytest.fixture(params=FAMILIES)
def policy(request) -> FastWeightLM:
    """A small float64 model of each family."""
    return FAMILIES[request.param]().double().eval()


@pytest.fixture
def deltanet() -> FastWeightLM:
    return make_deltanet().double().eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Rows of 20, 13 and 7 tokens with their mask, padded on one side or in all places."""
    tokens, mask = tokens_of(3, 20), torch.ones(3, 20, dtype=torch.long)
    if side == "left":
        mask[1, :7], mask[2, :13] = 0, 0
    elif side == "right":
        mask[1, 13:], mask[2, 7:] = 0, 0
    else:
        mask[0, 18:], mask[1, :3], mask[1, 17:], mask[2, :4], mask[2, 9:12], mask[2, 15:] = 0, 0, 0, 0, 0, 0
    return tokens, mask


def greedy(policy: FastWeightLM, context: Tensor, count: int) -> list[int]:
    """Every token from the whole context, read anew."""
    for _ in range(count):
        chosen = policy.lm_head(policy.read(context.unsqueeze(0)).hidden_states[0, -1]).argmax()
        context = torch.cat([context, chosen.view(1)])
    return context[-count:].tolist()


# -- pads ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_generate_continues_every_row_as_it_does_alone(policy, side, use_cache):
    tokens, mask = padded(side)
    asked = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=use_cache)
    written = policy.generate(tokens, attention_mask=mask, **asked)
    assert torch.equal(written[:, :20], tokens)
    assert written[:, 20:].tolist() == [greedy(policy, t[m.bool()], 6) for t, m in zip(tokens, mask, strict=True)]


@torch.no_grad()
def test_a_pad_has_the_outputs_of_the_last_token_before_it(policy):
    tokens, mask = padded("mixed")
    output = policy(tokens, attention_mask=mask, output_hidden_states=True)
    for row in range(3):
        real = mask[row].bool()
        alone = policy(tokens[row][real].unsqueeze(0), output_hidden_states=True)
        last = (real.cumsum(-1) - 1).clamp(min=0)
        assert torch.allclose(output.logits[row], alone.logits[0, last], atol=1e-10)
        for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert torch.allclose(ours[row], theirs[0, last], atol=1e-10)


def test_the_loss_of_padded_rows_is_that_of_each_row_alone(policy):
    for side in ("left", "right", "mixed"):
        tokens, mask = padded(side)
        labels = tokens.masked_fill(mask == 0, -100)
        losses, count = 0.0, 0
        for t, m in zip(tokens, mask, strict=True):
            alone = t[m.bool()].unsqueeze(0)
            losses += policy(alone, labels=alone).loss.item() * (alone.shape[1] - 1)
            count += alone.shape[1] - 1
        if side == "mixed":  # a label behind a pad is predicted from the token before the pad
            labels = torch.where(mask == 1, tokens, -100)
        assert policy(tokens, attention_mask=mask, labels=labels).loss.item() == pytest.approx(
            losses / count, abs=1e-10
        )


@torch.no_grad()
def test_reading_on_from_a_state_takes_pads_on_either_side(policy):
    tokens, mask = padded("mixed")
    first, rest = policy(tokens[:, :11], attention_mask=mask[:, :11]), tokens[:, 11:]
    rest_mask = mask.clone()
    whole = policy(tokens, attention_mask=mask)
    later = policy(rest, attention_mask=rest_mask, past_key_values=first.past_key_values)
    real = mask[:, 11:].bool()
    assert torch.allclose(later.logits[real], whole.logits[:, 11:][real], atol=1e-10)
    labels = rest.masked_fill(
        mask[:, 11:] == 0, -100
    )  # what precedes a row's first token of the call is not in the call
    given = dict(attention_mask=rest_mask, past_key_values=first.past_key_values, labels=labels)
    losses = [
        -whole.logits[row, :-1].log_softmax(-1).gather(-1, tokens[row, 1:, None])[i, 0]
        for row in range(3)
        for i in range(11, 19)
        if mask[row, i] and mask[row, i + 1]
    ]
    assert policy(rest, **given).loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-10)


# -- what a call may hold ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_stand_for_tokens(policy):
    tokens, mask = padded("left")
    embeds = policy.get_input_embeddings()(tokens)
    by_ids, by_embeds = policy(tokens, attention_mask=mask), policy(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(by_ids.logits, by_embeds.logits)
    asked = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(policy.generate(inputs_embeds=embeds, **asked), policy.generate(tokens, **asked)[:, 20:])
    with refused("exactly one of input_ids and inputs_embeds", "both"):
        policy(tokens, inputs_embeds=embeds)
    with refused("exactly one of input_ids and inputs_embeds", "neither"):
        policy()


@torch.no_grad()
def test_hidden_states_are_the_input_of_each_layer_and_the_final_ones(policy):
    tokens = tokens_of(2, 9)
    layers = policy.model.layers
    inputs, hooks = [], []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])))
    output = policy(tokens, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(output.hidden_states) == policy.config.num_hidden_layers + 1 == len(inputs) + 1
    assert torch.equal(output.hidden_states[0], policy.get_input_embeddings()(tokens))
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, inputs, strict=False))
    assert torch.equal(policy.lm_head(output.hidden_states[-1]), output.logits)
    state = policy.read(tokens[:, :5]).state_at(torch.tensor([[1, 4], [2, 4]]))  # branches: rows that share a prefix
    branched = policy(tokens_of(4, 3, seed=1), past_key_values=state, output_hidden_states=True).hidden_states
    assert [x.shape for x in branched] == [(4, 3, output.hidden_states[0].shape[-1])] * len(output.hidden_states)
    policy.config.output_hidden_states = True
    assert policy(tokens).hidden_states is not None


@torch.no_grad()
def test_logits_to_keep_is_a_number_of_columns_or_the_columns(policy):
    tokens = tokens_of(2, 9)
    whole = policy(tokens).logits
    columns = torch.tensor([7, 0, 3])
    for kept, expected in ((2, whole[:, -2:]), (columns, whole[:, columns]), (0, whole)):
        assert torch.allclose(policy(tokens, logits_to_keep=kept).logits, expected, atol=1e-12)
    with refused("logits_to_keep", -1):
        policy(tokens, logits_to_keep=-1)


@torch.no_grad()
def test_positions_are_those_of_the_tokens_or_refused(policy):
    tokens, mask = padded("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = policy(tokens, attention_mask=mask)
    assert torch.equal(policy(tokens, attention_mask=mask, position_ids=positions).logits, expected.logits)
    later = policy(tokens[:, :1], past_key_values=expected.past_key_values, position_ids=mask.sum(-1, keepdim=True))
    assert later.logits.shape == (3, 1, VOCABULARY)
    with naming(ValueError, "position_ids", "row 0", "from 0", 5):
        policy(tokens, position_ids=torch.arange(5, 25).unsqueeze(0))
    with refused("position_ids", [3, 3, 20], "of shape [3, 20]"):
        policy(tokens, position_ids=positions.expand(3, 3, 20))


@torch.no_grad()
def test_the_model_without_its_head_gives_final_hidden_states_and_a_state(policy):
    tokens, mask = padded("right")
    output, whole = policy.model(tokens, attention_mask=mask), policy(tokens, attention_mask=mask)
    assert torch.equal(policy.lm_head(output.last_hidden_state), whole.logits)
    assert isinstance(output.past_key_values, State)
    assert policy.model(tokens, use_cache=False, return_dict=False)[0].shape == output.last_hidden_state.shape
    assert len(policy.model(tokens, output_hidden_states=True).hidden_states) == policy.config.num_hidden_layers + 1


@torch.no_grad()
def test_beam_search_finds_what_it_finds_without_a_cache(policy):
    tokens, mask = padded("right")
    asked = dict(max_new_tokens=6, num_beams=4, num_return_sequences=2, do_sample=False, pad_token_id=0, eos_token_id=5)
    found = policy.generate(tokens, attention_mask=mask, **asked)
    assert torch.equal(found, policy.generate(tokens, attention_mask=mask, use_cache=False, **asked))
    assert found.shape[0] == 6


# -- what is refused, by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("output_attentions", True, True),
        ("attention_mask", torch.ones(2, 1, 9, 9), [2, 1, 9, 9]),
        ("attention_mask", {"full_attention": None}, "dict"),
        ("attention_mask", torch.ones(2, 12), [2, 12]),
        ("attention_mask", torch.ones(1, 9), [1, 9]),
        ("attention_mask", torch.tensor([[1] * 9, [0] * 9]), "row 1"),
        ("input_ids", torch.zeros(2, 0, dtype=torch.long), [2, 0]),
        ("input_ids", torch.zeros(9, dtype=torch.long), [9]),
    ],
)
def test_a_call_that_is_not_supported_is_refused_by_name(deltanet, name, argument, value):
    for model in (deltanet, deltanet.model):
        with refused(name, value):
            model(**{"input_ids": tokens_of(2, 9), name: argument})


@pytest.mark.parametrize("name", ["label", "token_type_ids", "cache_position", "head_mask"])
def test_an_argument_that_is_unknown_is_refused_by_name(policy, name):
    with naming(TypeError, name):
        policy(tokens_of(2, 9), **{name: tokens_of(2, 9)})


def test_generate_refuses_attentions_and_arguments_that_are_unknown(deltanet):
    with naming(ValueError, "label"):
        deltanet.generate(tokens_of(1, 4), label=tokens_of(1, 4), max_new_tokens=2)
    with refused("output_attentions", True, "False"):
        deltanet.generate(tokens_of(1, 4), max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)


def test_a_cache_of_transformers_is_refused(deltanet):
    from transformers import DynamicCache

    refusals = (ValueError, TypeCheckError)  # the tests check types before `forward` does
    with naming(refusals, "past_key_values"):
        deltanet(tokens_of(1, 4), past_key_values=DynamicCache())


# -- activation checkpointing by transformers' own switch ----------------------------------------------------------------


def gradients(policy: FastWeightLM, tokens: Tensor) -> list[Tensor]:
    policy.zero_grad()
    policy(tokens, labels=tokens, use_cache=False).loss.backward()
    return [p.grad.clone() for p in policy.parameters()]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_switch_runs_blocks_again_and_changes_no_gradient(policy):
    tokens, calls = tokens_of(2, 30), []
    plain = gradients(policy.train(), tokens)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if not hasattr(policy, f"{name}_enable"):  # transformers before 5.20 has the second name alone
            continue
        getattr(policy, f"{name}_enable")()
        assert policy.is_gradient_checkpointing
        hook = policy.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        calls.clear()
        again = gradients(policy, tokens)
        hook.remove()
        assert len(calls) == 2  # once forward, once in the backward
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, again, strict=True))
        getattr(policy, f"{name}_disable")()
        assert not policy.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (dict(gradient_checkpointing_kwargs={"use_reentrant": True}), "use_reentrant", True),
        (dict(gradient_checkpointing_kwargs={"use_reentrant": False, "debug": True}), "checkpointing", {"debug": True}),
        (dict(every_n_layers=2), "every_n_layers", 2),
        (dict(offload=True), "checkpointing", "offload=True"),
    ],
)
def test_checkpointing_that_is_not_supported_is_refused_by_name(deltanet, settings, name, value):
    with refused(name, value):
        deltanet.gradient_checkpointing_enable(**settings)
    assert not deltanet.is_gradient_checkpointing
