"""Transplants, counterfactuals, the layer lens, and the lifetimes of writes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from refine_lab.data.recall import RecallDocument, make_document, value_span
from refine_lab.explore.lens import layer_lens
from refine_lab.explore.lifetimes import lifetime_curve, write_lifetimes
from refine_lab.explore.targets import Target, score_target
from refine_lab.explore.transplant import counterfactual, transplant
from refine_lab.method.rollout import Branches
from refine_lab.models import load_model
from tests.factories.parity import make
from tests.support.refusals import refused

EVERY = ("deltanet", "gated-deltanet", "lact-momentum", "qwen3-next", "qwen3.5", "olmo-hybrid")


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 53, (150,), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[70:74] = torch.tensor([1, 2, 3, 4])
    return tokens, other


@pytest.mark.parametrize("family", EVERY)
def test_a_transplant_takes_the_chosen_heads_and_nothing_else(family: str) -> None:
    policy, (tokens, other) = make(family, torch.float64), documents()
    own, theirs = (policy.read(ids[None]).state_at(torch.tensor([[149]])) for ids in (tokens, other))
    before = {name: x.clone() for name, x in own.tensors.items()}
    whole = transplant(policy, own, theirs)
    for part in policy.memory_parts[-2:]:  # both kinds of a LaCT layer, and of a hybrid's layers
        cell = (part.layer, part.name, 1)
        one = transplant(policy, own, theirs, [cell, cell])
        assert_one_head_differs(policy, part, own, theirs, one, whole)
    assert all(torch.equal(x, before[name]) for name, x in own.tensors.items())


def assert_one_head_differs(policy, part, own, theirs, one, whole) -> None:
    """`one` has head 1 of `part` from `theirs` and the rest from `own`; `whole` has all memory from `theirs`."""
    for kind in ("tensors", "shared"):
        mine, other_, mixed, all_ = (getattr(x, kind) for x in (own, theirs, one, whole))
        for name in mine:
            belongs, axis = policy.STATE_PARTS.get(name.partition(".")[2], ("", 0))
            if not belongs:  # a convolution's window
                assert torch.equal(mixed[name], mine[name]) and torch.equal(all_[name], mine[name])
                continue
            assert torch.equal(all_[name], other_[name])
            if name.startswith(f"{part.layer}.") and belongs == part.name:
                heads = (
                    x.unflatten(axis, (part.heads, -1)).movedim(axis, 0)
                    for x in (mixed[name], mine[name], other_[name])
                )
                for head, (got, stays, comes) in enumerate(zip(*heads, strict=True)):
                    assert torch.equal(got, comes if head == 1 else stays)
            else:
                assert torch.equal(mixed[name], mine[name])


@pytest.mark.parametrize("family", ("deltanet", "lact-momentum", "qwen3.5"))
def test_a_counterfactual_asks_after_each_transplant(family: str) -> None:
    policy, (tokens, other) = make(family, torch.float64), documents()
    question, answers = [5, 6, 7], ([9, 1], [8])
    found = counterfactual(policy, tokens.tolist(), other.tolist(), question, answers)
    target = Target(position=1, token_ids=(8,), against=(9, 1))

    def asked(state) -> float:
        with torch.no_grad():
            trace = policy.read(torch.tensor([question]), state=state)
            return float(score_target(policy, Branches.of(trace, torch.tensor([[2]]), 1), target).logprobs)

    own, theirs = (policy.read(ids[None]).final_state for ids in (tokens, other))
    assert found.original == pytest.approx(asked(own), abs=1e-10)
    assert found.total == pytest.approx(asked(theirs) - asked(own), abs=1e-10)
    for number, part in enumerate(found.parts):
        cells = [(part.layer, part.name, head) for head in range(part.heads)]
        for cell, effect in zip(cells, found.effects[number], strict=False):
            assert effect == pytest.approx(asked(transplant(policy, own, theirs, [cell])) - asked(own), abs=1e-10)
        together = asked(transplant(policy, own, theirs, cells)) - asked(own)
        assert found.of_part[number] == pytest.approx(together, abs=1e-10)
    same = counterfactual(policy, tokens.tolist(), tokens.tolist(), question, answers)
    assert same.total == 0 and not np.nan_to_num(same.effects).any()


def test_states_of_other_lengths_share_only_recurrent_memory() -> None:
    tokens, _ = documents()
    policy = make("deltanet", torch.float64)
    longer, shorter = (policy.read(tokens[None, :n]).final_state for n in (150, 120))
    assert torch.equal(
        transplant(policy, longer, shorter).tensors["0.recurrent_state"], shorter.tensors["0.recurrent_state"]
    )
    policy = make("lact-momentum", torch.float64)
    longer, shorter = (policy.read(tokens[None, :n]).final_state for n in (150, 120))
    with refused(
        "the tokens read by both states", [150, 120], "equal, since attention and LaCT hold tokens by position"
    ):
        transplant(policy, longer, shorter)
    with refused("a head", (0, "window", 3), "one of the model's memory_parts"):
        transplant(policy, longer, longer, [(0, "window", 3)])


@pytest.mark.parametrize("family", EVERY)
def test_the_lens_equals_the_head_on_every_layer_of_a_whole_reading(family: str) -> None:
    policy, (tokens, _) = make(family, torch.float64), documents()
    inputs: list[torch.Tensor] = []
    with torch.no_grad():
        trace = policy.read_embeddings(policy.get_input_embeddings()(tokens[None]), None, None, inputs)
        for position in (0, 64, 100):
            streams = [policy.model.norm(x)[0, position] for x in inputs] + [trace.hidden_states[0, position]]
            logprobs = policy.head(torch.stack(streams)).log_softmax(-1)
            found = layer_lens(policy, trace, tokens, position)
            following = int(tokens[position + 1])
            np.testing.assert_allclose(found.logprobs, logprobs[:, following], atol=1e-5)
            assert found.ranks.tolist() == ((logprobs > logprobs[:, [following]]).sum(-1) + 1).tolist()
            assert found.alternatives[:, 0].tolist() == logprobs.argmax(-1).tolist()
            np.testing.assert_allclose(found.probabilities[:, 0], logprobs.exp().amax(-1), atol=1e-5)
    with refused("position", 149, "from 0 to 148, where a token follows"):
        layer_lens(policy, trace, tokens, 149)
    assert layer_lens(policy, trace, tokens, 149, token=4).token == 4


def recall(count: int, length: int = 256) -> tuple:
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    text = np.array(tokenizer.encode("The harbour was quiet and the boats were at sea. " * 60), np.int32)
    made = [
        make_document("word-4", length, text, torch.Generator().manual_seed(i), tokenizer, "validation")
        for i in range(count)
    ]
    return policy, tokenizer, made


def test_erasing_a_fact_ends_its_answer() -> None:
    policy, tokenizer, made = recall(12)
    for document in made:
        (question,) = document.questions
        begin, end = value_span(tokenizer, document, question)
        assert document.tokens[begin:end] == question.answer_ids and end < question.start
        assert tokenizer.decode(document.tokens[:begin]).endswith(f"The secret word for {question.key} is")
    rows = write_lifetimes(policy, tokenizer, made, attribute=True)
    assert rows["right"].mean() >= 0.75 and rows["right_erased"].mean() <= 0.1
    assert (rows["top"].abs() <= 3).mean() >= 0.75
    np.testing.assert_allclose(rows["effect"], rows["logprob"] - rows["logprob_erased"])
    assert (0 < rows["writes_since"]).all() and (rows["writes_since"] < rows["distance"]).all()


def test_a_fact_that_is_not_in_the_document_is_refused() -> None:
    _, tokenizer, (document,) = recall(1)
    (question,) = document.questions
    without = RecallDocument(tokens=document.tokens[question.start :], questions=[question])
    with refused("the asked key", question.key, "that of a fact in the document, a sentence of its own"):
        value_span(tokenizer, without, question)


def test_the_curve_groups_documents_by_distance() -> None:
    rows = pd.DataFrame(
        {
            "distance": [4, 1, 3, 2],
            "writes_since": [1.0, 4, 2, 3],
            "effect": [1.0, 7, 3, 5],
            "right": [False, True, False, True],
        }
    )
    curve = lifetime_curve(rows, bins=2)
    assert curve["distance"].tolist() == [1.5, 3.5] and curve["effect"].tolist() == [6, 2]
    assert curve["right"].tolist() == [1, 0] and curve["documents"].tolist() == [2, 2]
    np.testing.assert_allclose(curve["high"] - curve["effect"], 12.706204736432095)  # t(0.975, 1) * sqrt(2) / sqrt(2)
    assert lifetime_curve(rows, "writes_since", bins=1)["writes_since"].tolist() == [2.5]
    with refused("bins", 5, "from 1 to 4, the number of documents"):
        lifetime_curve(rows, bins=5)
