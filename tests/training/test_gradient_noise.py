"""Signal and noise of the NSP gradient: by hand, the estimates' expectations, a warning, and a trajectory left alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from refine_lab.config import RefineConfig, TrainConfig
from refine_lab.method.step import batch_gradient, train_step
from refine_lab.rng import Draws
from refine_lab.training.gradient_noise import FEWEST, LEAST_RATIO, dot, gradient_noise, noise_warning, ratio
from refine_lab.training.inputs import new_run
from refine_lab.training.trainer import train
from tests.factories.durable_runs import CLOCKS, assert_same, go, tiny_config, tiny_model
from tests.factories.step import make_batch, make_policy, train_state_for
from tests.support.refusals import refused
from tests.training.test_inputs import After

DRAWS = Draws(seed=1, step=3)
REFINE = RefineConfig(num_chunks=4, margin=5, rollout_length=3, group_size=2)


def flat(gradient) -> torch.Tensor:
    return torch.cat([part.flatten() for part in gradient])


# -- the gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [REFINE, replace(REFINE, kl_coef=0.0, prefix_gradient="detached"), None])
def test_the_gradient_of_a_batch_is_that_of_a_step(refine):
    batch = make_batch((150, 97, 131, 90))
    sizes = {"batch_size": 4, "mini_batch_size": 4, "max_grad_norm": 1e9}
    found = [
        batch_gradient(train_state_for(make_policy(), refine, micro_batch_size=size, **sizes), batch, DRAWS)
        for size in (1, 4)
    ]
    policy = make_policy()
    train_step(train_state_for(policy, refine, micro_batch_size=4, **sizes), batch, DRAWS)
    step = flat([p.grad for p in policy.parameters()])
    assert torch.equal(flat(found[1]), step)
    assert torch.allclose(flat(found[0]), step, rtol=1e-9, atol=1e-12)


def test_signal_and_noise_are_those_of_two_halves_and_nothing_else_changes():
    policy, batch = make_policy(), make_batch((150, 97, 131, 90, 120))
    state = train_state_for(policy, REFINE, batch_size=5, mini_batch_size=5, micro_batch_size=2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    random, marks = torch.get_rng_state(), torch.ones(1)
    for parameter in policy.parameters():
        parameter.grad = marks.double().expand_as(parameter)
    found = gradient_noise(state, batch, DRAWS)
    assert all((p.grad == 1).all() for p in policy.parameters()), "no gradient is left behind"
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and not any(o.state for o in state.optimizers)

    alone = replace(REFINE, ntp_coef=0.0, nsp_coef=1.0)
    g1, g2 = (
        flat(batch_gradient(train_state_for(make_policy(), alone), batch.rows(*rows), DRAWS))
        for rows in ((0, 2), (2, 4))
    )
    ntp = flat(batch_gradient(train_state_for(make_policy(), None), batch.rows(0, 4), DRAWS))
    assert found["nsp_signal"] == pytest.approx(float(g1 @ g2), rel=1e-6)
    assert found["nsp_noise"] == pytest.approx(float((g1 - g2).square().sum()) / 2, rel=1e-6)
    cosine = float(torch.cosine_similarity(g1 + g2, ntp, dim=0))
    assert found["nsp_ntp_cosine"] == pytest.approx(cosine, abs=1e-9)


def test_the_coefficients_of_the_loss_change_nothing():
    batch, found = make_batch((150, 97, 131, 90)), []
    for changes in ({}, {"nsp_coef": 3.0, "ntp_coef": 0.5, "entropy_coef": 0.1}):
        state = train_state_for(make_policy(), replace(REFINE, **changes), batch_size=4, mini_batch_size=4)
        found.append(gradient_noise(state, batch, DRAWS))
    assert found[0] == found[1]


@pytest.mark.parametrize("refine", [REFINE, replace(REFINE, placebo=True)])
def test_a_policy_without_a_finite_loss_has_no_signal(refine):
    policy, batch = make_policy(), make_batch((150, 97, 131, 90))
    with torch.no_grad():
        policy.model.norm.weight.fill_(torch.nan)
    assert gradient_noise(train_state_for(policy, refine), batch, DRAWS) == {}


def test_gradients_of_parameters_that_are_not_reached_count_as_zero():
    one, other = [torch.ones(2), None, torch.ones(3)], [torch.full((2,), 3.0), torch.ones(1), None]
    assert dot(one, other) == 6.0


# -- the ratio -------------------------------------------------------------------------------------------------------------


def test_the_ratio_and_its_jackknife_by_hand():
    assert ratio([], []) == {} and ratio([1.0], [0.0]) == {}
    assert ratio([3.0], [2.0]) == {"nsp_snr": 1.5}
    found = ratio([1.0, 2.0, 6.0], [2.0, 4.0, 3.0])
    assert found["nsp_snr"] == 1.0
    without = np.array([8 / 7, 7 / 5, 3 / 6])
    stderr = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert found["nsp_snr_stderr"] == pytest.approx(stderr)
    assert found["nsp_snr_upper"] == pytest.approx(1 + stats.t.ppf(0.975, 2) * stderr)


def test_the_ratio_estimates_what_it_is_defined_as():
    """Gradients of a known mean and spread: the interval contains the ratio about as often as it says."""
    random, size, true = np.random.default_rng(0), 200, 0.3
    mean = np.full(size, math.sqrt(true / size))  # |mean|^2 = 0.3, and the spread's trace is 1
    covered, estimates = 0, []
    for _ in range(300):
        halves = mean + random.normal(size=(2, 12, size)) / math.sqrt(size)
        signals, noises = (halves[0] * halves[1]).sum(-1), ((halves[0] - halves[1]) ** 2).sum(-1) / 2
        found = ratio(signals.tolist(), noises.tolist())
        estimates.append(found["nsp_snr"])
        covered += found["nsp_snr_upper"] >= true
    assert np.mean(estimates) == pytest.approx(true, abs=0.01)
    assert covered / 300 > 0.93


def rows(uppers: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"nsp_signal": [0.0] * len(uppers), "nsp_snr_upper": uppers})


def test_a_run_is_warned_about_from_the_fifth_evaluation_on():
    below, above = LEAST_RATIO / 2, LEAST_RATIO * 2
    assert noise_warning(pd.DataFrame()) == noise_warning(rows([np.nan] + [below] * (FEWEST - 2))) == ""
    assert noise_warning(rows([below] * FEWEST + [above])) == noise_warning(rows([np.nan] * 9)) == ""
    sentence = noise_warning(rows([np.nan] + [above] * 3 + [below]))
    assert str(FEWEST) in sentence and f"{below:.3f}" in sentence


# -- a run -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = tiny_model(tmp_path_factory.mktemp("model"))
        yield tiny_config(model, batch_size=4, mini_batch_size=2, eval_every=1, gradient_noise=True)


@pytest.mark.slow
def test_measuring_the_noise_changes_nothing_of_a_run(config, tmp_path):
    run, without = (
        go(new_run(each, tmp_path)) for each in (config, replace(config, gradient_noise=False, eval_every=6))
    )
    measured = run.evaluations()
    names = [name for name in measured if name.startswith("nsp_")]
    assert {"nsp_signal", "nsp_noise", "nsp_ntp_cosine", "nsp_snr", "nsp_snr_stderr", "nsp_snr_upper"} == set(names)
    assert not any(name.startswith("nsp_") for name in without.evaluations())
    lean = measured.drop(columns=[*names, *CLOCKS], errors="ignore")
    lean = lean[lean["step"].isin([0, 6])].reset_index(drop=True)
    pd.testing.assert_frame_equal(lean, without.evaluations().drop(columns=CLOCKS, errors="ignore"), check_exact=True)
    drop = [*CLOCKS, "lr"]
    train_rows = [each.metrics().drop(columns=drop, errors="ignore") for each in (run, without)]
    pd.testing.assert_frame_equal(*train_rows, check_exact=True)
    pd.testing.assert_frame_equal(run.rollouts(), without.rollouts(), check_exact=True)
    signals, noises = measured["nsp_signal"], measured["nsp_noise"]
    assert measured["nsp_snr"].iloc[-1] == pytest.approx(signals.mean() / noises.mean())
    assert (noises > 0).all() and measured["nsp_ntp_cosine"].abs().max() <= 1


@pytest.mark.slow
def test_a_resumed_run_continues_the_ratio_and_warns_once(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("refine_lab.training.gradient_noise.LEAST_RATIO", 1e9)  # every run is below it
    whole = go(new_run(config, tmp_path / "whole"))
    assert capsys.readouterr().out.count("mostly noise: after 5 evaluations") == 1
    again = new_run(config, tmp_path / "parts")
    train(again.path, After(again.path, 5))
    assert capsys.readouterr().out.count("mostly noise") == 1
    assert_same(go(again), whole)
    assert "mostly noise" not in capsys.readouterr().out


def test_half_a_batch_has_a_row(config):
    for refine in (config.refine, RefineConfig(estimator="dft"), RefineConfig(estimator="longce")):
        with refused("TrainConfig.batch_size", 1):
            replace(config, batch_size=1, mini_batch_size=1, refine=refine)
    assert replace(config, batch_size=1, mini_batch_size=1, refine=None).method == "sft"
    assert TrainConfig(recipe="default").gradient_noise is False
