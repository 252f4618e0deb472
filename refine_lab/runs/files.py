"""The files of a run directory: how each is written, read, and truncated to an earlier step.

Every file is written by `durable`, so that a reader never sees a partial file. The exception is `metrics.jsonl`, which is
appended to and may end in an incomplete line, which readers skip.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import socket
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from refine_lab.runs.durable import make_folder, replace_bytes, replace_text, sync

OLDER_NAMES = {"config.json": "ttt.json", "metrics.jsonl": "updates.jsonl"}
"""Names of these files in runs of test-time training of format version 1."""

RENAMED_METRICS = {"recall": "contains_answer"}
"""Quantities in `metrics.jsonl` of older runs and their present names."""


def is_run(path: Path) -> bool:
    """Returns whether `path` is a run directory; a folder of weights, whose `config.json` is the model's, is none.

    A folder with a damaged `config.json` counts as a run, so that the damage is reported.
    """
    file = run_file(path, "config.json")
    if not file.is_file():
        return False
    try:
        return "model_type" not in read_json(file)
    except (OSError, ValueError):
        return True


def run_file(run: Path, name: str) -> Path:
    """Returns the path of a run's `config.json` or `metrics.jsonl`, under its older name if only that exists."""
    older = run / OLDER_NAMES[name]
    return older if older.is_file() and not (run / name).is_file() else run / name


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object as a file, as `replace_text`; see `strict_values` for the values."""
    replace_text(path, json.dumps(strict_values(values), indent=1, allow_nan=False) + "\n")


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading, without waiting. Raises ValueError for a pipe, a folder or anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is damaged: it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises FileNotFoundError, or ValueError for any other content."""
    try:
        opened = open_file(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the run directory {path.parent} was deleted or moved") from None
        raise FileNotFoundError(f"{path.parent} has no {path.name}: the run directory is incomplete") from None
    try:
        with opened as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it contains {type(values).__name__}, not an object")
    return values


def parse_line(path: Path, line: bytes) -> dict[str, Any]:
    """Parses a line of `metrics.jsonl`; null is NaN. Raises ValueError for an invalid line."""
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not _is_metrics(values):
        raise ValueError(f"{path} is damaged: {line[:60]!r} is not a valid metrics line")
    line_values: dict[str, Any] = values
    return {
        RENAMED_METRICS.get(name, name): math.nan if value is None else value for name, value in line_values.items()
    }


def _is_metrics(values: Any) -> bool:
    """Returns whether a parsed line names its kind and step; one of training or evaluation holds only numbers."""
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or type(values.get("step")) is not int:
        return False
    numbers = [values["step"]]
    if values["kind"] in ("train", "eval"):
        numbers = [value for name, value in values.items() if name != "kind" and value is not None]
    return all(isinstance(value, (int, float)) and abs(value) < 1e300 for value in numbers)


def strict_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to strict JSON: tensors and numpy numbers to plain Python ones, non-finite numbers to None."""
    numbers = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in numbers.items()}


NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""What flock reports on a file system without locks."""


class LockLostError(RuntimeError):
    """Another process has taken a run's lock in a new file, so this process no longer writes into the run."""


_locks: weakref.WeakKeyDictionary[BinaryIO, Path] = weakref.WeakKeyDictionary()
"""Locks that this process holds, and the folder of each."""
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(_locks)])


def keep_lock(lock: BinaryIO, run: Path) -> BinaryIO:
    """Returns a lock's open file, which a forked child closes: only a process that is handed the lock inherits it."""
    _locks[lock] = run.absolute()
    return lock


def take_lock(run: Path) -> BinaryIO:
    """Takes a run's lock and returns the open file, which holds the lock until every copy of it is closed.

    Raises RuntimeError, which names the host and process that hold the lock, if another process holds it.
    """
    for _ in range(20):
        lock = (run / "lock").open("ab")
        try:
            if _locked(lock, run) and lock_file(lock, run) == "held":
                name_holder(lock, os.getpid())
                return keep_lock(lock, run)
        except BaseException:
            lock.close()
            raise
        lock.close()  # another file has replaced it meanwhile, or a process that checks whether the run is alive holds it
        time.sleep(0.05)
    raise RuntimeError(f"run {run.name} is in use by {_holder(run)}; stop that process first")


