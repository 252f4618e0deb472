"""Tables and figures that show our results beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from refine_lab.data.tasks.items import FEWEST_ITEMS, few_items
from refine_lab.experiments.paper_rows import Row
from refine_lab.recipes.paper_results import about, example_rows, reported
from widgets.figures.plotting import dress, one_legend, require_data
from widgets.figures.series import BLUE, GREEN, INK, ORANGE
from widgets.figures.tables import Table, visible

DIGITS = {"%": 1, "% of tokens": 2, "ppl": 1, "nats": 4, "reward": 3}
"""Unit -> decimals."""
TASK_NAMES = {"held_out": "held-out text", "rollouts": "training rewards", "ruler": "ruler_qa"}
"""Tasks -> their names in the table of what was measured."""
GAP, NO_NUMBER = "gap", "–"
PAPER_COLOUR = INK
OUR_COLOURS = (ORANGE, BLUE, GREEN)
SETTING_AXES = (("num_chunks", "number of chunks c", 8), ("rollout_length", "rollout length k", 5))
"""Panels of figure 5: the setting, its title, and the paper's value of it."""


# -- tables ------------------------------------------------------------------------------------------------------------


def measured_table(measured: pd.DataFrame) -> Table:
    """Tabulates what was measured: a line per row of the paper's tables, with the number of seeds of each group of tasks."""
    groups = measured["task"].str.replace(r"^(niah|ruler|longbench).*", r"\1", regex=True).replace(TASK_NAMES)
    labels = [Row(*values).label for values in measured[[*Row._fields]].itertuples(index=False)]
    frame = measured.assign(model=labels, group=groups)
    counts = frame.groupby(["model", "group"], sort=False)["seed"].nunique().unstack(fill_value=0).reset_index()
    counts = counts.sort_values("model", key=lambda names: names.map(_order), kind="stable")
    counts = counts.rename_axis(columns=None).replace(0, NO_NUMBER)
    return Table(counts, "Number of seeds measured for each model and group of tasks")


def _order(label: str) -> tuple[int, str]:
    """Returns the place of a model among others: random weights and the base first, then by the number of phases."""
    return (
        ["random weights", "base"].index(label) - 2 if label in ("random weights", "base") else label.count("→")
    ), label


def values_table(found: pd.DataFrame, model: str, *, by: str = "measure") -> Table:
    """Tabulates the `cells` of one table of the paper: its numbers for `model`, then ours.

    `by` is what a line shows: a measure at one length, or a row of the paper's table, then only at the lengths that the
    paper has. Ours are mean ± standard deviation over seeds; a single value has its standard error over samples in
    brackets.
    """
    require_data("values_table", len(found) > 0, "there are no cells")
    found = found if by == "measure" else _of_the_paper(found)
    frame = _by_measure(found) if by == "measure" else _by_row(found)
    table = str(found["table"].iloc[0])
    caption = (
        f"{_title(table)}, the paper's {model} and ours: {about(table)}. {_text(table)}{_spread(found)}{_few(found)}"
    )
    return Table(frame, caption.strip())


def _of_the_paper(found: pd.DataFrame) -> pd.DataFrame:
    """Returns the lines without those of lengths that the paper lacks, unless a measure has no others."""
    kept = found["length"].isin(("mean", "")) | found["paper"].notna()
    return found[kept.groupby(found["measure"]).transform(lambda own: own if own.any() else ~own)]


def _title(table: str) -> str:
    return table[0].upper() + table[1:]


def _spread(found: pd.DataFrame) -> str:
    single = found["mean"].notna() & found["sd"].isna() & found["stderr"].notna()
    sentences = "Ours are mean ± standard deviation over seeds. " if found["sd"].notna().any() else ""
    return sentences + (
        "A single value is shown with its standard error over samples in brackets. " if single.any() else ""
    )


def _few(found: pd.DataFrame) -> str:
    few = found[(found["different"] > 0) & (found["different"] < FEWEST_ITEMS)]
    if few.empty:
        return ""
    return f"With fewer than {FEWEST_ITEMS} distinct samples, most differences between models are noise."


def _text(table: str) -> str:
    """Returns what the paper's text reports about a figure, as a sentence."""
    return f"The paper: {text} " if (text := reported(table)) else ""


