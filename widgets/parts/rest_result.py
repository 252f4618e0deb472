"""The result of test-time training on the held-out remainder: one sentence, and the interval of the change."""

from __future__ import annotations

import math

import traitlets

from refine_lab.statistics.rest_change import RestChange
from widgets.core.base import Widget


class RestResult(Widget):
    """The change of the loss on the held-out remainder; empty until it is known, and if nothing is held out."""

    verdict = traitlets.Unicode().tag(sync=True)
    "Whether there is a gain beyond noise."
    details = traitlets.Unicode().tag(sync=True)
    "The numbers behind the verdict."
    interval = traitlets.List(traitlets.Float()).tag(sync=True)
    "Lower end, estimate and upper end of the change, in nats per token; empty if the interval is undetermined."

    def show(self, change: RestChange | None) -> None:
        """Shows a result; None empties the view."""
        ends = (math.nan, math.nan) if change is None else change.interval
        known = change is not None and all(map(math.isfinite, ends))
        with self.hold_sync():
            self.verdict = "" if change is None else change.verdict
            self.details = "" if change is None else change.details
            self.interval = [ends[0], change.change.value, ends[1]] if change is not None and known else []

    def __repr__(self) -> str:
        return f"{self.verdict}: {self.details}" if self.verdict else "no result"
