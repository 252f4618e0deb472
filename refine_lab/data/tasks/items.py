"""Distinct items of a test: prompts with the same question count once, and tables with few items show a warning."""

from __future__ import annotations

import pandas as pd

FEWEST_ITEMS = 100
"""Number of distinct items below which a table shows a warning."""


def items_of(answers: pd.DataFrame) -> pd.Series:
    """Returns the item of each answer: the text of its question, or the prompt's name if no question was found.

        Two prompts with the same question have different documents, but they are hard or easy for the same reason, so they
    are not independent.
    """
    asked = answers["question"].fillna("").str.strip()
    return asked.where(asked != "", answers["name"])


def few_items(count: int | None, items: str = "questions") -> str:
    """Returns a sentence that warns of fewer than `FEWEST_ITEMS` distinct items, or an empty string."""
    if count is None or count >= FEWEST_ITEMS:
        return ""
    return (
        f"There are only {count} distinct {items}, fewer than {FEWEST_ITEMS}: with other {items} the results may differ, "
        "and intervals over seeds do not account for this."
    )
