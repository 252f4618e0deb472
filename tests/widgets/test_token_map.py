"""Tokens as text, and the token map without a page: what is packed, checked, selected and said."""

from __future__ import annotations

import base64
import json
import re
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refine_lab.models import load_model
from tests.support.hostile import HOSTILE
from widgets.core.packing import unpack
from widgets.core.page import page
from widgets.token_map import Alternatives, Metric, Target, TokenMap, TokenText, token_text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_model("tiny-deltanet")[1]


def spans(text: TokenText) -> list[str]:
    return [text[token] for token in range(len(text))]


def cut(text: str) -> TokenText:
    """Tokens of one to three code points, some empty."""
    bounds = [0]
    while bounds[-1] < len(text):
        bounds.append(min(bounds[-1] + len(bounds) % 4, len(text)))
    return TokenText(text, bounds)


def small(**more: Any) -> TokenMap:
    text = TokenText("one two\nthree", [0, 3, 7, 8, 13])
    metrics = [
        Metric("entropy", "Entropy", "nats", [np.nan, 0.5, 2.0, 1.0]),
        Metric("change", "Change", "", [0, -3, 1, 2], diverging=True),
    ]
    return TokenMap(text, metrics, **more)


# -- tokens as text ------------------------------------------------------------------------------------------------------


def test_a_character_belongs_to_the_token_that_completes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a 🙂 é<|endoftext|>")["input_ids"]
    text = token_text(tokenizer, ids)
    assert text.text == "a 🙂 é<|endoftext|>"
    assert "".join(spans(text)) == text.text
    smile = tokenizer("🙂")["input_ids"]
    assert len(smile) > 1
    assert spans(token_text(tokenizer, smile)) == [""] * (len(smile) - 1) + ["🙂"]


@pytest.mark.parametrize(("name", "document"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_hostile_documents_come_back_as_they_were(name: str, document: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not re.search("[\ud800-\udfff]", document):  # no tokenizer takes a lone surrogate
        ids = tokenizer(document)["input_ids"]
        text = token_text(tokenizer, ids)
        assert text.text == document == tokenizer.decode(ids)
        assert len(text) == len(ids)
    text = cut(document)
    shown = TokenMap(text, [Metric("m", "Metric", "", np.linspace(0, 1, len(text)))])
    units = shown.document["text"]
    offsets = np.frombuffer(shown.document["offsets"], "<u4")
    assert units == document.encode("utf-16-le", "surrogatepass")
    parts = [units[2 * start : 2 * end] for start, end in pairwise(offsets)]
    assert parts == [part.encode("utf-16-le", "surrogatepass") for part in spans(text)]
    assert repr(shown).count("\n") < 12
    repr(shown).encode()  # a terminal gets no lone surrogate
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]", repr(shown))
    assert not re.search(
        r"<(?!(/?script|/?html|!doctype|head|/head|meta|title|/title|style|/style|body|/body|/?main))", page(shown)
    )


def test_ids_that_make_no_text_decode_as_the_tokenizer_does(tokenizer: PreTrainedTokenizerBase) -> None:
    random = np.random.default_rng(0)
    for size, last in ((40, 257), (400, 257), (40, 2048), (3000, 2048)):
        ids = random.integers(0, last, size)
        text = token_text(tokenizer, ids)
        assert text.text == tokenizer.decode(ids.tolist())
        assert len(text) == size
    half = tokenizer("🙂")["input_ids"][:-1]
    assert token_text(tokenizer, half).text == tokenizer.decode(half) == "\ufffd"


def test_ids_are_checked(tokenizer: PreTrainedTokenizerBase) -> None:
    assert spans(token_text(tokenizer, [50, 99_999])) == [tokenizer.decode([50]), ""]  # a padded embedding
    assert len(token_text(tokenizer, [])) == 0
    with pytest.raises(ValueError, match="must be at least 0, got -3"):
        token_text(tokenizer, [1, -3])
    with pytest.raises(ValueError, match=r"one-dimensional array of integers \[T\], got int64 \(1, 2\)"):
        token_text(tokenizer, [[1, 2]])
    with pytest.raises(ValueError, match="must be a fast tokenizer"):
        token_text(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), [0])


def test_tokenizers_with_word_starts_and_byte_fallback_are_read_too() -> None:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        ["the cat and the hat"] * 5, trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()))
    ids = wrapped("the cat 🙂 hat")["input_ids"]
    text = token_text(wrapped, ids)
    assert text.text == wrapped.decode(ids) == "the cat 🙂 hat"
    assert spans(text).count("") >= 3


