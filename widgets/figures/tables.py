"""Tables as HTML and text, and the table of rollouts with their references. Model text is data, never markup."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence

import pandas as pd

WHITE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


class Table:
    """A data frame as an HTML table in which every cell is text, and as plain text where HTML is not supported.

    `monospace` names the columns of model text; numbers are displayed with `digits` decimals.
    """

    def __init__(self, data: pd.DataFrame, caption: str, *, monospace: Sequence[str] = (), digits: int = 3) -> None:
        self.data, self.caption = data, caption
        self._monospace, self._digits = set(monospace), digits

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.data.to_string(index=False, float_format=f'{{:.{self._digits}f}}'.format)}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align: left'>{html.escape(str(name))}</th>" for name in self.data)
        rows = ("".join(map(self._cell, map(str, self.data), row)) for row in self.data.itertuples(index=False))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        caption = f"<caption style='text-align: left; font-weight: 600'>{html.escape(self.caption)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cell(self, column: str, value: object) -> str:
        text = f"{value:.{self._digits}f}" if isinstance(value, float) else str(value)
        is_text = column in self._monospace
        style = "text-align: left; white-space: pre-wrap" + ("; font-family: monospace" if is_text else "")
        return f"<td style='{style}'>{html.escape(text)}</td>"


def visible(text: str) -> str:
    """Returns `text` on one line with visible line ends, tabs, control characters, and leading, trailing or repeated spaces."""
    spaced = re.sub(r"^ +| +$| {2,}", lambda match: "·" * len(match.group()), text)
    return "".join(_shown(character) for character in spaced)


def _shown(character: str) -> str:
    if character in WHITE:
        return WHITE[character]
    hidden = unicodedata.category(character) in (
        "Cc",
        "Cf",
        "Zl",
        "Zp",
    )  # among them marks that turn the writing direction
    return f"\\u{ord(character):04x}" if hidden else character


def rollout_table(
    rollouts: pd.DataFrame, decode: Callable[[Sequence[int]], str], *, count: int = 4, prefix_tokens: int = 12
) -> Table:
    """Tabulates the best rollouts, the best that differ from the reference, and the worst, with rewards (paper, table F.1).

    `rollouts` is a frame of `rollouts/*.parquet`; `decode` converts token ids to text; `count` is the number of rows of
    each kind, without repeated pairs of reference and rollout. Method and seed are included if there are several. Raises
    ValueError if there are no rollouts.
    """
    if rollouts.empty:
        raise ValueError("figure rollout_table has no data: there are no rollouts")
    ranked = rollouts.sort_values("reward", ascending=False, kind="stable")
    ranked = ranked.assign(target=ranked["target_ids"].map(tuple), told=ranked["rollout_ids"].map(tuple))
    ranked = ranked.drop_duplicates(["target", "told"]).reset_index(drop=True)
    best = ranked.head(count)
    worst = ranked.drop(best.index).tail(count)  # before the middle, which takes of what is left where there are few
    rest = ranked.drop([*best.index, *worst.index])
    near = rest[rest["target"] != rest["told"]].head(count)
    parts = {"best": best, "best without exact match": near, "worst": worst}
    several = [name for name in ("method", "seed") if name in rollouts and rollouts[name].nunique() > 1]
    rows = [
        _rollout_row(kind, row, decode, prefix_tokens, several)
        for kind, part in parts.items()
        for _, row in part.iterrows()
    ]
    caption = f"Best and worst of {len(rollouts):,} rollouts by reward, with their references (Table F.1)"
    return Table(pd.DataFrame(rows), caption, monospace=["prefix", "reference", "rollout"])


def _rollout_row(
    kind: str, row: pd.Series, decode: Callable[[Sequence[int]], str], prefix_tokens: int, several: Sequence[str]
) -> dict[str, object]:
    def text(name: str) -> list[int]:
        return [int(token) for token in row[name]]

    numbers = {name: float(row[name]) for name in ("cosine", "binary", "reward") if name in row}
    return {
        "rollouts": kind,
        **{"method" if name == "method" else name: row[name] for name in several},
        "step": int(row["step"]),
        "position": int(row["position"]),
        "prefix": "…" + visible(decode(text("prefix_ids")[-prefix_tokens:])),
        "reference": visible(decode(text("target_ids"))),
        "rollout": visible(decode(text("rollout_ids"))),
        **numbers,
    }
