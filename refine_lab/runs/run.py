"""Reads run directories, which one process writes while any other process may read them.

    config.json    the configuration, with its kind            status.json   state, step, last error
    env.json       versions, device, commit                    stop          a request to stop
    metrics.jsonl  one line per step, evaluation or update     log.txt       the process's output
    rollouts/      <first>-<last>.parquet, closed files        lock          held while the process lives
    answers/       <first>-<last>.parquet, closed files        reward.py     a custom reward
    checkpoints/   step-<n>/                                   selection.py  a custom selection
    inputs.json    digests of the text or prompts and of the model that the run started with
    started.json   the configuration and functions that the run started with, and accepted changes
    evaluations/   result cards of evaluations of the run, and its answers to recall questions (recall.parquet)

There are two kinds of run: `train` trains a model, `answer` adapts a model to each prompt of a task and answers it.
Format version 1 had other file names for the second kind (`files.OLDER_NAMES`) and no status.json; such directories can
still be read.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from refine_lab.config import TrainConfig, from_json
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.checkpoints import checkpoints
from refine_lab.runs.checks import HIGHEST, check_inputs, check_started
from refine_lab.runs.environment import project_root
from refine_lab.runs.files import is_held, is_run, open_file, parquet_parts, parse_line, read_json, run_file
from refine_lab.runs.schema import ROLLOUT_TYPES, read_rollouts
from refine_lab.text import printable, shorten
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import ConfigError, Natural, configuration, path_of, require

State = Literal["starting", "running", "finished", "stopped", "failed"]
CONFIGS = {"train": TrainConfig, "answer": TTTRunConfig}
"""The configuration class of each kind of run."""

STARTED = "started.json"
"""File that records what a run started with (see `started`)."""
BESIDE = "run:"
"""Prefix in the `model` field of a stored configuration which marks the model as another run in the same folder."""
ERROR = 2000
"""Maximum number of characters of an error in `status.json`."""

TRAIN_COLUMNS = ("step", "time", "tokens", "updates", "seconds", "tokens_per_second", "lr", "ntp_loss", "ntp_accuracy")
EVAL_COLUMNS = ("step", "time", "ntp_loss", "ntp_accuracy", "sampled_accuracy")


def runs_dir() -> Path:
    """Returns the folder of new run directories: REFINE_RUNS, else the project's `runs/`, else `~/refine_lab_runs`.

    It never depends on the current folder, so that a notebook writes to the same place wherever it is started. Raises
    ValueError if REFINE_RUNS is a relative path.
    """
    if named := os.environ.get("REFINE_RUNS"):
        path = path_of("REFINE_RUNS", named)
        if not path.is_absolute():
            raise ConfigError("REFINE_RUNS", named, "an absolute path")
        return path
    root = project_root()
    return root / "runs" if root else Path.home() / "refine_lab_runs"


@configuration
class Status:
    """The content of a run's `status.json`."""

    state: State
    step: Natural
    steps: Natural
    error: str | None = None
    pid: int | None
    time: float
    tokens_per_second: float | None = None
    seconds_left: float | None = None


