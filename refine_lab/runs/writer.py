"""Writes run directories."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path
from typing import Any

from refine_lab.config import TrainConfig, to_json
from refine_lab.runs import checkpoints, durable
from refine_lab.runs.environment import environment
from refine_lab.runs.files import LockLostError, cut_metrics, new_directory, require_lock, strict_values, write_json
from refine_lab.runs.run import ERROR, Run, State, portable, runs_dir
from refine_lab.runs.schema import ROLLOUT_TYPES, cut_rollouts, write_rollouts
from refine_lab.runs.started import FUNCTIONS, write_started
from refine_lab.text import shorten
from refine_lab.ttt_config import TTTRunConfig

STATUS_SECONDS = 1.0
"""Minimum number of seconds between two writes of `status.json`."""


class RunWriter:
    """Writes one run directory. Only one process writes at a time: the one that holds its lock (see `process`).

    A directory of format version 1 is first converted to the file names of this version.
    """

    def __init__(self, path: Path, *, step: int, rollouts_every: int = 10) -> None:
        self.path = path
        self.run = Run(path)
        self.config = self.run.config
        upgrade(self.run)
        self._rollouts_every = rollouts_every
        self._step = step
        self._rows: list[tuple[int, Mapping[str, Any]]] = []
        self._held_out: tuple[int, float | None] = (-1, None)
        self._read = hashlib.sha256(), 0
        "Digest of the lines of `metrics.jsonl` up to the last checkpoint, and their number of bytes."
        self._metrics = os.open(path / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    @classmethod
    def create(
        cls,
        config: TrainConfig | TTTRunConfig,
        runs: Path | None = None,
        *,
        reward_source: str | None = None,
        selection_source: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        parent: Mapping[str, Any] | None = None,
        fill: Callable[[Path], None] = lambda path: None,
    ) -> RunWriter:
        """Creates a new directory in `runs` (default: `runs_dir()`) and writes what is known before the run begins.

        Its name is `<date>-<recipe>-<method>-s<seed>`, with `ttt-` after the date for a run of test-time training. Such a
        run needs `inputs` (see `refine_lab.training.inputs.inputs_of`), which hold the number of its prompts. A fork has
        a `parent`, and `fill` writes its checkpoint and records. The sources are those of custom functions.
        """
        train = isinstance(config, TrainConfig)
        name = f"{config.recipe}-{config.method}-s{config.seed}"
        folder = runs or runs_dir()
        path = new_directory(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{'' if train else 'ttt-'}{name}")
        for folder in ("rollouts" if train else "answers", "checkpoints"):
            durable.make_folder(path / folder)
        sources = {"reward": reward_source, "selection": selection_source}
        for function, source in sources.items():
            if source is not None:
                durable.replace_text(path / FUNCTIONS[function], source)
        if inputs is not None:
            write_json(path / "inputs.json", inputs)
        write_json(path / "env.json", environment())
        write_started(path, config, sources, parent)
        fill(path)
        stored = to_json(portable(config, path))
        durable.replace_text(path / "config.json", stored)  # last: a directory with a config.json is a run
        writer = cls(path, step=0)
        try:
            writer.status("starting")
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def open(
        cls, path: Path | str, step: int | None = None, *, done: Collection[int] | None = None, rollouts_every: int = 10
    ) -> RunWriter:
        """Opens a run directory in its state after batch `step`; with None, from the beginning.

        Metrics, rollouts and checkpoints of later batches are dropped, and so are incomplete files of a killed process:
        an interrupted run has the same records as an uninterrupted one. Evaluate a step before its checkpoint is
        written. `done` are the batches to keep if they need not be the first ones, as in test-time training with
        resets.
        """
        run, last = Run(path), -1 if step is None else step
        path = run.path
        require_lock(path)
        upgrade(run)
        for folder in (path, path / "rollouts", path / "checkpoints", path / "answers"):
            durable.drop_leftovers(folder)
        manifest = None if step is None else checkpoints.read_manifest(path / "checkpoints" / f"step-{step}")
        if manifest is not None:
            checkpoints.restore_records(path, manifest)
        elif step is None and done is None:
            checkpoints.drop_records(path)
        else:
            if done is None and last in dict(run.checkpoints()):  # a checkpoint of an earlier version
                run.require_records(last)
            cut_metrics(path / "metrics.jsonl", range(last + 1) if done is None else done)
            cut_rollouts(path / "rollouts", last)
        for number, folder in run.checkpoints():
            if number > last:
                durable.remove_folder(folder)
        write_json(path / "env.json", environment(run.config.device))
        return cls(path, step=max(last, 0), rollouts_every=rollouts_every)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line of `metrics.jsonl`. A non-finite number is written as null and read as NaN."""
        self._require_records()
        line = json.dumps(strict_values({"kind": kind, "step": step, "time": time.time(), **values}), allow_nan=False)
        durable.append(self._metrics, self.path / "metrics.jsonl", line.encode() + b"\n")
        if kind == "eval":
            self._held_out = step, values.get("answer_loss", values.get("ntp_loss"))
        self._step = max(self._step, step)

    def _require_records(self) -> None:
        """Raises FileNotFoundError if the run directory or its metrics were deleted since the writer opened them.

        Raises LockLostError, as `require_lock`, before this process writes what another one could have written.
        """
        require_lock(self.path)
        if self._metrics >= 0 and os.fstat(self._metrics).st_nlink == 0:
            raise FileNotFoundError(f"{self.path / 'metrics.jsonl'} was deleted while the run was in progress")

    train = partialmethod(_append, "train")
    "Appends the line of one batch (1-based), given its number and its values."
    evaluation = partialmethod(_append, "eval")
    "Appends the line of one evaluation after the given number of batches; 0 is before training."
    update = partialmethod(_append, "update")
    "Appends the line of one update of test-time training on a batch (1-based)."

    def rollouts(self, step: int, rows: Mapping[str, Any]) -> None:
        """Buffers one batch's rollouts, a column of equal length for each of `ROLLOUT_TYPES`, until their file is closed.

        Columns are lists, arrays or CPU tensors that must not change afterwards. Raises ValueError for other columns.
        """
        if wrong := ", ".join(sorted(rows.keys() ^ ROLLOUT_TYPES.keys())):
            columns = ", ".join(ROLLOUT_TYPES)
            raise ValueError(f"rollouts must have exactly the columns {columns}; missing or unknown: {wrong}")
        lengths = {name: len(column) for name, column in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"rollout columns must have the same length, got {lengths}")
        self._rows.append((step, rows))
        if step % self._rollouts_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered rollouts to a closed file, and waits until all records are on the disk."""
        require_lock(self.path)
        rows, self._rows = self._rows, []
        if rows:
            write_rollouts(self.path / "rollouts", rows)
        durable.sync_open(self._metrics, self.path / "metrics.jsonl")

    def status(
        self,
        state: State,
        step: int | None = None,
        *,
        error: str | None = None,
        tokens_per_second: float | None = None,
        seconds_left: float | None = None,
        pid: int | None = None,
    ) -> None:
        """Writes the run's status; `step` defaults to that of the last line written.

        A run that is starting has a `pid` only once its process has begun to work on it.
        """
        self._require_records()
        self._step = self._step if step is None else step
        status = {
            "state": state,
            "step": self._step,
            "steps": self.run.steps,
            "error": error and shorten(error, ERROR),
            "pid": pid if state == "starting" else os.getpid(),
            "time": time.time(),
            "tokens_per_second": tokens_per_second,
            "seconds_left": seconds_left,
        }
        path = self.path / "status.json"
        try:
            write_json(path, status)
        except OSError as full:
            if full.errno != errno.ENOSPC or error is None or not path.exists():
                raise
            durable.overwrite_text(path, json.dumps(strict_values(status)))

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yields an empty folder to fill; it becomes `checkpoints/step-<n>` after the block, or is removed on an error.

        The records up to `step` are closed first, so that a run can be resumed from every checkpoint.
        """
        self.flush()
        final = self.path / "checkpoints" / f"step-{step}"
        try:
            with durable.publishing(final) as folder:
                yield folder
                loss = self._held_out[1] if self._held_out[0] == step else None
                checkpoints.write_manifest(folder, step, self._records(), strict_values({"loss": loss})["loss"])
                require_lock(self.path)  # the files may have taken long
        except (OSError, LockLostError):
            raise
        except Exception as error:  # of the libraries that write the files from native code
            raise OSError(f"{final} cannot be written: {error}") from error

    def _records(self) -> dict[str, checkpoints.Facts]:
        """Returns the size and digest of the records so far; only new lines of `metrics.jsonl` are read."""
        digest, size = self._read
        with (self.path / "metrics.jsonl").open("rb") as file:
            file.seek(size)
            lines = file.read()
        digest.update(lines)
        self._read = digest, size + len(lines)
        metrics = {"bytes": self._read[1], "digest": durable.short_digest(digest)}
        return {"metrics.jsonl": metrics, **checkpoints.closed_files(self.path)}

    def close(self) -> None:
        if self._metrics >= 0:
            try:
                self.flush()
            finally:
                os.close(self._metrics)
                self._metrics = -1


