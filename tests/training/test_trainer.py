"""Real training processes: one seed one trajectory, interrupted or not; what a run leaves behind; what fails, and how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from refine_lab.config import DataConfig, RefineConfig, TrainConfig
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.experiments.runs import create_runs
from refine_lab.method import step as step_module
from refine_lab.method.custom import reward_source
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, load_model
from refine_lab.rng import Draws
from refine_lab.runs.child import StopSignal
from refine_lab.runs.process import TRAINER, RunProcess, follow, resume, start
from refine_lab.runs.run import Run
from refine_lab.training import __main__ as run_process
from refine_lab.training.optim import make_optimizers
from refine_lab.types import Batch
from tests.support.paths import TEXT

CLOCKS = ["time", "seconds", "tokens_per_second"]
STEPS, VOCABULARY = 30, 1200
DEADLINE = 300.0
"""Seconds that a process may take on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs and token arrays of these tests, for the processes too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("REFINE_RUNS", "REFINE_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model of two layers with a tokenizer of the fixture text."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), VOCABULARY)
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, num_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    config = DeltaNetConfig(**sizes, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    DeltaNetForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> TrainConfig:
    sizes = dict(batch_size=4, mini_batch_size=2, micro_batch_size=2, steps=STEPS, eval_every=10, checkpoint_every=5)
    data = DataConfig(sources={str(TEXT): 1.0}, sequence_length=96, validation_sequences=4, recall={"pairs": 0.25})
    refine = RefineConfig(num_chunks=3, margin=8, group_size=2)
    return TrainConfig(
        recipe="test", model=str(checkpoint), refine=refine, data=data, **sizes, lr=1e-3, device="cpu", threads=1
    )


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> Run:
    """The run that others are compared with."""
    return train(config)


def train(config: TrainConfig, **settings: str) -> Run:
    return follow(start(config, detach=False, **settings), every=0.2, log=lambda line: None)


def ended(process: RunProcess) -> Run:
    """Wait for the end, whatever it is."""
    process.popen.wait(DEADLINE)
    while process.run.alive:
        time.sleep(0.05)
    return process.run


def interrupted(config: TrainConfig, steps: int, end: Callable[[RunProcess], object]) -> Run:
    """A run that `end` was called on after so many steps, when it has ended."""
    process = start(config, detach=True)
    try:
        deadline = time.monotonic() + DEADLINE
        while process.alive and len(process.run.metrics()) < steps:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.02)
        end(process)
        return ended(process)
    finally:
        if process.alive:
            process.popen.kill()


def signalled(number: signal.Signals) -> Callable[[RunProcess], object]:
    return lambda process: os.kill(process.popen.pid, number)


