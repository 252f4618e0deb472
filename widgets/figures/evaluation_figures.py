"""Static figures of an evaluation: scores by prompt length."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from widgets.figures.plotting import dress, require_data
from widgets.figures.series import COLOURS

TASK_COLOURS = (*COLOURS[1:], COLOURS[0])
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")
SHARES = ("score", "any_match", "ntp_accuracy", "exact_recall_word-4")
"""Metrics from 0 to 1 that share an axis."""


def _by_length(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the tasks that were evaluated at several lengths with a metric from 0 to 1."""
    rows = scores[scores["length"].notna() & scores["metric"].isin(SHARES)]
    return rows[rows.groupby("task")["length"].transform("nunique") > 1]


def has_lengths(scores: pd.DataFrame) -> bool:
    """Returns whether a task was evaluated at several lengths."""
    return len(_by_length(scores)) > 0


def different(counts: pd.Series) -> str:
    """Returns the number of distinct samples, or the range over lengths."""
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def scores_by_length(scores: pd.DataFrame) -> go.Figure:
    """Plots the score of each task over the length, in percent, with one standard error.

    `scores` as from `refine_lab.evaluation.tables.score_frame`. Raises ValueError if no task has several lengths.
    """
    rows = _by_length(scores)
    require_data("scores_by_length", len(rows) > 0, "no task was evaluated at several lengths")
    figure = go.Figure()
    for number, (task, own) in enumerate(rows.sort_values("length").groupby("task", sort=False)):
        colour, symbol = TASK_COLOURS[number % len(TASK_COLOURS)], SYMBOLS[number % len(SYMBOLS)]
        figure.add_scatter(
            x=own["length"].astype(int),
            y=own["value"] * 100,
            error_y={"array": own["stderr"].fillna(0) * 100, "thickness": 1},
            name=f"{task} ({own['metric'].iloc[0]}, {different(own['distinct samples'])} distinct samples)",
            mode="lines+markers",
            line={"color": colour},
            marker={"symbol": symbol, "size": 8},
        )
    ticks = sorted(rows["length"].astype(int).unique())
    figure.update_xaxes(title_text="prompt + answer length (tokens)", type="log", tickvals=ticks, ticktext=ticks)
    figure.update_yaxes(title_text="score (%)", range=[-5, 105])
    return dress(figure, height=380)
