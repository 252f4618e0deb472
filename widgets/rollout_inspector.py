"""The rollout inspector: rollouts and their references token by token, with sorting, filters, comparison and table F.1."""

from __future__ import annotations

import json
from collections.abc import Collection
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import traitlets

from refine_lab.explore.saved import parquet_bytes
from refine_lab.runs.run import Run
from refine_lab.runs.schema import ROLLOUT_TYPES, completed
from refine_lab.validation import require
from widgets.core.base import Widget, bounded, guarded
from widgets.core.packing import PACKED
from widgets.figures.tables import Table, visible
from widgets.parts.rollout_columns import FIELDS, KEYS, SORTS, check_filters, rollout_columns
from widgets.parts.token_text import token_decoder

MOST_COMPARED = 8
SENT = ("name", "label", "unit", "digits", "about", "shared", "filtered", "heading", "look")
"Attributes of a column that the page receives."
EXAMPLES, SAMPLES = 6, 4
"Positions, and rollouts per position, in the paper's table F.1."
CAPTION = (
    "Cosine reward of rollouts and the reference (Table F.1); "
    "★ marks the rollout with the highest cosine reward in each example"
)
MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|~$&#!"})


class TableF1(Table):
    """Table F.1: the reference GT and rollouts of some positions, from P1 on, with their cosine rewards."""

    def markdown(self) -> str:
        """Returns the table in Markdown; model text is escaped, so that none of it acts as markup."""
        lines = ["| Example | Type | Text | Cosine reward |", "|---|---|---|---|"]
        for example, kind, text, cosine, best in self.data.itertuples(index=False):
            value = "–" if isinstance(cosine, str) else decimal(cosine)
            value = f"**{value}** {best}" if best else value
            lines.append(f"| {example} | {kind} | {text.translate(MARKS)} | {value} |")
        return "\n".join(lines) + "\n"


def _keys(rollouts: pd.DataFrame) -> list[tuple[int, ...]]:
    """Returns the key that identifies each rollout."""
    return list(zip(*(rollouts[name].tolist() for name in (*KEYS, "sample_index")), strict=True))


def decimal(value: float) -> str:
    """Formats three decimals, rounding ties away from zero as in the page."""
    return str(Decimal(float(value) + 0.0).quantize(Decimal("0.001"), ROUND_HALF_UP))