class NoWriter:
    """Takes what a `RunWriter` takes and writes nothing, for the workers of a run other than the first."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, Run(path)

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _ignore(self, *values: object, **named: object) -> None:
        pass

    train = evaluation = rollouts = status = _ignore


class RunProgress:
    """Writes the state `running` to `status.json` about once a second, with speed and remaining time."""

    def __init__(self, writer: RunWriter | NoWriter, done: int) -> None:
        """`done` is the number of batches completed before this process began."""
        self._writer, self._done, self._steps = writer, done, writer.run.steps
        self._began, self._written = time.monotonic(), 0.0

    def report(self, step: int, tokens: int | None = None) -> None:
        """Reports that `step` batches are done, and that this process has read `tokens` tokens."""
        now = time.monotonic()
        if now - self._written < STATUS_SECONDS:
            return
        self._written, elapsed, made = now, now - self._began, step - self._done
        speed = None if tokens is None else tokens / elapsed
        left = elapsed / made * (self._steps - step) if made else None
        self._writer.status("running", step, tokens_per_second=speed, seconds_left=left)


def write_status(
    run: Run, state: State, error: str | None = None, step: int | None = None, *, pid: int | None = None
) -> None:
    """Writes the status of a run that no process works on; `step` defaults to that of its last status."""
    with RunWriter(run.path, step=run.status.step if step is None else step) as writer:
        writer.status(state, error=error, pid=pid)


def upgrade(run: Run) -> None:
    """Converts a directory of format version 1 to this version's file names; can be repeated after an interruption."""
    path = run.path
    if not (path / "ttt.json").is_file():
        return
    status = asdict(run.status)
    if (path / "updates.jsonl").is_file():
        os.replace(path / "updates.jsonl", path / "metrics.jsonl")
    write_json(path / "status.json", status)
    durable.replace_text(path / "config.json", to_json(run.config))
    for name in ("ttt.json", "error.txt"):
        (path / name).unlink(missing_ok=True)
