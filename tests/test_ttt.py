"""Test-time training: what moves, what it reports, and that everything is what it was afterwards, whatever happened."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch
from test_step import VOCABULARY, learner_for, make_policy

from refine_lab import ttt
from refine_lab.config import RefineConfig
from refine_lab.draws import Draws
from refine_lab.step import train_step
from refine_lab.ttt import TTTConfig, adapt, adapted, fitted, restored
from refine_lab.types import Batch

PROMPTS, LENGTH = 200, 180


def prompt_of(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def moved(policy, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("method", [None, TTTConfig().method], ids=["sft", "refine"])
def test_it_moves_the_weights_as_training_does_and_puts_them_back(method):
    """The updates are those of `train_step` with an optimizer of its own."""
    policy, twin, prompt = make_policy(), make_policy(), prompt_of()
    before = weights(policy)
    learner = learner_for(twin, method, batch_size=1, mini_batch_size=1, lr=1e-3)
    batch = Batch(tokens=prompt.unsqueeze(0), lengths=torch.tensor([LENGTH]), sequence_ids=(0,))
    truth = [train_step(learner, batch, Draws(seed=0, step=step)).metrics for step in (1, 2, 3)]
    updates: list[ttt.Update] = []
    with adapted(policy, prompt, TTTConfig(method=method, steps=3, lr=1e-3), updates.append) as model:
        assert model is policy
        assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), twin.parameters(), strict=True))
    assert moved(policy, before) == set()
    assert [update.metrics for update in updates] == truth
    assert [update.number for update in updates] == [1, 2, 3]
    assert all((update.rollouts is None) == (method is None) for update in updates)
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


def test_a_named_subset_alone_moves():
    policy = make_policy()
    before = weights(policy)
    policy.model.norm.weight.requires_grad_(False)
    with adapted(policy, prompt_of(), TTTConfig(parameters=r"layers\.1\.attn\.[qk]_proj", lr=1e-3)):
        assert moved(policy, before) == {f"model.layers.1.attn.{name}_proj.weight" for name in "qk"}
    assert moved(policy, before) == set()
    assert [name for name, p in policy.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_it_can_be_stopped_after_any_update_and_stops_where_told():
    policy, prompt = make_policy(), prompt_of()
    with restored(policy):
        updates = adapt(policy, prompt, TTTConfig(steps=100, lr=1e-3))
        first = next(updates)
        updates.close()
        losses = [first.metrics["ntp_loss"]]
    for settings in ({"stop_at_loss": losses[0] - 0.01}, {"stop_at_reward": 0.01}):
        seen: list[ttt.Update] = []
        with adapted(policy, prompt, TTTConfig(steps=100, lr=1e-2, **settings), seen.append):
            pass
        assert 1 <= len(seen) < 100
        last = seen[-1].metrics
        assert last["ntp_loss"] <= losses[0] - 0.01 or last["reward_mean"] >= 0.01
        assert all(u.metrics["ntp_loss"] > losses[0] - 0.01 for u in seen[:-1]) or "stop_at_reward" in settings


class Fault(Exception):
    """Ours alone."""


@pytest.mark.parametrize("kind", ["exception", "interrupt", "stop", "memory"])
def test_after_any_fault_the_weights_are_what_they_were(kind, monkeypatch):
    """50 prompts a kind, the fault at a random place of a random update: bit for bit, flags and gradients too."""
    policy, chance = make_policy(torch.float32), random.Random(kind)
    before, gradient = weights(policy), torch.ones_like(policy.head_weight)
    policy.head_weight.grad = gradient
    step = torch.optim.AdamW.step

    def strike() -> None:
        if kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        raise {"exception": Fault, "stop": SystemExit, "memory": torch.OutOfMemoryError}.get(kind, Fault)("now")

    for number in range(PROMPTS // 4):
        when, place, done = chance.randint(1, 3), chance.choice(["before", "after", "report", "answer"]), [0]

        def faulty(self, *arguments, when=when, place=place, done=done):
            done[0] += 1
            if done[0] == when and place == "before":
                strike()
            step(self, *arguments)
            if done[0] == when and place == "after":
                strike()

        def report(update, when=when, place=place):
            if update.number == when and place == "report":
                strike()

        monkeypatch.setattr(torch.optim.AdamW, "step", faulty)
        config = TTTConfig(steps=3, lr=1e-2, method=None if number % 2 else TTTConfig().method)
        faults, prompt = (Fault, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError), prompt_of(seed=number)
        with pytest.raises(faults), adapted(policy, prompt, config, report):  # noqa: PT012
            assert moved(policy, before)
            strike()
        assert moved(policy, before) == set(), (number, place, when)
        assert policy.head_weight.grad is gradient
        assert all(p.requires_grad for p in policy.parameters())


def test_an_interrupt_while_the_weights_are_put_back_waits(monkeypatch):
    policy = make_policy()
    before, copy, struck = weights(policy), torch.Tensor.copy_, []

    def slow(self, other):
        if isinstance(self, torch.nn.Parameter) and not struck:
            struck.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return copy(self, other)

    with pytest.raises(KeyboardInterrupt), restored(policy):  # noqa: PT012
        for p in policy.parameters():
            p.data.add_(1.0)
        monkeypatch.setattr(torch.nn.Parameter, "copy_", slow)
    assert struck and moved(policy, before) == set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_short_prompt_has_fewer_chunks_and_says_so():
    method = RefineConfig(num_chunks=8, rollout_length=5, margin=20)
    assert fitted(method, 200) == method
    few = fitted(method, 60)
    assert (few.num_chunks, few.margin) == (2, 20)
    assert (fitted(method, 12).num_chunks, fitted(method, 12).margin) == (2, 0)
    seen: list[ttt.Update] = []
    with adapted(make_policy(), prompt_of(60), TTTConfig(method=method, steps=1), seen.append):
        pass
    assert seen[0].num_chunks == 2


@pytest.mark.parametrize(
    ("length", "settings", "sentence"),
    [
        (0, {}, "a prompt's tokens must be at least 2: one to read and one to predict, got 0"),
        (5, {}, "a prompt of 5 tokens has no room for a rollout of 5; it must have at least 6"),
        (
            60,
            {"parameters": "no_such"},
            "parameters must be found in a name, such as 'model.embeddings.weight', got 'no_such'",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(length, settings, sentence):
    policy = make_policy()
    before = weights(policy)
    with pytest.raises(ValueError, match=sentence), adapted(policy, prompt_of(length), TTTConfig(**settings)):
        pass
    assert moved(policy, before) == set()


def test_tokens_beyond_the_vocabulary_are_refused():
    outside, sentence = torch.tensor([0, 53]), r"a prompt's tokens must be from 0 to 52, got \[0, 53\]"
    with pytest.raises(ValueError, match=sentence), adapted(make_policy(), outside, TTTConfig(method=None)):
        pass
    with pytest.raises(ValueError, match=r"TTTConfig.parameters must be a regular expression, got '\('"):
        TTTConfig(parameters="(")
