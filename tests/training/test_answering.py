"""Runs of test-time training: what is answered with which weights, what is written, and going on after whatever ended them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from refine_lab.config import TrainConfig, to_json
from refine_lab.data.batches import padded
from refine_lab.data.tasks.prompts import Example
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.rng import Draws
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.files import take_lock
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.adaptation import TTTConfig, Update, preserve_weights, read_prompt
from refine_lab.training.answering import adapt_ids, batches_of, check_prompts, example_of, run_prompts
from refine_lab.training.answers import answer
from refine_lab.training.inputs import inputs_of, new_run
from refine_lab.training.optim import make_optimizers
from refine_lab.ttt_config import TTTRunConfig
from tests.factories.ttt_runs import METHOD, RULE, TTT, config_of, examples, made, model
from tests.support.refusals import naming, refused

TIMES = ["seconds", "time", "tokens_per_second"]


def go(run: Run, report: Any = lambda names, update: None, chosen: list[Example] | None = None) -> bool:
    """Run, and hold the model to its bits."""
    policy, tokenizer = model()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    try:
        with take_lock(run.path):
            return run_prompts(run, policy, tokenizer, examples() if chosen is None else chosen, RULE, report)
    finally:
        assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
        assert all(p.grad is None and p.requires_grad for p in policy.parameters())


def records(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers and updates without times."""
    return run.answers().drop(columns=TIMES, errors="ignore"), run.updates().drop(columns=TIMES, errors="ignore")


def assert_same(run: Run, whole: Run) -> None:
    for mine, theirs in zip(records(run), records(whole), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


# -- the weights that answer ---------------------------------------------------------------------------------------------


def by_hand(config: TTTRunConfig, chosen: list[Example]) -> list[tuple[str, float]]:
    """(answer, loss of the prompt after adapting), by `train_step` and AdamW written out."""
    policy, tokenizer = model()
    assert config.ttt is not None
    found: list[tuple[str, float]] = []
    run = TrainConfig(
        recipe="hand",
        refine=config.ttt.refine,
        batch_size=config.batch_size,
        mini_batch_size=config.mini_batch_size,
        micro_batch_size=1,
        lr=config.ttt.lr,
    )
    reward = REWARDS["binary"] if config.ttt.refine else None
    optimizers = None
    with preserve_weights(policy):
        start = {name: p.detach().clone() for name, p in policy.named_parameters()}
        for first in range(0, len(chosen) - config.batch_size + 1, config.batch_size):
            part = chosen[first : first + config.batch_size]
            if config.reset == "prompt" or optimizers is None:
                policy.load_state_dict(start, strict=False)
                optimizers = make_optimizers(policy, run)
            train_state = TrainState(policy=policy, optimizers=optimizers, config=run, reward=reward)
            ids = [adapt_ids(example, config.adapt_on).numpy() for example in part]
            batch = padded(ids, tuple(range(first, first + len(part))))
            for step in range(1, config.ttt.steps + 1):
                train_step(train_state, batch, Draws(seed=config.seed, step=step))
            losses = [float(read_prompt(policy, torch.tensor(example.prompt_ids)).losses.mean()) for example in part]
            found += zip(answer(policy, tokenizer, part, RULE, 1), losses, strict=True)
    return found


@pytest.mark.parametrize("method", ["refine", "sft"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"adapt_on": "document"}, {"reset": "never"}, {"reset": "never", "mini_batch_size": 2}],
    ids=["prompt", "document", "never", "never-one-update"],
)
def test_it_answers_with_the_weights_of_a_hand_written_sequence_of_updates(tmp_path, method, changes):
    config = config_of(**changes)
    if method == "sft":
        assert config.ttt is not None
        config = replace(config, ttt=replace(config.ttt, refine=None))
    run = made(tmp_path, config)
    assert go(run)
    answers = run.answers()
    assert list(zip(answers["answer"], answers["loss_after"], strict=True)) == by_hand(config, examples())
    assert answers["loss_before"].sub(answers["loss_after"]).abs().gt(1e-4).all()
    assert set(answers["method"]) == {method} and set(answers["reset"]) == {config.reset}
    a_batch = {1: 2, 2: 1}[config.mini_batch_size] if config.reset == "never" else TTT.steps
    assert set(answers["updates"]) == {a_batch}