def _by_measure(found: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for (measure, length), group in found.groupby(["measure", "length"], sort=False):
        line = {"measure": measure, **({"tokens": length} if _has_lengths(found) else {})}
        printed, random = group[group["row"] > 0], group[group["row"] == 0]
        line |= {f"paper: {cell.label}": _number(cell.paper, cell.unit) for cell in _each(printed)}
        both = pd.concat([random, printed]) if found.loc[found["row"] == 0, "mean"].notna().any() else printed
        line |= {f"ours: {cell.label}": _ours(cell) for cell in _each(both)}
        lines.append({**line, **_counts(found, group)})
    return pd.DataFrame(lines)


def _by_row(found: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for number, group in found.groupby("row"):
        if number == 0 and group["mean"].isna().all():
            continue
        line = {"row": number or "", "model": group["label"].iloc[0]}
        for cell in _each(group):
            name = f"{cell.measure} {cell.length}".strip()
            if not cell.own:
                line[f"{name}: paper"] = _number(cell.paper, cell.unit)
            line[f"{name}: ours"] = _ours(cell)
        lines.append({**line, **_counts(found, group)})
    return pd.DataFrame(lines)


def _each(found: pd.DataFrame) -> Iterator[Any]:
    """Yields the lines of a frame as named tuples."""
    yield from found.itertuples()


def _has_lengths(found: pd.DataFrame) -> bool:
    return bool((found["length"] != "").any())


def _counts(found: pd.DataFrame, group: pd.DataFrame) -> dict[str, str]:
    """Returns the column with the numbers of samples and of distinct samples, if anything was measured on samples."""
    if not (found["samples"] > 0).any():
        return {}
    most = group.sort_values("samples").iloc[-1]
    counts = f"{most['samples']} ({most['different']})" if most["samples"] else NO_NUMBER
    return {"samples (distinct)": counts}


def _number(value: float, unit: str, *, signed: bool = False) -> str:
    if np.isnan(value):
        return NO_NUMBER
    return f"{value:{'+' if signed else ''}.{DIGITS[unit]}f}".replace("-", "−")


def _ours(cell: Any) -> str:
    mean, sd, stderr, unit = (getattr(cell, name) for name in ("mean", "sd", "stderr", "unit"))
    if np.isnan(mean):
        return GAP
    text = _number(mean, unit)
    if not np.isnan(sd):
        return f"{text} ± {_number(sd, unit)}"
    return text if np.isnan(stderr) else f"{text} ({_number(stderr, unit)})"


def differences_table(found: pd.DataFrame, *, by: str = "measure") -> Table:
    """Tabulates the `differences` of one table: the paper's beside ours, and whether both have the same sign.

    `by` as for `values_table`, where a row is a pair of rows.
    """
    require_data("differences_table", len(found) > 0, "there are no differences")
    found = found if by == "measure" else _of_the_paper(found)
    lines: dict[object, dict[str, object]] = {}
    for line in _each(found):
        name, pair = f"{line.measure} {line.length}".strip(), str(line.difference)
        key, column = (name, pair) if by == "measure" else (pair, name)
        into = lines.setdefault(key, {"measure" if by == "measure" else "difference": key})
        into[f"{column}: paper"] = (
            line.paper_sign if np.isnan(line.paper) else _number(line.paper, line.unit, signed=True)
        )
        into[f"{column}: ours"] = _difference(line)
    frame = pd.DataFrame([*lines.values()]).replace("", NO_NUMBER).fillna(NO_NUMBER)
    title = _title(str(found["table"].iloc[0]))
    unit = {"%": "points"}.get(str(found["unit"].iloc[0]), str(found["unit"].iloc[0]))
    caption = f"{title}, differences in {unit}: the paper's, and ours with their standard deviation over seeds"
    known = found[found["low"].notna()]
    if known.empty:
        return Table(frame, caption)
    note = few_items(int(known["items"].min()), "samples")
    return Table(frame, f"{caption} and 95 % intervals that account for variation over seeds and samples", note=note)


def _difference(line: Any) -> str:
    mean, sd, unit, sign, same = (getattr(line, name) for name in ("mean", "sd", "unit", "sign", "verdict"))
    if sign in ("gap", "floor"):
        return sign
    text = _number(mean, unit, signed=True) + ("" if np.isnan(sd) else f" ± {_number(sd, unit)}")
    if not np.isnan(line.low):
        text += f" [{', '.join(_number(end, unit, signed=True) for end in (line.low, line.high))}]"
    if sign == "floor unknown":
        return f"{text}, {sign}"
    return f"{text}, {'one is 0' if same == 'zero' else f'{same} sign'}" if same else text


def summary_table(summary: pd.DataFrame) -> Table:
    """Tabulates `paper_tables.summary`."""
    require_data("summary_table", len(summary) > 0, "there are no tables")
    return Table(
        summary,
        "Number of differences by sign: same as in the paper (same), opposite to it (opposite), zero in the paper or in our "
        "runs (zero), or not comparable, with the reason",
    )


def gaps_table(gaps: pd.DataFrame) -> Table:
    """Tabulates the gaps of all tables with what produces their cells; a table without lines if there are none."""
    return Table(gaps, "Gaps: what was not measured, and how to measure it")


def examples_table(rollouts: pd.DataFrame | None = None) -> Table:
    """Tabulates table F.1, the paper's rollouts with their cosine rewards, or ours with the same columns.

    `rollouts` has `example`, `reference`, `rollout`, `cosine`, as from `example_rows`. The highest reward of an example is
    marked.
    """
    ours = rollouts is not None
    frame = rollouts if ours else example_rows()
    require_data("examples_table", len(frame) > 0, "there are no rollouts")
    best = frame["cosine"] == frame.groupby("example")["cosine"].transform("max")
    table = frame.assign(
        reference=frame["reference"].map(visible).where(~frame.duplicated("example"), ""),
        rollout=frame["rollout"].map(visible),
        best=["highest" if each else "" for each in best],
    )
    title = "ours, of the model before training" if ours else about("table F.1")
    return Table(table, f"Table F.1: {title}", monospace=["reference", "rollout"])


# -- figures -----------------------------------------------------------------------------------------------------------


def has_scores(found: pd.DataFrame) -> bool:
    """Returns whether any row of the paper's tables was measured."""
    return bool(found.loc[found["row"] > 0, "mean"].notna().any())


def scores_figure(found: pd.DataFrame) -> go.Figure:
    """Plots the `cells` of one table that have our scores, over the paper's rows: ours and the paper's means, per measure.

    Ours have bars of one standard deviation over seeds. The dotted line is the model with random weights. Raises
    ValueError if nothing was measured.
    """
    last = found[found["length"].isin(("mean", ""))]
    last = last if len(last) else found
    measures = [
        name for name, group in last.groupby("measure", sort=False) if group.loc[group["row"] > 0, "mean"].notna().any()
    ]
    require_data("scores_figure", bool(measures), "no row was measured")
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure = make_subplots(rows, columns, subplot_titles=measures, vertical_spacing=0.35 / rows)
    for index, measure in enumerate(measures):
        place: dict[str, Any] = {"row": index // columns + 1, "col": index % columns + 1}
        group = last[(last["measure"] == measure) & (last["row"] > 0)]
        random = last[(last["measure"] == measure) & (last["row"] == 0)]["mean"].iloc[0]
        labels = [str(row) for row in group["row"]]
        figure.add_trace(_marks(labels, group["paper"], None, "the paper", PAPER_COLOUR, "circle-open"), **place)
        figure.add_trace(_marks(labels, group["mean"], group["sd"], "ours", OUR_COLOURS[0], "diamond"), **place)
        if not np.isnan(random):
            figure.add_hline(y=random, line={"color": INK, "dash": "dot", "width": 1}, **place)
        figure.update_yaxes(title_text=group["unit"].iloc[0], rangemode="tozero", **place)
    figure.update_xaxes(type="category", title_text="row of the table")
    return dress(one_legend(figure), height=100 + 230 * rows)


def _marks(x: Sequence[str], y: pd.Series, spread: pd.Series | None, name: str, colour: str, symbol: str) -> go.Scatter:
    bars = None if spread is None else {"array": spread.fillna(0), "thickness": 1}
    return go.Scatter(
        x=list(x), y=y, error_y=bars, name=name, mode="lines+markers", legendgroup=name,
        line={"color": colour, "width": 1}, marker={"symbol": symbol, "size": 9},
    )  # fmt: skip


def settings_figure(found: pd.DataFrame) -> go.Figure:
    """Plots the `cells` of figure 5 over the number of chunks and the rollout length: the printed points, and ours.

    Raises ValueError if a cell belongs to another table.
    """
    require_data(
        "settings_figure", set(found["table"]) == {"figure 5"}, "it needs the cells of figure 5, and no others"
    )
    panels = [panel for panel in SETTING_AXES if len(_points(found, panel[0], panel[2]))]
    figure = make_subplots(1, len(panels), subplot_titles=[title for _, title, _ in panels])
    for column, (setting, title, usual) in enumerate(panels, start=1):
        points = _points(found, setting, usual)
        for index, (measure, group) in enumerate(points.groupby("measure", sort=False)):
            printed, ours = group[group["paper"].notna()], group[group["mean"].notna()]
            if len(printed) > 1:
                figure.add_trace(_curve(printed, "paper", f"the paper: {measure}", PAPER_COLOUR), 1, column)
            if len(ours):
                figure.add_trace(_curve(ours, "mean", f"ours: {measure}", OUR_COLOURS[index % 3]), 1, column)
        figure.update_xaxes(title_text=title, tickvals=sorted(points["value"].unique()), row=1, col=column)
    figure.update_yaxes(title_text="%")
    return dress(one_legend(figure), height=360)


def _points(found: pd.DataFrame, setting: str, usual: int) -> pd.DataFrame:
    """Returns the cells of one panel that have a number, with their `value` of the setting; the paper's own is `usual`."""
    value = found["label"].str.extract(rf"{setting}=(\d+)")[0]
    plain = found["label"] == Row("refine").label
    points = found.assign(value=value.where(~plain, str(usual)))
    points = points[points["value"].notna() & points["length"].isin(("mean", ""))].astype({"value": int})
    points = points[points["mean"].notna() | points["paper"].notna()]
    return points if len(points["value"].unique()) > 1 else points.head(0)


def _curve(points: pd.DataFrame, column: str, name: str, colour: str) -> go.Scatter:
    points = points.sort_values("value")
    bars = {"array": points["sd"].fillna(0), "thickness": 1} if column == "mean" else None
    return go.Scatter(
        x=points["value"], y=points[column], error_y=bars, name=name, legendgroup=name, mode="lines+markers",
        line={"color": colour}, marker={"size": 8},
    )  # fmt: skip
