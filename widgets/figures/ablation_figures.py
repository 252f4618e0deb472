"""Tables and figures of ablations: each setting of REFINE with its spread over seeds, next to SFT and the base model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from refine_lab.recipes.ablations import ABLATIONS
from widgets.figures.method_tables import Measure, comparison_table, heading, measure_of
from widgets.figures.plotting import draw_band, draw_line, dress, one_legend, require_data
from widgets.figures.series import KNOWN_METHODS, method_styles, over_seeds
from widgets.figures.tables import Table

PANELS = ("ntp_loss", "recall", "cosine", "contains_answer", "f1", "loss_after")
"""Measures that are drawn, where they exist; `recall` is the mean over the kinds of document."""
REFERENCES = {"sft": "dash", "base": "dot", "none": "dot"}
"""Methods that are drawn as a horizontal line, and its dash."""


NOT_TABULATED = ("ablation", "setting", "default", "updates", "sampled_accuracy")
TRAINING = {"reward_mean": "training reward", "reward_std": "std of training reward"}
"""Headings of the rewards of the last batches of training."""


def views(rows: pd.DataFrame, name: str) -> list[Any]:
    """Returns the table and the figure of one ablation, or a sentence if no run of it has finished.

    `rows` as from `refine_lab.sweep.ablate.midtrain_rows` or `ttt_rows`.
    """
    own = rows[rows["ablation"] == name] if len(rows) else rows
    if not len(own) or not own["method"].str.startswith("refine: ").any():
        return [f"{ABLATIONS[name].title}: no run has finished."]
    return [ablation_table(own, name), ablation_figure(own, name)]


def ablation_table(rows: pd.DataFrame, name: str) -> Table:
    """Tabulates the measures of each setting of one ablation: mean ± standard deviation over seeds."""
    ablation = ABLATIONS[name]
    own = rows.drop(columns=[*NOT_TABULATED], errors="ignore").dropna(
        axis=1, how="all"
    )  # without other ablations' columns
    compared = comparison_table(own.rename(columns=TRAINING))
    table = compared.data
    defaults = {f"REFINE, {label}" for label in rows.loc[rows.get("default") == True, "setting"]}  # noqa: E712
    marked = [f"{method} (recipe)" if method in defaults else method for method in table["method"]]
    order = sorted(range(len(table)), key=lambda row: table["method"][row].startswith("REFINE"))
    caption = f"{ablation.title} ({ablation.source}): mean ± standard deviation over seeds"
    return Table(table.assign(method=marked).iloc[order].reset_index(drop=True), caption, note=compared.note)


def ablation_figure(rows: pd.DataFrame, name: str) -> go.Figure:
    """Plots the measures of each setting of one ablation: mean, and bars from the minimum to the maximum over seeds.

    Small points are single seeds; the horizontal lines are the means of SFT and of the base model.
    """
    ablation, rows = ABLATIONS[name], _with_recall(rows)
    panels = [panel for panel in PANELS if panel in rows and rows[panel].notna().any()]
    require_data("ablation_figure", bool(panels))
    labels = [label for label in ablation.settings if label in set(rows["setting"].dropna())]
    figure = make_subplots(1, len(panels), subplot_titles=[_title(panel) for panel in panels])
    for column, panel in enumerate(panels, start=1):
        scale = _measure(panel).scale
        values = [rows.loc[rows["setting"] == label, panel].dropna().to_numpy(float) * scale for label in labels]
        for trace in _points(labels, values, connected=all(label.isdecimal() for label in labels)):
            figure.add_trace(trace, 1, column)
        for trace in _references(rows, panel, labels, scale):
            figure.add_trace(trace, 1, column)
        ends = [-0.4, len(labels) - 0.6]
        figure.update_xaxes(type="category", categoryarray=labels, range=ends, row=1, col=column)
    title = f"{ablation.title} ({ablation.source}). Bars: minimum to maximum over seeds"
    figure.update_layout(title_text=title, title_x=0.01).update_xaxes(title_text=_axis(ablation.settings))
    return dress(one_legend(figure), height=360).update_layout(margin_t=84)


def reward_by_setting(metrics: pd.DataFrame, name: str = "k") -> go.Figure:
    """Plots mean and standard deviation of a batch's rewards over training for each setting (paper, figure E.3).

    `metrics` holds the lines of training with `method` (`refine: SETTING`) and `seed`. Band: minimum to maximum over seeds.
    """
    require_data("reward_by_setting", len(metrics) > 0, "no run of the ablation has begun")
    figure = make_subplots(1, 2, subplot_titles=["Mean reward (fig. E.3 a, b)", "Standard deviation (fig. E.3 c, d)"])
    styles = method_styles(metrics["method"])
    colours = sample_colorscale("Viridis", np.linspace(0.2, 0.85, len(styles)).tolist(), colortype="tuple")
    for (method, style), colour in zip(styles.items(), colours, strict=True):
        red, green, blue = (round(255 * float(part)) for part in colour)
        label = f"{name} = {method.partition(': ')[2]}"
        style = replace(style, label=label, colour=f"#{red:02x}{green:02x}{blue:02x}")
        for column, key in ((1, "reward_mean"), (2, "reward_std")):
            means = over_seeds(metrics[metrics["method"] == method], key)
            x, y, low, high = (means[part].to_numpy() for part in ("step", "mean", "min", "max"))
            figure.add_trace(draw_band(x, low, high, style), 1, column)
            figure.add_trace(draw_line(x, y, style, label), 1, column)
    figure.update_xaxes(title_text="step").update_yaxes(title_text="reward", col=1)
    return dress(one_legend(figure), height=380)


def _points(labels: list[str], values: list[np.ndarray], *, connected: bool) -> list[go.Scatter]:
    """Draws the mean of each setting with its range, and single seeds as small points; numbers are `connected`."""
    style = KNOWN_METHODS["refine"]
    means = [float(each.mean()) for each in values]
    ranges = {
        "array": [float(each.max()) - mean for each, mean in zip(values, means, strict=True)],
        "arrayminus": [mean - float(each.min()) for each, mean in zip(values, means, strict=True)],
    }
    line = go.Scatter(
        x=labels, y=means, name="REFINE", mode="lines+markers" if connected else "markers", legendgroup="REFINE",
        line={"color": style.colour, "width": 1}, marker={"symbol": style.symbol, "size": 9},
        error_y={"type": "data", "symmetric": False, "thickness": 1.5, **ranges}, hovertemplate="%{x}: %{y:.4g}",
    )  # fmt: skip
    x = [label for label, each in zip(labels, values, strict=True) for _ in each]
    seeds = go.Scatter(
        x=x, y=np.concatenate(values), mode="markers", showlegend=False, hovertemplate="one seed: %{y:.4g}",
        marker={"color": style.colour, "size": 5, "opacity": 0.45},
    )  # fmt: skip
    return [line, seeds]


def _references(rows: pd.DataFrame, panel: str, labels: list[str], scale: float) -> list[go.Scatter]:
    found = []
    styles = method_styles(["base", "none", "sft"])
    for method, dash in REFERENCES.items():
        values = rows.loc[rows["method"] == method, panel].dropna()
        if len(values):
            level, style = float(values.mean()) * scale, styles[method]
            line = {"color": style.colour, "dash": dash, "width": 1.5}
            line = go.Scatter(x=labels, y=[level] * len(labels), mode="lines", name=style.label, line=line)
            found.append(line.update(hovertemplate=f"{style.label}: %{{y:.4g}}"))
    return found


def _with_recall(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds the mean of the exact recalls over the kinds of document."""
    kinds = [name for name in rows if str(name).startswith("exact recall")]
    return rows.assign(recall=rows[kinds].mean(axis=1)) if kinds else rows


def _measure(panel: str) -> Measure:
    return Measure("exact recall", "%", 100, 1) if panel == "recall" else measure_of(panel)


def _title(panel: str) -> str:
    return "exact recall (%)" if panel == "recall" else heading(panel)


def _axis(settings: Any) -> str:
    """Returns the title of the axis of settings: the parameter that all of them set."""
    return next(iter(next(iter(settings.values()))))
