"""The model as the harness sees it: batches, texts of any length, BOS tokens, limits, answers, test-time training."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from refine_lab.evaluation import reading
from refine_lab.evaluation.adapting import ttt_settings
from refine_lab.evaluation.config import ReadingConfig
from refine_lab.evaluation.generation import StopRule, generate
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.prompts import Encoder, cut_middle
from refine_lab.models import FastWeightLM
from tests.factories.evaluation import generations, loaded, request, small_tokenizer
from tests.factories.transformers_contract import FAMILIES, tokens_of
from tests.support.refusals import naming, refused

TOLERANCES = [(torch.float32, 1e-4), (torch.float64, 1e-9)]
CONTEXTS = (1, 9, 64, 65, 30, 30, 100, 7)
TEXTS = (
    "def area(width, height):\n    return width *",
    "import os\nfor name in os.listdir(path):\n    if name",
    "class A:\n    def __init__(self, value):\n        self.value =" * 12,
)


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> FastWeightLM:
    """A small model of each family."""
    return FAMILIES[request.param]().eval()


@pytest.fixture
def lm() -> RefineLM:
    return RefineLM(*loaded())


def rows_of(*lengths: int) -> list[list[int]]:
    return [tokens_of(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def by_hand(policy: FastWeightLM, row: list[int]) -> Tensor:
    """The log-probability of each token but the first, from logits of one reading."""
    logits = policy.lm_head(policy.read(torch.tensor([row])).hidden_states[0, :-1])
    return logits.log_softmax(-1).gather(-1, torch.tensor(row[1:]).unsqueeze(-1))[:, 0].double()


# -- batches -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_batches_of_8_and_1_give_the_same_log_likelihoods(policy, dtype, tolerance):
    policy = policy.to(dtype)
    contexts, after = rows_of(*CONTEXTS), rows_of(1, 5, 2, 70, 1, 3)
    asked = [(None, contexts[i % 8], after[i % 6]) for i in range(24)]
    found = {
        size: RefineLM(policy, small_tokenizer(), batch_size=size)._loglikelihood_tokens(asked) for size in (1, 3, 8)
    }
    for (_, context, continuation), *values in zip(asked, *found.values(), strict=True):
        expected = by_hand(policy, context + continuation)[len(context) - 1 :].sum()
        for value, is_greedy in values:
            assert value == pytest.approx(float(expected), abs=tolerance)
            assert isinstance(is_greedy, bool)


@torch.no_grad()
def test_batches_of_8_and_1_give_the_same_answers(policy):
    policy, prompts, rule = policy.double(), rows_of(*CONTEXTS), StopRule(max_tokens=9)
    together = generate(policy, small_tokenizer(), reading.read_prompts(policy, prompts), rule)
    alone = [generate(policy, small_tokenizer(), reading.read_prompts(policy, [row]), rule)[0] for row in prompts]
    assert together == alone
    assert len(set(together)) > 1


@torch.no_grad()
def test_float32_answers_differ_only_where_the_top_two_logits_are_close(lm):
    texts = {size: RefineLM(*loaded(), batch_size=size).generate_until(generations(*TEXTS * 3)) for size in (1, 8)}
    policy, _ = loaded()
    for prompt, one, other in zip(TEXTS * 3, *texts.values(), strict=True):
        if one != other:
            ids = [lm.tok_encode(prompt + text) for text in (one, other)]
            first = next(i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
            top = policy.lm_head(policy.read(torch.tensor([ids[0][:first]])).hidden_states[0, -1]).topk(2).values
            assert float(top[0] - top[1]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_reading_in_pieces_changes_nothing(policy, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_TOKENS", 32)
    policy, rows = policy.to(dtype), rows_of(*CONTEXTS)
    read = reading.read_prompts(policy, rows)
    assert read.state.lengths.tolist() == list(CONTEXTS)
    for row, hidden in zip(rows, read.hidden, strict=True):
        assert torch.allclose(hidden[0], policy.read(torch.tensor([row])).hidden_states[0, -1], atol=tolerance)
    for row, logprobs in zip(rows, reading.text_logprobs(policy, rows), strict=True):
        expected = by_hand(policy, row) if len(row) > 1 else torch.zeros(0, dtype=torch.float64)
        assert torch.allclose(logprobs, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_a_prompt_is_read_once_for_all_its_continuations(lm, monkeypatch):
    read = []
    whole = lm.policy.read_embeddings
    monkeypatch.setattr(
        lm.policy, "read_embeddings", lambda x, *rest: read.append(tuple(x.shape[:2])) or whole(x, *rest)
    )
    lm.loglikelihood([request("loglikelihood", TEXTS[0], text) for text in (" height", " width", " 2")])
    lm.generate_until(generations(TEXTS[0], max_gen_toks=4))
    tokens = len(lm.tok_encode(TEXTS[0]))
    assert read == [(1, tokens), (3, 1), (1, tokens), *[(1, 1)] * 3]


# -- texts of any length -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rolling_is_the_sum_by_hand(lm):
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in TEXTS])
    for text, value in zip(TEXTS, found, strict=True):
        row = [0, *lm.tokenizer.encode(text, add_special_tokens=False)]
        assert value == pytest.approx(float(by_hand(lm.policy, row).sum()), abs=1e-3)


@torch.no_grad()
def test_rolling_windows_score_every_token_once(lm):
    short = RefineLM(*loaded(), max_length=40)
    (value,) = short.loglikelihood_rolling([request("loglikelihood_rolling", TEXTS[2])])
    row = [0, *lm.tokenizer.encode(TEXTS[2], add_special_tokens=False)]
    expected, start = 0.0, 1
    while start < len(row):
        end = min(start + 40, len(row))
        expected += float(by_hand(lm.policy, row[max(0, end - 41) : end])[-(end - start) :].sum())
        start = end
    assert value == pytest.approx(expected, abs=1e-2)
    assert short.counts["cut"] == 0


# -- prompts -------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_adds_bos_gives_one_bos_a_prompt():
    _, tokenizer = loaded()
    tokenizer = tokenizer.__class__(
        tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    try:
        lm = RefineLM(loaded()[0], tokenizer)
        assert tokenizer.encode("a b")[0] == 0
        for text in ("a b", "<|endoftext|>a b", "<|endoftext|><|endoftext|>a b"):
            ids = lm.tok_encode(text)
            assert ids[0] == 0 and ids.count(0) == 1
            assert ids[1:] == tokenizer.encode("a b", add_special_tokens=False)
        context, after = lm._encode_pair("a b", " c")
        assert context.count(0) == 1 and after.count(0) == 0
        assert lm.tok_encode("a", add_special_tokens=False).count(0) == 0
        assert RefineLM(loaded()[0], tokenizer, add_bos=False).tok_encode("a b").count(0) == 0
    finally:
        tokenizer._tokenizer.post_processor = None
    assert Encoder.of(loaded()[1], add_bos=True).prompt("a")[0] == 0
    assert loaded()[1].encode("a b")[0] != 0


def test_the_middle_of_a_long_prompt_is_cut_and_counted():
    assert cut_middle([*range(10)], 4) == [0, 1, 8, 9]
    assert cut_middle([*range(10)], 5) == [0, 1, 7, 8, 9]
    assert cut_middle([*range(10)], 10) == [*range(10)]
    short = RefineLM(*loaded(), max_length=40)
    short.generate_until(generations(*TEXTS, max_gen_toks=10))
    tokens = [len(short.tok_encode(text)) for text in TEXTS]
    assert short.counts == {"prompts": 3, "cut": sum(count > 30 for count in tokens)}
    assert short.counts["cut"] == 1


def test_a_long_prompt_is_refused_where_it_may_not_be_cut():
    lm = RefineLM(*loaded(), max_length=40, over_limit="refuse")
    with refused("a prompt's tokens", len(lm.tok_encode(TEXTS[2])), "at most 30"):
        lm.generate_until(generations(*TEXTS, max_gen_toks=10))
    with refused("max_length", 40, "greater than 64, the number of tokens reserved for the answer"):
        lm.generate_until(generations(TEXTS[0], max_gen_toks=64))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("batch_size", 0), ("over_limit", "drop"), ("ttt", "grpo"), ("ttt_per", "document"), ("dtype", "float16")],
)
def test_bad_settings_are_named(setting, value):
    with refused(setting if setting == "over_limit" else f"ReadingConfig.{setting}", value):
        RefineLM(*loaded(), **{setting: value})


def test_a_model_without_its_tokenizer_is_refused():
    with refused("tokenizer", None):
        RefineLM(loaded()[0])


# -- answers -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_answers_are_those_of_transformers_generate(lm):
    answers = lm.generate_until(generations(*TEXTS))
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = torch.tensor([lm.tok_encode(text)])
        written = lm.policy.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer == lm.tokenizer.decode(written, skip_special_tokens=True)


def test_an_answer_ends_before_a_stop_text(lm):
    (whole,) = lm.generate_until(generations(TEXTS[1]))
    stop = whole[3:6]
    (cut,) = lm.generate_until(generations(TEXTS[1], until=["\0", stop]))
    assert stop in whole and cut == whole.partition(stop)[0]


def test_newlines_before_an_answer_can_be_kept():
    rule = StopRule(max_tokens=9, until=("\n",), skip_newlines=True)
    assert not rule.ended("\n\n") and not rule.ended("\nyes") and rule.ended("\nyes\nno")
    assert (rule.cut("\n\nyes\nno"), rule.cut("yes\nno"), rule.cut("\n")) == ("\n\nyes", "yes", "\n")
    strict = StopRule(max_tokens=9, until=("\n", "."))
    assert strict.ended("\nyes") and strict.cut("\nyes") == "" and strict.cut("a.b\n") == "a"


def test_sampled_answers_do_not_depend_on_batches_or_order():
    sampled = {size: RefineLM(*loaded(), sampled=True, seed=3, batch_size=size) for size in (1, 8)}
    asked = generations(*TEXTS, TEXTS[0])
    first = sampled[8].generate_until(asked)
    assert sampled[1].generate_until(asked) == first
    assert sampled[8].generate_until(asked[:3][::-1])[::-1] == first[:3]
    assert first[0] != first[3], "equal prompts are answered by different draws"
    assert RefineLM(*loaded(), sampled=True, seed=4).generate_until(asked) != first
    assert RefineLM(*loaded()).generate_until(asked) != first


# -- test-time training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "refine"])
@pytest.mark.parametrize("per", ["prompt", "batch"])
def test_test_time_training_changes_answers_and_restores_the_weights(method, per):
    policy, tokenizer = loaded()
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    lm = RefineLM(policy, tokenizer, ttt=method, ttt_per=per, ttt_steps=3, ttt_lr=3e-3)
    pairs = [request("loglikelihood", text, " value") for text in (*TEXTS, "if")]
    adapted, plain = lm.loglikelihood(pairs), RefineLM(policy, tokenizer).loglikelihood(pairs)
    assert all(torch.equal(before[name], x) for name, x in policy.state_dict().items())
    assert not any(p.grad is not None for p in policy.parameters())
    assert [one != other for one, other in zip(adapted, plain, strict=True)][:3] == [True] * 3
    assert lm.counts["adapted"] == 3 and lm.counts["not adapted, too short"] == 1
    change = abs(adapted[3][0] - plain[3][0])
    assert change < 1e-4 if per == "prompt" else change > 1e-4, "a batch's weights answer its short prompts, too"


def test_the_reward_of_test_time_training_is_a_setting():
    assert ttt_settings(ReadingConfig(ttt="refine")).refine.reward == "binary"
    asked = [request("loglikelihood", TEXTS[0], " value")]
    found = {}
    for reward in (None, "binary", "cosine"):
        lm = RefineLM(*loaded(), ttt="refine", ttt_steps=2, ttt_lr=3e-3, ttt_reward=reward)
        assert lm.ttt.refine.reward == (reward or "binary")
        ((found[reward], _),) = lm.loglikelihood(asked)
    assert found[None] == found["binary"] != found["cosine"]
    for ttt, reward in (("refine", "cos"), ("sft", "cosine"), ("none", "binary")):
        with refused("ReadingConfig.ttt_reward", reward):
            ReadingConfig(ttt=ttt, ttt_reward=reward)


def test_adaptation_sees_the_context_and_not_the_continuation():
    lm = RefineLM(*loaded(), ttt="sft", ttt_steps=2, ttt_lr=3e-3)
    both = lm.loglikelihood([request("loglikelihood", TEXTS[0], text) for text in (" height", " width")])
    alone = [lm.loglikelihood([request("loglikelihood", TEXTS[0], text)])[0] for text in (" height", " width")]
    for (one, _), (other, _) in zip(both, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_text_without_a_context_has_nothing_to_adapt_to():
    with naming(ValueError, "'none' for a text without a context"):
        RefineLM(*loaded(), ttt="sft").loglikelihood_rolling([request("loglikelihood_rolling", TEXTS[0])])


# -- the harness ---------------------------------------------------------------------------------------------------------


def test_the_harness_finds_the_model_by_its_name():
    from lm_eval.api.registry import get_model

    import refine_lab.evaluation  # noqa: F401

    found = get_model("refine_lab")
    assert found is RefineLM
    lm = found.create_from_arg_string("pretrained=tiny-deltanet,max_length=128,ttt=sft", {"batch_size": "4"})
    assert (lm.max_length, lm.batch_size, lm.name) == (128, 4, "tiny-deltanet") and lm.ttt is not None
    own = found.create_from_arg_obj({"pretrained": "tiny-deltanet", "batch_size": 2}, {"batch_size": 1, "device": None})
    assert own.batch_size == 2, "a value of --model_args precedes lm_eval's option of the same name"
    default = found.create_from_arg_obj({"pretrained": "tiny-deltanet"}, {"device": "cuda:0"})
    assert torch.cuda.is_available() or default.device.type == "cpu"
    with naming(ValueError, "device", "'tpu'"):
        found.create_from_arg_obj({"pretrained": "tiny-deltanet"}, {"device": "tpu"})


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (
            "pretrained=tiny-deltanet,max_lenght=128",
            ("'max_lenght'", "did you mean 'max_length'?", "over_limit", "ttt_lr"),
        ),
        ("pretraned=tiny-deltanet", ("'pretraned'", "did you mean 'pretrained'?", "batch_size")),
        ("max_length=128", ("pretrained in --model_args", "the name of a model")),
        ("pretrained=tiny-deltanet,max_length=long", ("ReadingConfig.max_length", "'long'")),
        ("pretrained=tiny-deltanet,batch_size=auto", ("ReadingConfig.batch_size", "'auto'")),
    ],
)
def test_wrong_model_arguments_get_one_sentence(arguments, facts):
    with naming(ValueError, *facts) as caught:
        RefineLM.create_from_arg_string(arguments)
    assert "\n" not in str(caught.value)
