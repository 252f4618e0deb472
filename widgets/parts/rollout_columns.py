"""Rollouts as numeric columns and a table of distinct strings, which the inspector sends, filters, sorts and tabulates.

This module defines which rollouts are shown, and in which order; `static/rollout_data.js` does the same in the page:

- A range `[low, high]` keeps the rows with low <= value <= high. A null bound is open; the bounds of a float32 column are
  rounded to float32 first; NaN passes open ranges only.
- `text` keeps the rollouts whose text contains it, `target` those whose reference does. A text is the concatenation of its
  tokens' strings; ASCII letters are compared without case.
- Rows are sorted by one column, with NaN last and ties in original order; `row` is the original order. Then, unless the
  list is flat, the rollouts of a position are placed together, at the place of its first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.runs.schema import COLUMNS, completed
from refine_lab.validation import require
from widgets.parts.token_text import Decode, part_of, texts_of

KEYS = ("step", "sequence_id", "position")
"Columns that identify a position."
FIELDS = [column for column in COLUMNS if column.filtered or column.digits is not None]
"The columns to sort by."
RANGES = [column.name for column in FIELDS if column.filtered]
TEXTS = ("text", "target")
SORTS = ["row", *(column.name for column in FIELDS)]
MOST_ROWS, MOST_IDS = 2**21, 2**24
MOST_JOINED = 50_000
"Maximum number of rollouts in which tokens are joined to whole characters; in later ones they show their bytes."
PREFIX_TOKENS, MOST_PREFIX_TOKENS = (8, 32), 1_000_000
"Number of final prefix tokens sent, from 8 to 32, such that there are at most about a million in total."


LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def fold(text: str) -> str:
    """Converts ASCII capital letters to lower case; all other characters are kept."""
    return text.translate(LOWER)


def check_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `filters` without those that filter nothing. Raises ValueError for unknown names and invalid values."""
    if unknown := sorted(set(filters) - {*RANGES, *TEXTS}):
        raise ValueError(f"filter names must be among {', '.join((*RANGES, *TEXTS))}, got {', '.join(unknown)}")
    for name, value in filters.items():
        if name in TEXTS:
            require(isinstance(value, str), f"filter {name}", value, "a string")
        elif value is not None:
            require(_is_range(value), f"filter {name}", value, "[lowest, highest], numbers or None")
    kept = {name: value if name in TEXTS else list(value) for name, value in filters.items() if value}
    return {name: value for name, value in kept.items() if value != [None, None]}


