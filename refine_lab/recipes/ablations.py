"""The paper's ablations (tables 6, 7 and E.2, figures 5 and E.3) and our own: what each varies, and its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refine_lab.validation import unknown


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Settings of REFINE that are compared while everything else is the same."""

    title: str
    source: str
    phase: Literal["midtrain", "ttt"] = "midtrain"
    "Notebook whose parameters are varied; test-time training starts from the mid-trained model."
    settings: Mapping[str, Mapping[str, Any]]
    "Label of each setting -> the notebook's parameters."


def _varying(name: str, *values: Any) -> dict[str, dict[str, Any]]:
    return {str(value): {name: value} for value in values}


ABLATIONS = {
    "reward": Ablation(title="Reward", source="table 6", settings=_varying("reward", "binary", "cosine")),
    "selection": Ablation(
        title="Selection of positions",
        source="table 7",
        settings=_varying("selection", "uniform", "argmax", "argmin", "entropy"),
    ),
    "k": Ablation(
        title="Tokens per rollout, k",
        source="figures 5 (left) and E.3",
        settings=_varying("rollout_length", 1, 3, 5, 7, 9),
    ),
    "c": Ablation(
        title="Chunks per sequence, c", source="figure 5 (right)", settings=_varying("num_chunks", 1, 2, 4, 8, 16)
    ),
    "n": Ablation(title="Rollouts per position, n", source="ours", settings=_varying("group_size", 1, 2, 4)),
    "group_by": Ablation(
        title="Group over which rewards are standardised, with n = 4",
        source="ours",
        settings={name: {"group_by": name, "group_size": 4} for name in ("sequence", "prefix")},
    ),
    "entropy_index": Ablation(
        title="Entropy of the last token of the prefix or of the next token",
        source="ours; equation 5 and the paper's released code differ",
        settings=_varying("entropy_index", "equation", "release"),
    ),
    "ttt_reward": Ablation(
        title="Reward of test-time training",
        source="table E.2",
        phase="ttt",
        settings=_varying("reward", "cosine", "binary"),
    ),
}


def ablations(names: str) -> dict[str, Ablation]:
    """Returns the ablations in a comma-separated string. Raises ConfigError for an unknown name."""
    chosen = [name.strip() for name in names.split(",")]
    if strange := [name for name in chosen if name not in ABLATIONS]:
        raise unknown("ablation", strange[0], ABLATIONS)
    return {name: ABLATIONS[name] for name in dict.fromkeys(chosen)}
