"""Static plotly figures of mid-training from data frames, without a network and readable on light and dark pages.

Metrics are as `refine_lab.runs.run.Run` reads them, with additional columns `method` and `seed`. A line is the mean over
seeds and a band spans the minimum to the maximum over seeds, unless a panel defines another spread; both use only steps
that all seeds have. Every figure without data raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from widgets.figures.plotting import (
    draw_band,
    draw_line,
    dress,
    one_legend,
    plain_text,
    require_data,
    thin_line,
    traces_of,
)
from widgets.figures.series import (
    BLUE,
    INK,
    ORANGE,
    PANELS,
    Dash,
    MethodStyle,
    Plot,
    Symbol,
    has_panel,
    method_styles,
    over_seeds,
)
from widgets.figures.tables import Table

REWARD_SYMBOLS: Sequence[Symbol] = ("diamond", "circle", "triangle-up")
REWARD_DASHES: Sequence[Dash] = ("solid", "dash", "dot")
"""Dashes of rewards where there is one method; otherwise dashes distinguish methods of the same colour."""


HELD_OUT = (
    ("ntp_accuracy", "Held-out NTP accuracy (fig. 4)", "%"),
    ("sampled_accuracy", "Accuracy of sampled tokens (release)", "%"),
    ("ntp_loss", "Held-out NTP loss (fig. E.1)", "nats per token"),
)
"""Column, title and unit of the panels of `heldout_curves`."""


def use_offline_renderer() -> None:
    """Selects JupyterLab's own plotly bundle: no network, and only the figure's data in the notebook."""
    pio.renderers.default = "plotly_mimetype"


def training_curves(metrics: pd.DataFrame, evaluations: pd.DataFrame | None = None) -> go.Figure:
    """Plots loss, NTP accuracy, reward mean and spread, gradient norm and clip fraction over steps for each method.

    `metrics` holds train lines: `method`, `seed`, `step` and the quantities; `evaluations`, if given, adds the held-out
    panels. For rewards, the line is the mean over seeds of the batch's mean reward, and the band that of its standard
    deviation.
    """
    frames = {"train": metrics, "eval": pd.DataFrame() if evaluations is None else evaluations}
    panels = [panel for panel in PANELS if panel.kind in frames and has_panel(frames[panel.kind], panel)]
    require_data("training_curves", bool(panels))
    methods = method_styles(method for frame in frames.values() if len(frame) for method in frame["method"])
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    cells = [[{} if row * columns + column < len(panels) else None for column in range(columns)] for row in range(rows)]
    titles = [panel.title for panel in panels]
    figure = make_subplots(
        rows, columns, specs=cells, subplot_titles=titles, vertical_spacing=0.3 / rows, horizontal_spacing=0.1
    )
    for index, panel in enumerate(panels):
        row, column = index // columns + 1, index % columns + 1
        traces = [*_panel_traces(frames[panel.kind], panel, methods)]
        for trace in traces:
            figure.add_trace(trace, row, column)
        positive = all(np.nanmin(np.asarray(trace.y, dtype=float), initial=0) >= 0 for trace in traces)
        figure.update_yaxes(rangemode="nonnegative" if positive else "normal", row=row, col=column)
        figure.update_xaxes(title_text="step", row=row, col=column)
        figure.update_yaxes(title_text=panel.unit, row=row, col=column)
    return dress(one_legend(figure), height=60 + 250 * rows)


def _panel_traces(
    frame: pd.DataFrame, panel: Plot, methods: dict[str, MethodStyle], marks: int = 8
) -> Iterator[go.Scatter]:
    """Yields a band and a line for each method that has the panel's quantity."""
    centre = over_seeds(frame, panel.key)
    for method, style in methods.items():
        rows = centre[centre["method"] == method]
        if rows.empty:
            continue
        x = rows["step"].to_numpy()
        y, low, high = (rows[name].to_numpy() * panel.scale for name in ("mean", "min", "max"))
        if panel.spread is not None:
            spreads = over_seeds(frame[frame["method"] == method], panel.spread).set_index("step")["mean"]
            spread = spreads.reindex(x).to_numpy() * panel.scale
            low, high = y - spread, y + spread
        yield draw_band(x, low, high, style)
        yield draw_line(x, y, style, style.label, dash=style.dash, marks=marks)


def heldout_curves(evaluations: pd.DataFrame) -> go.Figure:
    """Plots held-out NTP accuracy and loss of the methods over training (paper, fig. 4 and E.1).

    `evaluations` holds eval lines: `method`, `seed`, `step`, `ntp_loss`, `ntp_accuracy` and, if measured,
    `sampled_accuracy` (the release's accuracy of sampled tokens, in a panel of its own, since it is about 10 points
    lower). Line: mean; band: min to max over seeds.
    """
    require_data("heldout_curves", len(evaluations) > 0)
    methods = method_styles(evaluations["method"])
    panels = [Plot(kind="eval", key=key, title=title, unit=unit) for key, title, unit in HELD_OUT if key in evaluations]
    figure = make_subplots(1, len(panels), subplot_titles=[panel.title for panel in panels], horizontal_spacing=0.1)
    for column, panel in enumerate(panels, start=1):
        for trace in _panel_traces(evaluations, panel, methods, marks=len(evaluations)):
            figure.add_trace(trace, 1, column)
        figure.update_yaxes(title_text=panel.unit, row=1, col=column)
    figure.update_xaxes(title_text="step")
    check_figures(figure)
    return dress(one_legend(figure), height=400)


