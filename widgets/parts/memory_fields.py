"""The input fields of the memory view."""

from __future__ import annotations

from typing import Any

import ipywidgets

from widgets.parts.controls import field, text_field


def memory_fields(text: str, answer: str, against: str) -> dict[str, Any]:
    """Returns the fields by name, with the initial document, the explained answer, and the one that it is compared with."""
    own = "empty: the model's own next token"
    fields = {
        "document": text_field("Document", text, 3),
        "answer": field(ipywidgets.Text, "answer", answer, "24em", placeholder=own),
        "against": field(ipywidgets.Text, "compared with", against, "24em", placeholder="empty: no contrast"),
        "tokens": field(ipywidgets.BoundedIntText, "tokens at a click", 1, "14em", min=1, max=64),
        "erased": field(ipywidgets.Text, "tokens to erase", "", "28em", placeholder="such as 646-648, 805"),
        "path": field(ipywidgets.Text, "file of the state", "state.safetensors", "26em"),
    }
    for name in ("erased", "path", "answer", "against"):
        fields[name].continuous_update = False
    for name in set(fields) - {"document"}:
        fields[name].style.description_width = "initial"
    return fields
