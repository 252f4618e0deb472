"""The answers of a run, stored in completed Parquet files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from refine_lab.runs.files import cut_parts, parquet_parts, read_parquet, write_parquet

COLUMNS = {
    "name": pa.string(),
    "method": pa.string(),
    "seed": pa.int64(),
    "prompt_tokens": pa.int32(),
    "cut": pa.int32(),
    "question": pa.string(),
    "references": pa.list_(pa.string()),
    "answer": pa.string(),
    "exact_match": pa.float32(),
    "contains_answer": pa.float32(),
    "f1": pa.float32(),
    "seconds": pa.float64(),
}
"""Columns of a row, one row per example; further columns may follow."""

RENAMED_COLUMNS = {"way": "method", "recall": "contains_answer"}
"""Columns of older files and their present names."""


class AnswerLog:
    """The answers of one method and seed in a folder of closed parquet files, `<first>-<last>.parquet` by row, from 0.

    A file is written under a temporary name and renamed, so that readers never see a partial file. A damaged file is
    skipped with a warning: its examples count as unanswered, and other files are unaffected.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def done(self) -> frozenset[str]:
        """Returns the names of the answered examples."""
        return frozenset(name for table in self._tables(["name"]) for name in table["name"].to_pylist())

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows as one file; each has the columns `COLUMNS`, and any others.

        Raises ValueError if a row lacks a column, or holds a value of the wrong type.
        """
        if not rows:
            return
        for row in rows:
            if missing := [name for name in COLUMNS if name not in row]:
                raise ValueError(f"an answer must have the columns {', '.join(COLUMNS)}; {missing[0]!r} is missing")
        types = {**COLUMNS, **{name: None for name in rows[0] if name not in COLUMNS}}  # None: inferred
        try:
            table = pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()})
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"an answer contains a value whose type does not match its column: {error}") from None
        first = self.rows
        write_parquet(self.folder / f"{first}-{first + len(rows) - 1}.parquet", table)

    def read(self) -> pd.DataFrame:
        """Returns one row per answer, in the order written; if an example was answered twice, the last answer."""
        tables = list(self._tables()) or [pa.schema(list(COLUMNS.items())).empty_table()]
        rows = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        return rows.drop_duplicates("name", keep="last").reset_index(drop=True)

    def cut(self, count: int) -> None:
        """Keeps only the first `count` rows written, for a run that resumes from an earlier checkpoint."""

        def kept(first: int, path: Path) -> pa.Table | None:
            table = _table(path)
            return None if table is None else table.slice(0, count - first)

        cut_parts(self.folder, count - 1, kept)

    @property
    def rows(self) -> int:
        """Returns the number of rows written so far, for a later `cut`."""
        return max((last for _, last, _ in parquet_parts(self.folder)), default=-1) + 1

    def _tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        tables = (_table(path, columns) for _, _, path in parquet_parts(self.folder))
        return (table for table in tables if table is not None)


def _table(path: Path, columns: list[str] | None = None) -> pa.Table | None:
    """Returns the content of a file; None, with a warning, if it is damaged."""
    try:
        table = read_parquet(path, columns)
        return table.rename_columns([RENAMED_COLUMNS.get(name, name) for name in table.column_names])
    except (pa.ArrowException, OSError) as error:
        warnings.warn(f"{path} is damaged; its answers are treated as missing: {error}", stacklevel=2)
        return None