class Run:
    """Read access to a run directory, finished or not.

    Raises FileNotFoundError if `path` is not a run directory; the properties raise ValueError for damaged files.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        if not self.path.is_dir():
            raise FileNotFoundError(f"no run directory at {self.path}: the folder does not exist")
        if not is_run(self.path):
            raise FileNotFoundError(f"{self.path} is not a run directory: it has no config.json of a run")
        self.log = AnswerLog(self.path / "answers")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> Any:
        """Returns the run's `TrainConfig` or `TTTRunConfig`, depending on its `kind`."""
        path = run_file(self.path, "config.json")
        values = read_json(path)  # apart, so that invalid JSON and an invalid value have errors of their own
        kind = values.get("kind", "answer" if path.name == "ttt.json" else "train")
        try:
            require(kind in list(CONFIGS), "kind", kind, " or ".join(map(repr, CONFIGS)))
            return located(from_json(json.dumps(values), kind=CONFIGS[kind]), self.path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from None

    @property
    def kind(self) -> Literal["train", "answer"]:
        return self.config.kind

    @property
    def env(self) -> dict[str, Any]:
        return read_json(self.path / "env.json")

    @property
    def inputs(self) -> dict[str, Any] | None:
        """Returns the run's inputs besides its configuration (`refine_lab.training.inputs`); None if none were recorded."""
        path = self.path / "inputs.json"
        if not path.is_file():
            return None
        values = read_json(path)
        check_inputs(path, values, self.config, self.started, begun=self.latest_checkpoint() is not None)
        return values

    @property
    def started(self) -> dict[str, Any]:
        """Returns what the run started with (see `started`); empty for a run of an earlier version.

        Raises ValueError, naming the file, if its reward, parent or changes are malformed.
        """
        path = self.path / STARTED
        if not path.is_file():
            return {}
        values = read_json(path)
        check_started(path, values)
        return values

    @property
    def number(self) -> int:
        """Returns the run's number in its folder, by which runs are ordered; 0 for a run of an earlier version."""
        number = self.started.get("number", 0)
        fits = type(number) is int and 0 <= number <= HIGHEST
        require(fits, f"number of {self.path / STARTED}", number, f"a whole number from 0 to {HIGHEST:,}")
        return number

    @property
    def parent(self) -> tuple[Path, int] | None:
        """Returns the run directory and the step that the run was forked from, or None."""
        parent = self.started.get("parent")
        return None if parent is None else (Path(os.path.normpath(self.path / parent["run"])), int(parent["step"]))

    @property
    def steps(self) -> int:
        """Returns the number of batches of the whole run: of sequences, or of prompts without the last incomplete batch."""
        if self.kind == "train":
            return self.config.steps
        path = self.path / "inputs.json"
        prompts = read_json(path).get("prompts")
        require(type(prompts) is int, f"prompts of {path}", prompts, "a whole number")
        return prompts // self.config.batch_size

    @property
    def done(self) -> int:
        """Returns how many batches a resumed run skips: those up to its last checkpoint, or the answered ones."""
        if self.kind == "train":
            return (self.latest_checkpoint() or (0, None))[0]
        return min(self.log.rows // self.config.batch_size, self.steps)

    @property
    def status(self) -> Status:
        path = self.path / "status.json"
        if not path.is_file() and run_file(self.path, "config.json").name == "ttt.json":
            return self._older_status()
        if not path.exists() and is_run(self.path):  # the power failed while the run was created
            return Status(state="starting", step=self.done, steps=self.steps, pid=None, time=self.path.stat().st_mtime)
        values = read_json(path)
        if isinstance(error := values.get("error"), str):
            values["error"] = printable(shorten(error, 2 * ERROR))
        try:
            return Status(**values)
        except ConfigError as error:
            name, sentence = error.field.removeprefix("Status."), f"{path} is damaged: {error}"
            raise ConfigError(name, error.value, error.allowed, sentence) from None

    def _older_status(self) -> Status:
        """Derives the status of a test-time training run of format version 1 from its answers and `error.txt`."""
        alive, path = self.alive, self.path / "error.txt"  # asked first: the run may end in between
        error = path.read_text(encoding="utf-8") if path.is_file() else None
        ended = "running" if alive else "failed" if error else "stopped"
        state = "finished" if self._all_answered() else ended
        time = (self.path / "env.json").stat().st_mtime
        return Status(state=state, step=self.done, steps=self.steps, error=error, pid=None, time=time)

    def _all_answered(self) -> bool:
        wanted = self.steps * self.config.batch_size
        return self.log.rows >= wanted and len(self.log.done) == wanted  # a damaged file holds no answers

    @property
    def alive(self) -> bool:
        """Returns whether a process works on this run or will do so later, that is, whether one holds its lock."""
        return is_held(self.path)

    @property
    def state(self) -> State | Literal["killed", "waiting"]:
        """Returns the state in `status.json`, except in two cases in which no process holds the lock.

        `waiting`: no process has begun to work on the run since it was created or resumed. `killed`: the process that
        worked on it no longer exists. A finished run is `stopped` if its answers were later damaged or deleted, or if
        its number of steps was raised.
        """
        alive = self.alive  # asked before the status is read: a run may end in between
        status = self.status
        if status.state in ("starting", "running") and not alive:
            return "waiting" if status.pid is None else "killed"
        if status.state == "finished":
            whole = self._all_answered() if self.kind == "answer" else status.step >= self.steps
            return "finished" if whole else "stopped"
        return status.state

    def metrics(self) -> pd.DataFrame:
        """Returns one row per batch."""
        return self._lines("train", TRAIN_COLUMNS)

    def evaluations(self) -> pd.DataFrame:
        """Returns one row per evaluation."""
        return self._lines("eval", EVAL_COLUMNS)

    def updates(self) -> pd.DataFrame:
        """Returns one row per update of test-time training: `step` is its batch from 1, `number` the update on that batch."""
        return self._lines("update", ("step", "time", "number", "names"))

    def answers(self) -> pd.DataFrame:
        """Returns one row per answer of test-time training: `answers.COLUMNS` and the columns of `training.answering`."""
        return self.log.read()

    def _lines(self, kind: str, columns: tuple[str, ...]) -> pd.DataFrame:
        lines = [line for line in MetricsTail(self).read() if line.pop("kind") == kind]
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=list(columns))

    def rollouts(self, steps: Collection[int] | None = None) -> pd.DataFrame:
        """Returns one row per rollout, for the given steps or all; the last steps of a live run are not yet in closed files."""
        frames = []
        for first, last, path in parquet_parts(self.path / "rollouts"):
            if steps is None or any(first <= step <= last for step in steps):
                frame = read_rollouts(path)
                frames.append(frame if steps is None else frame[frame["step"].isin(list(steps))])
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["step", *ROLLOUT_TYPES])

    def require_records(self, last: int) -> None:
        """Raises ValueError, naming the first missing step, unless the records hold all batches up to `last`."""
        parts = parquet_parts(self.path / "rollouts") if self.config.rolls_out else None
        written = {int(step) for step in self.metrics()["step"]}
        for step in range(1, last + 1):
            rolled_out = parts is None or any(first <= step <= end for first, end, _ in parts)
            if step not in written or not rolled_out:
                file = "rollouts" if step in written else "metrics.jsonl"
                raise ValueError(
                    f"{self.path / file} is missing step {step} (the checkpoint is at step {last}): restore the file, delete "
                    "the checkpoints after the last recorded step, or start a new run"
                )

    def log_to(self, tracker: str, *, project: str) -> int:
        """Copies the metrics to an experiment tracker, `trackio` or `wandb`, and returns the number of entries sent.

        A run in progress is followed until it ends; an interrupt ends the following, not the run. Every step is one
        entry, with names such as `train/ntp_loss` and `held_out/ntp_loss`; values that are not finite are left out.
        Another call sends only what the tracker lacks. The tracker is configured by its own environment variables.
        Raises ConfigError for another tracker, and for one that is not installed.
        """
        from refine_lab.runs.tracking import copy_metrics

        return copy_metrics(self, MetricsTail(self), tracker, project)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Returns step and folder of every complete checkpoint, in order."""
        return checkpoints(self.path)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Returns step and folder of the last complete checkpoint, or None."""
        return max(self.checkpoints(), default=None)


