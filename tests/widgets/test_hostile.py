"""Forty hostile documents through the panels and a real model: shown as they are or refused in a sentence, never more."""

from __future__ import annotations

import re
import unicodedata

import pytest

from refine_lab.explore.client import Worker
from refine_lab.text import replace_surrogates
from tests.support.explored import ADAPTED, explored
from tests.support.hostile import HOSTILE
from widgets.parts.entry_field import EntryField
from widgets.reward_explorer import RewardExplorer

pytestmark = [pytest.mark.process, pytest.mark.slow]

REFUSED = {
    "empty": "is empty",
    "one space": "has 1 token",
    "one line of letters": "has 100,000 tokens",
    "one line of wide letters": "has 300,006 tokens",
}
"""Documents of too few tokens, or of more than a document may have, and what is said of each."""


def acts(text: str) -> set[str]:
    """The characters on which a terminal would do something, line ends aside."""
    return {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


def test_the_list_is_whole() -> None:
    assert len(HOSTILE) == len(dict(HOSTILE)) == 40


@pytest.mark.parametrize(("name", "document"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_a_document_is_shown_and_rolled_out_or_refused(name: str, document: str) -> None:
    found = explored()[name]
    assert acts(found.told) == set()
    assert found.told.count("\n") < 40
    assert "<script>window" not in found.page
    if name in REFUSED:
        assert isinstance(found.raised, ValueError)
        sentence = f"the document {REFUSED[name]}; 2 to 65,536 tokens are allowed"
        assert found.error == str(found.raised) == sentence
        assert found.text == ""
        assert f"error: {found.error}" in found.told
        return
    assert found.raised is None, found.error
    assert found.error == ""
    assert found.text == replace_surrogates(document)  # every character whole, at one of its tokens
    assert re.search(
        "^(4 rollouts at 2|2 rollouts at 1) sampled positions?,", found.told, re.MULTILINE
    )  # one where it is short


@pytest.mark.parametrize(("name", "document"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_a_document_to_adapt_to_is_shown_or_refused(name: str, document: str) -> None:
    found = explored()[f"read: {name}"]
    assert acts(found.told) == set()
    if name in REFUSED:
        sentence = f"the document {REFUSED[name]}; 2 to 65,536 tokens are allowed"
        assert found.error == str(found.raised) == sentence
        assert found.text == ""
        return
    assert found.raised is None, found.error
    assert (found.text, found.error) == (replace_surrogates(document), "")


@pytest.mark.parametrize("name", ADAPTED)
def test_the_states_along_a_document_are_shown(name: str) -> None:
    found = explored()[f"states: {name}"]
    assert (found.raised, found.error) == (None, "")
    assert acts(found.told) == set()
    assert "strongest writes at" in found.told


@pytest.mark.parametrize("name", ADAPTED)
def test_a_document_is_attributed_erased_and_read_by_two_models(name: str) -> None:
    document = replace_surrogates(dict(HOSTILE)[name])
    for kind, shown in (("memory", "Without the erased writes"), ("side", "pairs are equal")):
        found = explored()[f"{kind}: {name}"]
        assert (found.raised, found.error, found.text) == (None, "", document)
        assert acts(found.told) == set()
        assert shown in found.told and "reference" in found.told
        assert "<script>window" not in found.page.lower()


@pytest.mark.parametrize("name", ADAPTED)
def test_a_document_is_adapted_to(name: str) -> None:
    found, document = explored()[f"adapt: {name}"], dict(HOSTILE)[name]
    assert found.raised is None, found.error
    assert found.error == ""
    assert found.text == replace_surrogates(document) + replace_surrogates(document)
    assert acts(found.told) == set()
    assert "1 steps" in found.told


def test_a_document_without_room_for_a_rollout_takes_the_place_of_the_last_one() -> None:
    worker = Worker("cpu")
    panel = RewardExplorer(text="def f(x): return x\n" * 4, worker=worker, settings={"group_size": 2, "num_chunks": 1})
    panel.shown.result(60)
    assert len(panel.inspector.rollouts) == 2
    with pytest.raises(
        ValueError, match="a prompt of 2 tokens is too short for a rollout of 5; it must have at least 6"
    ):
        panel.read("a b").result(60)
    assert "too short for a rollout" in panel.error
    assert (panel.token_map.text.text, len(panel.inspector.rollouts), panel.summary.summary) == ("a b", 0, {})
    assert panel.token_map.document["targets"] == []
    panel.token_map.selected = 1  # a click there
    assert "too close to the end" in panel.error
    worker.close()


def test_a_field_takes_half_of_a_pair_from_a_page() -> None:
    field = EntryField(value="before", rows=2)
    field._on_message(field, {"typed": "a\ud83d\u202e\0 \U0001f44d"}, [])  # as the page sends it
    assert field.value == "a\ufffd\u202e\0 \U0001f44d"
