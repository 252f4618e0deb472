"""Extracts the answer from a generated text in the same way as the paper's release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

CutRule = Literal["first_line", "first_line_after_newlines", "whole"]
"""`first_line`: the text before the first newline, so that a leading newline leaves an empty answer;
`first_line_after_newlines`: leading newlines are stripped first; `whole`: nothing is cut.
"""

CUTS: dict[CutRule, Callable[[str], str]] = {
    "first_line": lambda text: text.partition("\n")[0],
    "first_line_after_newlines": lambda text: text.lstrip("\n").partition("\n")[0],
    "whole": lambda text: text,
}


def stop_texts(rule: CutRule) -> list[str]:
    """Returns the strings at which generation can stop without changing the answer (after leading newlines)."""
    return [] if rule == "whole" else ["\n"]


def cut_figures(rule: CutRule, text: str) -> dict[str, float]:
    """Returns whether the generated text begins with a newline, and whether the answer is empty, as 0 or 1."""
    return {
        "leading_newline": float(text.startswith("\n")),
        "empty_answer": float(not CUTS[rule](text).strip()),
    }
