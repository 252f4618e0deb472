"""Shared elements of the static figures: lines, bands, texts, one legend, and a style for light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Iterable
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from widgets.core.glossary import explain
from widgets.figures.series import BAND, INK, WIDE, MethodStyle
from widgets.figures.tables import visible

LEGEND_ROW = 20
"""Height of a row of a legend in pixels."""
TOOLS_LEFT_OUT = (
    *("zoom", "pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale"),
    *("hoverClosestCartesian", "hoverCompareCartesian", "toggleSpikelines"),
)
"""Tools of plotly that a figure does not show; dragging zooms, and a double click resets the axes."""
GRID = "rgba(128, 128, 128, 0.25)"


def require_data(name: str, ok: bool, needed: str = "every panel needs at least one finite point") -> None:
    """Raises ValueError, with what is `needed`, unless the figure or table called `name` has data."""
    if not ok:
        raise ValueError(f"figure {name} has no data: {needed}")


def traces_of(figure: go.Figure) -> list[Any]:
    traces: Any = figure.data  # plotly annotates it as a tuple without an element type
    return list(traces)


def plain_text(text: str) -> str:
    """Returns a token's text so that plotly displays it literally, since plotly interprets some HTML tags."""
    return html.escape(visible(text), quote=False)


def draw_line(
    x: np.ndarray, y: np.ndarray, style: MethodStyle, name: str, *, dash: str = "solid", marks: int = 8
) -> go.Scatter:
    """Returns a line with at most `marks` symbols on it."""
    marker = {"symbol": style.symbol + ("-open" if dash != "solid" else ""), "size": 7, "maxdisplayed": marks}
    line = {"color": style.colour, "width": style.width, "dash": dash}
    return go.Scatter(
        x=x, y=y, mode="lines+markers", name=html.escape(name, quote=False), legendgroup=name, line=line, marker=marker,
        hovertemplate="%{y:.4g}<extra>" + html.escape(name, quote=False) + "</extra>",
    )  # fmt: skip


def draw_band(x: np.ndarray, low: np.ndarray, high: np.ndarray, style: MethodStyle) -> go.Scatter:
    """Returns a filled area from `low` to `high`."""
    red, green, blue = hex_to_rgb(style.colour)
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), name=f"{style.label} band",
        mode="lines", line={"width": 0}, fill="toself", fillcolor=f"rgba({red}, {green}, {blue}, {BAND})",
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def thin_line(
    x: np.ndarray, y: np.ndarray, colour: str, width: float, name: str, texts: Iterable[str], hover: str
) -> go.Scatter:
    line = {"color": colour, "width": width}
    return go.Scatter(x=x, y=y, mode="lines", name=name, line=line, text=list(texts), hovertemplate=hover)


def one_legend(figure: go.Figure) -> go.Figure:
    """Keeps one legend entry per name, however many panels draw it."""
    seen: set[str] = set()
    for trace in traces_of(figure):
        if trace.showlegend is not False:
            trace.showlegend = trace.name not in seen
            seen.add(trace.name)
    return figure


def dress(figure: go.Figure, *, height: int) -> go.Figure:
    """Sets a transparent background and mid-grey text, so that the figure suits light and dark notebooks.

    Wide lines are drawn below thin ones. The legend's rows are added to `height`. Titles that the glossary explains have a
    tooltip, and the bar of tools has only those that do not cover a title.
    """
    clear, legend = "rgba(0, 0, 0, 0)", LEGEND_ROW * legend_rows(figure)
    figure.update_layout(
        template="none", height=height + legend - 2 * LEGEND_ROW, paper_bgcolor=clear, plot_bgcolor=clear,
        font={"color": INK, "size": 12}, title_font_size=14, hovermode="closest",
        margin={"l": 64, "r": 16, "t": 60, "b": 48 + legend},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        modebar={"remove": [*TOOLS_LEFT_OUT], "bgcolor": clear, "color": INK},
    )  # fmt: skip
    layout: Any = figure.layout  # plotly annotates it without its properties
    titles = [note for note in layout.annotations if note.text and not note.showarrow]
    columns = len({round(note.x, 3) for note in titles})
    for title in titles:
        if about := explain(title.text):
            title.hovertext = "<br>".join(wrap(about, 60))
        if "<br>" not in title.text:
            title.text = "<br>".join(wrap(title.text, 90 // columns))
    figure.update_annotations(font_size=13)
    axes = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "title_font_size": 12, "automargin": True}
    figure.update_xaxes(**axes, title_standoff=4)
    figure.update_yaxes(**axes, title_standoff=6)
    figure.data = sorted(traces_of(figure), key=lambda trace: (trace.line.width or 0) < WIDE)
    return figure


def legend_rows(figure: go.Figure, width: int = 640) -> int:
    """Returns how many rows the legend needs in a figure of that width in pixels."""
    rows, used = 1, 0
    for name in dict.fromkeys(str(trace.name) for trace in traces_of(figure) if trace.showlegend is not False):
        entry = 48 + 6.6 * len(name)
        rows, used = (rows + 1, entry) if used and used + entry > width else (rows, used + entry)
    return rows
