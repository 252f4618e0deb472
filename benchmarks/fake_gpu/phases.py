"""The steps that are watched: those of training, an evaluation, and the explorer's reading with rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.fake_gpu.values import give
from benchmarks.fake_gpu.watch import Watch
from benchmarks.gpu_cases import deltanet, lact
from refine_lab.config import TrainConfig
from refine_lab.explore.reading import read_document
from refine_lab.explore.rollouts import rollouts_at
from refine_lab.method import places
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import FastWeightLM, decode_step
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.recipes import paper_midtrain, paper_posttrain
from refine_lab.recipes.testtime import ttt_paper
from refine_lab.rng import Draws
from refine_lab.training.adaptation import Adapter
from refine_lab.training.evaluation import next_token
from refine_lab.training.optim import make_optimizers
from refine_lab.training.posttraining import nested_step
from refine_lab.types import Batch, PromptBatch
from refine_lab.workers import Workers

MODELS: dict[str, Callable[[], FastWeightLM]] = {"DeltaNet-1.3B": deltanet, "LaCT-760M": lact}
ANSWER = 32
"""Tokens of an answer in post-training, as in RULER."""
EXPLORED = 8
"""Positions of a document from which the explorer rolls out."""

Phase = Literal["midtrain", "posttrain", "ttt", "evaluation", "explore"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: `rows` rows of `length` tokens, all in one micro-batch, for each of the workers."""

    model: Callable[[], FastWeightLM]
    phase: Phase = "midtrain"
    method: str = "refine"
    rows: int = 1
    length: int = 16_384
    activation_checkpointing: str = "blocks"
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A phase that is ready to run: `run` takes the length of the rows and makes one step, whose dtype is that of autocast."""

    run: Callable[[int], object]
    dtype: str
    optimizers: list[Optimizer] = field(default_factory=list)

    def settle(self) -> list[Tensor]:
        """Makes an update with gradients of zeros, which are kept as after any step; returns the optimizers' moments."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        return [x for state in states for x in state.values() if isinstance(x, Tensor)]


def make_step(policy: FastWeightLM, case: Case) -> Step:
    """Prepares a phase with the paper's configuration. Raises ValueError for a method that the phase does not know."""
    checkpoint_activations(policy, case.activation_checkpointing)
    makers = {
        "midtrain": _midtrain,
        "posttrain": _posttrain,
        "ttt": _ttt,
        "evaluation": _evaluation,
        "explore": _explore,
    }
    return makers[case.phase](policy, case)


def _midtrain(policy: FastWeightLM, case: Case) -> Step:
    state = _train_state(policy, case, paper_midtrain(case.method))

    def run(length: int) -> None:
        rows = case.rows * case.workers
        train_step(state, batch(policy, rows, length).to(policy.device), Draws(seed=0, step=1))

    return Step(run=run, dtype=state.config.dtype, optimizers=list(state.optimizers))


def _posttrain(policy: FastWeightLM, case: Case) -> Step:
    method = "nested_refine" if case.method == "refine" else case.method
    state = _train_state(policy, case, paper_posttrain(method))

    def run(length: int) -> None:
        sequences = batch(policy, case.rows, length)
        prompts = PromptBatch(sequences=sequences, prompt_lengths=sequences.lengths - ANSWER)
        nested_step(state, prompts.to(policy.device), Draws(seed=0, step=1))

    return Step(run=run, dtype=state.config.dtype, optimizers=list(state.optimizers))


def _ttt(policy: FastWeightLM, case: Case) -> Step:
    config = ttt_paper(case.method).ttt
    assert config is not None
    adapter = Adapter(policy, config, mini_batch_size=case.rows, micro_batch_size=case.rows)

    def run(length: int) -> None:
        for _ in adapter.adapt(batch(policy, case.rows, length).to(policy.device)):
            pass

    return Step(run=run, dtype=config.dtype, optimizers=list(adapter.optimizers))


def _evaluation(policy: FastWeightLM, case: Case) -> Step:
    state = _train_state(policy, case, paper_midtrain("sft"))

    def run(length: int) -> None:
        with state.autocast():
            next_token(policy, batch(policy, case.rows, length), micro_batch_size=case.rows)

    return Step(run=run, dtype=state.config.dtype)


def _explore(policy: FastWeightLM, case: Case) -> Step:
    def run(length: int) -> None:
        reading, trace = read_document(policy, batch(policy, 1, length).tokens[0])
        positions = [(2 * place + 1) * length // (2 * EXPLORED) for place in range(EXPLORED)]
        rollouts_at(policy, reading, trace, positions)

    return Step(run=run, dtype="float32")


def _train_state(policy: FastWeightLM, case: Case, config: TrainConfig) -> TrainState:
    rows, workers = case.rows * case.workers, Workers(0, case.workers)
    config = replace(config, batch_size=rows, mini_batch_size=rows, micro_batch_size=case.rows)
    refine = config.refine
    reward = REWARDS[refine.reward] if refine is not None and refine.rolls_out else None
    return TrainState(
        policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward, workers=workers
    )


def batch(policy: FastWeightLM, rows: int, length: int) -> Batch:
    """Returns rows of random tokens on the CPU, whose values are known."""
    generator: Any = torch.Generator().manual_seed(0)
    with _disable_current_modes():
        tokens = torch.randint(policy.config.vocab_size, (rows, length), generator=generator)
        return Batch(tokens=tokens, lengths=torch.full((rows,), length), sequence_ids=tuple(range(rows)))


@contextmanager
def middle_positions() -> Iterator[None]:
    """Gives the positions that are drawn from entropies, which have no values, those in the middle of the chunks."""
    original = places.select_positions

    def select(probabilities: Tensor, lengths: Tensor, sequence_ids: Any, draws: Draws, num_chunks: int) -> Tensor:
        positions = original(probabilities, lengths, sequence_ids, draws, num_chunks)
        with _disable_current_modes():
            size = probabilities.shape[1] // num_chunks
            values = (torch.arange(num_chunks) * size + size // 2).expand(tuple(positions.shape)).contiguous()
        return give(positions, values.to(positions.dtype))

    places.select_positions = select
    try:
        yield
    finally:
        places.select_positions = original


@contextmanager
def one_graph(watch: Watch) -> Iterator[None]:
    """Runs what is compiled as one graph operation by operation, and counts how often it is started.

    `tests/models/test_decode_step.py` shows that it compiles, and that its result is the same.
    """
    original, _ = decode_step.compiled, torch._dynamo  # imported here, outside of what is watched

    def start(*arguments: Any) -> None:
        watch.roofline.phases["decode"].graphs += 1
        decode_step.decode(*arguments)

    decode_step.compiled = lambda: start
    try:
        yield
    finally:
        decode_step.compiled = original
