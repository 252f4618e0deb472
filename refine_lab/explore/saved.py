"""Saves explored rollouts as one Parquet file with the columns of a run's rollouts, and reads them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from refine_lab.runs.durable import replace_bytes
from refine_lab.runs.files import read_parquet
from refine_lab.runs.schema import FORMAT_VERSION, INT32, ROLLOUT_TYPES, VERSION_KEY, read_rollouts
from refine_lab.validation import path_of

ORIGIN_KEY = b"explored"
"""Metadata of the file: the model and the settings that the rollouts were made with."""


def rollouts_table(rollouts: pd.DataFrame, origin: Mapping[str, Any] | None = None) -> pa.Table:
    """Returns the rollouts with the columns of `runs.schema.COLUMNS` first, and then the other ones of the frame.

    Raises ValueError for a frame that lacks one of these columns.
    """
    types = {"step": INT32, **ROLLOUT_TYPES}
    if lost := [name for name in types if name not in rollouts]:
        raise ValueError(f"rollouts lack the columns {', '.join(lost)}")
    others = [name for name in rollouts if name not in types]
    columns = {name: pa.array(rollouts[name].tolist(), types.get(str(name))) for name in (*types, *others)}
    metadata = {VERSION_KEY: str(FORMAT_VERSION).encode(), ORIGIN_KEY: json.dumps(dict(origin or {})).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def parquet_bytes(rollouts: pd.DataFrame, origin: Mapping[str, Any] | None = None) -> bytes:
    """Returns the contents of a Parquet file of `rollouts_table`."""
    buffer = pa.BufferOutputStream()
    pq.write_table(rollouts_table(rollouts, origin), buffer, write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


def save_rollouts(path: Path | str, rollouts: pd.DataFrame, origin: Mapping[str, Any] | None = None) -> Path:
    """Writes the rollouts to a Parquet file atomically, and returns its path. Raises as `rollouts_table`, and OSError."""
    path = path_of("the file of rollouts", path)
    replace_bytes(path, memoryview(parquet_bytes(rollouts, origin)))
    return path


def load_rollouts(path: Path | str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Returns saved rollouts, and the model and settings that they were made with; none for a file of a run.

    Raises FileNotFoundError for a missing file and ValueError for a damaged one.
    """
    path = path_of("the file of rollouts", path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    frame = read_rollouts(path)
    metadata = read_parquet(path, []).schema.metadata or {}
    return frame, json.loads(metadata.get(ORIGIN_KEY, b"{}"))
