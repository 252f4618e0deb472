"""The fields of the reward explorer: everything that can be changed on rollouts that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets


def make_controls(rewards: Sequence[str], setting: Callable[[str], Any]) -> dict[str, Any]:
    """A field for `reward` and `seed` and for each that can be changed of the method, by name, at its present `setting`."""
    narrow, style = ipywidgets.Layout(width="14em"), {"description_width": "8em"}

    def number(name: str, label: str, low: float, high: float, **others: Any) -> Any:
        kind = ipywidgets.BoundedFloatText if others else ipywidgets.BoundedIntText
        return kind(value=setting(name), min=low, max=high, description=label, layout=narrow, style=style, **others)

    def choice(name: str, label: str, options: Sequence[str]) -> ipywidgets.Dropdown:
        return ipywidgets.Dropdown(
            options=[*options], value=setting(name), description=label, layout=narrow, style=style
        )

    return {
        "reward": choice("reward", "reward", rewards),
        "group_by": choice("group_by", "advantage group", ["prefix", "sequence"]),
        "rollout_length": number("rollout_length", "tokens (k)", 1, 64),
        "group_size": number("group_size", "rollouts (n)", 1, 64),
        "temperature": number("temperature", "temperature", 0.01, 10, step=0.1),
        "num_chunks": number("num_chunks", "chunks (c)", 1, 256),
        "selection": choice("selection", "selection", ["entropy", "uniform", "argmax", "argmin"]),
        "tau": number("tau", "tau", 0.01, 100, step=0.1),
        "smoothing_kernel": number("smoothing_kernel", "smoothing", 1, 101),
        "seed": number("seed", "seed", 0, 2**31),
    }
