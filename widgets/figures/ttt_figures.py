"""Static figures and tables of adaptation to one prompt: steps, answers, and entropy before and after."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from refine_lab.data.tasks.scores import SCORES
from refine_lab.experiments.compare import READINGS
from refine_lab.statistics.rest_change import RestChange
from widgets.figures.method_tables import heading, measure_of
from widgets.figures.plots import check_figures
from widgets.figures.plotting import GRID, dress, one_legend, plain_text, require_data, thin_line
from widgets.figures.series import BLUE, INK, ORANGE, MethodStyle, decimate, method_styles
from widgets.figures.tables import Table, visible

POINTS = 1500
"""Maximum number of points per curve: a prompt of 16,384 tokens would take megabytes."""
FALL, RISE = (", ".join(map(str, hex_to_rgb(colour))) for colour in (BLUE, ORANGE))
"""Red, green and blue values for tokens about which the model became more, or less, certain."""
STRONGEST = 0.5
"""Change in nats beyond which the background does not become stronger."""


def steps_table(steps: pd.DataFrame) -> Table:
    """Tabulates the prompt's loss and entropy before and after each step, with reward and speed. `steps`: of `PromptTrace`."""
    require_data("steps_table", len(steps) > 0)
    styles = method_styles(steps["method"])
    table = steps.assign(
        method=[styles[method].label for method in steps["method"].tolist()],
        reward=[_number(reward, 3) for reward in steps["reward"].tolist()],
        tokens_per_second=[f"{speed:,.0f}" for speed in steps["tokens_per_second"].tolist()],
    )
    rests = {f"rest_{when}": f"loss on the remainder {when} (nats)" for when in ("before", "after")}
    rests = {name: label for name, label in rests.items() if name in table}
    names = {"tokens_per_second": "tokens/s"} | {name: heading(name) for name in READINGS} | rests
    scored = "the adapted part" if rests else "its tokens"
    return Table(
        table.rename(columns=names), f"Steps on one prompt: loss and entropy are means over {scored}", digits=4
    )


def rest_table(rests: Mapping[str, RestChange]) -> Table:
    """Tabulates the loss on the held-out remainder before and after adaptation with each method.

    `rests`: of `PromptTrace`.
    """
    require_data("rest_table", len(rests) > 0)
    styles = method_styles(rests)
    rows = [{"method": styles[method].label} | change.row() for method, change in rests.items()]
    names = {"low": "95 % from", "high": "95 % to", "block_length": "block length", "verdict": "result"}
    note = (
        "Losses in nats per token. The interval is from a block bootstrap over the tokens of the remainder, for one "
        "adaptation; it does not cover other seeds or other documents."
    )
    return Table(pd.DataFrame(rows).rename(columns=names), "Loss on the held-out remainder", digits=4, note=note)