def _is_range(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(bound is None or (isinstance(bound, (int, float)) and bound == bound) for bound in value)


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutColumns:
    """R rollouts of at most K tokens at G positions. A token is an index into `strings`; 0 means no token."""

    strings: list[
        str
    ]  # one a distinct token id, "" for none; then those of tokens that complete a character or begin one
    bases: list[int]  # of each of the latter, the string of its token alone
    tokens: np.ndarray  # [R, K] int
    targets: np.ndarray  # [G, K] int, the target
    prefixes: np.ndarray  # [G, P] int, its end, filled up on the left
    logprobs: np.ndarray  # [R, K] float32, nats, NaN where there is no token
    cosines: np.ndarray | None  # [R, K] float32
    group: np.ndarray  # [R] int32, the position's number in order of appearance
    sample_index: np.ndarray  # [R] int32
    step: np.ndarray  # [G] int32
    position: np.ndarray  # [G] int32
    sequence_id: np.ndarray  # [G] int64
    clicked: np.ndarray  # [G] bool, whether the position is there because it was clicked, not because it was selected
    numbers: dict[str, np.ndarray]  # [R] float32 each: every column of FIELDS that has digits

    def __len__(self) -> int:
        return len(self.group)

    def column(self, name: str) -> np.ndarray:
        """Returns the [R] values to filter and sort by."""
        if name == "row":
            return np.arange(len(self))
        return self.numbers[name] if name in self.numbers else getattr(self, name)[self.group]

    def base(self, index: int) -> int:
        """Returns the index that all strings of one token stand for."""
        first = len(self.strings) - len(self.bases)
        return index if index < first else self.bases[index - first]

    def text(self, ids: np.ndarray) -> str:
        return "".join(self.strings[index] for index in ids)

    @property
    def explored(self) -> bool:
        """Returns whether the rollouts belong to no run: they all have step 0 and sequence 0."""
        return len(self) > 0 and not self.step.any() and not self.sequence_id.any()

    def shown(self, filters: Mapping[str, Any], sort: tuple[str, bool], flat: bool = False) -> np.ndarray:
        """Returns the rows that pass, in display order; `sort` is a column of `SORTS` and whether the highest comes first."""
        keep = np.ones(len(self), bool)
        for name in set(RANGES) & set(filters):
            values = self.column(name)
            low, high = (_bound(bound, values) for bound in filters[name])
            keep &= (values >= low) if low is not None else True
            keep &= (values <= high) if high is not None else True
        folded = [fold(string) for string in self.strings]
        for name, table, of_row in (("text", self.tokens, slice(None)), ("target", self.targets, self.group)):
            if wanted := fold(filters.get(name, "")):
                has = np.array([wanted in "".join(folded[index] for index in ids) for ids in table.tolist()], bool)
                keep &= has[of_row]
        rows = np.flatnonzero(keep)
        column, descending = sort
        keys = self.column(column)[rows].astype(np.float64)
        rows = rows[np.argsort(-keys if descending else keys, kind="stable")]
        if flat:
            return rows
        _, first, inverse = np.unique(self.group[rows], return_index=True, return_inverse=True)
        return rows[np.argsort(first[inverse], kind="stable")]

    def examples(self, rows: np.ndarray, count: int) -> list[tuple[int, list[int]]]:
        """Returns the first `count` positions in `rows` with different references, each with all its rollouts, as (g, rows)."""
        chosen: dict[tuple[int, ...], int] = {}
        for group in dict.fromkeys(self.group[rows].tolist()):
            if len(chosen) < count:
                chosen.setdefault(tuple(map(self.base, self.targets[group].tolist())), group)
        order = np.argsort(self.sample_index, kind="stable")
        return [(group, order[self.group[order] == group].tolist()) for group in chosen.values()]

    def packed(self) -> dict[str, Any]:
        """Returns the columns as sent to the page: tables row by row as little-endian bytes."""
        kinds = dict.fromkeys(("tokens", "targets", "prefixes"), "<u2" if len(self.strings) <= 2**16 else "<u4")
        kinds |= dict.fromkeys(("group", "sample_index", "step", "position"), "<i4")
        kinds |= {"sequence_id": "<f8", "logprobs": "<f4"}
        sizes = {"rows": len(self), "groups": len(self.step)}
        sizes |= {"width": self.tokens.shape[1], "prefix": self.prefixes.shape[1]}
        return (
            sizes
            | {name: getattr(self, name).astype(kind).tobytes() for name, kind in kinds.items()}
            | {
                "strings": self.strings,
                "bases": self.bases,
                "clicked": np.flatnonzero(self.clicked).tolist(),
                "numbers": {name: values.astype("<f4").tobytes() for name, values in self.numbers.items()},
                "cosines": None if self.cosines is None else self.cosines.astype("<f4").tobytes(),
            }
        )


def _bound(bound: float | None, values: np.ndarray) -> float | None:
    if bound is None or values.dtype != np.float32:
        return bound
    with np.errstate(over="ignore"):
        return float(np.float32(bound))


def rollout_columns(frame: pd.DataFrame, decode: Decode, known: dict[int, str] | None = None) -> RolloutColumns:
    """Returns the columns of a frame of rollouts (`Run.rollouts`), decoding each distinct token once unless it is `known`.

    The frame may also have `cosines`, a list of one cosine per token, and `clicked`, whether the position was clicked.
    Raises ValueError for missing columns, ids out of range, lists whose length differs from the rollout's, rollouts of
    one position with different references, and more than 2,097,152 rows.
    """
    frame = completed(frame)
    if len(frame) > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS:,} rollouts can be shown, got {len(frame):,}; select fewer steps")
    keys = {name: _integers(frame[name], name) for name in (*KEYS, "sample_index")}
    group = pd.DataFrame({name: keys[name] for name in KEYS}).groupby([*KEYS], sort=False).ngroup().to_numpy(np.int32)
    first = np.unique(group, return_index=True)[1]
    rolled, true = (_ragged(frame[name], name, ids=True) for name in ("rollout_ids", "target_ids"))
    shortest, longest = PREFIX_TOKENS
    width = max(shortest, min(longest, MOST_PREFIX_TOKENS // max(len(first), 1)))
    before = _ragged(frame["prefix_ids"].iloc[first], "prefix_ids", ids=True, last=width)
    strings, index = _strings(np.concatenate([rolled[0], true[0], before[0]]), decode, {} if known is None else known)
    width = max([*rolled[1], *true[1]], default=0)
    tokens, targets = (_padded(index[flat], lengths, width) for flat, lengths in (rolled, true))
    if (unlike := np.flatnonzero((targets[first[group]] != targets).any(1))).size:
        where = ", ".join(f"{name} {keys[name][unlike[0]]}" for name in KEYS)
        raise ValueError(f"the rollouts of {where} have different references; they must share one")
    per_token = {}
    for name in ("logprobs", *(["cosines"] if "cosines" in frame else [])):
        values, lengths = _ragged(frame[name], name, ids=False)
        if (unlike := np.flatnonzero(lengths != rolled[1])).size:
            row, needed = unlike[0], rolled[1][unlike[0]]
            raise ValueError(f"row {row} must have {needed} values in {name}, one per token, got {lengths[row]}")
        per_token[name] = _padded(values.astype(np.float32), lengths, width, np.nan)
    frame = frame.assign(logprob=np.nansum(per_token["logprobs"], 1, dtype=np.float64))
    numbers = {c.name: frame[c.name].to_numpy(np.float32, na_value=np.nan) for c in FIELDS if c.digits is not None}
    prefixes = _padded(index[before[0]][::-1], before[1][::-1], max(before[1], default=0))[::-1, ::-1]
    ids = np.concatenate([[-1], np.flatnonzero(index)])  # the token id of each string
    targets = targets[first]
    added = _with_whole_characters(
        ids, decode, [(tokens, prefixes[group]), (targets, prefixes), (prefixes, prefixes[:, :0])]
    )
    return RolloutColumns(
        strings=[*strings, *(text for _, text in added)],
        bases=[base for base, _ in added],
        tokens=tokens,
        targets=targets,
        prefixes=prefixes,
        logprobs=per_token["logprobs"],
        cosines=per_token.get("cosines"),
        group=group,
        clicked=frame["clicked"].to_numpy(bool)[first] if "clicked" in frame else np.zeros(len(first), bool),
        sample_index=keys["sample_index"].astype(np.int32),
        **{name: keys[name][first] for name in KEYS},
        numbers=numbers,
    )


def _integers(column: pd.Series, name: str) -> np.ndarray:
    if len(column) and not pd.api.types.is_integer_dtype(column):
        raise ValueError(f"column {name} must contain whole numbers, got {column.iloc[0]}")
    return column.to_numpy(np.int64)


def _ragged(column: pd.Series, name: str, *, ids: bool, last: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the lists of a column, only their `last` values if it is not 0, and returns them with the lists' lengths."""
    try:
        lists = [values[-last:] for values in column] if last else column.tolist()
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        flat = np.concatenate([values for values in lists if len(values)] or [np.zeros(0, np.int64)])
        if flat.ndim != 1 or flat.dtype.kind not in ("iu" if ids else "iuf"):
            raise TypeError
    except (TypeError, ValueError):
        kind = "whole numbers" if ids else "numbers"
        raise ValueError(f"column {name} must contain a list of {kind} in every row") from None
    if ids and flat.size and not 0 <= flat.min() <= flat.max() < MOST_IDS:
        raise ValueError(f"{name} must be from 0 to {MOST_IDS - 1:,}, got {flat.min()} to {flat.max()}")
    return flat, lengths


def _padded(flat: np.ndarray, lengths: np.ndarray, width: int, fill: float = 0) -> np.ndarray:
    table = np.full((len(lengths), width), fill, flat.dtype)
    table[np.arange(width) < lengths[:, None]] = flat
    return table


def _strings(ids: np.ndarray, decode: Decode, known: dict[int, str]) -> tuple[list[str], np.ndarray]:
    """Returns the strings of the distinct tokens after an empty one, and the map from token ids to their indices."""
    seen = np.zeros(int(ids.max(initial=-1)) + 1, bool)
    seen[ids] = True
    distinct = np.flatnonzero(seen).tolist()
    for token in distinct:
        if token not in known:
            text = decode([token]) or f"<{token}>"
            known[token] = text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates cannot be sent
    return ["", *(known[token] for token in distinct)], np.cumsum(seen) * seen


def _with_whole_characters(
    ids: np.ndarray, decode: Decode, tables: list[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[int, str]]:
    """Gives tokens that hold parts of characters, in place, the strings that they have after the tokens before them.

    A character then belongs to the token that completes it (see `texts_of`). `tables` are tables of indices, each with the
    prefixes of its rows; `ids` are the tokens' ids by index. Returns the added strings, each with its token's index. In a
    table, only the first `MOST_JOINED` such rows are changed.
    """
    partial = np.array([False, *(part_of(decode, int(token)) is not None for token in ids[1:])])
    texts: dict[tuple[int, ...], list[str]] = {}  # by run of such tokens; the tokens around a run do not change them
    added: dict[tuple[int, str], int] = {}
    for table, before in tables if partial.any() else []:
        rows, width = np.flatnonzero(partial[table].any(1))[:MOST_JOINED], before.shape[1]
        joined = np.hstack([before[rows], table[rows]])
        for row, begin, end in _runs(partial[joined]):
            run = tuple(joined[row, begin:end].tolist())
            if run not in texts:
                texts[run] = texts_of(decode, ids[[*run]].tolist())
            for place in range(max(begin, width), end):
                index, text = run[place - begin], texts[run][place - begin]
                table[rows[row], place - width] = added.setdefault((index, text), len(ids) + len(added))
    return [*added]


def _runs(marked: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns the row, begin and end of each run of marked places in a table."""
    edges = np.diff(np.pad(marked, ((0, 0), (1, 1))).astype(np.int8))
    (rows, begins), ends = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    return [*zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True)]
