"""What the tests of posttraining and others share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from refine_lab.config import DataConfig, RefineConfig, TaskConfig, TrainConfig
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.training.inputs import resume_or_create
from refine_lab.training.trainer import train
from tests.support.paths import TEXT

VOCABULARY = 1200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), VOCABULARY).save_pretrained(folder)
    sizes = dict(hidden_size=32, num_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    config = DeltaNetConfig(**sizes, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    DeltaNetForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents of different words with a question each."""
    text = " ".join(path.read_text() for path in sorted(TEXT.rglob("*.txt"))).split()
    chance, lines = random.Random(0), []
    for number in range(30):
        words = " ".join(chance.sample(text, 60))
        prompt = f"Document 1:\n{words}\n\nQuestion: what is number {number}?\nAnswer:"
        lines.append(json.dumps({"prompt": prompt, "answer": [f"thing {number % 3}", "another"]}))
    path = tmp_path_factory.mktemp("task") / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(checkpoint: Path, prompts: Path, method: str) -> TrainConfig:
    task = TaskConfig(source=str(prompts), train=20, validation=4, test=6, prompt_tokens=400, answer_tokens=4)
    refine = RefineConfig(num_chunks=3, margin=8, reward="hybrid") if method == "nested_refine" else None
    return TrainConfig(
        recipe="test", model=str(checkpoint), refine=refine, nested=method != "sft", task=task, data=DataConfig(),
        steps=6, batch_size=4, mini_batch_size=2, micro_batch_size=2, lr=1e-3, eval_every=3, checkpoint_every=2,
        device="cpu", threads=1,
    )  # fmt: skip


class StopAfter(StopSignal):
    """Asks for a stop at the question number `steps` + 1."""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__(path)
        self.left = steps

    def requested(self) -> str | None:
        self.left -= 1
        return "enough" if self.left < 0 else None


def trained(config: TrainConfig, folder: Path, *, stop_after: int | None = None) -> Run:
    (run,) = resume_or_create([config], folder)
    if stop_after is not None:
        train(run.path, StopAfter(run.path, stop_after))
        assert run.status.state == "stopped" and len(run.metrics()) == stop_after
    train(run.path, StopSignal(run.path))
    assert run.status.state == "finished"
    return run
