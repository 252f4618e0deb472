"""The result of test-time training on the held-out remainder: a sentence and an interval per method and per difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import traitlets

from refine_lab.statistics.rest_change import RestChange, RestDifference
from widgets.core.base import Widget
from widgets.figures.series import COLOURS, method_styles


class RestResult(Widget):
    """How the loss on the held-out remainder changed with each method, and how the methods differ; empty until it is known."""

    page_heading = "Result"

    results = traitlets.List().tag(sync=True)
    """Dictionaries with a `name` (empty for a single method), whether it is a `pair` of methods, the `verdict` and `details`,
    the `interval` (lower end, estimate and upper end, in nats per token; empty if undetermined), and the number of the
    method's colour, `look` (−1: none)."""

    def show(
        self,
        changes: Mapping[str, RestChange],
        pairs: Sequence[RestDifference] = (),
        methods: Mapping[str, str] | None = None,
    ) -> None:
        """Shows the differences of pairs of methods, and then the change with each method by its label.

        `methods` has the name of the method of each label, which defines its colour.
        """
        styles = method_styles((methods or {}).values())
        looks = {label: COLOURS.index(styles[name].colour) for label, name in (methods or {}).items()}
        results = [_result(f"{pair.second} − {pair.first}", pair) for pair in pairs]
        for label, change in changes.items():
            results.append(_result(label if len(changes) > 1 else "", change, looks.get(label, -1)))
        self.results = results

    def __repr__(self) -> str:
        return "\n".join(map(sentence, self.results)) or "no result"


def _result(name: str, said: RestChange | RestDifference, look: int = -1) -> dict[str, Any]:
    change = said.change if isinstance(said, RestDifference) else said
    low, high = change.interval
    return {
        "name": name,
        "pair": isinstance(said, RestDifference),
        "verdict": said.verdict,
        "details": said.details,
        "interval": [low, change.change.value, high] if math.isfinite(low) and math.isfinite(high) else [],
        "look": look,
    }


def sentence(result: Mapping[str, Any]) -> str:
    """Returns a result as one sentence, after its name if it has one."""
    said = f"{result['verdict'][0].upper()}{result['verdict'][1:]}: {result['details']}"
    return f"{result['name']}. {said}" if result["name"] else said
