"""Reads input files: checks UTF-8 and git-lfs pointers, reads .jsonl and .parquet rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a git-lfs pointer, which replaces a file whose content was not fetched."""


def existing_file(path: Path, missing: str) -> Path:
    """Returns `path`. Raises FileNotFoundError with the sentence `missing` if there is no such file.

    Raises ValueError if the file is a git-lfs pointer instead of its content.
    """
    if not path.is_file():
        raise FileNotFoundError(missing)
    return refuse_pointer(path)


def refuse_pointer(path: Path) -> Path:
    """Returns `path`. Raises ValueError for anything but a regular file, and for a git-lfs pointer instead of its content."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(f"{str(path)!r} must be a file, but it is {what}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{str(path)!r} is a git-lfs pointer, not the file itself: `git lfs pull` in its repository fetches the content"
            )
    return path


def refuse_pointers(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError if an existing file with one of these names in `folder` is a git-lfs pointer."""
    for name in names:
        if (folder / name).is_file():
            refuse_pointer(folder / name)


def read_text(path: Path) -> str:
    """Returns the UTF-8 text of a file.

    Raises ValueError, naming the file, for a git-lfs pointer, for invalid UTF-8 and for a NUL byte.
    """
    data = refuse_pointer(path).read_bytes()
    try:
        text, wrong = data.decode("utf-8"), data.find(0)
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: byte {wrong} is {data[wrong]:#04x}")
    return text


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the number, from 1, and the value of each non-blank line of a .jsonl file.

    Raises ValueError, naming the line, for invalid JSON or UTF-8.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and JSON nested too deeply
                raise ValueError(f"line {number} of {str(path)!r} is not valid JSON: {error}") from error


def parquet_rows(path: Path, columns: Callable[[list[str]], Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .parquet file; `columns` returns which of its columns, passed by name, are read.

    Raises ValueError, naming the file, if it is not in this format or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a Parquet file: {error}") from error
    chosen = columns(file.schema_arrow.names)
    try:
        for batch in file.iter_batches(batch_size=256, columns=chosen):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
