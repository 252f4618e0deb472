"""A simulated disk that keeps only what was synced, and faults under every write.

`Disk(folder)` watches the system calls of this process below a real folder. At each fsync it takes what the disk then
holds: a file's content (read from the file, so that it does not matter who wrote it), or a folder's list of names. Each
call is a moment at which the power can fail; `Moment.restore` builds the folder that a restarted machine would find.
Libraries that write from native code are not seen when they write. So a file or folder that is renamed into place
without being synced as it is then raises `NotSynced`, and so does `Disk.require_synced` for what was left unsynced.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

CALLS = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "write", "open")
"""The functions of `os` that are watched; `open` only where it creates a file."""
NATIVE = "serialize_file"
"""safetensors' function that writes a file from native code."""

NEVER_SYNCED = ("log.txt", "lock", "stop")
"""Files that no resumed run depends on."""

Names = dict[str, int]


class NotSynced(AssertionError):
    """A file of the run is used as if it were on the disk, which it need not be."""


@dataclass(frozen=True)
class Tree:
    """The inodes of a disk: the names in each folder and the content of each file."""

    folders: dict[int, Names]
    files: dict[int, bytes]


@dataclass(frozen=True)
class Moment:
    """The disk just before a call: what is synced, and what the system would still write."""

    call: str
    root: int
    synced: Tree
    present: Tree

    def restore(self, folder: Path, chance: random.Random | None = None) -> Path:
        """Builds what is left after a power cut at this moment: what was synced and, with `chance`, parts of the rest."""
        self._folder(self.root, folder, chance)
        return folder

    def _folder(self, inode: int, path: Path, chance: random.Random | None) -> None:
        path.mkdir(parents=True)
        names, present = self.synced.folders.get(inode, {}), self.present.folders.get(inode, {})
        if chance is not None:
            both = {name: chance.choice((names.get(name), present.get(name))) for name in sorted({*names, *present})}
            names = {name: found for name, found in both.items() if found is not None}
        for name, found in names.items():
            if found in self.synced.folders or found in self.present.folders:
                self._folder(found, path / name, chance)
            else:
                (path / name).write_bytes(self._content(found, chance))

    def _content(self, inode: int, chance: random.Random | None) -> bytes:
        synced = self.synced.files.get(inode, b"")
        present = self.present.files.get(inode, synced)
        if chance is None or present == synced:
            return synced
        kept = len(synced) if present.startswith(synced) else 0  # what was appended to is not lost
        part = present[: chance.randint(kept, len(present))]
        return chance.choice((synced, present, part, part + bytes(len(present) - len(part))))