def entropy_profile(
    entropies: ArrayLike,
    smoothed: ArrayLike,
    positions: Sequence[int],
    chunk_borders: Sequence[int],
    tokens: Sequence[str] | None = None,
    label: str = "smoothed",
) -> go.Figure:
    """Plots the entropy of one document by token, raw and smoothed, with the sampled positions (paper, fig. E.2).

    `entropies` and `smoothed` [T] in nats, at each position t; `label` names the second, which is another score for
    selections that do not use the entropies; `positions`: the sampled positions, each the last token
    of its prefix; `chunk_borders`: the first token of each chunk; `tokens` [T]: their texts, displayed on hover. Raises
    ValueError for unequal lengths.
    """
    raw, smooth = np.asarray(entropies, dtype=float), np.asarray(smoothed, dtype=float)
    require_data("entropy_profile", len(raw) > 0 and len(positions) > 0)
    texts = [""] * len(raw) if tokens is None else [plain_text(token) for token in tokens]
    if len({*(lengths := (len(raw), len(smooth), len(texts)))}) > 1:
        raise ValueError(
            f"entropies, smoothed and tokens must have the same length, got {', '.join(map(str, lengths))}"
        )
    x, drawn = np.arange(len(raw)), np.asarray(positions, dtype=int)
    if (outside := drawn[(drawn < 0) | (drawn >= len(raw))]).size:
        raise ValueError(f"positions must be from 0 to {len(raw) - 1}, got {outside[0]}")
    hover = "position %{x}, token “%{text}”<br>%{y:.3f}<extra></extra>"
    figure = go.Figure()
    figure.add_trace(thin_line(x, raw, "rgba(122, 122, 122, 0.55)", 1, "entropy", texts, hover))
    figure.add_trace(thin_line(x, smooth, BLUE, 1.6, label, texts, hover))
    marks = go.Scatter(x=drawn, y=smooth[drawn], mode="markers", name="sampled positions", hovertemplate=hover)
    marks.update(marker={"symbol": "diamond", "size": 11, "color": ORANGE, "line": {"width": 1, "color": "white"}})
    figure.add_trace(marks.update(text=[texts[position] for position in drawn]))
    for border in chunk_borders:
        figure.add_vline(x=border - 0.5, line={"color": INK, "width": 1, "dash": "dot"})
    title = "Entropy of one document and its sampled positions (fig. E.2)<br>Dotted lines: chunk borders"
    figure.update_layout(title_text=title).update_xaxes(title_text="position (tokens)")
    score = "" if label == "smoothed" else f"; {label}"
    figure.update_yaxes(title_text=f"entropy (nats){score}", rangemode="tozero")
    return dress(figure, height=380)


def reward_distribution(metrics: pd.DataFrame) -> go.Figure:
    """Plots mean and standard deviation of a batch's rewards over steps (paper, fig. E.3). Band: min to max over seeds."""
    rewards = [panel for panel in PANELS if panel.spread and len(metrics) and has_panel(metrics, panel)]
    require_data("reward_distribution", bool(rewards))
    figure = make_subplots(1, 2, subplot_titles=["Mean reward (fig. E.3 a, b)", "Standard deviation (fig. E.3 c, d)"])
    methods = method_styles(metrics.loc[metrics[rewards[0].key].notna(), "method"])
    for panel, symbol, dash in zip(rewards, REWARD_SYMBOLS, REWARD_DASHES, strict=False):
        for method, style in methods.items():
            several = len(methods) > 1
            label = f"{style.label}, {panel.title.lower()}" if several else panel.title.lower()
            style = replace(style, label=label, symbol=symbol, dash=style.dash if several else dash)
            for column, key in ((1, panel.key), (2, panel.spread)):
                rows = over_seeds(metrics[metrics["method"] == method], str(key))
                x, y, low, high = (rows[name].to_numpy() for name in ("step", "mean", "min", "max"))
                figure.add_trace(draw_band(x, low, high, style), 1, column)
                figure.add_trace(draw_line(x, y, style, label, dash=style.dash), 1, column)
    figure.update_xaxes(title_text="step").update_yaxes(title_text="mean reward of a batch", col=1)
    figure.update_yaxes(title_text="std of rewards in a batch", col=2)
    return dress(one_legend(figure), height=380)


def check_figures(*figures: go.Figure | Table) -> None:
    """Raises ValueError for a figure without a trace, a panel without any finite point, or a table without rows."""
    for index, figure in enumerate(figures, start=1):
        if isinstance(figure, Table):
            require_data(f"{index} (a table)", len(figure.data) > 0)
            continue
        drawn = {
            trace.xaxis or "x"
            for trace in traces_of(figure)
            if trace.y is not None and np.isfinite(np.asarray(trace.y, dtype=float)).any()
        }
        axes = {name.replace("axis", "") for name in figure.layout.to_plotly_json() if name.startswith("xaxis")}
        require_data(str(index), bool(drawn) and not axes - drawn)
