"""A run of six batches that trains within a second, runs that answer prompts, and comparisons of two runs' results."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from refine_lab.config import DataConfig, RefineConfig, TaskConfig, TrainConfig
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.adaptation import TTTConfig
from refine_lab.training.trainer import train
from refine_lab.ttt_config import TTTRunConfig
from tests.support.paths import TEXT

CLOCKS = ["time", "seconds", "tokens_per_second"]
VOCABULARY, STEPS = 400, 6


def tiny_model(folder: Path) -> Path:
    """Saves a fresh model of one layer with a tokenizer of the fixture text."""
    train_tokenizer(tokenizer_sample({str(TEXT): 10**5}), VOCABULARY).save_pretrained(folder)
    sizes = dict(hidden_size=16, num_heads=1, num_hidden_layers=1, intermediate_size=16, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    config = DeltaNetConfig(**sizes, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    DeltaNetForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_config(model: Path, **changes: object) -> TrainConfig:
    sizes = dict(batch_size=2, mini_batch_size=1, micro_batch_size=2, steps=STEPS, eval_every=2, checkpoint_every=2)
    data = DataConfig(sources={str(TEXT): 1.0}, sequence_length=48, validation_sequences=2)
    refine = RefineConfig(num_chunks=2, rollout_length=2, margin=4, group_size=2)
    config = TrainConfig(
        recipe="tiny", model=str(model), refine=refine, data=data, **sizes, lr=1e-3, device="cpu", threads=1
    )
    return replace(config, **changes)


def answering_config(model: Path, **changes: object) -> TTTRunConfig:
    """Returns the configuration of a run that adapts to three prompts and answers them."""
    data = DataConfig(sources={str(TEXT): 1.0})
    task = TaskConfig(source="recall:word-1", prompt_tokens=100, train=0, test=3)
    refine = RefineConfig(num_chunks=2, rollout_length=2, margin=4, reward="binary", nsp_coef=0.4)
    ttt = TTTConfig(refine=refine, lr=1e-3)
    config = TTTRunConfig(recipe="tiny", model=str(model), data=data, task=task, ttt=ttt, device="cpu")
    return replace(config, **changes)


def begun(config: TrainConfig, folder: Path) -> Run:
    """The run in `folder`, or a new one."""
    for path in folder.iterdir():
        if (path / "config.json").is_file():
            return Run(path)
    with RunWriter.create(config, folder) as writer:
        return writer.run


class After(StopSignal):
    """A request to stop after so many batches."""

    def __init__(self, path: Path, batches: int) -> None:
        super().__init__(path)
        self.left = batches + 1

    def requested(self) -> str | None:
        self.left -= 1
        return None if self.left else "that was enough"


def go(run: Run) -> Run:
    train(run.path, StopSignal(run.path))
    return run


def assert_same(ours: Run, theirs: Run) -> None:
    """Both have finished with the same weights, moments, metrics and rollouts, bit for bit."""
    assert (ours.status.state, ours.status.step) == ("finished", theirs.status.step)
    for of in (Run.metrics, Run.evaluations):
        a, b = (of(run).drop(columns=CLOCKS, errors="ignore") for run in (ours, theirs))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    pd.testing.assert_frame_equal(ours.rollouts(), theirs.rollouts(), check_exact=True)
    last, other = (run.path / "checkpoints" / f"step-{theirs.status.step}" for run in (ours, theirs))
    assert {path.name for path in last.iterdir()} == {path.name for path in other.iterdir()}
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(last / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def assert_same_answers(ours: Run, theirs: Run) -> None:
    """Both have finished with the same answers and the same lines of updates, bit for bit."""
    assert (ours.status.state, ours.status.step) == ("finished", theirs.status.step)
    for of in (Run.answers, Run.updates):
        a, b = (of(run).drop(columns=CLOCKS, errors="ignore") for run in (ours, theirs))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "emptied": lambda path: os.truncate(path, 0),
    "one bit flipped": lambda path: flip_bit(path, path.stat().st_size * 5),
    "its end damaged": lambda path: flip_bit(path, path.stat().st_size * 8 - 3),
    "removed": lambda path: path.unlink(),
}