def test_the_paper_updates_twice_a_batch_and_drops_the_last_incomplete_one(tmp_path):
    """8 prompts, 4 an update; the released code's SFT makes one of them."""
    chosen = examples(19)
    for method, mini, expected in (("refine", 4, 2), ("sft", 8, 1)):
        ttt = TTTConfig(refine=METHOD if method == "refine" else None, steps=1, lr=1e-3)
        config = config_of("never", batch_size=8, mini_batch_size=mini, micro_batch_size=4, ttt=ttt)
        run = made(tmp_path, config, chosen)
        assert go(run, chosen=chosen)
        lines = run.updates()
        assert lines["step"].tolist() == [1, 2] and lines["updates"].tolist() == [expected] * 2
        assert run.answers()["name"].tolist() == [f"made-{i}" for i in range(16)]
        assert lines["names"].tolist() == [[f"made-{i}" for i in range(first, first + 8)] for first in (0, 8)]
        assert [folder.name for _, folder in run.checkpoints()] == ["step-1", "step-2"], "two, in case one is damaged"
    parts, dropped = batches_of(chosen, 8)
    assert [len(part) for part in parts] == [8, 8] and [e.name for e in dropped] == ["made-16", "made-17", "made-18"]


def test_without_adapting_nothing_moves_and_nothing_is_drawn(tmp_path):
    run = made(tmp_path, config_of(ttt=None))
    policy, tokenizer = model()
    assert go(run)
    answers = run.answers()
    assert answers["answer"].tolist() == answer(policy, tokenizer, examples(), RULE, 1)
    assert (answers["loss_before"] == answers["loss_after"]).all() and (answers["updates"] == 0).all()
    assert run.config.method == "none" and run.updates().empty and "-ttt-test-none-s0" in run.name


