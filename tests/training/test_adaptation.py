"""Test-time training: what moves, what it reports, and that everything is what it was afterwards, whatever happened."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch

from refine_lab.config import RefineConfig
from refine_lab.method.step import train_step
from refine_lab.recipes.methods import CHANGES
from refine_lab.rng import Draws
from refine_lab.training import adaptation as ttt
from refine_lab.training.adaptation import TTTConfig, adapt, adapted, fit_to_length, preserve_weights
from refine_lab.types import Batch
from tests.factories.step import VOCABULARY, make_policy, train_state_for
from tests.support.refusals import naming, refused

PROMPTS, LENGTH = 200, 180


def prompt_of(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def moved(policy, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("refine", [None, TTTConfig().refine], ids=["sft", "refine"])
def test_it_moves_the_weights_as_training_does_and_puts_them_back(refine):
    """The updates are those of `train_step` with an optimizer of its own, every setting handed on."""
    policy, twin, prompt = make_policy(), make_policy(), prompt_of()
    before = weights(policy)
    settings = dict(lr=1e-3, weight_decay=0.3, max_grad_norm=0.05)
    train_state = train_state_for(twin, refine, batch_size=1, mini_batch_size=1, **settings)
    batch = Batch(tokens=prompt.unsqueeze(0), lengths=torch.tensor([LENGTH]), sequence_ids=(0,))
    expected = [train_step(train_state, batch, Draws(seed=7, step=step)).metrics for step in (1, 2, 3)]
    updates: list[ttt.Update] = []
    with adapted(policy, prompt, TTTConfig(refine=refine, steps=3, seed=7, **settings), updates.append) as model:
        assert model is policy
        assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), twin.parameters(), strict=True))
        assert all(p.grad is None for p in policy.parameters())
    assert moved(policy, before) == set()
    assert [update.metrics for update in updates] == expected
    assert [update.number for update in updates] == [1, 2, 3]
    assert all((update.rollouts is None) == (refine is None) for update in updates)
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("name", CHANGES)
def test_every_method_adapts_and_puts_the_weights_back(name):
    policy, found = make_policy(), []
    refine = replace(RefineConfig(reward="binary", nsp_coef=0.4, window=32), **{"window": 32, **CHANGES[name]})
    before = weights(policy)
    with adapted(policy, prompt_of(), TTTConfig(refine=refine, steps=2, lr=1e-3), found.append):
        assert len(moved(policy, before)) > 10
    assert moved(policy, before) == set()
    assert all((update.rollouts is not None) == refine.rolls_out for update in found)
    own = "reward_mean" if refine.rolls_out else "target_probability" if refine.has_places else "token_weight"
    assert own in found[-1].metrics


def test_a_method_without_positions_adapts_to_any_prompt():
    dft = RefineConfig(**CHANGES["dft"])
    with adapted(make_policy(), prompt_of(3), TTTConfig(refine=dft, steps=1)):
        pass
    assert fit_to_length(dft, 3) == dft
    with naming(ValueError, "3 tokens"):
        fit_to_length(RefineConfig(**CHANGES["expected"]), 3)


def test_the_modules_own_example():
    model, text = make_policy(), prompt_of().unsqueeze(0)
    before = model.generate(text, max_new_tokens=20, do_sample=False)
    with adapted(model, text[0], TTTConfig(lr=0.05, refine=None)) as same:
        meanwhile = same.generate(text, max_new_tokens=20, do_sample=False)
    assert not torch.equal(meanwhile, before)
    assert torch.equal(model.generate(text, max_new_tokens=20, do_sample=False), before)


@pytest.mark.parametrize("alone", [False, True], ids=["adapted", "adapt"])
def test_a_named_subset_alone_moves(alone):
    policy = make_policy()
    before = weights(policy)
    policy.model.norm.weight.requires_grad_(False)
    config = TTTConfig(parameters=r"layers\.1\.attn\.[qk]_proj|model\.norm", lr=1e-3)
    with preserve_weights(policy) if alone else adapted(policy, prompt_of(), config):
        if alone:
            list(adapt(policy, prompt_of(), config))
        assert moved(policy, before) == {f"model.layers.1.attn.{name}_proj.weight" for name in "qk"}
    assert moved(policy, before) == set()
    assert [name for name, p in policy.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_a_tied_weight_goes_by_either_name():
    policy = make_policy()
    assert policy.lm_head.weight is policy.get_input_embeddings().weight
    before = weights(policy)
    with adapted(policy, prompt_of(), TTTConfig(parameters="^lm_head", lr=1e-3)):
        assert moved(policy, before) == {"model.embeddings.weight"}
    assert moved(policy, before) == set()


def test_it_can_be_stopped_after_any_update_and_stops_where_told():
    policy, prompt = make_policy(), prompt_of()
    with preserve_weights(policy):
        updates = adapt(policy, prompt, TTTConfig(steps=100, lr=1e-3))
        first = next(updates)
        updates.close()
        losses = [first.metrics["ntp_loss"]]
    for settings in ({"stop_at_loss": losses[0] - 0.01}, {"stop_at_reward": 0.01}):
        seen: list[ttt.Update] = []
        with adapted(policy, prompt, TTTConfig(steps=100, lr=1e-2, **settings), seen.append):
            pass
        lower = [update.metrics["ntp_loss"] <= losses[0] - 0.01 for update in seen]
        enough = lower if "stop_at_loss" in settings else [update.metrics["reward_mean"] >= 0.01 for update in seen]
        assert len(seen) < 100 and enough == [False] * (len(seen) - 1) + [True]
    seen = []
    with adapted(policy, prompt, TTTConfig(steps=9), lambda update: seen.append(update) or update.number == 2):
        assert [update.number for update in seen] == [1, 2]


class Fault(Exception):
    """Ours alone."""


FAULTS = {
    "exception": Fault,
    "interrupt": KeyboardInterrupt,
    "stop": SystemExit,
    "memory": torch.OutOfMemoryError,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_after_any_fault_the_weights_are_what_they_were(kind, monkeypatch):
    """50 prompts a kind, the fault at a random place of a random update: bit for bit, flags and gradients too."""
    policy, chance = make_policy(torch.float32), random.Random(kind)
    before, gradient = weights(policy), torch.ones_like(policy.lm_head.weight)
    policy.lm_head.weight.grad = gradient
    step = torch.optim.AdamW.step

    def strike() -> None:
        if kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        raise FAULTS[kind]("now")

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
        config = TTTConfig(steps=3, lr=1e-2, refine=None if number % 2 else TTTConfig().refine)
        with pytest.raises(FAULTS[kind]), adapted(policy, prompt_of(seed=number), config, report):  # noqa: PT012
            assert moved(policy, before)
            strike()
        assert moved(policy, before) == set(), (number, place, when)
        assert policy.lm_head.weight.grad is gradient
        assert all(p.requires_grad for p in policy.parameters())


UNGUARDED = 5
"""Lines of the method out before its `try`, where the exception of another signal's handler is nobody's to catch."""


@pytest.mark.parametrize("kind", ["interrupt", "other signal"])
def test_a_signal_at_any_line_from_the_body_on_finds_everything_put_back(kind):
    """At each line in turn that Python runs of this module, from within the body to the end of the context."""
    policy = make_policy()
    before, lines = weights(policy), 0

    def strike_at(number: int):
        left = [number]

        def trace(frame, event, argument):
            if event == "line" and frame.f_code.co_filename == ttt.__file__:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGINT if kind == "interrupt" else signal.SIGALRM)
            return trace

        return trace, left

    def late(number, frame):
        raise TimeoutError("now")

    old = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(1, 1000):
            trace, left = strike_at(number)
            try:
                with preserve_weights(policy):
                    for p in policy.parameters():
                        p.data.add_(1.0)
                    sys.settrace(trace)
            except (KeyboardInterrupt, TimeoutError):
                lines += 1
            finally:
                sys.settrace(None)
            if kind == "interrupt" or number > UNGUARDED:
                assert moved(policy, before) == set(), number
            policy.load_state_dict(before, strict=False)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler or kind != "interrupt", number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if left[0] > 0:
                break
    finally:
        signal.signal(signal.SIGALRM, old)
    assert lines > 20


def test_another_thread_adapts_and_restores_too():
    policy, failed = make_policy(), []
    before = weights(policy)

    def work() -> None:
        try:
            with adapted(policy, prompt_of(), TTTConfig(lr=1e-2)):
                assert moved(policy, before)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and moved(policy, before) == set()


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_mode_does_not_matter_and_no_cast_of_old_weights_stays(mode):
    policy, prompt = make_policy(torch.float32), prompt_of()
    with mode():
        first = policy.read(prompt.unsqueeze(0)).hidden_states
        seen: list[ttt.Update] = []
        with adapted(policy, prompt, TTTConfig(lr=1e-2), seen.append):
            assert not torch.equal(policy.read(prompt.unsqueeze(0)).hidden_states, first)
        assert torch.equal(policy.read(prompt.unsqueeze(0)).hidden_states, first)
    plain: list[ttt.Update] = []
    with adapted(policy, prompt, TTTConfig(lr=1e-2), plain.append):
        pass
    assert [update.metrics for update in seen] == [update.metrics for update in plain]


def test_a_short_prompt_has_fewer_chunks_and_says_so():
    refine = RefineConfig(num_chunks=8, rollout_length=5, margin=20)
    assert fit_to_length(refine, 200) == refine
    found = [fit_to_length(refine, length) for length in range(6, 200)]
    assert [few.num_chunks for few in found] == [min(8, length // 6) for length in range(6, 200)]
    margins = [few.margin for few in found if few.num_chunks == 8]
    assert margins == sorted(margins) and margins[-1] == 20
    assert all(few.fits(length) for few, length in zip(found, range(6, 200), strict=True))
    seen: list[ttt.Update] = []
    said = "a prompt of 30 tokens is too short for the method's settings, so c is 5 and not 8"
    short = TTTConfig(refine=refine, steps=1)
    with pytest.warns(UserWarning, match=said), adapted(make_policy(), prompt_of(30), short, seen.append):
        pass
    assert seen[0].refine == fit_to_length(refine, 30)
    assert seen[0].rollouts.positions.shape == (1, 5)


@pytest.mark.parametrize(
    ("length", "settings", "facts"),
    [
        (0, {}, ["a prompt's tokens", "at least 2", 0]),
        (5, {}, ["a prompt of 5 tokens", "at least 6"]),
        (60, {"parameters": "no_such"}, ["parameters", "'no_such'"]),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(length, settings, facts):
    policy = make_policy()
    before = weights(policy)
    with naming(ValueError, *facts), adapted(policy, prompt_of(length), TTTConfig(**settings)):
        pass
    assert moved(policy, before) == set()


def test_tokens_beyond_the_vocabulary_are_refused():
    outside, allowed = torch.tensor([0, 53]), "from 0 to 52"
    with (
        refused("a prompt's tokens", [0, 53], allowed),
        adapted(make_policy(), outside, TTTConfig(refine=None)),
    ):
        pass
    with refused("TTTConfig.parameters", "("):
        TTTConfig(parameters="(")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (torch.zeros(1, 9, dtype=torch.long), "torch.int64 [1, 9]"),
        (torch.zeros(9), "torch.float32 [9]"),
        ([1, 2], [1, 2]),
    ],
)
def test_what_is_no_row_of_tokens_is_refused(prompt, shown):
    with refused("a prompt", shown, "a row of token ids, a tensor [T] of whole numbers"):
        ttt._check(make_policy(), prompt)


@pytest.mark.parametrize(
    ("settings", "field", "value", "allowed"),
    [
        (
            {"refine": RefineConfig(reward="custom")},
            "refine.reward",
            "custom",
            "one of 'cosine', 'binary', 'hybrid', 'edit', 'exact'",
        ),
        ({"refine": RefineConfig(selection="custom")}, "refine.selection", "custom", "a built-in selection"),
        (
            {"refine": RefineConfig(kl_coef=0.1)},
            "refine.kl_coef",
            0.1,
            "0, since test-time training has no reference policy",
        ),
        ({"refine": None, "stop_at_reward": 0.5}, "stop_at_reward", 0.5, "none for SFT"),
        (
            {"refine": RefineConfig(estimator="dft"), "stop_at_reward": 0.5},
            "stop_at_reward",
            0.5,
            "none for the estimator 'dft'",
        ),
        ({"stop_at_loss": "x"}, "stop_at_loss", "x", "a number, or none"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, field, value, allowed):
    with refused(f"TTTConfig.{field}", value, allowed):
        TTTConfig(**settings)


def test_weights_that_swallow_small_updates_are_refused():
    with refused("the model's dtype", torch.bfloat16):
        list(adapt(make_policy(torch.bfloat16), prompt_of(), TTTConfig()))


def test_a_suspended_adaptation_holds_nothing_back():
    """Whoever stops asking may keep the iterator: another adaptation moves all it names, and all of it is put back."""
    policy, prompt = make_policy(), prompt_of()
    before = weights(policy)
    with preserve_weights(policy):
        suspended = adapt(policy, prompt, TTTConfig(parameters="embed", steps=3))
        next(suspended)
        assert all(p.requires_grad for p in policy.parameters())
    with adapted(policy, prompt, TTTConfig(refine=None, parameters="layers.0", lr=1e-3)):
        suspended.close()
        assert moved(policy, before) == {name for name in before if "layers.0" in name}
    assert moved(policy, before) == set()
