"""Run directories of test-time training: what was asked, with what, every update and every answer.

ttt.json       the configuration, with its format version        answers/       <first>-<last>.parquet, closed files
inputs.json    which prompts and weights it was begun with       checkpoints/   step-<n>/, the last one; never reset only
env.json       versions, device, commit                          lock           held while a process writes
updates.jsonl  a line a step                                    stop, log.txt, error.txt   see `answering`
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from refine_lab.config import from_json, to_json
from refine_lab.environment import environment
from refine_lab.inputs import changes
from refine_lab.optim import load_optimizer_tensors, optimizer_tensors
from refine_lab.records import Run
from refine_lab.run_files import (
    checkpoints,
    drop_leftovers,
    is_held,
    new_directory,
    parse_line,
    plain,
    read_json,
    replace_text,
    take_lock,
    write_inputs,
)
from refine_lab.tasks.answers import AnswerLog
from refine_lab.ttt.adaptation import Adapter
from refine_lab.ttt.config import TTTRunConfig

CONFIG = "ttt.json"


class TTTRun:
    """A run directory of test-time training. Raises FileNotFoundError where `path` is none."""

    def __init__(self, path: Path | str, *, held: bool = False) -> None:
        """`held`: its lock is this process's already."""
        self.path = Path(path).absolute()
        self.name = self.path.name
        self._held = held
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(f"{self.path} is no run directory of test-time training: it has no {CONFIG}")
        self.log = AnswerLog(self.path / "answers")

    def __repr__(self) -> str:
        return f"TTTRun({str(self.path)!r})"

    @classmethod
    def create(cls, config: TTTRunConfig, inputs: Mapping[str, Any], folder: Path) -> TTTRun:
        """A new directory `<date>-ttt-<recipe>-<way>-s<seed>` in `folder`."""
        path = new_directory(
            folder, f"{time.strftime('%Y%m%d-%H%M%S')}-ttt-{config.recipe}-{config.way}-s{config.seed}"
        )
        for part in ("answers", "checkpoints"):
            (path / part).mkdir()
        replace_text(path / "env.json", json.dumps(environment(config.device), indent=2) + "\n")
        write_inputs(path, inputs)
        replace_text(path / CONFIG, to_json(config))  # last: a directory with a ttt.json is a run
        return cls(path)

    @classmethod
    def taken_up(cls, config: TTTRunConfig, inputs: Mapping[str, Any], folder: Path) -> TTTRun:
        """The newest run in `folder` with this configuration and these inputs, finished or not; else a new one."""
        for path in sorted(folder.glob(f"*-ttt-*/{CONFIG}"), reverse=True):
            run = cls(path.parent)
            try:
                same = run.config == config and not changes(run.inputs, inputs, config)
            except (OSError, ValueError):  # damaged, or of another version: no reason not to make a new one
                continue
            if same:
                return run
        return cls.create(config, inputs, folder)

    @cached_property
    def config(self) -> TTTRunConfig:
        path = self.path / CONFIG
        return from_json(path.read_text(encoding="utf-8"), str(path), TTTRunConfig)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What it was begun with besides its configuration (`refine_lab.inputs.inputs_of`)."""
        return read_json(self.path / "inputs.json")

    @property
    def alive(self) -> bool:
        """Whether a process writes it, or will when its turn comes."""
        return is_held(self.path)

    @property
    def prompts(self) -> int:
        """How many it answers: all in whole batches."""
        size = self.config.batch_size
        return int(self.inputs["prompts"]) // size * size

    @property
    def state(self) -> Literal["running", "finished", "failed", "stopped"]:
        """`stopped` also where it has not begun; `running` also while it waits for its turn."""
        alive = self.alive  # asked first: it may end in between
        if self.log.rows >= self.prompts and len(self.log.done) == self.prompts:
            return "finished"
        return "running" if alive else "failed" if self.error else "stopped"

    @property
    def error(self) -> str:
        """Why answering it failed, or nothing."""
        path = self.path / "error.txt"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def answers(self) -> pd.DataFrame:
        """A row an answer, with the arm as `way`: columns of `tasks.answers.COLUMNS` and those of `ttt.runs`."""
        return self.log.read()

    def updates(self) -> pd.DataFrame:
        """A row a step: `step` is the number of its batch from 1, `number` that of the step on it."""
        path = self.path / "updates.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        return pd.DataFrame([parse_line(path, line) for line in lines if line.endswith(b"\n")])

    # -- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held while one process writes, whatever becomes of it. Raises BlockingIOError where another one does."""
        lock = None if self._held else take_lock(self.path)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def write_update(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the line of one step on batch `step`, in one write; a number that is not finite is null."""
        line = {"kind": "update", "step": step, "time": time.time(), **values}
        text = json.dumps({name: plain(value) for name, value in line.items()}, allow_nan=False) + "\n"
        with (self.path / "updates.jsonl").open("ab", buffering=0) as file:
            whole = text.encode()
            if file.write(whole) < len(whole):
                raise OSError(f"{file.name} cannot grow: the disk is full")

    def cut_back(self, finished: Collection[int], rows: int | None = None) -> None:
        """Drop what a killed process left half done: the updates of other batches than `finished`, answers past `rows`."""
        drop_leftovers(self.path)
        for left in self.log.folder.glob(".*.tmp"):
            left.unlink()
        path = self.path / "updates.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith(b"\n") and parse_line(path, line)["step"] in finished]
        if len(kept) < len(lines):
            replace_text(path, b"".join(kept).decode())
        if rows is not None:
            self.log.cut(rows)
        replace_text(self.path / "env.json", json.dumps(environment(self.config.device), indent=2) + "\n")

    # -- checkpoints: weights that are never reset ---------------------------------------------------------------------

    def checkpoint(self) -> int:
        """How many batches the last whole checkpoint has seen, 0 without one."""
        return max((step for step, _ in checkpoints(self.path)), default=0)

    def save(self, step: int, adapter: Adapter) -> None:
        """Keep the moved weights and the moments after batch `step`, in place of the checkpoint before."""
        final = self.path / "checkpoints" / f"step-{step}"
        folder = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(
            {name: p.detach().contiguous() for name, p in _moving(adapter).items()}, folder / "weights.safetensors"
        )
        save_file(optimizer_tensors(adapter.optimizers), folder / "optimizer.safetensors")
        folder.rename(final)
        self.drop_checkpoints(keep=step)

    def load(self, adapter: Adapter) -> None:
        """Put the last checkpoint's weights and moments into the model and the optimizer."""
        _, folder = max(checkpoints(self.path))
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, p in _moving(adapter).items():
                p.copy_(weights[name])
        load_optimizer_tensors(adapter.optimizers, load_file(folder / "optimizer.safetensors"))

    def drop_checkpoints(self, keep: int | None = None) -> None:
        for step, folder in checkpoints(self.path):
            if step != keep:
                shutil.rmtree(folder)


def is_run(path: Path) -> bool:
    """Whether it is a run directory, of training or of test-time training."""
    return any((path / name).is_file() for name in (CONFIG, "config.json"))


def opened_run(path: Path) -> Run | TTTRun:
    """The run in a directory, of either kind. Raises FileNotFoundError where it is none."""
    return TTTRun(path) if (path / CONFIG).is_file() else Run(path)


def list_ttt_runs(folder: Path) -> list[TTTRun]:
    """The runs of test-time training in `folder`, oldest first; one whose ttt.json is damaged is told and left out."""
    runs = []
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        run = TTTRun(path.parent)
        try:
            _ = run.config
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
        else:
            runs.append(run)
    return runs


def _moving(adapter: Adapter) -> dict[str, nn.Parameter]:
    moving = {id(p) for p in adapter.moving}
    return {name: p for name, p in adapter.model.named_parameters() if id(p) in moving}