class RolloutInspector(Widget):
    """A list of rollouts grouped by position below their reference, with per-token and per-rollout rewards.

    `rollouts`: a frame of `Run.rollouts`, one row per rollout, optionally with `cosines` (a list of one cosine per
    token); `decode`: a function from token ids to text, or a tokenizer. Raises ValueError as `rollout_columns` does.
    """

    page_heading = "Rollouts"

    columns = traitlets.Dict().tag(**PACKED)
    "The displayed data, as returned by `RolloutColumns.packed`."
    fields = traitlets.List([{name: getattr(column, name) for name in SENT} for column in FIELDS]).tag(sync=True)
    "The columns that the page lists, sorts and filters by, as `runs.schema.COLUMNS` specifies them."
    selected = traitlets.Int(-1).tag(sync=True)
    "Row of the frame shown in detail, or -1."
    compared = traitlets.List(traitlets.Int()).tag(sync=True)
    "Rows pinned for comparison, at most 8."
    sort = traitlets.Tuple(traitlets.Unicode(), traitlets.Bool(), default_value=("row", False)).tag(sync=True)
    "A column of `rollout_columns.SORTS`, and whether the highest comes first."
    flat = traitlets.Bool(False).tag(sync=True)
    "Whether the rollouts of all positions are listed together by `sort`, not position by position."
    token = traitlets.Int(-1).tag(sync=True)
    "A token of the document; setting it filters for the rollouts that begin there. -1 and 0 change nothing."
    filters = traitlets.Dict().tag(sync=True)
    "`step`, `position`, `entropy` and `reward` as [lowest, highest], `text` and `target` as substrings; see `rollout_columns`."

    def __init__(self, rollouts: pd.DataFrame | None = None, *, decode: Any) -> None:
        self._decode = token_decoder(decode)
        self._known: dict[int, str] = {}
        self._frame = completed(pd.DataFrame(columns=["step", *ROLLOUT_TYPES]) if rollouts is None else rollouts)
        self._table = rollout_columns(self._frame, self._decode, self._known)
        super().__init__(columns=self._table.packed())
        self.origin: dict[str, Any] = {}
        "The model and the settings of the rollouts, which a download as Parquet includes."
        self.on_msg(self._on_message)

    @classmethod
    def of_run(cls, run: Run | Path | str, tokenizer: Any, steps: Collection[int] | None = None) -> RolloutInspector:
        """Returns an inspector of the rollouts that a run has written so far, for some steps or all."""
        run = run if isinstance(run, Run) else Run(run)
        return cls(run.rollouts(steps), decode=tokenizer)

    @property
    def rollouts(self) -> pd.DataFrame:
        """Returns the displayed frame."""
        return self._frame

    def show(self, rollouts: pd.DataFrame, *, keep: bool = False) -> None:
        """Shows another frame. With `keep`, filters, selected and pinned rollouts are kept as far as the frame contains them.

        A rollout is identified by step, sequence, position and sample index. Use `keep` if the same rollouts get other
        numbers, as after a change of reward, or if some are added. The sort order is always kept.
        """
        rollouts = completed(rollouts)
        table = rollout_columns(rollouts, self._decode, self._known)
        with self.hold_sync():  # one message: the page never sees the selection of one frame with the rows of another
            there = {key: row for row, key in enumerate(_keys(rollouts))} if keep else {}
            moved = {row: there[key] for row, key in enumerate(_keys(self._frame)) if key in there}
            selected, compared = moved.get(self.selected, -1), [moved[row] for row in self.compared if row in moved]
            self.selected, self.compared = -1, []
            self._frame, self._table = rollouts, table
            self.columns = table.packed()
            self.filters = self.filters if keep else {}
            self.selected, self.compared = selected, compared

    def _rows(self) -> np.ndarray:
        return self._table.shown(self.filters, self.sort, self.flat)

    @property
    def passing(self) -> np.ndarray:
        """Returns [R] bool: whether each row of the frame passes the filters."""
        passing = np.zeros(len(self._table), bool)
        passing[self._rows()] = True
        return passing

    def filtered(self) -> pd.DataFrame:
        """Returns the rows that the page shows, in its order; the index is the row in the frame."""
        rows = self._rows()
        return self._frame.iloc[rows].set_axis(rows, axis=0)

    def download(self, kind: str) -> bytes:
        """Returns the filtered rollouts as a file, `csv` or `parquet`, in the order of the list.

        The Parquet file has the columns of a run's rollouts (`refine_lab.explore.saved`). The CSV file has the texts of
        rollout and reference as well, and its lists are JSON.
        """
        require(kind in ("csv", "parquet"), "kind", kind, "'csv' or 'parquet'")
        frame = self.filtered()
        if kind == "parquet":
            return parquet_bytes(frame, self.origin)
        table, rows = self._table, frame.index.to_numpy()
        texts = {"rollout": table.tokens[rows], "reference": table.targets[table.group[rows]]}
        frame = frame.assign(**{name: [table.text(ids) for ids in tokens] for name, tokens in texts.items()})
        lists = [name for name in frame if len(frame) and isinstance(frame[name].iloc[0], (list, np.ndarray))]
        frame = frame.assign(**{name: [json.dumps(np.asarray(v).tolist()) for v in frame[name]] for name in lists})
        return frame.to_csv(index=False).encode("utf-8", "backslashreplace")

    @guarded
    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if "download" in content:
            kind = str(content["download"])
            self.send({"file": f"rollouts.{kind}"}, [self.download(kind)])

    def table_f1(self, examples: int = EXAMPLES, samples: int = SAMPLES) -> TableF1:
        """Returns the first positions with different references, and their rollouts, in the format of the paper's table F.1.

        For each position, the first `samples` rollouts are listed, as well as the one with the position's highest
        cosine reward, marked by a star. P7 is the seventh rollout of its position. Raises ValueError if nothing is
        shown, and for less than one example or rollout.
        """
        for name, value in (("examples", examples), ("samples", samples)):
            require(value >= 1, name, value, "at least 1")
        rows, cosine = self._rows(), self._table.numbers["cosine"]
        if not len(rows):
            raise ValueError("figure table_f1 has no data: no rollout is shown")
        lines = []
        for number, (group, members) in enumerate(self._table.examples(rows, examples), 1):
            finite = [row for row in members if np.isfinite(cosine[row])]
            best = max(finite, key=lambda row: cosine[row]) if len(finite) > 1 else -1
            lines.append((f"Ex. {number}", "GT", self._table.text(self._table.targets[group]), "–", ""))
            for place, row in enumerate(members, 1):
                if place <= samples or row == best:
                    value = float(cosine[row]) if row in finite else "–"
                    text = self._table.text(self._table.tokens[row])
                    lines.append(("", f"P{place}", text, value, "★" if row == best else ""))
        frame = pd.DataFrame(lines, columns=["example", "type", "text", "cosine reward", "best"])
        return TableF1(frame.assign(text=frame["text"].map(visible)), CAPTION, monospace=["text"])

    _check_selected = bounded("selected", lambda self: (-1, len(self._table) - 1))

    @traitlets.validate("compared")
    def _check_compared(self, proposal: Any) -> list[int]:
        pinned, rows = list(dict.fromkeys(proposal["value"])), len(self._table)
        for row in pinned:
            require(0 <= row < rows, "a compared row", row, f"from 0 to {rows - 1}")
        require(len(pinned) <= MOST_COMPARED, "the number of rows compared", len(pinned), f"at most {MOST_COMPARED}")
        return pinned

    @traitlets.validate("sort")
    def _check_sort(self, proposal: Any) -> tuple[str, bool]:
        require(proposal["value"][0] in SORTS, "sort", proposal["value"][0], f"one of {', '.join(SORTS)}")
        return proposal["value"]

    @traitlets.validate("filters")
    def _check_filters(self, proposal: Any) -> dict[str, Any]:
        return check_filters(proposal["value"])

    @traitlets.observe("token")
    def _filter_for_token(self, change: Any) -> None:
        if change["new"] > 0:
            self.filters = {**self.filters, "position": [change["new"] - 1] * 2}

    def __repr__(self) -> str:
        """Counts the rollouts and lists the first positions, the reference above its rollouts."""
        table = getattr(self, "_table", None)
        if table is None or not len(table):
            return "RolloutInspector: no rollouts"
        rows, (column, descending) = self._rows(), self.sort
        order = (
            f"by {column}, {'highest' if descending else 'lowest'} first" if column != "row" else "in original order"
        )
        order += ", all positions together" if self.flat else ""
        positions = f"{len(np.unique(table.group[rows])):,} of {len(table.step):,} positions"
        lines = [f"RolloutInspector: {len(rows):,} of {len(table):,} rollouts at {positions}, {order}"]
        groups = dict.fromkeys(table.group[rows[:200]].tolist())
        for group in [*groups][:4]:
            where = f"position {table.position[group]}"
            if not table.explored:
                where = f"step {table.step[group]}, sequence {table.sequence_id[group]}, {where}"
            where += ", clicked" if table.clicked[group] else ""
            lines += [where, "  reference            " + self._cells(table.targets[group])]
            for row in [row for row in rows[:200].tolist() if table.group[row] == group][:3]:
                reward, advantage = (table.numbers[name][row] for name in ("reward", "advantage"))
                lines.append(f"  {reward:7.3f} ({advantage:+.2f}) {row:>5d}  " + self._cells(table.tokens[row]))
        return "\n".join(lines)

    def _cells(self, ids: np.ndarray) -> str:
        return "|".join((visible(self._table.strings[index])[:16] or "…") for index in ids[:12] if index)
