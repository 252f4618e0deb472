"""Pairs of rollouts from the same prefix, token by token below the reference, with differing tokens marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import traitlets

from refine_lab.text import shorten
from widgets.core.base import Widget
from widgets.core.packing import PACKED
from widgets.figures.tables import visible
from widgets.parts.token_text import texts_of

MOST_PAIRS = 200
"""Maximum number of pairs on a page; Python has all of them."""
PREFIX_TOKENS = 12
"""Number of final prefix tokens that are shown."""
LONGEST = 40
"""Maximum number of characters of a token that are shown."""
PART = "…"
"""Text of a token that holds the beginning of a character which a later token completes."""
Strings = Callable[[Sequence[int]], str]


class RolloutPairs(Widget):
    """Rollouts of A and B in pairs, grouped by prefix below the reference."""

    content = traitlets.Dict().tag(**PACKED)
    "The heading, the summary and the groups that are shown, packed; empty without pairs."
    hint = traitlets.Unicode("select a token of the document").tag(sync=True)
    "How a person gets rollouts, shown while there are none."

    def __init__(self, **options: Any) -> None:
        self.pairs = pd.DataFrame()
        super().__init__(**options)

    def show(self, pairs: pd.DataFrame, string: Strings, title: str, names: Sequence[str] = ("A", "B")) -> None:
        """Shows pairs as `rollout_pairs.pair_rollouts` returns them; `string` maps one token id, in a list, to its text.

        `title` says whose rollouts these are, and `names` are the short names of both sides. A frame without rows empties
        the view.
        """
        self.pairs = pairs
        if pairs.empty:
            self.content = {}
            return
        shown = pairs.head(MOST_PAIRS)
        groups = shown.groupby(["sequence_id_a", "sequence_id_b", "position"], sort=False)
        self.content = {
            "title": title,
            "summary": summary(pairs, names),
            "names": [*names],
            "groups": [_group(rows, string) for _, rows in groups],
        }

    def __repr__(self) -> str:
        if self.pairs.empty:
            return "RolloutPairs: no rollouts"
        lines = [f"{self.content['title']}: {self.content['summary']}"]
        one, other = self.content["names"]
        for group in self.content["groups"][:2]:
            lines += [f"{group['place']}: …{group['prefix']}", f"  reference  {' | '.join(group['reference'])}"]
            for row in group["rows"]:
                tokens = [f"*{text}*" if mark else text for text, mark in zip(row["b"], row["changed"], strict=False)]
                lines.append(f"  #{row['index']} {one:>8}  {' | '.join(row['a'])}")
                lines.append(f"  #{row['index']} {other:>8}  {' | '.join(tokens)}")
        return "\n".join(lines)


def summary(pairs: pd.DataFrame, names: Sequence[str]) -> str:
    """Returns one sentence: how many pairs are equal, and the exact-match rate and mean reward of both sides."""
    equal, count = int((~pairs["changed"].map(any)).sum()), len(pairs)
    before = pairs["same"].mean()
    numbers = [
        f"{label} {pairs[f'{name}_a'].mean():.3f} ({names[0]}) and {pairs[f'{name}_b'].mean():.3f} ({names[1]})"
        for label, name in (("exact-match rate", "binary"), ("mean reward", "reward"))
    ]
    pair = "pairs are" if count != 1 else "pair is"
    first = f"{equal:,} of {count:,} {pair} equal, on average {before:.1f} tokens before the first difference"
    return f"{first}; {', '.join(numbers)}."


def _group(rows: pd.DataFrame, string: Strings) -> dict[str, Any]:
    first = rows.iloc[0]
    side = (first["sequence_id_a"], first["sequence_id_b"])
    where = "" if side == (0, 0) else f", sequence {side[0]}" + (f" and {side[1]}" if side[0] != side[1] else "")
    before = list(first["prefix_ids"])[-PREFIX_TOKENS:]
    return {
        "place": f"Position {first['position']:,}{where}",
        "prefix": visible("".join(texts_of(string, before))),
        "reference": _texts(before, first["target_ids"], string),
        "rows": [_row(row, before, string) for row in rows.to_dict("records")],
    }


def _row(row: Mapping[Any, Any], before: Sequence[int], string: Strings) -> dict[str, Any]:
    target = list(row["target_ids"])
    found: dict[str, Any] = {
        "index": int(row["sample_index"]),
        "changed": list(row["changed"]),
        "same": int(row["same"]),
    }
    for side in ("a", "b"):
        ids = list(row[f"rollout_ids_{side}"])
        found[side] = _texts(before, ids, string)
        found[f"match_{side}"] = [bool(x == y) for x, y in zip(ids, target, strict=False)]
        found[f"numbers_{side}"] = [float(row[f"{name}_{side}"]) for name in ("logprob", "binary", "reward")]
    return found


def _texts(before: Sequence[int], ids: Sequence[int], string: Strings) -> list[str]:
    """Returns the text of each token after those `before`, which may have begun its first character."""
    texts = texts_of(string, [*before, *ids])[len(before) :]
    return [shorten(visible(text), LONGEST) if text else PART for text in texts]
