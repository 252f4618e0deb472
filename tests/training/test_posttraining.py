"""Nested post-training against a hand-written sequence of optimizer steps, and batches of prompts with answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import refine_lab.training.posttraining as nested_module
from refine_lab.config import RefineConfig, TaskConfig, TrainConfig
from refine_lab.data.tasks.batches import TaskData, prompt_batch
from refine_lab.data.tasks.examples import Example
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.recipes.methods import CHANGES
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.training.posttraining import answer_stats, nested_step
from refine_lab.types import Batch, PromptBatch
from tests.support.naive import naive_loss
from tests.support.refusals import naming, refused

VOCABULARY = 53
METHOD = RefineConfig(num_chunks=4, margin=5, reward="hybrid")
LR, DECAY, NORM = 0.01, 0.1, 0.5


def make_policy() -> DeltaNetForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_heads=2, num_hidden_layers=2, intermediate_size=40, vocab_size=VOCABULARY)
    return DeltaNetForCausalLM(DeltaNetConfig(**sizes, tie_word_embeddings=True, initializer_range=0.05)).double()


def make_example(name: str, prompt: int, answer: int, seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (prompt + answer,), generator=generator).tolist()
    texts = dict(answers=("a",), question="", documents=())
    return Example(
        name=name, prompt_ids=tuple(ids[:prompt]), answer_ids=tuple(ids[prompt:]), question_start=prompt, **texts
    )


def make_prompts() -> PromptBatch:
    sizes = [(90, 3), (61, 1), (75, 5), (90, 2)]
    return prompt_batch([make_example(f"{i}", *size, seed=i) for i, size in enumerate(sizes)], (0, 1, 2, 3))


def train_state_for(policy: DeltaNetForCausalLM, refine: RefineConfig | None, **changes) -> TrainState:
    values = {"nested": True, "batch_size": 4, "mini_batch_size": 2, "micro_batch_size": 2, **changes}
    config = TrainConfig(
        recipe="test", refine=refine, task=TaskConfig(), lr=LR, weight_decay=DECAY, max_grad_norm=NORM, **values
    )
    reward = REWARDS[refine.reward] if refine else None
    return TrainState(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)


class AdamWByHand:
    """Loshchilov and Hutter (2019), algorithm 2, after scaling the gradient down to `NORM`."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.t = parameters, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def step(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
        self.t += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
                g = g * min(1.0, NORM / norm)
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                unbiased = (m / (1 - 0.9**self.t), v / (1 - 0.999**self.t))
                p.copy_(p - LR * DECAY * p - LR * unbiased[0] / (unbiased[1].sqrt() + 1e-8))


def next_token_loss(policy: DeltaNetForCausalLM, batch: Batch) -> Tensor:
    """One row at a time, with whole logits."""
    rows = [row[:length].unsqueeze(0) for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
    losses = [
        torch.nn.functional.cross_entropy(policy(row).logits[0, :-1], row[0, 1:], reduction="none") for row in rows
    ]
    return torch.cat(losses).mean()


def answers_loss(policy: DeltaNetForCausalLM, batch: PromptBatch) -> Tensor:
    losses = []
    for row, start, end in zip(
        batch.sequences.tokens, batch.prompts.lengths.tolist(), batch.sequences.lengths.tolist(), strict=True
    ):
        logits = policy(row[:end].unsqueeze(0)).logits[0, start - 1 : end - 1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[start:end], reduction="none"))
    return torch.cat(losses).mean()


def assert_same_weights(policy: DeltaNetForCausalLM, reference: DeltaNetForCausalLM) -> None:
    for (name, p), q in zip(policy.named_parameters(), reference.parameters(), strict=True):
        assert float(((p - q).norm() / q.norm()).detach()) <= 1e-6, name


@pytest.mark.parametrize("micro", [1, 2])
def test_nested_sft_is_this_sequence_of_updates(micro):
    policy, reference, batch = make_policy(), make_policy(), make_prompts()
    result = nested_step(train_state_for(policy, None, micro_batch_size=micro), batch, Draws(seed=3, step=1))
    optimizer = AdamWByHand(list(reference.parameters()))
    for start in (0, 2):
        optimizer.step(next_token_loss(reference, batch.prompts.rows(start, start + 2)))
    before = float(answers_loss(reference, batch).detach())
    optimizer.step(answers_loss(reference, batch))
    assert_same_weights(policy, reference)
    assert result.metrics["updates"] == 3 and result.rollouts is None
    assert result.metrics["answer_loss"] == pytest.approx(before, rel=1e-9), "of the weights after the inner updates"


