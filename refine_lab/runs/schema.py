"""The single specification of the rollout columns, which training, readers and pages all follow.

To add a column, add it to `COLUMNS` with the next format version in `since` and the value for rollouts of older files
in `older`, and compute it in `refine_lab.training.trainer.rollout_rows`. The inspector, its filters and its offline
pages then show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from refine_lab.runs.files import cut_parts, read_parquet, write_parquet


@dataclass(frozen=True)
class Column:
    """A column of rollouts: how it is stored, and how pages show it."""

    name: str
    dtype: pa.DataType | None
    "Type in the file; None for a number that `widgets.parts.rollout_columns` computes and no file holds."
    label: str = ""
    "The column's name for readers."
    unit: str = ""
    digits: int | None = None
    "Decimals of a number that pages list and sort by; None for other columns."
    about: str = ""
    "Description in the tooltip of the column's header."
    shared: bool = False
    "Whether all rollouts of a position have the same value."
    filtered: bool = False
    "Whether the inspector has a range filter for it."
    heading: str = ""
    "A longer name than `label`, for pages with enough room."
    look: Literal["number", "best", "bar"] = "number"
    "`best`: each position's maximum is bold, and the histogram shows this column. `bar`: a bar to the left or right of 0."
    since: int = 1
    "The format version that introduced the column."
    older: Any = None
    "The value for rollouts in files of earlier versions."
    formerly: str = ""
    "The column's name in files of earlier versions."


IDS, INT32, FLOAT32 = pa.list_(pa.int32()), pa.int32(), pa.float32()

COLUMNS = (
    Column("step", INT32, "step", shared=True, filtered=True),
    Column("sequence_id", pa.int64(), "sequence", shared=True),
    Column("position", INT32, "position", shared=True, filtered=True),
    Column("sample_index", INT32, "sample index at this position", formerly="member"),
    Column("prefix_ids", IDS, "prefix", shared=True),
    Column("rollout_ids", IDS, "rollout"),
    Column("target_ids", IDS, "reference", shared=True),
    Column("logprobs", pa.list_(FLOAT32), "log p of each token", "nats"),
    Column("entropy", FLOAT32, "entropy", "nats", 3, "Entropy of the policy at the position", shared=True, filtered=True),
    Column("reward", FLOAT32, "reward", "", 3, "Training reward; bold: the highest at its position",
           filtered=True, look="best"),
    Column("advantage", FLOAT32, "advantage", "", 2, "Advantage, with a bar from 0", look="bar"),
    Column("cosine", FLOAT32, "cosine", "", 3, "Cosine similarity with the hidden states of the reference"),
    Column("binary", FLOAT32, "match", "", 2, "Exact-match rate: fraction of tokens that equal the reference",
           heading="exact-match rate"),
    Column("logprob", None, "log p", "nats", 2, "Sum of the tokens' logprobs, nats"),
)  # fmt: skip
"""The columns in the order of the file; pages list the numbers of a rollout in this order."""

FORMAT_VERSION = max(column.since for column in COLUMNS)
"""Version of the files in `rollouts/`, stored in each file's metadata. A file without it is of version 1."""
ROLLOUT_TYPES = {column.name: column.dtype for column in COLUMNS if column.dtype is not None and column.name != "step"}
"""The columns in which a step's rollouts are passed; in the file, `step` precedes them."""
VERSION_KEY = b"rollouts_format"


def write_rollouts(folder: Path, batches: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """Writes the rollouts of some steps, with a column for each name in `ROLLOUT_TYPES`, as `<first>-<last>.parquet`."""
    schema = pa.schema({"step": INT32, **ROLLOUT_TYPES}, metadata={VERSION_KEY: str(FORMAT_VERSION)})
    tables = []
    for step, rows in batches:
        columns = {name: rows[name].tolist() if hasattr(rows[name], "tolist") else rows[name] for name in ROLLOUT_TYPES}
        tables.append(pa.table({"step": [step] * len(columns["position"]), **columns}, schema=schema))
    write_parquet(folder / f"{batches[0][0]}-{batches[-1][0]}.parquet", pa.concat_tables(tables))


def read_rollouts(path: Path) -> pd.DataFrame:
    """Returns the rollouts of one file, one per row. Columns newer than the file are filled in; unknown ones are kept.

    Raises ValueError for a file that is not parquet, or that lacks a column of its own format version.
    """
    try:
        table = read_parquet(path)
        version = int((table.schema.metadata or {}).get(VERSION_KEY, 1))
        return completed(table.to_pandas(), version)
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{path} is damaged: {error}") from None


def cut_rollouts(folder: Path, last_step: int) -> None:
    """Keeps the rollouts up to `last_step`."""
    cut_parts(folder, last_step, lambda first, path: read_parquet(path).filter(pc.field("step") <= last_step))


def completed(rollouts: pd.DataFrame, version: int = 1) -> pd.DataFrame:
    """Adds the columns introduced after `version` to `rollouts`, with their values for older files.

    Raises ValueError if a column of that version is missing.
    """
    rollouts = rollouts.rename(columns={column.formerly: column.name for column in COLUMNS if column.formerly})
    missing = [column for column in COLUMNS if column.dtype is not None and column.name not in rollouts]
    if lost := [column.name for column in missing if column.since <= version]:
        raise ValueError(f"rollouts lack the columns {', '.join(lost)}")
    fills = {c.name: pa.array([c.older] * len(rollouts), c.dtype).to_pandas().to_numpy() for c in missing}
    return rollouts.assign(**fills)
