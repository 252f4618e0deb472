"""Run directories: written by a training process while it trains, read as data frames by whoever follows.

    config.json    the configuration, with its format version      status.json   state, step, last error
    env.json       versions, device, commit                        stop          a request to stop
    metrics.jsonl  a line a step and a line an evaluation          log.txt       what the process printed
    rollouts/      <first>-<last>.parquet, closed files            lock          held while the process lives
    checkpoints/   step-<n>/                                       reward.py     a reward of the user's own
    inputs.json    digests of the text or prompts, and of the model that it was begun with

How each file is written, read and cut back: `run_files`. What `env.json` holds: `environment`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import typing
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from refine_lab.config import TrainConfig, from_json, to_json
from refine_lab.environment import environment, project_root
from refine_lab.run_files import (
    ROLLOUT_TYPES,
    checkpoints,
    cut_metrics,
    cut_rollouts,
    drop_leftovers,
    is_held,
    new_directory,
    parquet_parts,
    parse_line,
    plain,
    read_json,
    read_rollouts,
    replace_text,
    write_inputs,
    write_rollouts,
)

State = Literal["starting", "running", "finished", "stopped", "failed"]

TRAIN_COLUMNS = ("step", "time", "tokens", "updates", "seconds", "tokens_per_second", "lr", "ntp_loss", "ntp_accuracy")
EVAL_COLUMNS = ("step", "time", "ntp_loss", "ntp_accuracy", "sampled_accuracy")


def runs_dir() -> Path:
    """Where run directories are made: REFINE_RUNS, else `runs/` of the project, else `refine_lab_runs` in the home.

    Never found from the current folder, so that a notebook writes to one place wherever it is started.
    Raises ValueError where REFINE_RUNS is a relative path.
    """
    if named := os.environ.get("REFINE_RUNS"):
        path = Path(named).expanduser()
        if not path.is_absolute():
            raise ValueError(f"REFINE_RUNS must be an absolute path, got {named!r}")
        return path
    root = project_root()
    return root / "runs" if root else Path.home() / "refine_lab_runs"


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a run says of itself in `status.json`."""

    state: State
    step: int
    steps: int
    error: str | None = None
    pid: int | None
    time: float
    tokens_per_second: float | None = None
    seconds_left: float | None = None


