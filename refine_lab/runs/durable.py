"""Durable writes: whatever is written here is either complete after a power failure or absent.

Each function syncs a file's content before it renames the file into place, and then syncs the folder that lists it. A
rename without the first sync can leave an empty file after a power failure; without the second, it can be undone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_open(descriptor, path)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int, path: Path) -> None:
    """Waits until what was written through `descriptor`, to the file at `path`, is on the disk."""
    try:
        with _naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, if it does not exist."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def append(descriptor: int, path: Path, data: bytes) -> None:
    """Appends `data` to an open file in one write, without waiting for the disk (see `sync_open`)."""
    with _naming(path):
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, "the disk is full, and only part of a line was written")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file, replacing an existing one."""
    replace_bytes(path, text.encode())


def overwrite_text(path: Path, text: str) -> None:
    """Overwrites the text of an existing file in place on the disk, for a message when the disk is full."""
    with path.open("r+b", buffering=0) as file:
        file.write(text.encode())
        file.truncate()
        sync_open(file.fileno(), path)


def replace_bytes(path: Path, data: bytes | memoryview) -> None:
    """Writes a file, replacing an existing one."""
    with _replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file that replaces `path` after the block; on an error, it is removed."""
    with _replacing(path) as temporary:
        yield temporary
        sync(temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Is `replacing` for a block that syncs the file itself."""
    temporary = _temporary(path)
    try:
        with _naming(path):
            yield temporary
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` after the block; on an error, it is removed.

    An existing `folder` is replaced as a whole: none of its files remains.
    """
    temporary, old = _temporary(folder), folder.with_name(f".{folder.name}{_OLD}")
    make_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.mkdir()
        with _naming(folder):
            yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that no part of it is ever found under its name."""
    removed = folder.with_name(f".{folder.name}.removed.tmp")
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(folder, removed)
    sync(folder.parent)
    shutil.rmtree(removed)


def drop_leftovers(folder: Path) -> None:
    """Removes temporary files and folders of an interrupted process; a folder that it was replacing is put back."""
    for left in folder.glob(".*.tmp"):
        original = folder / left.name[1:].removesuffix(_OLD)
        if left.name.endswith(_OLD) and not original.exists():
            os.rename(left, original)
            sync(folder)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


_OLD = ".old.tmp"
"""Ending of the name of a folder that is being replaced."""


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to an OSError that has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path)) from error
        raise


def digest(path: Path) -> str:
    """Returns the first 24 hexadecimal digits of the sha256 of a file's content.

    A process reads a file once, and again whenever its inode reports a change (the inode's change time cannot be set
    back).
    """
    facts = path.stat()
    return _digest(os.fspath(path.absolute()), (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))


@lru_cache(maxsize=100_000)
def _digest(path: str, facts: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return short_digest(hashlib.file_digest(file, "sha256"))


def short_digest(sha256: hashlib._Hash) -> str:
    return sha256.hexdigest()[:24]