def located(config: Any, run: Path) -> Any:
    """Returns a stored configuration with the path of its model if that is a run beside `run`, stored as `run:NAME`."""
    name = config.model.removeprefix(BESIDE)
    return config if name == config.model else replace(config, model=str(run.parent / name))


def portable(config: Any, run: Path) -> Any:
    """Returns a configuration as it is stored, so that runs that start from each other can be moved: see `located`."""
    model = Path(config.model)
    # a run, or weights saved beside it
    beside = model.parent == run.parent and run_file(model, "config.json").is_file()
    return replace(config, model=f"{BESIDE}{model.name}") if beside else config


def list_runs(folder: Path | str | None = None) -> list[Run]:
    """Returns the runs of both kinds in `folder` (default: `runs_dir()`), in the order in which they were created.

    The order is that of their numbers in `started.json`, and of their names for runs without one. A run with a damaged
    configuration is skipped, with a warning that names it.
    """
    folder = Path(folder) if folder is not None else runs_dir()
    runs = []
    for path in sorted(path for path in folder.glob("*") if is_run(path)):
        try:
            run = Run(path)
            _ = run.config
            runs.append((run.number, run.name, run))
        except (OSError, ValueError) as error:
            warnings.warn(printable(f"skipped: {error}"), stacklevel=2)
    return [run for *_, run in sorted(runs, key=lambda each: each[:2])]


def made_at(runs: Iterable[Any]) -> str:
    """Returns a sentence with the commits of runs, from the `env.json` in each run's `path`.

    Raises FileNotFoundError for a run without that file, and ValueError for a damaged one.
    """
    found = set()
    for run in runs:
        env = read_json(run.path / "env.json")
        commit = env.get("commit") or "unknown (no git checkout)"
        found.add(f"{commit} with uncommitted changes" if env.get("dirty") else commit)
    return f"Runs created with commit {', '.join(sorted(found))}."


class MetricsTail:
    """Reads the lines of a run's `metrics.jsonl` added since the last `read`, for following a run."""

    def __init__(self, run: Run) -> None:
        self.restarts = 0
        "How often a resumed run has truncated the file; all lines are then read again."
        self._run = run.path
        self._offset = 0
        self._file: int | None = None

    def read(self) -> list[dict[str, Any]]:
        """Returns new complete lines; null is NaN. Raises ValueError for a line that is not JSON."""
        path = run_file(self._run, "metrics.jsonl")
        try:
            with open_file(path) as file:
                facts = os.fstat(file.fileno())
                if self._file not in (None, facts.st_ino) or facts.st_size < self._offset:
                    self._offset, self.restarts = 0, self.restarts + 1
                self._file = facts.st_ino
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        lines = [parse_line(path, line) for line in whole.splitlines()]
        self._offset += len(whole)
        return lines
