"""The input fields of the reward explorer and the TTT panel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from ipywidgets import Checkbox, Dropdown

from refine_lab.config import BUILT_IN_REWARDS
from refine_lab.ttt_config import TTTConfig
from refine_lab.validation import MOST_SEED, require
from widgets.core.glossary import explain
from widgets.figures.series import KNOWN_METHODS
from widgets.parts.entry_field import EntryField
from widgets.parts.number_field import NumberField
from widgets.parts.step_slider import StepSlider

MOST_HELD_OUT = 0.9
"""Maximum share of a document that the TTT panel holds out."""
CURRENT = "current weights"
"""Name of the weights that a model has now, among those that can be saved."""


def field(kind: Any, label: str, value: Any, width: str = "20.5em", **options: Any) -> Any:
    """Creates an input field of a kind with its label in front, whose tooltip is the glossary's sentence about it."""
    layout, style = ipywidgets.Layout(width=width), {"description_width": "12.5em"}
    return kind(value=value, description=label, tooltip=explain(label), layout=layout, style=style, **options)


def text_field(label: str, text: str, rows: int, placeholder: str = "") -> EntryField:
    """Creates a field for a text as wide as its panel, with that many rows; 0: for one line."""
    made = EntryField("auto", label=label, value=text, rows=rows, placeholder=placeholder, help=explain(label))
    made.add_class("as-field")
    return made


def method_boxes(methods: Sequence[str]) -> dict[str, Checkbox]:
    """Returns a checkbox per method, by its label, in the order in which methods are compared; all are ticked."""
    known = [style.label for style in KNOWN_METHODS.values()]
    layout = ipywidgets.Layout(width="auto", margin="2px 12px 2px 2px")
    return {
        label: Checkbox(value=True, description=label, indent=False, layout=layout)
        for label in sorted(methods, key=known.index)
    }


def in_rows(fields: Sequence[Any]) -> ipywidgets.Box:
    """Arranges fields side by side, in as many rows as they need."""
    return ipywidgets.Box([*fields], layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"))


def explorer_fields(rewards: Sequence[str], selections: Sequence[str], setting: Callable[[str], Any]) -> dict[str, Any]:
    """Returns fields for `reward`, `seed` and the method's adjustable settings, by name, with the current `setting` of each."""
    fields: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "reward": (Dropdown, "reward", {"options": [*rewards]}),
        "group_by": (Dropdown, "advantage group", {"options": ["prefix", "sequence"]}),
        "rollout_length": (NumberField, "tokens per rollout (k)", {"min": 1, "max": 64}),
        "group_size": (NumberField, "rollouts per position (n)", {"min": 1, "max": 64}),
        "temperature": (NumberField, "temperature", {"min": 0.01, "max": 10, "step": 0.1, "whole": False}),
        "num_chunks": (NumberField, "chunks (c)", {"min": 1, "max": 256}),
        "selection": (Dropdown, "selection", {"options": [*selections]}),
        "tau": (NumberField, "tau", {"min": 0.01, "max": 100, "step": 0.1, "whole": False}),
        "smoothing_kernel": (NumberField, "smoothing", {"min": 1, "max": 101}),
        "seed": (NumberField, "seed", {"min": 0, "max": MOST_SEED}),
    }
    return {name: _made(kind, label, setting(name), options) for name, (kind, label, options) in fields.items()}


def number_field(label: str, value: float, low: float, high: float, **options: Any) -> NumberField:
    """Creates a field for a number from `low` to `high`, which refuses other numbers."""
    return NumberField(label=label, help=explain(label), min=low, max=high, value=value, **options)


def _made(kind: Any, label: str, value: Any, options: dict[str, Any]) -> Any:
    if kind is NumberField:
        return number_field(label, value, options.pop("min"), options.pop("max"), **options)
    return field(kind, label, value, "22em", **options)


def ttt_fields(
    texts: tuple[str, str, str], config: TTTConfig, reward: str, answer_tokens: int, held_out: float
) -> dict[str, Any]:
    """Returns the TTT panel's fields by name, with the values of `config`; `reward` is used if REFINE is selected.

    `texts`: document, question and reference answer. `held_out`: the share of the document that is its unseen remainder,
    at most `MOST_HELD_OUT`; 0 holds out nothing. The slider shows it in percent. The methods are REFINE, SFT and that of
    `config`, if it is another.
    """
    require(0 <= held_out <= MOST_HELD_OUT, "held_out", held_out, f"from 0 to {MOST_HELD_OUT}")
    label, most = "Held-out remainder", round(100 * MOST_HELD_OUT)
    slider = StepSlider(last=most, value=round(100 * held_out), label=label, help=explain(label), unit="%")
    slider.add_class("as-field")
    chosen = KNOWN_METHODS["sft" if config.refine is None else config.refine.method].label
    method = field(Dropdown, "method", chosen, options=[*dict.fromkeys([chosen, "REFINE", "SFT"])])
    rewards = field(Dropdown, "reward", reward, options=[*BUILT_IN_REWARDS])
    ipywidgets.dlink((method, "value"), (rewards, "disabled"), transform=lambda name: name != "REFINE")
    weights = ipywidgets.Label("Original weights.")
    weights.add_class("wrapped")
    document, question, reference = texts
    return {
        "document": text_field("Document", document, 5),
        "question": text_field("Question", question, 2),
        "reference": text_field("Reference answer", reference, 0, "optional; answers are then marked right or wrong"),
        "method": method,
        "reward": rewards,
        "steps": number_field("steps", config.steps, 1, 1_000_000),
        "lr": number_field("lr", config.lr, 0, 1e10, step=1e-5, whole=False),
        "answer_tokens": number_field("max answer tokens", answer_tokens, 1, 1_000_000),
        "held_out": slider,
        "weights": weights,
        "saved": _kept_weights(),
        "folder": EntryField("24em", label="save weights as", placeholder="a name under runs/"),
    }


def _kept_weights() -> Dropdown:
    """Returns the choice of the weights to save, hidden while only the current ones can be saved."""
    made = field(Dropdown, "weights to save", "", "25em", options=[(CURRENT, "")])
    made.layout.display = "none"
    return made


def show_kept(choice: Dropdown, kept: Sequence[str]) -> None:
    """Lists the methods whose weights are kept after the current weights; a choice stays while it is listed."""
    options = [(CURRENT, ""), *((f"{method}, as compared", method) for method in kept)]
    if tuple(options) != choice.options:
        chosen = choice.value
        choice.options = options
        choice.value = chosen if chosen in kept else ""
    choice.layout.display = "" if kept else "none"