def test_readings_are_those_of_the_plain_softmax():
    policy, _ = model()
    prompt = torch.tensor(examples()[0].prompt_ids)
    reading = read_prompt(policy, prompt)
    with torch.no_grad():
        logprobs = policy(prompt.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
    torch.testing.assert_close(reading.entropies.double(), -(logprobs.exp() * logprobs).sum(-1), atol=1e-5, rtol=0)
    picked = -logprobs.gather(1, prompt[1:].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(reading.losses.double(), picked, atol=1e-5, rtol=1e-5)


def test_it_stops_early_by_reward_or_loss_and_tells_how_many_updates_it_made(tmp_path):
    for number, stop in enumerate(({"stop_at_loss": 100.0}, {"stop_at_reward": 0.0}, {})):
        run = made(tmp_path, config_of(ttt=replace(TTT, **stop)))
        assert go(run)
        assert set(run.answers()["updates"]) == ({1} if number < 2 else {2})


# -- going on ------------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """Ours alone."""


@pytest.mark.parametrize("kind", ["stop", "exception", "interrupt"])
@pytest.mark.parametrize("reset", ["prompt", "never"])
def test_ended_at_any_report_it_goes_on_and_equals_an_uninterrupted_run(tmp_path, reset, kind):
    config, chance = config_of(reset), random.Random(f"{reset} {kind}")
    whole, run = made(tmp_path / "whole", config), made(tmp_path / "parts", config)
    assert go(whole)
    adapted_on: list[tuple[str, ...]] = []

    for _ in range(100):
        left = [chance.randint(1, 4)]

        def strike(names: tuple[str, ...], update: Update | None, left: list[int] = left) -> bool:
            adapted_on.append(names if update and update.number == 1 else ())
            left[0] -= 1
            if left[0] == 0 and kind == "exception":
                raise Fault
            if left[0] == 0 and kind == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            return left[0] == 0

        try:
            if go(run, strike):
                break
        except (Fault, KeyboardInterrupt):
            pass
    assert [path.name for path in run.path.rglob("*.tmp")] == [], "what was half written is gone"
    assert_same(run, whole)
    adapted_on.clear()
    assert go(run, lambda names, update: adapted_on.append(names))
    assert adapted_on == []  # what is answered is not answered again


def child(folder: str, reset: str, place: str, count: str) -> None:
    """In a process of its own: kill -9 it at a place, when it is reached for the `count`-th time."""
    left = [int(count)]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    run, save, write = made(Path(folder), config_of(reset)), RunWriter.checkpoint, AnswerLog.write

    def before_saving(self: RunWriter, step: int) -> Any:
        strike()
        return save(self, step)

    def before_writing(self: Any, rows: Any) -> None:
        strike()
        write(self, rows)

    if place == "checkpoint":
        RunWriter.checkpoint = before_saving  # type: ignore[method-assign]
    if place == "answers":
        AnswerLog.write = before_writing  # type: ignore[method-assign]
    go(run, lambda names, update: strike() if place == "update" and update else None)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("reset", "kills"),
    [
        ("prompt", [("update", 4), ("answers", 1)]),
        ("never", [("update", 2), ("checkpoint", 1), ("answers", 1)]),
    ],
)
def test_killed_it_goes_on_and_equals_an_uninterrupted_run(tmp_path, reset, kills):
    whole = made(tmp_path / "whole", config_of(reset))
    assert go(whole)
    answered = []
    for place, count in kills:
        call = f"t.child({str(tmp_path / 'parts')!r}, {reset!r}, {place!r}, '{count}')"
        words = f"import tests.training.test_answering as t; {call}"
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", words], env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        (run,) = [Run(path) for path in (tmp_path / "parts").iterdir()]
        answered.append(len(run.answers()))
    assert 0 < answered[-1] < len(whole.answers())
    assert go(run)
    assert_same(run, whole)


@pytest.mark.parametrize("reset", ["prompt", "never"])
def test_damaged_answers_are_answered_again_and_no_others(tmp_path, reset):
    whole, run = made(tmp_path / "whole", config_of(reset)), made(tmp_path / "parts", config_of(reset))
    assert go(whole) and go(run)
    first = sorted((run.path / "answers").iterdir())[0]
    first.write_bytes(b"no parquet")
    seen: list[str] = []
    with pytest.warns(UserWarning, match="is damaged"):
        assert go(run, lambda names, update: seen.extend(names if update is None else ()))
    # weights that were never reset cannot answer an early prompt again: all of it is run anew
    assert seen == (["made-0"] if reset == "prompt" else [f"made-{i}" for i in range(4)])
    if reset == "prompt":
        first.unlink()
    answers = run.answers().sort_values("name", ignore_index=True).drop(columns=TIMES, errors="ignore")
    pd.testing.assert_frame_equal(answers, records(whole)[0], check_exact=True)


def test_a_run_is_taken_up_where_configuration_prompts_and_weights_are_the_same(tmp_path):
    config, chosen = config_of(), examples()
    run = made(tmp_path, config, chosen)
    assert made(tmp_path, config, chosen).path == run.path
    others = {
        made(tmp_path, replace(config, adapt_on="document"), chosen).path,
        made(tmp_path, config, chosen[:-1]).path,
        made(tmp_path, config, [replace(chosen[0], prompt_ids=(5, 6, 7) * 9), *chosen[1:]]).path,
        new_run(config, tmp_path, inputs=inputs_of(config.model, chosen)).path,
    }
    assert len(others | {run.path}) == 5
    (newest,) = {made(tmp_path, config, chosen).path}
    with take_lock(newest):
        assert made(tmp_path, config, chosen).path == newest and Run(newest).state == "starting"
        with naming(RuntimeError, newest.name):
            go(Run(newest), chosen=chosen)
    assert json.loads((run.path / "inputs.json").read_text())["prompts"] == 5
    assert {"torch", "commit"} <= json.loads((run.path / "env.json").read_text()).keys()
    assert (run.path / "config.json").read_text() == to_json(config)
    with naming(FileNotFoundError, tmp_path, "config.json"):
        Run(tmp_path)


# -- what is refused, and what is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shape", "facts"),
    [
        ({}, {"prompt_ids": (7,)}, ["'made-1'", "a prompt's tokens", "at least 2", 1]),
        ({}, {"prompt_ids": (7, 8, 9)}, ["'made-1'", "a prompt of 3 tokens", "a rollout of 3"]),
        ({}, {"prompt_ids": (7, 99) * 9}, ["'made-1'", "a prompt's tokens", "from 0 to 52", [7, 99]]),
        ({"adapt_on": "document"}, {"question_start": 41, "question": ""}, ["adapt_on 'document'", "'made-1'"]),
        ({"adapt_on": "document"}, {"question_start": 0}, ["'made-1'", "a prompt's tokens", "at least 2", 0]),
        ({"ttt": replace(TTT, parameters="nothing")}, {}, ["parameters", "'nothing'"]),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_anything_is_written(tmp_path, changes, shape, facts):
    chosen = examples()
    chosen[1] = replace(chosen[1], **shape)
    config = config_of(**changes)
    run = made(tmp_path, config, chosen)
    with naming(ValueError, *facts):
        go(run, chosen=chosen)
    assert run.answers().empty and run.updates().empty


def test_too_few_prompts_for_a_batch_are_refused(tmp_path):
    with refused("the number of prompts", 1):
        go(made(tmp_path, config_of("never"), examples(1)), chosen=examples(1))


def test_a_short_prompt_has_fewer_chunks_and_it_is_told(tmp_path):
    chosen = [*examples(1), *[replace(e, prompt_ids=e.prompt_ids[:10], question_start=9) for e in examples(2)[1:]]]
    policy, _ = model()
    said = check_prompts(policy, config_of(), chosen)
    assert said == ["made-1: a prompt of 10 tokens is too short for the method's settings, so c is 2 and not 4"]
    run = made(tmp_path, config_of(), chosen)
    assert go(run, chosen=chosen)
    assert run.answers()["num_chunks"].tolist() == [4, 2] and run.updates()["num_chunks"].tolist() == [4, 4, 2, 2]


def test_an_own_text_with_its_question():
    _, tokenizer = model()
    example = example_of(tokenizer, "The secret word for fish is stone.\n", "What is it?")
    said = str(tokenizer.decode(example.prompt_ids))
    assert said == "The secret word for fish is stone.\nWhat is it?"
    assert str(tokenizer.decode(adapt_ids(example, "document"))).strip() == "The secret word for fish is stone."
    bare = example_of(tokenizer, "The secret word for fish is stone.")
    assert bare.question_start == len(bare.prompt_ids) and bare.question == ""
    task = replace(config_of().task, prompt_tokens=16)
    long = "one two three " * 20
    assert len(example_of(tokenizer, long, "what?", replace(task, over_limit="cut_middle")).prompt_ids) == 16
    for document, question, over_limit, expected in (
        (" \n", None, "refuse", refused("a prompt", " \n")),
        ("fish", " ", "refuse", refused("a question", " ")),
        (long, None, "refuse", naming(ValueError, "1 of 1 prompts", "TaskConfig.prompt_tokens 16")),
        (long, None, "drop", refused("a prompt's tokens")),
    ):
        with expected:
            example_of(tokenizer, document, question, replace(task, over_limit=over_limit))