class Disk:
    """The disk below `root`, an existing folder whose present content counts as synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments: list[Moment] = []
        self.calls: list[tuple[str, str]] = []
        "Name and path of each call, in order."
        self.fault: Callable[[int, str, Path], Any] = lambda number, call, path: None
        "Called before each call with its number; it may raise, or return a number of bytes for a short write."
        self._kept: list[int] = []  # descriptors, so that no inode number is used again
        self._read: dict[tuple[int, ...], bytes] = {}
        self._real = {name: getattr(os, name) for name in CALLS}
        self._synced = self._scan()
        for each in (root, *root.rglob("*")):
            self._keep(each)

    @contextmanager
    def watched(self, *, moments: bool = True) -> Iterator[Disk]:
        """Watches the calls inside the block; with `moments`, notes what is on the disk before each."""
        self._noting = moments
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._wrapped(name))
            native = getattr(safetensors.torch, NATIVE)

            def serialize_file(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
                self._before("native", Path(path))
                native(tensors, path, *rest, **named)

            patch.setattr(safetensors.torch, NATIVE, serialize_file)
            yield self

    def require_synced(self) -> None:
        """Raises NotSynced if a file that a resumed run depends on is not on the disk as it is."""
        present = self._scan()
        self._require_same(present, present.folders, self.root)

    def _require_same(self, present: Tree, folders: dict[int, Names], path: Path) -> None:
        inode = path.stat().st_ino
        if inode in folders:
            ours = {name for name in folders[inode] if name not in NEVER_SYNCED}
            synced = {name for name in self._synced.folders.get(inode, {}) if name not in NEVER_SYNCED}
            if ours != synced:
                raise NotSynced(f"the folder {path} has unsynced names: {', '.join(sorted(ours ^ synced))}")
            for name in ours:
                self._require_same(present, folders, path / name)
        elif present.files[inode] != self._synced.files.get(inode):
            raise NotSynced(f"{path} was written and not synced")

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(first: Any, *rest: Any, **named: Any) -> Any:
            path = self._path(first, named.get("dir_fd"))
            creates = name != "open" or (rest and rest[0] & os.O_CREAT)
            if path is None or not creates:
                return real(first, *rest, **named)
            short = self._before(name, path)
            if name == "write" and short is not None:
                return real(first, bytes(rest[0])[:short])
            if name in ("rename", "replace"):
                present = self._scan()
                self._require_same(present, present.folders, path)
            result = real(first, *rest, **named)
            if name == "fsync":
                self._sync(path, first)
            return result

        return call

    def _before(self, name: str, path: Path) -> Any:
        if self._noting:
            self.moments.append(Moment(f"{name} {path.name}", self._inode(self.root), self._copy(), self._scan()))
        self.calls.append((name, path.relative_to(self.root).as_posix()))
        return self.fault(len(self.calls) - 1, name, path)

    def _copy(self) -> Tree:
        return Tree(dict(self._synced.folders), dict(self._synced.files))

    def _sync(self, path: Path, descriptor: int) -> None:
        self._keep(path)
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            entries = list(os.scandir(path))
            self._synced.folders[facts.st_ino] = {entry.name: entry.inode() for entry in entries}
            for entry in entries:
                self._keep(Path(entry.path))
        else:
            self._synced.files[facts.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _keep(self, path: Path) -> None:
        self._kept.append(self._real["open"](path, os.O_RDONLY))

    def _path(self, first: Any, folder: int | None) -> Path | None:
        """Returns the path that a call concerns if it is below the root, as descriptor or as name."""
        if isinstance(first, int):
            path = Path(os.readlink(f"/proc/self/fd/{first}"))
        else:
            path = Path(os.fsdecode(first))
            path = path if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}")) / path
            path = Path(os.path.abspath(path))
        return path if path.is_relative_to(self.root) else None

    def _inode(self, path: Path) -> int:
        return path.stat().st_ino

    def _scan(self) -> Tree:
        """Returns the folder as the running system sees it."""
        tree = Tree({}, {})
        waiting = [self.root]
        while waiting:
            folder = waiting.pop()
            entries = list(os.scandir(folder))
            tree.folders[self._inode(folder)] = {entry.name: entry.inode() for entry in entries}
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                else:
                    tree.files[entry.inode()] = self._content(entry)
        return tree

    def _content(self, entry: os.DirEntry[str]) -> bytes:
        facts = entry.stat()
        key = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if key not in self._read:
            descriptor = self._real["open"](entry.path, os.O_RDONLY)
            with os.fdopen(descriptor, "rb") as file:
                self._read[key] = file.read()
        return self._read[key]

    def close(self) -> None:
        for descriptor in self._kept:
            os.close(descriptor)
        self._kept.clear()


FAULTS = {"no space": errno.ENOSPC, "no permission": errno.EACCES, "input/output error": errno.EIO}


def failed(kind: str, call: str, path: Path) -> Exception:
    """The error of a call: of native code its own, of a descriptor without the file's name."""
    number = FAULTS[kind]
    if call == "native":
        path.write_bytes(b"half of it")
        return SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
    return OSError(number, os.strerror(number), *([] if call in ("write", "fsync") else [os.fspath(path)]))


def fault_at(number: int, kind: str) -> Callable[[int, str, Path], Any]:
    """Returns a fault at the call `number`: an error of `FAULTS`, or half of a write and then no space ("short write")."""

    def fault(now: int, call: str, path: Path) -> Any:
        if kind == "short write":
            if now == number and call == "write":
                return 5
            if now == number + 1:
                raise failed("no space", call, path)
        elif now == number:
            raise failed(kind, call, path)
        return None

    return fault
