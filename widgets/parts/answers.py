"""A table of answers with their reference, right or wrong, and the probability of the reference; its text can be copied."""

from __future__ import annotations

import traitlets

from widgets.core.base import Widget


class Answers(Widget):
    """A model's answers before adaptation and after each method, and the reference answer; empty until they are known."""

    page_heading = "Answers"

    rows = traitlets.List().tag(sync=True)
    """A dictionary of text per answer: its `label`, the `answer`, and, with a reference, the `verdict` (right or wrong) and
    the `logprob` of the reference in nats."""

    def __repr__(self) -> str:
        lines = []
        for row in self.rows:
            facts = [repr(row["answer"]), row.get("verdict"), row.get("logprob") and f"log p {row['logprob']}"]
            lines.append(f"{row['label']}: {', '.join(filter(None, facts))}")
        return "\n".join(lines) or "no answers"