def test_offsets_are_checked() -> None:
    for offsets, words in (
        ([0, 1], "from 0 to the text's 3 characters, got 0 to 1"),
        ([1, 3], "got 1 to 3"),
        ([0, 2, 1, 3], "token 1 ends before it begins"),
        ([], r"T \+ 1 integers"),
        ([0.0, 3.0], "integers, got float64"),
    ):
        with pytest.raises(ValueError, match=words):
            TokenText("abc", offsets)
    with pytest.raises(IndexError, match="token 3 is not among the 2 tokens"):
        TokenText("abc", [0, 2, 3])[3]


# -- metrics -------------------------------------------------------------------------------------------------------------


def test_scales_begin_at_zero_or_at_percentiles() -> None:
    values = np.linspace(0, 100, 101)
    assert Metric("a", "A", "", values).scale() == (0, 99)
    assert Metric("a", "A", "", -values).scale() == (-99, 0)
    assert Metric("a", "A", "", values - 10).scale() == (-9, 89)
    assert Metric("a", "A", "", values - 10, diverging=True).scale() == (-89, 89)
    assert Metric("a", "A", "", values, low=20, high=30).scale() == (20, 30)
    assert Metric("a", "A", "", [1, 1000, np.inf, np.nan], log=True).scale() == pytest.approx((10.99, 990.01))
    assert Metric("a", "A", "", [1, 1], log=True).scale() == (1, 10)
    for nothing in ([], [np.nan], [0, 0]):
        assert Metric("a", "A", "", nothing).scale() == (0, 1)
    assert Metric("a", "A", "", [0], diverging=True).scale() == (-1, 1)
    packed = Metric("a", "A", "", values).packed()
    assert (packed["below"], packed["above"]) == (False, True)


def test_metrics_are_checked() -> None:
    for arguments, words in (
        (dict(values=[[1.0]]), r"must be one-dimensional \[T\], got shape \(1, 1\)"),
        (dict(values=[1], name=""), "must have a name"),
        (dict(values=[1], low=2, high=1), "must rise from low to high, got 2.0 to 1.0"),
        (dict(values=[1], high=float("inf")), "must rise"),
        (dict(values=[1], diverging=True, low=1, high=2), "must extend from below 0 to above 0, got 1.0 to 2.0"),
        (dict(values=[-1, 0], log=True), "needs a scale above 0"),
        (dict(values=[1], log=True, diverging=True), "both log and diverging"),
    ):
        with pytest.raises(ValueError, match=words):
            Metric(**({"name": "a", "title": "A", "unit": ""} | arguments))


# -- the widget ----------------------------------------------------------------------------------------------------------


def test_a_document_is_packed_whole() -> None:
    shown = small(targets=[Target(2, "second"), Target(1)], chunk_borders=[2, 0])
    document = shown.document
    assert document["text"].decode("utf-16-le") == "one two\nthree"
    assert np.frombuffer(document["offsets"], "<u4").tolist() == [0, 3, 7, 8, 13]
    assert document["targets"] == [[1, "sampled position"], [2, "second"]]
    assert document["chunk_borders"] == [0, 2]
    entropy, change = document["metrics"]
    np.testing.assert_array_equal(np.frombuffer(entropy["values"], "<f4"), np.float32([np.nan, 0.5, 2, 1]))
    assert (change["low"], change["high"], change["diverging"]) == (pytest.approx(-2.91), pytest.approx(2.91), True)
    assert shown.metric == "entropy"