class RunWriter:
    """The writing side of one run directory. One process at a time writes (see `launch`)."""

    def __init__(self, path: Path, *, step: int, rollouts_every: int = 10) -> None:
        self.path = path
        self.run = Run(path)
        self.config = self.run.config
        self._rollouts_every = rollouts_every
        self._step = step
        self._rows: list[tuple[int, Mapping[str, Any]]] = []
        self._metrics = os.open(path / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        runs: Path | None = None,
        *,
        reward_source: str | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> RunWriter:
        """Make a new directory `<date>-<recipe>-<way>-s<seed>` in `runs` and write what is known before training."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.recipe}-{config.way}-s{config.seed}"
        path = new_directory(runs or runs_dir(), name)
        for folder in ("rollouts", "checkpoints"):
            (path / folder).mkdir()
        if reward_source is not None:
            replace_text(path / "reward.py", reward_source)
        if inputs is not None:
            write_inputs(path, inputs)
        replace_text(path / "env.json", json.dumps(environment(), indent=2) + "\n")
        replace_text(path / "config.json", to_json(config))  # last: a directory with a config.json is a run
        writer = cls(path, step=0)
        writer.status("starting")
        return writer

    @classmethod
    def open(cls, path: Path | str, step: int | None = None, *, rollouts_every: int = 10) -> RunWriter:
        """Go on with an existing run directory as it was after batch `step`; with None, from nothing.

        Metrics, rollouts and checkpoints of later steps are dropped, and so is what a killed process left half-written:
        an interrupted run has the records of one that was not. Evaluate a step before its checkpoint is written.
        """
        path = Path(path).absolute()
        run = Run(path)
        kept = -1 if step is None else step
        drop_leftovers(path)
        cut_metrics(path / "metrics.jsonl", kept)
        cut_rollouts(path / "rollouts", kept)
        for last, folder in run.checkpoints():
            if last > kept:
                shutil.rmtree(folder)
        replace_text(path / "env.json", json.dumps(environment(run.config.device), indent=2) + "\n")
        return cls(path, step=max(kept, 0), rollouts_every=rollouts_every)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the line of one batch (1-based). A number that is not finite is written as null and read as NaN."""
        self._append("train", step, values)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the line of one evaluation; step 0 is before training."""
        self._append("eval", step, values)

    def _append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        line = {"kind": kind, "step": step, "time": time.time(), **values}
        text = json.dumps({name: plain(value) for name, value in line.items()}, allow_nan=False)
        whole = text.encode() + b"\n"
        if os.write(self._metrics, whole) < len(whole):  # one write, unbuffered: a line is whole or it is the last
            raise OSError(f"{self.path / 'metrics.jsonl'} cannot grow: the disk is full")
        self._step = max(self._step, step)

    def rollouts(self, step: int, rows: Mapping[str, Any]) -> None:
        """Keep one batch's rollouts, a column of equal length for each of `ROLLOUT_TYPES`, until their file is closed.

        Columns are lists, arrays or CPU tensors that nobody changes any more. Raises ValueError for other columns.
        """
        if set(rows) != set(ROLLOUT_TYPES):
            wrong = ", ".join(sorted(set(rows) ^ set(ROLLOUT_TYPES)))
            raise ValueError(
                f"rollouts have exactly the columns {', '.join(ROLLOUT_TYPES)}; missing or unknown: {wrong}"
            )
        lengths = {name: len(column) for name, column in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"rollout columns must be of one length, got {lengths}")
        self._rows.append((step, rows))
        if step % self._rollouts_every == 0:
            self.flush()

    def flush(self) -> None:
        """Close the file of the rollouts kept so far."""
        if self._rows:
            write_rollouts(self.path / "rollouts", self._rows)
            self._rows = []

    def status(
        self,
        state: State,
        step: int | None = None,
        *,
        error: str | None = None,
        tokens_per_second: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Say where the run stands; `step` is that of the last line written where it is not given."""
        self._step = self._step if step is None else step
        status = Status(
            state=state,
            step=self._step,
            steps=self.config.steps,
            error=error,
            pid=None if state == "starting" else os.getpid(),
            time=time.time(),
            tokens_per_second=tokens_per_second,
            seconds_left=seconds_left,
        )
        replace_text(self.path / "status.json", json.dumps({name: plain(v) for name, v in asdict(status).items()}))

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """An empty folder to fill; it becomes `checkpoints/step-<n>` when the block ends, and vanishes where it raises.

        The records up to `step` are closed first, so that a run can go on from every checkpoint there is.
        """
        self.flush()
        final = self.path / "checkpoints" / f"step-{step}"
        folder, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if final.exists():
            final.rename(old)
        folder.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        self.flush()
        if self._metrics >= 0:
            os.close(self._metrics)
            self._metrics = -1


class Run:
    """The reading side of a run directory, finished or not.

    Raises FileNotFoundError where `path` is no run directory; the properties raise ValueError for damaged files.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        if not self.path.is_dir():
            raise FileNotFoundError(f"no run directory at {self.path}: there is no such folder")
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path} is no run directory: it has no config.json")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> TrainConfig:
        path = self.path / "config.json"
        values = read_json(path)  # so that what is no JSON is told from what is out of range
        try:
            return from_json(json.dumps(values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from None

    @property
    def env(self) -> dict[str, Any]:
        return read_json(self.path / "env.json")

    @property
    def inputs(self) -> dict[str, Any] | None:
        """What the run was begun with besides its configuration (`refine_lab.inputs`); None where none was recorded."""
        path = self.path / "inputs.json"
        return read_json(path) if path.is_file() else None

    @property
    def status(self) -> Status:
        path = self.path / "status.json"
        values = read_json(path)
        if "state" in values and values["state"] not in typing.get_args(State):
            allowed = ", ".join(typing.get_args(State))
            raise ValueError(f"{path} is damaged: state must be one of {allowed}, got {values['state']!r}")
        for name in {"step", "steps"} & set(values):
            if type(values[name]) is not int or values[name] < 0:
                raise ValueError(f"{path} is damaged: {name} must be a whole number from 0, got {values[name]!r}")
        try:
            return Status(**values)
        except TypeError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    @property
    def alive(self) -> bool:
        """Whether a process trains this run: whether one holds its lock."""
        return is_held(self.path)

    @property
    def state(self) -> State | Literal["killed"]:
        """The state the run tells of, or `killed` where it tells of a process that is no more."""
        alive = self.alive  # asked before the status is read: a run may end in between
        state = self.status.state
        return "killed" if state in ("starting", "running") and not alive else state

    def metrics(self) -> pd.DataFrame:
        """A row a batch."""
        return self._lines("train", TRAIN_COLUMNS)

    def evaluations(self) -> pd.DataFrame:
        """A row an evaluation."""
        return self._lines("eval", EVAL_COLUMNS)

    def _lines(self, kind: str, columns: tuple[str, ...]) -> pd.DataFrame:
        lines = [line for line in MetricsTail(self).read() if line.pop("kind") == kind]
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=list(columns))

    def rollouts(self, steps: Collection[int] | None = None) -> pd.DataFrame:
        """A row a rollout, of the steps given or of all; the last steps of a living run are not yet in closed files."""
        frames = []
        for first, last, path in parquet_parts(self.path / "rollouts"):
            if steps is None or any(first <= step <= last for step in steps):
                frame = read_rollouts(path)
                frames.append(frame if steps is None else frame[frame["step"].isin(list(steps))])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["step", *ROLLOUT_TYPES])

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of every whole checkpoint, in order."""
        return checkpoints(self.path)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the last whole checkpoint, or None."""
        return max(self.checkpoints(), default=None)


def list_runs(folder: Path | str | None = None) -> list[Run]:
    """The runs of `folder` (else of `runs_dir()`), oldest first; one whose config.json is damaged is told and left out."""
    folder = Path(folder) if folder is not None else runs_dir()
    runs = []
    for path in sorted(folder.glob("*/config.json")):
        try:
            run = Run(path.parent)
            _ = run.config
        except (OSError, ValueError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
        else:
            runs.append(run)
    return runs


def made_at(runs: Iterable[Any]) -> str:
    """A sentence with the commits that runs were made at, from the `env.json` in each run's `path`.

    Raises FileNotFoundError for a run without that file, and ValueError for a damaged one.
    """
    found = set()
    for run in runs:
        env = read_json(run.path / "env.json")
        commit = env.get("commit") or "an unknown commit (no git checkout)"
        found.add(f"{commit} with uncommitted changes" if env.get("dirty") else commit)
    return f"Runs made at {', '.join(sorted(found))}."


class MetricsTail:
    """The lines of a run's `metrics.jsonl` that are new since the last `read`, for following a run as it trains."""

    def __init__(self, run: Run) -> None:
        self.restarts = 0
        "How often the file was cut back, by a run that was taken up again; all lines are then read anew."
        self._path = run.path / "metrics.jsonl"
        self._offset = 0
        self._file: int | None = None

    def read(self) -> list[dict[str, Any]]:
        """New whole lines; null is NaN. Raises ValueError for a line that is no JSON."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if self._file not in (None, facts.st_ino) or facts.st_size < self._offset:
                    self._offset, self.restarts = 0, self.restarts + 1
                self._file = facts.st_ino
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        lines = [parse_line(self._path, line) for line in whole.splitlines()]
        self._offset += len(whole)
        return lines
