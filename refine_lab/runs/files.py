"""The files of a run directory: how each is written, read, and cut back to an earlier step.

Whatever is not appended is written under a temporary name and renamed, so that a reader never sees half a file; the one
file that is appended to, `metrics.jsonl`, may end in half a line, which readers skip.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

OLDER_NAMES = {"config.json": "ttt.json", "metrics.jsonl": "updates.jsonl"}
"""What format version 1 called these files in a run of test-time training."""


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return run_file(path, "config.json").is_file()


def run_file(run: Path, name: str) -> Path:
    """The path of a run's `config.json` or `metrics.jsonl`, under its older name where the run has only that."""
    older = run / OLDER_NAMES[name]
    return older if older.is_file() and not (run / name).is_file() else run / name


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_inputs(run: Path, inputs: Mapping[str, Any]) -> None:
    """Write what a run is begun with (see `refine_lab.training.inputs`)."""
    replace_text(run / "inputs.json", json.dumps(inputs, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, and ValueError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}: the run directory is incomplete") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds {type(values).__name__}, not an object")
    return values


def parse_line(path: Path, line: bytes) -> dict[str, Any]:
    """A line of `metrics.jsonl`; null is NaN. Raises ValueError for what is none."""
    try:
        values = json.loads(line)
        _ = values["kind"], values["step"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged: {line[:60]!r} is no line of metrics") from None
    return {name: math.nan if value is None else value for name, value in values.items()}


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: tensors and numpy numbers plain, what is not finite None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def take_lock(run: Path) -> int:
    """Hold a run's lock: the descriptor, which holds it until every copy is closed. Raises BlockingIOError where it is held."""
    lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # perhaps only someone who asks whether the run lives
        else:
            return lock
    os.close(lock)
    raise BlockingIOError(f"another process is writing {run}")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's lock inside the block, in this process. Raises BlockingIOError where another one holds it."""
    lock = take_lock(run)
    try:
        yield
    finally:
        os.close(lock)


def is_held(run: Path) -> bool:
    """Whether a process holds a run's lock, which no kill can leave behind."""
    try:
        lock = os.open(run / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of every whole checkpoint of a run directory, in order; what is no `step-<n>` is passed over."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((int(f.name[5:]), f) for f in folders if re.fullmatch(r"step-[0-9]+", f.name) and f.is_dir())


def drop_leftovers(path: Path) -> None:
    """Remove what killed processes left under temporary names."""
    for folder in (path, *(path / name for name in ("rollouts", "checkpoints", "answers"))):
        for left in folder.glob(".*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def cut_metrics(path: Path, kept: Collection[int]) -> None:
    """Keep the whole lines of the steps in `kept`."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        left = [line for line in lines if line.endswith(b"\n") and parse_line(path, line)["step"] in kept]
        if len(left) < len(lines):
            replace_text(path, b"".join(left).decode())


def cut_rollouts(folder: Path, last_step: int) -> None:
    """Keep the rollouts up to `last_step`: later files go, one that reaches beyond it is written anew."""
    for first, last, path in parquet_parts(folder):
        if last > last_step:
            if first <= last_step:
                table = pq.read_table(path)
                write_parquet(folder / f"{first}-{last_step}.parquet", table.filter(pc.field("step") <= last_step))
            path.unlink()


def parquet_parts(folder: Path) -> list[tuple[int, int, Path]]:
    """First, last and path of every closed file `<first>-<last>.parquet`, in order: of steps, or of rows."""
    found = ((re.fullmatch(r"(\d+)-(\d+)\.parquet", path.name), path) for path in folder.glob("*.parquet"))
    return sorted((int(name[1]), int(name[2]), path) for name, path in found if name)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table whole: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, path)


def new_directory(folder: Path, name: str) -> Path:
    """A directory `name` made in `folder`; with a number behind it where there is one of that name already.

    Raises OSError, which names REFINE_RUNS, where it cannot be made.
    """
    number = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder.absolute() / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:  # another run of the same second
                number += 1
            else:
                return path
    except OSError as error:
        raise OSError(
            f"no run directory can be made in {folder} ({error}): name a folder that can be written in REFINE_RUNS"
        ) from error