def rest_loss(steps: pd.DataFrame) -> go.Figure:
    """Plots the loss on the held-out remainder and on the adapted part over the steps of each method.

    `steps`: of `PromptTrace`. Step 0 is before adaptation. Raises ValueError for steps without a held-out remainder.
    """
    require_data("rest_loss", len(steps) > 0 and "rest_after" in steps)
    figure = go.Figure()
    styles = method_styles(steps["method"])
    for name, label, dash in (("rest", "held-out remainder", "solid"), ("loss", "adapted part", "dash")):
        for method, rows in steps.groupby("method", sort=False):
            style = styles[str(method)]
            x = np.array([0, *rows["step"]])
            y = np.array([rows[f"{name}_before"].iloc[0], *rows[f"{name}_after"]], dtype=float)
            kept = decimate(y, POINTS)
            line = {"color": style.colour, "dash": dash, "width": 3 if name == "rest" else 1.5}
            marker = {"symbol": style.symbol if name == "rest" else f"{style.symbol}-open", "size": 7}
            trace = go.Scatter(
                x=x[kept], y=np.round(y[kept], 4), name=f"{style.label}, {label}", line=line, marker=marker
            )
            figure.add_trace(trace.update(mode="lines+markers", hovertemplate="step %{x}: %{y:.4f} nats"))
    figure.update_xaxes(title_text="step", dtick=max(1, int(steps["step"].max()) // 8))
    figure.update_yaxes(title_text="NTP loss (nats per token)")
    check_figures(figure)
    return dress(figure, height=380)


def answers_table(answers: pd.DataFrame) -> Table:
    """Tabulates the answers before and after adaptation with each method. `answers`: of `PromptTrace`."""
    require_data("answers_table", len(answers) > 0)
    styles = method_styles(list(answers["method"]))
    rows = [
        {
            "method": styles[row["method"]].label,
            "answer": visible(row["answer"]),
            "references": " | ".join(map(visible, row["references"])) or "–",
            **{measure_of(name).label: _number(row[name], 2) for name in SCORES},
        }
        for row in answers.to_dict("records")
    ]
    return Table(pd.DataFrame(rows), "Answers before and after adaptation", monospace=["answer", "references"])


def entropy_change(
    before: ArrayLike,
    after: Mapping[str, ArrayLike],
    tokens: Sequence[str],
    *,
    question_start: int | None = None,
    smoothing: int = 9,
) -> go.Figure:
    """Plots the entropy of every token of a prompt before and after adaptation with each method, and the change.

    `before` and each of `after` [T - 1] in nats, entry i about token i + 1 of `tokens` [T]. The upper panel shows means
    over `smoothing` tokens, the lower one those of after - before; a dotted line marks the start of the question.
    Raises ValueError for unequal lengths.
    """
    raw = {method: np.asarray(values, dtype=float) for method, values in {"none": before, **after}.items()}
    require_data("entropy_change", len(raw["none"]) > 0 and len(after) > 0)
    _require_lengths(tokens, raw)
    figure = make_subplots(
        2, 1, shared_xaxes=True, vertical_spacing=0.12,
        subplot_titles=["Uncertainty about each token (eq. 5)", "Change after adaptation: below 0 the model is more certain"],
    )  # fmt: skip
    texts = [plain_text(token) for token in tokens[1:]]
    for method, style in method_styles(raw).items():
        figure.add_trace(_curve(_smooth(raw[method], smoothing), style, texts), 1, 1)
        if method != "none":
            figure.add_trace(_curve(_smooth(raw[method] - raw["none"], smoothing), style, texts), 2, 1)
    if question_start is not None and 1 <= question_start < len(tokens):
        figure.add_vline(x=question_start - 0.5, line={"color": INK, "width": 1, "dash": "dot"})
    figure.add_hline(y=0, row=2, col=1, line={"color": GRID, "width": 1})  # type: ignore[arg-type]
    figure.update_xaxes(title_text="token", row=2, col=1).update_yaxes(title_text="nats")
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    check_figures(figure)
    return dress(one_legend(figure), height=560)


def _curve(values: np.ndarray, style: MethodStyle, texts: list[str]) -> go.Scatter:
    kept = decimate(values, POINTS)
    hover = "token %{x}, “%{text}”<br>%{y:.3f} nats<extra>" + html.escape(style.label, quote=False) + "</extra>"
    shown = [texts[int(i)] for i in kept]
    curve = thin_line(kept + 1, np.round(values[kept], 4), style.colour, 1.4, style.label, shown, hover)
    return curve.update(legendgroup=style.label)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Returns means over up to `width` tokens around each, fewer at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


class EntropyText:
    """The change in entropy as text: every token of the prompt on a coloured background, and a summary.

    `change` [T - 1] is after - before in nats, entry i about token i + 1; of a long prompt only the first and the last
    `shown` / 2 tokens are displayed. Blue: more certain than before, orange: less certain; the colour intensifies up to
    half a nat.
    """

    def __init__(
        self, tokens: Sequence[str], before: Sequence[float], after: Sequence[float], method: str, *, shown: int = 800
    ) -> None:
        self.before, self.after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
        require_data("EntropyText", len(self.before) > 0)
        _require_lengths(tokens, {"before": self.before, "after": self.after})
        self.tokens, self.change, self.shown = list(tokens), self.after - self.before, shown
        self.label = method_styles([method])[method].label

    def __repr__(self) -> str:
        """Summarises the means, the fraction of tokens with lower entropy, and the five largest changes in each direction."""
        change = self.change
        order = np.argsort(change, kind="stable")
        lowest = ", ".join(self._describe(i) for i in order[:5] if change[i] < 0)
        highest = ", ".join(self._describe(i) for i in order[::-1][:5] if change[i] > 0)
        return (
            f"{self.label}: mean entropy {self.before.mean():.3f} before, {self.after.mean():.3f} after "
            f"({change.mean():+.3f} nats per token); more certain about {(change < 0).mean():.0%} of {len(change)} tokens.\n"
            f"Largest decrease: {lowest or 'none'}.\nLargest increase: {highest or 'none'}."
        )

    def _repr_html_(self) -> str:
        length, half = len(self.tokens), self.shown // 2
        omitted = range(half, length - half) if length > self.shown else range(0)
        parts = [self._span(i) for i in range(length) if i not in omitted]
        if omitted:
            parts.insert(half, f"<i> … {len(omitted)} tokens … </i>")
        summary = "".join(f"<p style='margin: 2px 0'>{html.escape(line)}</p>" for line in repr(self).splitlines())
        style = "font-family: monospace; white-space: pre-wrap; max-height: 24em; overflow-y: auto; line-height: 1.5"
        return f"{summary}<div tabindex='0' style='{style}'>{''.join(parts)}</div>"

    def _span(self, index: int) -> str:
        text = html.escape(self.tokens[index])
        if index == 0 or not np.isfinite(self.change[index - 1]):
            return text
        change = float(self.change[index - 1])
        colour, opacity = (FALL if change < 0 else RISE), 0.7 * min(1.0, abs(change) / STRONGEST)
        return f"<span title='{change:+.3f} nats' style='background: rgba({colour}, {opacity:.2f})'>{text}</span>"

    def _describe(self, index: int) -> str:
        return f"“{visible(self.tokens[index + 1])}” ({self.change[index]:+.2f})"


def _require_lengths(tokens: Sequence[str], entropies: Mapping[str, np.ndarray]) -> None:
    lengths = {name: len(values) for name, values in entropies.items()}
    if {*lengths.values()} != {len(tokens) - 1}:
        raise ValueError(f"expected {len(tokens) - 1} entropies for {len(tokens)} tokens, got {lengths}")


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"
