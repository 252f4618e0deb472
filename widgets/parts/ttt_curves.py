"""The curves of the TTT panel: loss on the held-out remainder and on the adapted part, entropy and reward over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from widgets.figures.series import COLOURS, decimate, method_styles


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel: the key of its values in a step's row, and its name in the legend (none: the method's)."""

    key: str
    label: str | None = None
    front: bool = False
    "Whether the line is thick and drawn over the others."
    quiet: bool = False
    "Whether the line is grey and dashed."


def ttt_curves(steps: Sequence[Mapping[str, float]], method: str) -> dict[str, Any]:
    """Returns the trait `curves` of `Curves`. `steps`: those of `TTTPanel`; `method`: its name, such as `sft` or `refine`.

    If the steps have a `rest_loss`, the first panel shows it in front of the loss of the adapted part. Lines are thinned
    by `decimate`.
    """
    held_out = any("rest_loss" in row for row in steps)
    losses = [Line(key="loss", label="adapted part", quiet=True)] if held_out else [Line(key="loss")]
    if held_out:
        losses.insert(0, Line(key="rest_loss", label="held-out remainder", front=True))
    titles = (
        ("loss", "NTP loss" if held_out else "NTP loss of the prompt", "nats per token", losses),
        (
            "entropy",
            "Entropy, adapted part" if held_out else "Entropy of the prompt",
            "nats per token",
            [Line(key="entropy")],
        ),
        ("reward", "Reward of the step's rollouts", "mean", [Line(key="reward")]),
    )
    looks = {line.key: _look(line, method) for *_, lines in titles for line in lines}
    panels = []
    for name, title, unit, lines in titles:
        if drawn := [each for line in lines if (each := _drawn(line, steps))]:
            panels.append({"name": name, "title": title, "unit": unit, "marks": True, "lines": drawn})
    return {"methods": [*looks.values()], "panels": panels}


def _look(line: Line, method: str) -> dict[str, Any]:
    """Returns the style of a line, which `Curves` calls a method; the colours are those of the methods elsewhere."""
    style = method_styles([method])[method]
    colour, dash = (0, "dash") if line.quiet else (COLOURS.index(style.colour), "solid")
    return {
        "method": line.key,
        "label": line.label or style.label,
        "symbol": "square" if line.quiet else style.symbol,
        "look": colour,
        "dash": dash,
        "width": 1.75,
    }


def _drawn(line: Line, steps: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """Returns a line's points; None without any."""
    found = [(row["step"], row[line.key]) for row in steps if line.key in row]
    if not found:
        return None
    points = np.array(found, dtype="<f4")
    x, y = points[decimate(points[:, 1])].T
    return {"method": line.key, "seed": 0, "x": x.tobytes(), "y": y.tobytes(), "front": line.front}
