"""Sources of documents: the Python corpus, text files and folders, table columns, and data sets by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from refine_lab.data.corpus import File, Manifest, Split, compare, current_manifest, python_documents
from refine_lab.data.files import existing_file, json_lines, parquet_rows, read_text, refuse_pointer
from refine_lab.runs.durable import digest
from refine_lab.text import quote
from refine_lab.validation import ConfigError, path_of, require

HELD_OUT_EVERY = 20
"""Every 20th row of a table is held out, starting with the first, and about the same fraction of a folder's files."""
HELD_OUT_END = 0.05
"""The held-out fraction of a single text file, at its end."""
COLUMN = "text"
"""The column of a table that contains its documents."""


def documents(source: str, split: Split, manifest: Manifest | None = None) -> Iterator[str]:
    """Yields the non-empty documents of one split of `source`.

    `source` is `python`, a folder of .txt files or one such file, a .jsonl or .parquet file, or `datasets:NAME` (or
    `datasets:NAME:CONFIGURATION`; its `train` split, streamed); tables have a column `text`. `manifest` fixes the files
    of `python`.

    Raises FileNotFoundError or ValueError, in one sentence, for a missing path, a folder without text, a column that
    the rows lack, invalid UTF-8, and a source whose documents are all empty.
    """
    if source == "python":
        found = python_documents(split, manifest)
    elif source.startswith("datasets:"):
        found = _held_out_rows(_dataset_rows(source), split, source)
    else:
        found = _path_documents(path_of("source", source), split)
    filled = (document for document in found if document.strip())
    first = next(filled, None)
    if first is None:
        raise ValueError(f"the source {source!r} has no {split} document with any text in it")
    return chain([first], filled)


def identity(source: str, manifest: Manifest | None = None) -> str:
    """Returns a string that changes whenever the documents of `source` do, used as their cache key.

    Files are identified by name and content, a `datasets` source by its name alone.
    """
    if source == "python":
        return repr(_python_files(manifest))
    if source.startswith("datasets:"):
        return f"{source} {COLUMN}"
    return f"{COLUMN} {source_digests(source, manifest)}"


def source_digests(source: str, manifest: Manifest | None = None) -> dict[str, str]:
    """Returns file -> content digest for every file that documents of `source` are read from; not for `datasets:NAME`.

    Files of a folder are named by their paths in it, those of `python` by package and path.

    Raises FileNotFoundError or ValueError if there is no such file or folder, or a file is a git-lfs pointer.
    """
    if source == "python":
        return {f"{file.package}/{file.path}": file.digest for file in _python_files(manifest)}
    path = path_of("source", source)
    if path.is_dir():
        return {file.relative_to(path).as_posix(): digest(file) for file in _text_files(path)}
    return {path.name: digest(_existing(path))}


def _python_files(manifest: Manifest | None) -> tuple[File, ...]:
    return current_manifest().files if manifest is None else compare(manifest).present


def _path_documents(path: Path, split: Split) -> Iterator[str]:
    if path.is_dir():
        return _text_documents(_text_files(path), split)
    _existing(path)
    if path.suffix == ".txt":
        return _text_documents([path], split)
    if path.suffix == ".jsonl":
        return _held_out_rows((row for _, row in json_lines(path)), split, str(path))
    if path.suffix == ".parquet":
        rows = parquet_rows(path, lambda names: [COLUMN] if COLUMN in names else names)
        return _held_out_rows(rows, split, str(path))
    raise ConfigError("source", str(path), "a folder of .txt files, or a .txt, .jsonl or .parquet file")


def _existing(path: Path) -> Path:
    allowed = "'python', a folder of .txt files, a .txt, .jsonl or .parquet file, or 'datasets:NAME'"
    return existing_file(path, f"there is no source {str(path)!r}; allowed values: {allowed}")


def _text_files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise FileNotFoundError(f"the folder {str(folder)!r} contains no .txt files")
    return [refuse_pointer(file) for file in files]


def _text_documents(files: list[Path], split: Split) -> Iterator[str]:
    """Yields each file as a document; files whose names have the smallest hashes are held out. A single file is divided."""
    if len(files) == 1:
        text = read_text(files[0])
        cut = len(text) - int(len(text) * HELD_OUT_END)
        return iter([text[:cut] if split == "train" else text[cut:]])
    ordered = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
    held_out = set(ordered[: -(-len(files) // HELD_OUT_EVERY)])
    return (read_text(file) for file in files if (file in held_out) == (split == "validation"))


def _held_out_rows(rows: Iterable[Any], split: Split, source: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        if (number % HELD_OUT_EVERY == 0) == (split == "validation"):
            yield _field(row, source, number)


def _field(row: Any, source: str, number: int) -> str:
    if not isinstance(row, dict) or COLUMN not in row:
        columns = ", ".join(map(quote, row)) if isinstance(row, dict) else "none, since it is not an object"
        raise ValueError(f"row {number + 1} of {source!r} has no column {COLUMN!r}; it has {columns}")
    if not isinstance(row[COLUMN], str):
        raise ValueError(
            f"column {COLUMN!r} of {source!r} must contain text, but row {number + 1} contains {quote(row[COLUMN])}"
        )
    try:
        row[COLUMN].encode()
    except UnicodeEncodeError as error:
        where = f"column {COLUMN!r} of {source!r}"
        raise ValueError(f"{where} contains an unpaired surrogate in row {number + 1}, at {error.start}") from error
    return row[COLUMN]


def check_dataset(source: str) -> None:
    """Raises ConfigError unless `source` is `datasets:` with a name that the library `datasets` can look up."""
    fits = re.fullmatch(r"datasets:[\w./][\w./-]{0,199}(:[\w./-]{1,200})?", source) is not None
    require(fits, "source", source, "'datasets:NAME' or 'datasets:NAME:CONFIGURATION'")


def _dataset_rows(source: str) -> Iterator[Any]:
    check_dataset(source)
    name, _, configuration = source.removeprefix("datasets:").partition(":")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"the source {source!r} needs the package `datasets`: pip install datasets") from error
    if not hasattr(datasets, "load_dataset"):
        place = datasets.__file__ or next(iter(datasets.__path__))
        raise ValueError(f"{place} shadows the package `datasets`: rename it, or start in a different folder")
    try:
        yield from datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # the library raises errors of every kind: no network, no such name, a loading script
        raise ValueError(f"the data set {name!r} could not be read: {error}") from error
