"""The input fields and buttons of the memory view, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets

from refine_lab.explore.exploration import Exploration
from refine_lab.text import replace_surrogates
from refine_lab.validation import require
from widgets.core.glossary import explain
from widgets.parts.controls import in_rows, number_field, text_field
from widgets.parts.entry_field import EntryField
from widgets.parts.model_picker import model_picker

Wanted = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Position of the last token before a continuation, its tokens, and those of another one that it is compared with."""

ERASING = (
    "What would the model predict if it had never written some tokens to its memory? Mark tokens and press Erase. "
    "Random tokens are a control; Undo takes back the last erasure, and Restore all of them and the marks."
)
"""Explains the row of buttons below it."""


def memory_fields(model: str, text: str, answer: str, against: str) -> dict[str, Any]:
    """Returns the fields by name, with the initial model and document, the explained answer and that compared with it."""
    own = "empty: the model's own"
    return {
        "model": model_picker("model", model, "54em"),
        "document": text_field("Document", text, 2),
        "answer": _entry("answer", answer, "18em", own),
        "against": _entry("compared with", against, "20em", "empty: no contrast"),
        "tokens": number_field("tokens explained per click", 1, 1, 64),
        "erased": _entry("tokens to erase", "", "25em", "for example 646-648, 805"),
        "path": _entry("save the memory state as", "state.safetensors", "30em", ""),
    }


def _entry(label: str, value: str, width: str, placeholder: str) -> EntryField:
    return EntryField(width, label=label, value=value, placeholder=placeholder, help=explain(label))


def answer_wanted(fields: Mapping[str, Any], exploration: Exploration) -> Wanted:
    """Returns the answer in the fields after the document, and the one that it is compared with; empty: the model's own."""
    texts = (replace_surrogates(fields[name].value) for name in ("answer", "against"))
    answer, against = (tuple(exploration.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return len(exploration._known.token_ids) - 1, answer, against


def token_wanted(fields: Mapping[str, Any], exploration: Exploration, token: int) -> Wanted:
    """Returns a token and those after it, as many as the field says. Raises ValueError for the first two tokens."""
    ids = exploration._known.token_ids
    require(2 <= token < len(ids), "the token to explain", token, f"from 2 to {len(ids) - 1}")
    return token - 1, tuple(ids[token : token + fields["tokens"].value].tolist()), ()


def memory_layout(view: Any) -> tuple[dict[str, Any], list[Any]]:
    """Returns the buttons of a `MemoryView` by name, and its children: result and grid are beside the document or below it."""
    fields = view.fields
    buttons = {
        "read": view.button("read", "Read the document with this model, and explain the answer to it", style="primary"),
        "explain": view.button("explain", "Explain the answer after the document", "Explain the answer"),
        "strongest": view.button(
            "mark_strongest",
            "Mark the write with the largest effect, and the token on each side of it",
            "Mark the strongest write and its neighbours",
        ),
        "highlighted": view.button(
            "mark_highlighted", "Mark the tokens that are highlighted in the document too", "Mark highlighted text"
        ),
        "erase": view.button("erase", "Predict again without the marked writes", style="primary"),
        "random": view.button(
            "erase_random",
            "A control: predict again without as many other tokens, drawn at random",
            "Erase as many random tokens",
        ),
        "undo": view.button("undo", "Back to the erasure before"),
        "restore": view.button("restore", "Back to the model with all writes"),
        "save": view.button("save_state", "Save the state at the explained position", "Save state"),
    }
    for button in buttons.values():
        button.layout.width = "auto"
    reading = in_rows([fields["model"], buttons["read"], view.cancel_button])
    asked = in_rows([*(fields[name] for name in ("answer", "against", "tokens")), buttons["explain"]])
    erasing = in_rows(
        [
            fields["erased"],
            *(buttons[name] for name in ("strongest", "highlighted", "erase", "random", "undo", "restore")),
        ]
    )
    saving = in_rows([fields["path"], buttons["save"]])
    view.token_map.layout = ipywidgets.Layout(flex="4 1 550px", min_width="0")
    side = ipywidgets.VBox([view.result, view.grid], layout=ipywidgets.Layout(flex="3 1 370px", min_width="0"))
    beside = ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="0 16px")
    document = ipywidgets.Box([view.token_map, side], layout=beside)
    explanation = ipywidgets.Label(ERASING)
    explanation.add_class("wrapped")
    head = [reading, fields["document"], asked, explanation, erasing, view.notice]
    return buttons, [*head, document, view.rollouts, saving, view.layers]
