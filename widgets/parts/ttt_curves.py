"""The curves of the TTT panel: loss on the held-out remainder and on the adapted part, entropy and reward over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from widgets.figures.series import COLOURS, decimate, method_styles
from widgets.parts.ttt_results import Adaptation

PER_TOKEN = "nats per token"


def ttt_curves(adaptations: Sequence[Adaptation]) -> dict[str, Any]:
    """Returns the trait `curves` of `Curves`, with a line per adaptation in every panel, in the colour of its method.

    If something is held out, the loss on it is the first panel. Lines are thinned by `decimate`.
    """
    held_out = any("rest_loss" in row for each in adaptations for row in each.steps)
    part = "adapted part" if held_out else "prompt"
    titles = (
        ("rest_loss", "Held-out NTP loss", PER_TOKEN),
        ("loss", f"NTP loss, {part}", PER_TOKEN),
        ("entropy", f"Entropy, {part}", PER_TOKEN),
        ("reward", "Reward of the step's rollouts", "mean"),
    )
    panels = []
    for name, title, unit in titles:
        if drawn := [line for each in adaptations if (line := _line(each, name))]:
            panels.append({"name": name, "title": title, "unit": unit, "marks": True, "lines": drawn})
    styles = method_styles(each.method for each in adaptations)
    looks = [
        {
            "method": each.label,
            "label": each.label,
            "symbol": styles[each.method].symbol,
            "look": COLOURS.index(styles[each.method].colour),
            "dash": styles[each.method].dash,
            "width": styles[each.method].width,
        }
        for each in adaptations
    ]
    return {"methods": looks, "panels": panels}


def _line(adaptation: Adaptation, name: str) -> dict[str, Any] | None:
    """Returns an adaptation's points of one quantity; None without any."""
    found = [(row["step"], row[name]) for row in adaptation.steps if name in row]
    if not found:
        return None
    points = np.array(found, dtype="<f4")
    x, y = points[decimate(points[:, 1])].T
    front = name == "rest_loss"
    return {"method": adaptation.label, "seed": 0, "x": x.tobytes(), "y": y.tobytes(), "front": front}
