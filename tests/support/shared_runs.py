"""Runs that two workers and one train in turn, compared with uninterrupted ones (see `tests.support.two_workers`)."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from refine_lab.config import TrainConfig, to_json
from refine_lab.runs.checkpoints import check_checkpoint
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.trainer import train
from refine_lab.workers import ALONE, Workers
from tests.factories.durable_runs import CLOCKS, STEPS, After, tiny_config

FILES = ("model.safetensors", "optimizer.safetensors")


def resumed(folder: Path, workers: Workers) -> dict[str, Any]:
    """Trains the same run in several ways, and compares each with the one that one worker has trained."""
    config = tiny_config(folder / "model", batch_size=4, mini_batch_size=2, micro_batch_size=1)
    ways = {
        "one": [(ALONE, "none", STEPS)],
        "two": [(workers, "none", STEPS)],
        "two, one, two": [(workers, "none", 1), (ALONE, "none", 3), (workers, "none", STEPS)],
        "sharded": [(workers, "full", STEPS)],
        "sharded, one, sharded": [(workers, "full", 1), (ALONE, "none", 3), (workers, "full", STEPS)],
    }
    with redirect_stdout(None):
        runs = {
            name: _trained(config, folder / name.replace(", ", "-"), parts, workers) for name, parts in ways.items()
        }
    return {name: _compared(run, runs["one"]) for name, run in runs.items()} if workers.first else {}


def _trained(config: TrainConfig, folder: Path, parts: list[tuple[Workers, str, int]], everyone: Workers) -> Run:
    """Trains a run up to each of the given steps, with other workers and another sharding from there on."""
    if everyone.first:
        with RunWriter.create(config, folder):
            pass
    everyone.wait()
    (path,) = (each.parent for each in folder.glob("*/config.json"))
    done = 0
    for workers, sharding, step in parts:
        if everyone.first:
            (path / "config.json").write_text(to_json(replace(config, sharding=sharding)), encoding="utf-8")
        everyone.wait()
        if everyone.first or workers.count > 1:
            stop = StopSignal(path) if step == STEPS else After(path, step - done)
            train(path, stop, (), workers)
        everyone.wait()
        done = step
    return Run(path)


def _compared(run: Run, reference: Run) -> dict[str, Any]:
    last, other = (each.path / "checkpoints" / f"step-{STEPS}" for each in (run, reference))
    check_checkpoint(last)
    pairs = [(load_file(last / name), load_file(other / name)) for name in FILES]
    tensors = [(a[key], b[key]) for a, b in pairs for key in b]
    ours, theirs = (each.metrics().drop(columns=CLOCKS, errors="ignore") for each in (run, reference))
    return {
        "state": run.status.state,
        "files": sorted(path.name for path in last.iterdir()) == sorted(path.name for path in other.iterdir()),
        "names": all(a.keys() == b.keys() for a, b in pairs),
        "identical": all(torch.equal(a, b) for a, b in tensors),
        "weights": max(float((a - b).abs().max()) for a, b in tensors),
        "metrics": float((ours - theirs).abs().max().max()),
        "same_rollouts": _tokens(run) == _tokens(reference),
        "checkpoints": [number for number, _ in run.checkpoints()],
    }


def _tokens(run: Run) -> list[list[int]]:
    return [list(tokens) for tokens in run.rollouts()["rollout_ids"]]
