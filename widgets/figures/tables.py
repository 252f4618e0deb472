"""Tables as HTML and text, and the table of rollouts with their references. Model text is data, never markup."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from widgets.core.glossary import explain

WHITE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
HIDDEN = ("Cc", "Cf", "Zl", "Zp")
"""Unicode categories of control characters, which include marks that change the writing direction."""


CELL = "text-align: left; padding: 0.15em 1em 0.15em 0"
"""Style of every cell: a page with other distances, such as that of an ipywidgets.HTML, would hide rows of a table."""
NOTE = "line-height: 1.4; max-width: 72em; margin: 0.4em 0"
"""Style of the sentence below a table."""


class Table:
    """A data frame as an HTML table in which every cell is text, and as plain text where HTML is not supported.

    `monospace` names the columns of model text; numbers are displayed with `digits` decimals. `note` is a sentence below.
    `helps` are tooltips of columns that the glossary does not have.
    """

    def __init__(
        self,
        data: pd.DataFrame,
        caption: str,
        *,
        monospace: Sequence[str] = (),
        digits: int = 3,
        note: str = "",
        helps: Mapping[str, str] | None = None,
    ) -> None:
        self.data, self.caption, self.note = data, caption, note
        self._helps = dict(helps or {})
        self._monospace, self._digits = set(monospace), digits

    def __repr__(self) -> str:
        rows = self.data.to_string(index=False, float_format=f"{{:.{self._digits}f}}".format)
        return f"{self.caption}\n{rows}" + (f"\n{self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        head = "".join(map(self._heading, map(str, self.data)))
        rows = ("".join(map(self._cell, map(str, self.data), row)) for row in self.data.itertuples(index=False))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        caption = f"<caption style='text-align: left; font-weight: 600'>{html.escape(self.caption)}</caption>"
        note = f"<p style='{NOTE}'>{html.escape(self.note)}</p>" if self.note else ""
        return f"<table style='line-height: 1.4'>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"

    def help_of(self, column: str) -> str:
        """Returns the tooltip of a column; empty if it has none."""
        return self._helps.get(column) or explain(column)

    def _heading(self, name: str) -> str:
        about = html.escape(self.help_of(name), quote=True)
        return f"<th style='{CELL}'" + (f' title="{about}"' if about else "") + f">{html.escape(name)}</th>"

    def _cell(self, column: str, value: object) -> str:
        text = f"{value:.{self._digits}f}" if isinstance(value, float) else str(value)
        font = "; font-family: monospace" if column in self._monospace else ""
        style = f"{CELL}; white-space: pre-wrap{font}"
        return f"<td style='{style}'>{html.escape(text)}</td>"


def visible(text: str) -> str:
    """Returns `text` on one line with visible line ends, tabs, control characters, and leading, trailing or repeated spaces."""
    spaced = re.sub(r"^ +| +$| {2,}", lambda match: "·" * len(match.group()), text)
    return "".join(WHITE.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in HIDDEN else c) for c in spaced)


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
    ranked = ranked.assign(target=ranked["target_ids"].map(tuple), rollout=ranked["rollout_ids"].map(tuple))
    ranked = ranked.drop_duplicates(["target", "rollout"]).reset_index(drop=True)
    best = ranked.head(count)
    worst = ranked.drop(best.index).tail(count)  # before the middle, which takes from the remaining rows
    rest = ranked.drop([*best.index, *worst.index])
    near = rest[rest["target"] != rest["rollout"]].head(count)
    chosen = pd.concat({"best": best, "best without exact match": near, "worst": worst}, names=["rollouts"])
    several = [name for name in ("method", "seed") if name in rollouts and rollouts[name].nunique() > 1]

    def texts(name: str, last: int = 0) -> list[str]:
        return [visible(decode([int(token) for token in ids[-last:]])) for ids in chosen[name]]

    table = chosen.reset_index("rollouts")[["rollouts", *several, "step", "position"]].assign(
        prefix=["…" + text for text in texts("prefix_ids", prefix_tokens)],
        reference=texts("target_ids"),
        rollout=texts("rollout_ids"),
        **{name: chosen[name].to_numpy(float) for name in ("cosine", "binary", "reward") if name in chosen},
    )
    caption = f"Best and worst of {len(rollouts):,} rollouts by reward, with their references (Table F.1)"
    return Table(table, caption, monospace=["prefix", "reference", "rollout"])
