"""Files that others wrote: what is no text, what only points to a file, and digests of contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a git-lfs pointer begins with. It stands where the file itself was not fetched."""


def refuse_pointer(path: Path) -> Path:
    """Return `path`. Raise ValueError where the file there is a git-lfs pointer in place of its content."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{str(path)!r} is a git-lfs pointer, not the file itself: `git lfs pull` in its repository fetches the content"
            )
    return path


def refuse_pointers(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError where one of the files with these names in `folder`, of those there are, is a git-lfs pointer."""
    for name in names:
        if (folder / name).is_file():
            refuse_pointer(folder / name)


def read_text(path: Path) -> str:
    """The UTF-8 text of a file.

    Raises ValueError, naming the file, for a git-lfs pointer, for bytes that are no UTF-8 and for a NUL byte.
    """
    data = refuse_pointer(path).read_bytes()
    try:
        text = data.decode("utf-8")
        wrong = data.find(0)
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        raise ValueError(f"{str(path)!r} is no UTF-8 text: byte {wrong} is {data[wrong]:#04x}")
    return text


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of each line of a .jsonl file that is not blank.

    Raises ValueError, naming the line, for one that is no JSON or no UTF-8.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # also bytes that are no UTF-8
                raise ValueError(f"line {number} of {str(path)!r} is no JSON: {error}") from error
            yield number, value


def digest(path: Path) -> str:
    """The first 24 hexadecimal digits of the sha256 of a file's content.

    A process reads a file once, and again when the file system notes any change: the time that it notes in the inode
    cannot be set back.
    """
    facts = path.stat()
    return _digest(os.fspath(path.absolute()), (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))


@lru_cache(maxsize=100_000)
def _digest(path: str, facts: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]