def assert_same_run(ours: Run, theirs: Run) -> None:
    for of in (Run.metrics, Run.evaluations):
        a, b = (of(run).drop(columns=CLOCKS, errors="ignore") for run in (ours, theirs))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    pd.testing.assert_frame_equal(ours.rollouts(), theirs.rollouts(), check_exact=True)
    (_, last), (_, other) = ours.latest_checkpoint(), theirs.latest_checkpoint()
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(last / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


pytestmark = pytest.mark.process


def test_one_seed_gives_one_trajectory_and_another_another(config, whole):
    assert_same_run(train(config), whole)
    other = train(replace(config, seed=1, steps=2)).metrics()
    assert (other["ntp_loss"] != whole.metrics()["ntp_loss"][:2]).all()


def test_a_run_learns_and_records_every_step(config, whole):
    metrics, held_out = whole.metrics(), whole.evaluations()
    assert metrics["step"].tolist() == list(range(1, STEPS + 1))
    assert held_out["step"].tolist() == [0, 10, 20, 30]
    # by 0.29 to 0.4: a source's rows are drawn by its name, which holds the checkout's folder
    assert held_out["ntp_loss"].iloc[-1] < held_out["ntp_loss"].iloc[0] - 0.2
    assert metrics["updates"].tolist() == [2 * step for step in range(1, STEPS + 1)]
    assert metrics["tokens"].is_monotonic_increasing and metrics["tokens"].iloc[-1] <= STEPS * 4 * 96
    rollouts = whole.rollouts()
    assert len(rollouts) == STEPS * 4 * 3 * 2
    means = rollouts.groupby("step")["reward"].mean()
    assert means.to_numpy() == pytest.approx(metrics["reward_mean"].to_numpy(), abs=1e-6)
    assert (whole.status.state, whole.status.step) == ("finished", STEPS)
    assert [step for step, _ in whole.checkpoints()] == [20, 25, 30], "the last three"


def test_a_run_without_rollouts_records_its_own_metrics_and_continues_after_an_interruption(config):
    expected = replace(config, refine=replace(config.refine, estimator="expected", reward="exact"), steps=12)
    run = train(expected)
    metrics = run.metrics()
    assert run.config.method == "expected" and run.rollouts().empty
    assert metrics["target_probability"].between(0, 1).all() and (metrics["nsp_loss"] < 0).all()
    assert "reward_mean" not in metrics
    stopped = interrupted(expected, 7, signalled(signal.SIGTERM))
    assert 7 <= stopped.done < 12
    assert_same_run(follow(resume(stopped, detach=False), every=0.2, log=lambda line: None), run)


def test_load_model_takes_the_run(config, whole, checkpoint):
    policy, tokenizer = load_model(whole.path, device="cpu")
    trained, fresh = policy.lm_head.weight, load_model(checkpoint, device="cpu")[0].lm_head.weight
    assert torch.equal(
        trained, load_file(whole.latest_checkpoint()[1] / "model.safetensors")["model.embeddings.weight"]
    )
    assert (trained - fresh).abs().max() > 0.01
    assert len(tokenizer) <= len(trained)


@pytest.mark.parametrize("end", ["stop", "SIGTERM", "SIGKILL"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(config, whole, end):
    methods = {"stop": lambda process: (process.run.path / "stop").touch(), "SIGTERM": signalled(signal.SIGTERM)}
    run = interrupted(config, 12, methods.get(end, signalled(signal.SIGKILL)))
    step, _ = run.latest_checkpoint()
    if end == "SIGKILL":
        assert run.state == "killed" and 10 <= step < STEPS and step % 5 == 0
    else:
        assert run.state == "stopped" and 12 <= step < STEPS
        assert run.status.step == step == run.metrics()["step"].iloc[-1]
        reason = "a stop was requested" if end == "stop" else "stopped by SIGTERM"
        where = f"{reason}; saved after step {step} in checkpoints/step-{step}"
        assert run.status.error == where and where in (run.path / "log.txt").read_text()
    assert_same_run(follow(resume(run, detach=False), every=0.2, log=lambda line: None), whole)


def test_a_finished_run_has_nothing_left_to_do(whole):
    before = (whole.path / "metrics.jsonl").read_bytes()
    assert ended(resume(whole, detach=False)).status.state == "finished"
    assert (whole.path / "metrics.jsonl").read_bytes() == before


def test_the_micro_batch_changes_no_draw_and_next_to_no_metric(config, whole):
    ours, theirs = train(replace(config, micro_batch_size=1, steps=10)), whole
    tokens = [list(map(list, run.rollouts([1, 2, 3])["rollout_ids"])) for run in (ours, theirs)]
    assert tokens[0] == tokens[1]
    for name in ("ntp_loss", "nsp_loss", "reward_mean", "grad_norm"):
        a, b = (run.metrics()[name][:10].to_numpy() for run in (ours, theirs))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4), name


def test_numbers_of_the_models_configuration_reach_the_process(config):
    """The reference of kl_coef too: before its first update a policy is its reference."""
    refine = replace(config.refine, kl_coef=0.1)
    run = train(replace(config, steps=1, mini_batch_size=4, refine=refine, model_settings={"norm_eps": 0.5}))
    policy, _ = load_model(run.path, device="cpu")
    assert policy.config.norm_eps == 0.5
    assert run.metrics()["kl"].tolist() == pytest.approx([0.0], abs=1e-6)


def largest_id(inputs):
    return inputs.rollout_ids.max(-1).values.to(inputs.logprobs.dtype)


def test_a_reward_of_the_users_own_reaches_the_process(config):
    own = replace(config, refine=replace(config.refine, reward="custom"), steps=2)
    rollouts = train(own, reward_source=reward_source(largest_id)).rollouts()
    assert rollouts["reward"].tolist() == [max(ids) for ids in rollouts["rollout_ids"]]
    assert rollouts["advantage"].abs().max() > 0.5


def test_bfloat16_arithmetic_keeps_float32_weights_and_moments(config, checkpoint):
    run = train(replace(config, dtype="bfloat16", lr=1e-6, steps=2))
    (_, folder), before = run.latest_checkpoint(), load_file(checkpoint / "model.safetensors")
    after, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    assert {x.dtype for x in (*after.values(), *moments.values())} == {torch.float32}
    for name, x in after.items():
        moved = (x - before[name]).abs()
        assert moved.max() > 5e-7, f"{name} has not moved"
        assert moved.max() < 2e-5


def test_a_run_without_enough_text_fails_in_one_sentence(config):
    too_long = replace(config, data=replace(config.data, sequence_length=50_000))
    run = ended(process := start(too_long, detach=False))
    assert process.popen.returncode == 1
    assert run.status.state == "failed"
    assert run.status.error.startswith("ValueError: the train text of") and "\n" not in run.status.error
    assert "fewer than one row of 50000" in run.status.error
    with pytest.raises(RuntimeError, match="fewer than one row of 50000"):
        follow(process, every=0.2, log=lambda line: None)


@pytest.mark.parametrize(
    "given, message",
    [([], "usage:"), (["nowhere"], "nowhere"), (["a", "b"], "no run directory at")],
    ids=["none", "no run", "two"],
)
def test_a_wrong_call_says_so(given, message, tmp_path):
    done = subprocess.run([sys.executable, *TRAINER[1:], *given], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_update_of_1e_6_moves_float32_weights_and_vanishes_in_bfloat16_ones(checkpoint, config):
    """Table D.1's learning rate: why parameters and Adam moments stay float32 under autocast."""
    policy, _ = load_model(checkpoint, device="cpu")
    small = replace(config, lr=1e-6, weight_decay=0.0, dtype="bfloat16", mini_batch_size=4, micro_batch_size=4)
    optimizers = make_optimizers(policy, small)
    train_state = TrainState(policy=policy, optimizers=optimizers, config=small, reward=REWARDS["cosine"])
    batch = Batch(tokens=torch.randint(VOCABULARY, (4, 96)), lengths=torch.full((4,), 96), sequence_ids=(0, 1, 2, 3))
    before = [p.detach().clone() for p in policy.parameters()]
    train_step(train_state, batch, Draws(seed=0, step=1))
    rounded = [was.bfloat16().requires_grad_() for was in before]
    for weight, p in zip(rounded, policy.parameters(), strict=True):
        weight.grad = p.grad.bfloat16()
    torch.optim.AdamW(rounded, lr=1e-6, weight_decay=0.0).step()

    def moved(weights) -> float:
        """Share of the weights above 1e-3 that have a gradient and are not what they were."""
        triples = zip(weights, before, policy.parameters(), strict=True)
        counted = [(w.detach() != was.to(w))[(p.grad != 0) & (was.abs() > 1e-3)] for w, was, p in triples]
        return float(torch.cat(counted).float().mean())

    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {m[name].dtype for m in optimizers[0].state.values() for name in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }
    assert moved(policy.parameters()) > 0.99
    assert moved(rounded) < 0.01


def test_five_functions_lead_from_the_process_of_a_run_to_its_loss(config, tmp_path, monkeypatch):
    (run,) = create_runs([replace(config, steps=1, mini_batch_size=4)], tmp_path)
    stacks, whole_loss = [], step_module.ntp_loss

    def watched(*arguments):
        frames = traceback.extract_stack()[:-1]
        stacks.append([frame.name for frame in frames if f"refine_lab{os.sep}" in frame.filename])
        return whole_loss(*arguments)

    monkeypatch.setattr(step_module, "ntp_loss", watched)
    monkeypatch.setattr(run_process, "child_setup", lambda *paths: [StopSignal(Path(path)) for path in paths])
    assert run_process.main([str(run.path)]) == 0
    assert stacks == [["main", "train", "train_step", "_loss"]] * 2, "which calls ntp_loss"
