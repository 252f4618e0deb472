"""The glossary: every label of the workbench that has a term shows its sentences, and a term stands for one thing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from refine_lab.refine_config import RefineConfig
from refine_lab.ttt_config import TTTConfig
from tests.factories.state_view import summary
from widgets.core.glossary import LABELS, TERMS, explain, term_of
from widgets.figures.method_tables import MEASURES, heading
from widgets.figures.series import PANELS
from widgets.figures.tables import Table
from widgets.parts import document_metrics
from widgets.parts.controls import explorer_fields, ttt_fields
from widgets.parts.live_curves import Curves
from widgets.parts.text_tables import TextTables
from widgets.state_view import BARS, StateView
from widgets.token_map import Metric, TokenMap, TokenText


def test_entries_are_short_whole_sentences() -> None:
    for term, text in TERMS.items():
        assert text.endswith(".") and text[0].isupper(), term
        assert len(re.findall(r"\.(?= |$)", text)) <= 2 and len(text) <= 230, term
    assert {*LABELS.values()} <= {*TERMS} and not {*LABELS} & {term.lower() for term in TERMS}


@pytest.mark.parametrize(
    ("label", "term"),
    [
        ("Held-out LongPPL", "LongPPL"),
        ("contains answer (%)", "contains answer"),
        ("Exact-match rate so far", "exact-match rate"),
        ("loss before (nats)", "NTP loss"),
        ("Difference in entropy: runs/a minus this model", "entropy"),
        ("rollouts per position (n)", "rollouts per position"),
        ("tokens", None),
        ("rollouts", None),
        ("", None),
    ],
)
def test_a_label_stands_for_a_term_whatever_its_unit(label: str, term: str | None) -> None:
    assert term_of(label) == term
    assert explain(label) == (TERMS[term] if term else "")


def fields() -> dict[str, Any]:
    """The controls of the explorer and of the TTT panel, by label."""
    settings = RefineConfig()
    made = explorer_fields(["cosine"], ["entropy"], lambda name: 0 if name == "seed" else getattr(settings, name))
    made |= ttt_fields(("a text", "a question", "an answer"), TTTConfig(), "cosine", 8, 0.0)
    named = {getattr(each, "description", "") or getattr(each, "label", ""): each for each in made.values()}
    return {label: each for label, each in named.items() if label}


def test_every_control_has_its_tooltip() -> None:
    unexplained = {"Document", "Question", "Held-out remainder", "save weights as"}
    for label, field in fields().items():
        tooltip = field.help if hasattr(field, "help") else getattr(field, "tooltip", "") or ""
        assert tooltip == explain(label)
        assert tooltip or label in unexplained, label


def test_curves_carry_the_sentences_of_their_titles() -> None:
    unexplained = {"Gradient norm, answers"}
    assert {panel.title for panel in PANELS if not explain(panel.title)} == unexplained
    x = np.zeros(2, "<f4").tobytes()
    line = {"method": "sft", "seed": 0, "x": x, "y": x}
    titles = [panel.title for panel in PANELS]
    curves = Curves(curves={"methods": [], "panels": [{"title": title, "lines": [line]} for title in titles]})
    assert [panel["help"] for panel in curves.curves["panels"]] == [explain(title) for title in titles]


def test_column_headings_have_their_tooltip_and_others_have_none() -> None:
    for name in MEASURES:
        assert explain(heading(name)), name
    table = Table(pd.DataFrame({"LongPPL": [1.0], "runs": [2]}), "A table")
    page = table._repr_html_()
    assert f'title="{explain("LongPPL")}">LongPPL</th>' in page and page.count("title=") == 1
    assert TextTables.of([table]).tables[0]["helps"] == [explain("LongPPL"), ""]


def test_metrics_and_states_carry_the_sentences_of_their_titles() -> None:
    view = StateView(summary())
    for shown in (*view.states["measures"], *view.states["bars"]):
        assert shown["help"] == explain(shown["title"]) != ""
    assert [bar["name"] for bar in view.states["bars"]] == [*BARS]
    shown = TokenMap(TokenText("ab", [0, 1, 2]), [Metric("entropy", "Entropy", "nats", np.zeros(2))])
    document: Any = shown.document
    assert document["metrics"][0]["help"] == explain("entropy")


def test_every_metric_of_a_document_is_explained() -> None:
    source = document_metrics.__loader__.get_source(document_metrics.__name__)  # type: ignore[union-attr]
    titles = re.findall(r'Metric\("\w+", "([^"]+)"', source)
    assert len(titles) >= 5 and not [title for title in titles if not explain(title)]