def test_a_new_document_arrives_in_one_message() -> None:
    shown = small()
    shown.selected, shown.metric = 3, "change"
    sent: list[dict] = []
    shown.send_state = lambda key=None: sent.append(shown.get_state(key))  # type: ignore[method-assign]
    shown.show(TokenText("ab", [0, 1, 2]), [Metric("loss", "Loss", "nats", [1, 2])])
    (state,) = sent
    assert set(state) == {"document", "selected", "metric"}
    assert (state["selected"], state["metric"]) == (-1, "loss")
    shown.show(None)
    assert (shown.metric, shown.selected, len(shown.text)) == ("", -1, 0)


def test_the_same_text_keeps_selection_and_metric() -> None:
    shown = small()
    shown.selected, shown.metric = 3, "change"
    before = shown.document["text_key"]
    again = [Metric("loss", "Loss", "", [1, 2, 3, 4]), Metric("change", "Change", "", [1, 2, 3, 4])]
    shown.show(shown.text, again)
    assert (shown.selected, shown.metric, shown.document["text_key"]) == (3, "change", before)
    shown.show(TokenText(shown.text.text, shown.text.offsets), again)
    assert (shown.selected, shown.document["text_key"] > before) == (-1, True)


def test_what_does_not_fit_changes_nothing() -> None:
    shown = small()
    before = shown.document
    text = TokenText("ab", [0, 1, 2])
    metric = Metric("a", "A", "", [1, 2])
    for arguments, more, words in (
        ((text, [Metric("a", "A", "", [1])]), {}, "'a' must have a value for each of 2 tokens, got 1"),
        ((text, [metric, metric]), {}, r"must have distinct names, got \['a', 'a'\]"),
        ((text,), dict(targets=[Target(2)]), "target must be a token index from 0 to 1, got 2"),
        ((text,), dict(chunk_borders=[-1]), "chunk border must be a token index from 0 to 1, got -1"),
        ((text,), dict(alternatives=([[0]], [[1.0]], ["a"])), r"must have shape \[2, A\], got \[1, 1\] and \[1, 1\]"),
        ((TokenText("", np.zeros(2**17 + 2, int)),), {}, "at most 131,072 tokens, got 131,073"),
    ):
        with pytest.raises(ValueError, match=words):
            shown.show(*arguments, **more)
    assert shown.document is before
    for name, value, words in (
        ("metric", "loss", r"one of \['entropy', 'change'\], got 'loss'"),
        ("selected", 4, "from -1 to 3, got 4"),
        ("height", 5, "from 100 to 4000, got 5"),
    ):
        with pytest.raises(ValueError, match=words):
            setattr(shown, name, value)
    shown.view = 99
    assert shown.view == 3


def rows_of(packed: dict[str, Any]) -> list[list[tuple[str, float]]]:
    """Alternatives read back from the bytes that go to the page."""
    offsets = np.frombuffer(packed["offsets"], "<u4")
    index = np.frombuffer(packed["index"], "<u4").reshape(-1, packed["width"])
    probabilities = np.frombuffer(packed["probabilities"], "<f4").reshape(index.shape)
    strings = [
        packed["text"][2 * start : 2 * end].decode("utf-16-le", "surrogatepass") for start, end in pairwise(offsets)
    ]
    return [
        [(strings[i], float(p)) for i, p in zip(*row, strict=True) if p == p]
        for row in zip(index, probabilities, strict=True)
    ]


def test_alternatives_as_arrays() -> None:
    ids = [[-1, -1], [7, 3], [3, 900], [7, -1]]
    shares = [[0, 0], [0.5, 0.25], [0.75, 0.125], [1, 0]]
    strings = {3: "three", 7: "\ud800", 900: "🙂"}
    shown = small(alternatives=Alternatives(ids, shares, strings))
    assert rows_of(shown.document["alternatives"]) == [
        [], [("\ud800", 0.5), ("three", 0.25)], [("three", 0.75), ("🙂", 0.125)], [("\ud800", 1.0)],
    ]  # fmt: skip


