"""Tables of methods: means with their spread, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from refine_lab.data.tasks.items import few_items
from refine_lab.experiments.compare import comparison, different_items
from refine_lab.experiments.stored_scores import HELD_OUT
from refine_lab.training.key_tokens import THRESHOLD, WINDOW
from widgets.figures.plotting import require_data
from widgets.figures.series import method_styles
from widgets.figures.tables import Table, visible


class Measure(NamedTuple):
    """The display settings of a measure."""

    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 4


ITEMS = "distinct questions"
"""Column of the number of distinct items (`refine_lab.data.tasks.items.items_of`)."""
DOCUMENTS = "distinct documents"
"""Column of the number of distinct documents that recall is measured on."""

MEASURES = {
    "contains_answer": Measure("contains answer", "%", 100, 1),
    "exact_match": Measure("exact-match rate", "%", 100, 1),
    "f1": Measure("F1", "%", 100, 1),
    "exact_recall": Measure("exact recall", "%", 100, 1),
    "loss_before": Measure("loss before", "nats", digits=3),
    "loss_after": Measure("loss after", "nats", digits=3),
    "entropy_before": Measure("entropy before", "nats", digits=3),
    "entropy_after": Measure("entropy after", "nats", digits=3),
    "ntp_loss": Measure("NTP loss", "nats"),
    "long_ppl": Measure("LongPPL", digits=3),
    "key_loss": Measure("key-token loss", "nats"),
    "cosine": Measure("cosine reward"),
    "binary": Measure("binary reward"),
}


def comparison_table(rows: pd.DataFrame | Sequence[Mapping[str, object]]) -> Table:
    """Tabulates each method's measures: mean ± standard deviation (n - 1) over seeds, or mean [95 % interval] over prompts.

    `rows` as for `refine_lab.experiments.compare.comparison`, with `updates` if they were counted. Accuracies, recalls
    and scores are fractions, displayed in percent. If the rows have items or recall documents, the number of distinct
    ones is a column, and a sentence warns of fewer than 100; a sentence defines the key tokens of LongPPL. Raises
    ValueError for no rows.
    """
    frame = pd.DataFrame(rows)
    require_data("comparison_table", len(frame) > 0, "there are no rows")
    over_prompts, found, items = "name" in frame, comparison(frame), different_items(frame)
    documents = int(frame["documents"].min()) if "documents" in frame else None
    table = []
    for method, style in method_styles(frame["method"]).items():
        own = frame[frame["method"] == method]
        row: dict[str, object] = {"method": style.label}
        if "updates" in frame:
            updates = own["updates"].fillna(0).mean()
            row["updates"] = f"{updates:.0f}" if updates == round(updates) else f"{updates:.4g}"
        row["prompts" if over_prompts else "runs"] = len(own)
        if items is not None:
            row[ITEMS] = different_items(own)
        if documents is not None:
            row[DOCUMENTS] = documents
        for values in found[found["method"] == method].to_dict("records"):
            ends, spread = ((values["low"], values["high"]), None) if over_prompts else ((), values["std"])
            row[heading(values["measure"])] = format_value(values["measure"], values["mean"], ends, spread)
        table.append(row)
    over = "mean over prompts [95 % interval]" if over_prompts else "mean ± standard deviation over seeds"
    notes = (few_items(items), few_items(documents, "documents"), _key_tokens(frame))
    return Table(pd.DataFrame(table), f"Methods: {over}", note=" ".join(filter(None, notes)))


def _key_tokens(rows: pd.DataFrame) -> str:
    """Returns a sentence about the key tokens of LongPPL, or an empty string if the rows have none."""
    if "key_tokens" not in rows or not rows["key_tokens"].notna().any():
        return ""
    return (
        f"LongPPL is the perplexity of {rows['key_tokens'].max():.0f} held-out key tokens. A token is a key token if "
        f"the model before training assigns it a log-probability higher by at least {THRESHOLD:g} nat given the whole prefix "
        f"than given only the most recent tokens (between w and 2 w - 1 of them). Here w is {WINDOW}, or the window of the "
        "model's attention if that is larger."
    )


def format_p(value: float) -> str:
    """Formats a p-value; NaN is a dash."""
    if np.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def samples_table(samples: pd.DataFrame) -> Table:
    """Tabulates the answers of all methods from `training.answers.side_by_side`. Raises ValueError for no rows."""
    require_data("samples_table", len(samples) > 0, "there are no rows")
    methods = [str(name) for name in samples if name not in ("question", "references")]
    named = {method: style.label for method, style in method_styles(methods).items()}
    table = samples.map(lambda text: visible(str(text)) or "–").rename(columns=named)
    monospace = ["question", "references", *named.values()]
    return Table(table, "Answers side by side, differing answers first", monospace=monospace)


def measure_of(name: str) -> Measure:
    """Returns a measure's display settings: accuracies, and recalls by kind of document, are in percent."""
    if name in MEASURES:
        return MEASURES[name]
    if name.startswith(HELD_OUT):
        inner = measure_of(name.removeprefix(HELD_OUT))
        return inner._replace(label=f"{HELD_OUT}{inner.label}")
    share = "accuracy" in name or name.startswith("exact recall")
    label = name.replace("ntp", "NTP").replace("_", " ")
    return Measure(label, "%", 100, 2) if share else Measure(label)


def heading(name: str) -> str:
    """Returns the header of a measure's column, with its unit."""
    measure = measure_of(name)
    return measure.label + (f" ({measure.unit})" if measure.unit else "")


def digits_of(name: str, rows: pd.DataFrame) -> int:
    """Returns the digits of a measure's means, one more for shares whose differences would not agree with the shown means.

    `rows` has the columns `value`, `against_value` and `difference`.
    """
    measure = measure_of(name)
    if measure.unit != "%":
        return measure.digits
    means = {*rows["value"], *rows["against_value"]}
    agree = all(
        shown_difference(name, a, b, measure.digits)
        == round(round((a - b) * measure.scale, 9), measure.digits) / measure.scale
        for a in means
        for b in means
    )
    return measure.digits + (not agree)


def shown_difference(name: str, value: float, against: float, digits: int) -> float:
    """Returns the difference of two means as they are shown with this number of digits."""
    scale = measure_of(name).scale
    first, second = (float(f"{mean * scale:.{digits}f}") for mean in (value, against))
    return round(first - second, digits) / scale


def format_value(
    name: str,
    mean: float,
    ends: Sequence[float],
    spread: float | None = None,
    *,
    signed: bool = False,
    digits: int | None = None,
) -> str:
    """Formats a mean with its interval or spread, if any, with a minus sign; `digits`: other than the measure's own."""
    measure = measure_of(name)
    if not np.isfinite(mean):
        return "–"
    if measure.unit == "%":
        ends = np.clip(ends, -1 if signed else 0, 1).tolist()  # a fraction, or a difference of two, cannot exceed this
    style = f"{'+' if signed else ''}.{measure.digits if digits is None else digits}f"
    text = f"{mean * measure.scale:{style}}"
    if spread is not None and np.isfinite(spread):
        text += f" ± {spread * measure.scale:{style}}"
    if len(ends) and np.isfinite(ends).all():
        text += f" [{', '.join(f'{end * measure.scale:{style}}' for end in ends)}]"
    return text.replace("-", "−")