def lock_file(lock: BinaryIO, run: Path) -> Literal["held", "deleted", "replaced"]:
    """Returns what has become of the file of a lock, which any user of the folder can delete while it is held."""
    try:
        there = os.stat(run / "lock")
    except FileNotFoundError:
        return "deleted"
    return "held" if os.path.samestat(os.fstat(lock.fileno()), there) else "replaced"


def require_lock(run: Path) -> None:
    """Raises LockLostError if this process has taken a run's lock and another process may have taken it since.

    A deleted file is allowed: the process that holds it saves the run and stops (see `child.StopSignal`).
    """
    found = {lock_file(lock, run) for lock, path in list(_locks.items()) if path == run and not lock.closed}
    if found == {"replaced"}:
        raise LockLostError(
            f"{run / 'lock'} was deleted while this process was working on the run, and another process has created it "
            "again; this process ends and writes nothing more into the run"
        )


def _locked(file: IO[bytes], place: Path) -> bool:
    """Locks an open file unless another process holds the lock. Raises OSError where files cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        sentence = f"its file system does not support file locks (flock): {error.strerror}"
        raise OSError(error.errno, sentence, str(place)) from None
    return True


def name_holder(lock: BinaryIO, pid: int) -> None:
    """Writes host and process id of a lock's holder into the lock's file."""
    os.ftruncate(lock.fileno(), 0)
    os.write(lock.fileno(), f"{socket.gethostname()} {pid}\n".encode())


def _holder(run: Path) -> str:
    host, _, number = (run / "lock").read_text(encoding="utf-8", errors="replace").strip().rpartition(" ")
    if not host or not number.isdecimal():
        return "another process"
    try:
        if host == socket.gethostname():
            os.kill(int(number), 0)
    except ProcessLookupError:
        return f"a process started by process {number} on {host}, which has since exited"
    except (OSError, OverflowError):
        pass  # a process of another user
    return f"process {number} on {host}"


def is_held(run: Path) -> bool:
    """Returns whether a process holds a run's lock, which is released even if the process is killed.

    Only read access is needed. On a file system without locks no run is executed, and none is held.
    """
    try:
        with open_file(run / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return False


def require_locks(folder: Path) -> None:
    """Raises OSError if files on the file system of `folder`, which need not exist yet, cannot be locked."""
    place = next(each for each in (folder, *folder.parents) if each.is_dir())
    with tempfile.TemporaryFile(dir=place) as file:
        _locked(file, place)


def cut_metrics(path: Path, kept: Collection[int]) -> None:
    """Keeps the complete lines of the steps in `kept`."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        left = [line for line in lines if line.endswith(b"\n") and parse_line(path, line)["step"] in kept]
        if len(left) < len(lines):
            replace_bytes(path, b"".join(left))


def cut_parts(folder: Path, end: int, kept: Callable[[int, Path], pa.Table | None]) -> None:
    """Keeps the steps or rows up to `end` of closed files: deletes later files and rewrites one that extends beyond it.

    `kept` returns what remains of that file, given its first step or row; None deletes it.
    """
    for first, last, path in parquet_parts(folder):
        if last > end:
            if first <= end and (table := kept(first, path)) is not None:
                write_parquet(folder / f"{first}-{end}.parquet", table)
            path.unlink()


def parquet_parts(folder: Path) -> list[tuple[int, int, Path]]:
    """Returns first, last and path of every closed file `<first>-<last>.parquet`, in order of steps or rows."""
    found = ((re.fullmatch(r"(\d+)-(\d+)\.parquet", path.name), path) for path in folder.glob("*.parquet"))
    return sorted((int(name[1]), int(name[2]), path) for name, path in found if name and path.is_file())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table with checksums, which `read_parquet` verifies."""
    make_folder(path.parent)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, write_page_checksum=True)
    replace_bytes(path, memoryview(buffer.getvalue()))


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a table. Raises OSError or ValueError if the file is damaged."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns, use_threads=False)  # a file is small: threads cost more than they save


def new_directory(folder: Path, name: str) -> Path:
    """Creates a directory `name` in `folder`, with a number appended if the name is taken.

    Raises OSError, which mentions REFINE_RUNS, if it cannot be created.
    """
    number = 0
    try:
        require_locks(folder.absolute())
        make_folder(folder)
        while True:
            number += 1
            path = folder.absolute() / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):  # another run of the same second
                path.mkdir()
                sync(folder)
                return path
    except OSError as error:
        raise OSError(
            f"cannot create a run directory in {folder} ({error}): set REFINE_RUNS to a writable folder"
        ) from error
