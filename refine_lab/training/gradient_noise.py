"""Signal and noise of the gradient of the next-sequence loss, measured at evaluations on the batch that would come next.

Two halves of a batch give two independent estimates g1 and g2 of the same gradient, with the same variance:

    signal = g1 . g2              whose mean is the squared norm of the expected gradient
    noise  = |g1 - g2|^2 / 2      whose mean is the variance of the gradient of a half batch
    ratio  = mean of the signals / mean of the noises, over the evaluations of a run

The two expectations are those of McCandlish et al. (2018; arXiv 1812.06162). Below 1, most of what a half batch's update
follows is noise; the ratio of a whole batch is twice that of a half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from refine_lab.config import TrainConfig
from refine_lab.method.step import TrainState, batch_gradient
from refine_lab.rng import Draws
from refine_lab.runs.run import Run
from refine_lab.types import Batch, PromptBatch

LEAST_RATIO = 0.05
"""A run is warned about if the upper bound of its ratio is below this."""
FEWEST = 5
"""Number of evaluations before a run is warned about."""
CONFIDENCE = 0.95
"""Confidence level of the interval whose upper end is the bound, by Student's t."""

Gradient = Sequence[Float[Tensor, "..."] | None]
"""The gradient of each parameter that is trained; None for one that the loss does not depend on."""


def gradient_noise(train_state: TrainState[TrainConfig], batch: Batch, draws: Draws) -> dict[str, float]:
    """Returns `nsp_signal`, `nsp_noise` and `nsp_ntp_cosine` on the two halves of a batch; nothing if a loss is not finite.

    g1 and g2 are gradients of the next-sequence loss alone, with coefficient 1, by the estimator and the draws of a
    training step. `nsp_ntp_cosine` is the cosine of g1 + g2 and the gradient of the next-token loss of the same rows. A
    last odd row is left out. No weight, gradient, moment or random stream changes.
    """
    config, half = train_state.config, len(batch.lengths) // 2
    assert config.refine is not None
    alone = replace(config.refine, ntp_coef=0.0, nsp_coef=1.0, kl_coef=0.0, entropy_coef=0.0)
    nsp = replace(train_state, config=replace(config, refine=alone))
    ntp = replace(train_state, config=replace(config, refine=None, nested=False))
    halves = [batch.rows(0, half), batch.rows(half, 2 * half)]
    g1, g2 = (batch_gradient(nsp, rows, draws) for rows in halves)
    next_token = batch_gradient(ntp, batch.rows(0, 2 * half), draws)
    if g1 is None or g2 is None or next_token is None:
        return {}
    signal, squares = dot(g1, g2), dot(g1, g1) + dot(g2, g2)
    along = dot(g1, next_token) + dot(g2, next_token)
    norms = math.sqrt(max(squares + 2 * signal, 0.0) * dot(next_token, next_token))
    cosine = {"nsp_ntp_cosine": along / norms} if norms > 0 else {}
    return {"nsp_signal": signal, "nsp_noise": squares / 2 - signal, **cosine}


def dot(one: Gradient, other: Gradient) -> float:
    """Returns the scalar product of two gradients over all parameters, in float64."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return float(sum((a.double() * b.double()).sum() for a, b in pairs))


def ratio(signals: Sequence[float], noises: Sequence[float]) -> dict[str, float]:
    """Returns `nsp_snr`, the ratio over evaluations, with its jackknife standard error and the upper end of its interval.

    `nsp_snr_stderr` and `nsp_snr_upper` need two evaluations. Nothing is returned if the mean noise is 0.
    """
    a, b = np.asarray(signals, dtype=float), np.asarray(noises, dtype=float)
    n = len(a)
    if not n or not b.mean() > 0:
        return {}
    found = {"nsp_snr": float(a.mean() / b.mean())}
    rest = b.sum() - b
    if n < 2 or not (rest > 0).all():
        return found
    without = (a.sum() - a) / rest
    stderr = math.sqrt((n - 1) * float(np.var(without)))
    from scipy import stats  # a tenth of a second, only where noise is measured

    bound = found["nsp_snr"] + float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stderr
    return {**found, "nsp_snr_stderr": stderr, "nsp_snr_upper": bound}


def noise_warning(evaluations: pd.DataFrame) -> str:
    """Returns a sentence if the last of at least `FEWEST` evaluations bounds the ratio below `LEAST_RATIO`, else nothing."""
    if "nsp_snr_upper" not in evaluations:
        return ""
    count, rows = int(evaluations["nsp_signal"].notna().sum()), evaluations["nsp_snr_upper"].dropna()
    if count < FEWEST or not len(rows) or not rows.iloc[-1] < LEAST_RATIO:
        return ""
    return (
        f"The gradient of the next-sequence loss is mostly noise: after {count} evaluations its signal-to-noise ratio is "
        f"at most {rows.iloc[-1]:.3f} for half a batch (95 % interval)."
    )


def noise_meter(run: Run, train_state: TrainState[TrainConfig], data: Any) -> Callable[[int], dict[str, float]]:
    """Returns a function that measures a run after so many steps: `gradient_noise` on the next batch, and `ratio` so far.

    It measures nothing unless `config.gradient_noise` is set and the run has a next-sequence loss. The first time that
    `noise_warning` has a sentence, it is printed to the run's log.
    """
    config = train_state.config

    def measure(step: int) -> dict[str, float]:
        batch = data.batch(step, config.batch_size).to(train_state.policy.device)
        rows = batch.prompts if isinstance(batch, PromptBatch) else batch
        found = gradient_noise(train_state, rows, Draws(seed=config.seed, step=step + 1))
        if not found:
            return {}
        past = run.evaluations()
        past = past[past["step"] < step] if "nsp_signal" in past else pd.DataFrame()
        now = pd.concat([past, pd.DataFrame([{"step": step, **found}])], ignore_index=True)
        known = now.dropna(subset=["nsp_signal", "nsp_noise"])
        found |= ratio(known["nsp_signal"].tolist(), known["nsp_noise"].tolist())
        now.loc[len(now) - 1, list(found)] = list(found.values())
        if (sentence := noise_warning(now)) and not noise_warning(past):
            print(sentence, flush=True)
        return found

    return measure if config.gradient_noise and config.refine is not None else lambda step: {}
