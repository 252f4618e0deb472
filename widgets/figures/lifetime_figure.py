"""Figure of how long a write lives: the effect of erasing a fact on its answer, by distance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from refine_lab.explore.lifetimes import lifetime_curve
from widgets.figures.plotting import draw_band, draw_line, dress, one_legend, require_data
from widgets.figures.series import method_styles

TITLES = {"distance": "tokens since the fact", "writes_since": "sum of the write strengths since the fact"}


def lifetime_figure(rows: pd.DataFrame, bins: int = 6) -> go.Figure:
    """Plots the effect of erasing a fact against its distance and the writes since, with 95 % intervals of the means.

    `rows`: those of `refine_lab.explore.lifetimes.write_lifetimes`, with a column `method`. Each point is the mean of a group
    of documents of equal size. Raises ValueError for no rows.
    """
    require_data("lifetime_figure", len(rows) > 0, "there are no rows")
    known = [name for name in TITLES if rows[name].notna().any()]
    figure = make_subplots(1, len(known), shared_yaxes=True, horizontal_spacing=0.06)
    for method, style in method_styles(rows["method"]).items():
        own = rows[rows["method"] == method]
        for column, by in enumerate(known, start=1):
            curve = lifetime_curve(own, by, min(bins, len(own)))
            x, y, low, high = (curve[name].to_numpy(float) for name in (by, "effect", "low", "high"))
            if np.isfinite(low).all():
                figure.add_trace(draw_band(x, low, high, style), 1, column)
            figure.add_trace(draw_line(x, y, style, style.label, dash=style.dash), 1, column)
    for column, by in enumerate(known, start=1):
        figure.update_xaxes(title_text=TITLES[by], row=1, col=column)
    figure.update_yaxes(title_text="fall of log p(answer) when the fact is erased (nats)", col=1)
    return dress(one_legend(figure), height=460).update_layout(margin={"t": 16})