def asked(shown: TokenMap, tokens: list, key: int | None = None) -> list[tuple[dict, list[bytes]]]:
    """What the page gets where it asks."""
    sent: list[tuple[dict, list[bytes]]] = []
    shown.send = lambda content, buffers=None: sent.append((content, list(buffers or [])))  # type: ignore[method-assign]
    shown._handle_custom_msg({"ask": tokens, "document": shown.document["key"] if key is None else key}, [])
    return sent


def test_alternatives_are_asked_for_when_looked_at() -> None:
    calls: list[list[int]] = []

    def ask(tokens: list[int]) -> list[list[tuple[str, float]]]:
        calls.append(tokens)
        return [[(f"{token}a", 0.5), ("b", 0.25)][: token + 1] for token in tokens]

    shown = small(alternatives=ask)
    assert shown.document["alternatives"] == {"lazy": True}
    ((content, buffers),) = asked(shown, [0, 2, 77, "x"])
    answer = content["alternatives"]
    assert (answer["tokens"], answer["document"]) == ([0, 2], shown.document["key"])
    packed = dict(zip(answer["names"], buffers, strict=True)) | {"width": answer["width"]}
    assert rows_of(packed) == [[("0a", 0.5)], [("2a", 0.5), ("b", 0.25)]]
    assert asked(shown, [1], key=-5) == []  # of another document
    assert calls == [[0, 2]]
    state = shown.page_state()
    assert rows_of(unpack(state["document"])["alternatives"])[1] == [("1a", 0.5), ("b", 0.25)]
    assert shown.document["alternatives"] == {"lazy": True}


def test_alternatives_may_come_later_or_not_at_all() -> None:
    future: Future = Future()
    shown = small(alternatives=lambda tokens: future)
    sent = asked(shown, [1])
    assert sent == []
    future.set_result([[("x", 1.0)]])
    assert sent[0][0]["alternatives"]["tokens"] == [1]

    def fail(tokens: list[int]) -> list:
        raise RuntimeError("the worker has gone")

    shown = small(alternatives=fail)
    assert asked(shown, [1]) == []
    assert shown.error == "RuntimeError: the worker has gone"
    shown = small(alternatives=lambda tokens: [])
    asked(shown, [1])
    assert shown.error == "alternatives must have a row for each of 1 tokens, got 0"


def test_it_says_what_it_shows() -> None:
    shown = small(targets=[Target(2), Target(3)])
    shown.selected = 3
    assert repr(shown).splitlines() == [
        "TokenMap: 4 tokens, 13 characters, 2 sampled positions",
        "  Entropy (nats): mean 1.167, 0.5 to 2  <- shown",
        "  Change: mean 0, -3 to 2",
        "highest Entropy:",
        "  2 '\\n', Entropy 2 nats, Change 1",
        "  3 'three', Entropy 1 nats, Change 2",
        "  1 ' two', Entropy 0.5 nats, Change -3",
        "selected: 3 'three', Entropy 1 nats, Change 2",
    ]
    assert repr(TokenMap()) == "TokenMap: no tokens"
    assert shown._repr_mimebundle_()[0]["text/plain"] == repr(shown)


def test_the_page_holds_document_and_selection(tmp_path: Path) -> None:
    shown = small()
    shown.selected, shown.metric = 2, "change"
    text = shown.save_html(tmp_path / "map.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])
    state = data["widgets"][0]["state"]
    assert (state["selected"], state["metric"], state["view"]) == (2, "change", 0)
    assert unpack(base64.b64decode(state["document"]["base64"]))["metrics"][1]["title"] == "Change"


def test_labels_reach_any_channel() -> None:
    shown = TokenMap(TokenText("\ud800", [0, 1]), [Metric("m", "t\ud800", "", [1])], targets=[Target(0, "\udc00")])
    document = unpack(shown.get_state()["document"])
    rest = {"targets": document["targets"], "title": document["metrics"][0]["title"]}
    assert json.dumps(rest, ensure_ascii=False).encode() == '{"targets": [[0, "\ufffd"]], "title": "t\ufffd"}'.encode()
