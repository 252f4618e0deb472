"""Different items of a test: prompts with the same question count once, and a table of few items warns."""

from __future__ import annotations

import pandas as pd

FEWEST_ITEMS = 100
"""Number of different items below which a table warns."""


def items_of(answers: pd.DataFrame) -> pd.Series:
    """Returns the item of each answer: the text of its question, or the prompt's name if no question was found.

    Two prompts with the same question have different documents, but the same words decide whether they are hard, so that
    they are not independent.
    """
    asked = answers["question"].fillna("").str.strip()
    return asked.where(asked != "", answers["name"])


def few_items(count: int | None, items: str = "questions") -> str:
    """Returns a sentence that warns of fewer than `FEWEST_ITEMS` different items, or an empty text."""
    if count is None or count >= FEWEST_ITEMS:
        return ""
    return (
        f"There are only {count} different {items}, fewer than {FEWEST_ITEMS}: with other {items} the results may differ, "
        "and intervals over seeds do not include that."
    )
