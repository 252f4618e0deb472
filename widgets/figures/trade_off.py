"""Figures of what methods gain and what it costs: recall and LongPPL against next-token loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from widgets.figures.method_tables import heading, measure_of
from widgets.figures.plotting import dress, one_legend, require_data
from widgets.figures.series import MethodStyle, method_styles

COST = "ntp_loss"


def trade_off(rows: pd.DataFrame | Sequence[Mapping[str, object]]) -> go.Figure:
    """Plots each method's recall of facts and its LongPPL against its held-out next-token loss.

    `rows` as for `method_tables.comparison_table`: `method`, `seed`, `ntp_loss`, and `long_ppl` or measures whose names begin
    with `exact recall`; a panel for each of these. A large symbol is the mean over seeds, a small one is a seed. Raises
    ValueError for rows without any of these measures.
    """
    frame, benefits = pd.DataFrame(rows), benefits_of(rows)
    require_data("trade_off", bool(benefits) and COST in frame, "it needs recall or LongPPL, and next-token loss")
    better = {name: "lower is better" if name == "long_ppl" else "higher is better" for name in benefits}
    titles = [f"{heading(name)}, {better[name]}" for name in benefits]
    figure = make_subplots(1, len(benefits), subplot_titles=titles)
    for method, style in method_styles(frame["method"]).items():
        own = frame[frame["method"] == method]
        for column, name in enumerate(benefits, start=1):
            for trace in _points(own, name, style):
                figure.add_trace(trace, 1, column)
    figure.update_xaxes(title_text="held-out NTP loss (nats per token),<br>lower is better")
    layout: Any = dress(one_legend(figure), height=434).layout
    return figure.update_layout(margin_b=layout.margin.b + 14)  # the axes' titles have two lines


def benefits_of(rows: pd.DataFrame | Sequence[Mapping[str, object]]) -> list[str]:
    """Returns the measures of `trade_off` that have values: recalls, then LongPPL."""
    frame = pd.DataFrame(rows)
    recalls = [str(name) for name in frame if str(name).startswith("exact recall")]
    return [name for name in (*recalls, "long_ppl") if name in frame and frame[name].notna().any()]


def _points(rows: pd.DataFrame, name: str, style: MethodStyle) -> list[go.Scatter]:
    """Returns the points of one method: its seeds, if there are several, and their mean."""
    x, y = rows[COST].astype(float), rows[name].astype(float) * measure_of(name).scale
    marker = {"color": style.colour, "symbol": style.symbol}
    mean = go.Scatter(
        x=[x.mean()], y=[y.mean()], mode="markers", name=style.label, legendgroup=style.label,
        marker={**marker, "size": 13}, hovertemplate="%{x:.4f} nats: %{y:.4g}<extra>" + style.label + "</extra>",
    )  # fmt: skip
    if len(rows) < 2:
        return [mean]
    texts = [f"seed {seed:.0f}" for seed in rows["seed"]]
    seeds = go.Scatter(
        x=x, y=y, mode="markers", name=f"{style.label} seeds", legendgroup=style.label, showlegend=False, text=texts,
        marker={**marker, "size": 6, "opacity": 0.6},
        hovertemplate="%{x:.4f} nats: %{y:.4g}, %{text}<extra>" + style.label + "</extra>",
    )  # fmt: skip
    return [seeds, mean]


def frontier_figure(rows: pd.DataFrame, benefit: str = "exact_recall") -> go.Figure:
    """Plots the mean recall of each method and coefficient over seeds against the mean next-token loss.

    `rows`: `label` (a line or a point of the figure), `method` (whose style it has), `coefficient` (NaN for none), `seed`,
    `ntp_loss` and `benefit`. A line joins the coefficients of a label in increasing order and shows their values; bars
    span the minimum to the maximum over seeds. A second label of the same method has an open symbol. Raises ValueError for
    no rows.
    """
    require_data("frontier_figure", len(rows) > 0, "there are no rows")
    figure, scale = go.Figure(), measure_of(benefit).scale
    styles, drawn = method_styles(rows["method"]), set()
    for label, own in rows.groupby("label", sort=False):
        by_coefficient = own.groupby("coefficient", dropna=False)
        x, y = (by_coefficient[name].agg(["mean", "min", "max"]) for name in (COST, benefit))
        y = y * scale
        style, texts = styles[str(own["method"].iloc[0])], [f"{value:g}" for value in x.index.dropna()]
        symbol = style.symbol + ("-open" if style in drawn else "")
        drawn.add(style)
        figure.add_scatter(
            x=x["mean"], y=y["mean"], name=str(label), mode="lines+markers+text" if len(x) > 1 else "markers",
            text=texts, textposition="bottom right", line={"color": style.colour, "width": style.width, "dash": style.dash},
            marker={"symbol": symbol, "size": 10, "color": style.colour},
            error_x=_bars(x), error_y=_bars(y), hovertemplate="%{x:.4f} nats: %{y:.1f} %<extra>" + str(label) + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="held-out NTP loss (nats per token), lower is better")
    figure.update_yaxes(title_text=f"{heading(benefit)}, higher is better")
    return dress(figure, height=560).update_layout(margin_t=30)


def _bars(points: pd.DataFrame) -> dict[str, object]:
    """Returns the bars from the mean of points to their minimum and maximum."""
    high, low = points["max"] - points["mean"], points["mean"] - points["min"]
    return {"type": "data", "array": high, "arrayminus": low, "thickness": 1, "width": 2}