@pytest.mark.parametrize("name", ["expected", "weighted", "longce", "dft", "placebo"])
def test_every_method_makes_the_inner_updates_and_the_one_on_the_answers(name):
    refine = replace(RefineConfig(num_chunks=3, reward="hybrid"), **{"window": 16, **CHANGES[name]})
    policy, sft = make_policy(), make_policy()
    result = nested_step(train_state_for(policy, refine), make_prompts(), Draws(seed=3, step=1))
    other = nested_step(train_state_for(sft, None), make_prompts(), Draws(seed=3, step=1))
    assert result.metrics["updates"] == 3 and "skipped_updates" not in result.metrics
    assert (result.rollouts is not None) == refine.rolls_out
    assert abs(result.metrics["answer_loss"] - other.metrics["answer_loss"]) > 1e-9


def test_nested_refine_is_this_sequence_of_updates():
    policy, reference, batch = make_policy(), make_policy(), make_prompts()
    result = nested_step(train_state_for(policy, METHOD), batch, Draws(seed=3, step=1))
    rollouts = result.rollouts
    assert rollouts is not None and rollouts.advantages.abs().max() > 0.5
    optimizer = AdamWByHand(list(reference.parameters()))
    for start in (0, 2):
        mini = batch.prompts.rows(start, start + 2)
        optimizer.step(naive_loss(reference, mini, rollouts.rows(start, start + 2), METHOD))
    optimizer.step(answers_loss(reference, batch))
    assert_same_weights(policy, reference)
    assert result.metrics["updates"] == 3


def test_sft_is_the_update_on_the_answers_alone():
    policy, reference, batch = make_policy(), make_policy(), make_prompts()
    result = nested_step(train_state_for(policy, None, nested=False), batch, Draws(seed=3, step=1))
    AdamWByHand(list(reference.parameters())).step(answers_loss(reference, batch))
    assert_same_weights(policy, reference)
    assert result.metrics["updates"] == 1
    assert {name for name in result.metrics if not name.startswith("answer_")} == {"updates"}


@pytest.mark.parametrize("refine", [None, METHOD])
def test_moments_and_order_of_both_kinds_of_update(refine, monkeypatch):
    """All inner updates come first, each optimizer step is counted by the one optimizer, and rollouts precede them."""
    policy, batch, order = make_policy(), make_prompts(), []
    train_state = train_state_for(policy, refine, mini_batch_size=1)
    whole = nested_module._answer_update

    def watched(*arguments):
        order.append(int(train_state.optimizers[0].state[policy.lm_head.weight]["step"]))
        return whole(*arguments)

    monkeypatch.setattr(nested_module, "_answer_update", watched)
    result = nested_step(train_state, batch, Draws(seed=0, step=1))
    assert order == [4], "the answers come after four updates on the prompts"
    assert int(train_state.optimizers[0].state[policy.lm_head.weight]["step"]) == 5 == result.metrics["updates"]


def test_answers_are_the_only_places_of_the_outer_loss():
    batch = make_prompts()
    stats = answer_stats(make_policy(), batch)
    assert stats.logprobs.shape == (3 + 1 + 5 + 2,) == (int(batch.loss_mask.sum()),)
    changed = replace(batch, sequences=replace(batch.sequences, tokens=batch.sequences.tokens.clone()))
    changed.sequences.tokens[1, 62:] = 7  # pads
    assert torch.equal(answer_stats(make_policy(), changed).logprobs, stats.logprobs)


def test_prompts_without_an_answer_are_refused():
    bare = make_example("bare", 20, 0)
    with pytest.raises(ValueError, match="needs an answer of at least one token"):
        prompt_batch([bare], (0,))
    with naming(ValueError, "1 have none", "'bare'"):
        TaskData([make_example("good", 20, 2), bare], seed=0)
    with pytest.raises(ValueError, match="needs examples to train on, got none"):
        TaskData([], seed=0)


def test_every_example_once_an_epoch_in_the_seeds_own_order():
    examples = [make_example(f"{i}", 20 + i, 2, seed=i) for i in range(10)]
    data, other = TaskData(examples, seed=0), TaskData(examples, seed=1)

    def lengths(data: TaskData, size: int) -> list[int]:
        return [n for step in range(20 // size) for n in data.batch(step, size).prompts.lengths.tolist()]

    first = lengths(data, 4)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(20, 30))
    assert first[:10] != first[10:] and first != lengths(other, 4)
    assert first == lengths(data, 2), "whatever the size of a batch"
    assert data.batch(1, 4).prompts.sequence_ids == (4, 5, 6, 7)


def test_configurations_that_make_no_sense_are_refused():
    for settings, field, value, allowed in (
        ({"nested": True}, "nested", True, "false without a task: there are no answers"),
        (
            {"task": TaskConfig()},
            "nested",
            False,
            "true for a task with REFINE, since REFINE makes its updates on the prompts",
        ),
        ({"refine": None, "task": TaskConfig(train=3)}, "batch_size", 128, "at most task.train, 3"),
        (
            {"nested": True, "task": TaskConfig(prompt_tokens=100)},
            "task.prompt_tokens",
            100,
            "at least 161 for the method's num_chunks, rollout_length and margin",
        ),
    ):
        with refused(f"TrainConfig.{field}", value, allowed):
            TrainConfig(recipe="test", **settings)
