"""The metrics that colour a document in the reward explorer: statistics of one or two models, and rollout rewards."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from refine_lab.explore.reading import DocumentReading
from refine_lab.training.held_out_rest import HeldOutRest
from widgets.parts.token_document import Metric


def entropy_metric(reading: DocumentReading, when: str = "") -> Metric:
    """Returns the entropy of each token; `when` distinguishes several forward passes over a document."""
    name, title = (f"entropy_{when}", f"Entropy {when}") if when else ("entropy", "Entropy")
    return Metric(name, title, "nats", reading.entropies)


def loss_metric(reading: DocumentReading) -> Metric:
    """Returns the next-token loss of each token."""
    return Metric("loss", "NTP loss", "nats", reading.losses)


def long_short_metric(difference: Float[np.ndarray, "T"]) -> Metric:
    """Returns the long-short difference of each token (`refine_lab.explore.reading.long_short`)."""
    return Metric("long_short", "Long-short difference", "nats", difference, low=0)


def reading_metrics(reading: DocumentReading, probabilities: Float[np.ndarray, "T"] | None) -> list[Metric]:
    """Returns the statistics of each token, and the probability that its prefix is selected.

    A document that is longer than the short contexts also has the long-short difference. `probabilities` belong to
    positions, the last tokens of prefixes; the token after a position is the one that is coloured.
    """
    chance = np.full(len(reading.token_ids), np.nan)
    if probabilities is not None:
        chance[1:] = probabilities[:-1]
    ranks = np.where(reading.ranks > 0, reading.ranks, np.nan)
    memory = [] if reading.long_short is None else [long_short_metric(reading.long_short)]
    return [
        entropy_metric(reading),
        loss_metric(reading),
        *memory,
        Metric("logprob", "Logprob", "nats", reading.logprobs),
        Metric("rank", "Rank of the reference token", "", ranks, log=True, low=1),
        Metric("chance", "Sampling probability within chunk", "", np.where(chance > 0, chance, np.nan)),
    ]


def change_metrics(reading: DocumentReading, other: DocumentReading, name: str = "") -> list[Metric]:
    """Returns entropy and loss of each token in `other` minus those in `reading`; `name` is the other model's."""
    metrics = []
    for field, title in (("entropies", "entropy"), ("losses", "NTP loss")):
        change = getattr(other, field) - getattr(reading, field)
        heading = f"Difference in {title}: {name} minus this model" if name else f"Change in {title}"
        metrics.append(Metric(f"{title.split()[-1]}_change", heading, "nats", change, diverging=True))
    return metrics


def rest_metric(before: DocumentReading, after: DocumentReading, held: HeldOutRest) -> Metric:
    """Returns the change of the next-token loss of each token of the held-out remainder; the other tokens have no value."""
    change = np.full(len(before.losses), np.nan)
    change[held.first : held.stop] = held.rest((after.losses - before.losses)[1:])
    return Metric("rest_change", "Change in NTP loss on the held-out remainder", "nats", change, diverging=True)


def reward_metric(frame: pd.DataFrame, reward: str, tokens: int) -> Metric:
    """Returns the mean reward of the rollouts that begin at each token. `frame`: of `Exploration.frame`."""
    rewards = np.full(tokens, np.nan)
    means = frame.groupby("position")["reward"].mean()
    rewards[means.index.to_numpy() + 1] = means.to_numpy()
    return Metric("reward", f"Mean {reward} reward", "", rewards)
