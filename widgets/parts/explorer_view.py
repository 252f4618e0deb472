"""What the reward explorer shows of an exploration: the content of its map, and its status in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from refine_lab.explore.exploration import Exploration
from refine_lab.explore.reading import DocumentReading
from widgets.parts.document_metrics import change_metrics, reading_metrics, reward_metric
from widgets.parts.token_document import Metric, Target
from widgets.parts.token_text import token_decoder


def map_content(
    exploration: Exploration, rollouts: pd.DataFrame, reward: str, other: DocumentReading | None, compared: str | None
) -> tuple[list[Metric], dict[str, Any]]:
    """Returns the metrics of the document, and the marks and alternatives of its map (see `TokenMap.show`).

    `reward`: the name of the rollouts' reward. `other`: the reading by the model `compared`, whose differences are added.
    """
    document = exploration.document
    assert document is not None
    reading = document.reading
    positions, borders, chance = [], [], None
    if len(reading.token_ids) > exploration.refine.rollout_length:  # else no position has room for a rollout
        positions, borders, chance = exploration.targets(), exploration.chunk_borders(), exploration.probabilities()
    metrics = reading_metrics(reading, chance)
    if other is not None:
        metrics += change_metrics(reading, other, Path(compared or "").name)
    if len(rollouts):
        metrics.append(reward_metric(rollouts, reward, len(reading.token_ids)))
    targets = [Target(position + 1, f"sampled position of chunk {i}") for i, position in enumerate(positions, 1)]
    borders = [position + 1 for position in borders]  # the first token that can be the chunk's target
    decode = token_decoder(exploration.tokenizer)

    def alternatives(tokens: Sequence[int]) -> list[list[tuple[str, float]]]:
        """Returns the most likely alternatives to each token; a token that is part of a character shows its bytes."""
        pairs = [zip(reading.alternatives[token], reading.probabilities[token], strict=True) for token in tokens]
        return [
            [(decode([int(other)]), float(chance)) for other, chance in row if token > 0]
            for token, row in zip(tokens, pairs, strict=True)
        ]

    return metrics, {"targets": targets, "chunk_borders": borders, "alternatives": alternatives}


def summarize(rollouts: pd.DataFrame, reward: str, k: int, seconds: float) -> str:
    """Describes the selected positions, which alone enter the mean, and the clicked ones."""
    parts = []
    mean = f"mean {reward} reward {rollouts.loc[~rollouts['clicked'], 'reward'].mean():.3f}"
    for clicked, kind, note in ((False, "sampled", mean), (True, "clicked", "excluded from all statistics")):
        frame = rollouts[rollouts["clicked"] == clicked]
        count = frame["position"].nunique()
        if count:
            rows, places = ("" if number == 1 else "s" for number in (len(frame), count))
            where = f"{len(frame):,} rollout{rows} at {count} {kind} position{places}"
            parts.append(f"{where}, {note}, {_matches(frame, k)}")
    return "; ".join([*parts, f"{1000 * seconds:.0f} ms."])


def _matches(frame: pd.DataFrame, k: int) -> str:
    """Describes the mean reward `exact` and the probability that it estimates: that of the reference at temperature 1."""
    matched, probability = (frame[name].mean() for name in ("exact", "target_probability"))
    return f"exact match {matched:.3g}, expected {probability:.3g} (mean joint probability of the next {k} tokens)"
