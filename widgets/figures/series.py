"""The panels, method styles and series thinning shared by static figures and live curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from refine_lab.experiments.run_groups import SEPARATOR
from widgets.core.palette import FIGURES

INK = "#7a7a7a"
"Grey of texts and axes, with a contrast above 4 on white and on black backgrounds."

BAND = 0.18
"Opacity of a band."


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One quantity over training steps, drawn as a small multiple."""

    kind: Literal["train", "eval", "answers", "recall"]
    "Source of the quantity: lines of this kind in `metrics.jsonl`, the answers of a test-time training run, or stored recall."
    key: str
    "Column of the quantity."
    title: str
    "Title of the panel."
    unit: str
    "Unit of the axis."
    spread: str | None = None
    "Column of the standard deviation drawn as a band."

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.key}"

    @property
    def scale(self) -> int:
        """Returns the factor from the column to the axis: fractions are drawn in percent."""
        return 100 if self.unit.startswith("%") else 1


PANELS = (
    Plot(kind="recall", key="exact_recall", title="Exact recall", unit="% of questions"),
    Plot(kind="train", key="ntp_loss", title="NTP loss", unit="nats per token"),
    Plot(kind="train", key="ntp_accuracy", title="NTP accuracy", unit="%"),
    Plot(kind="eval", key="ntp_loss", title="Held-out NTP loss", unit="nats per token"),
    Plot(kind="eval", key="ntp_accuracy", title="Held-out NTP accuracy", unit="%"),
    Plot(kind="eval", key="long_ppl", title="Held-out LongPPL", unit="perplexity of key tokens"),
    Plot(kind="train", key="answer_loss", title="Answer loss", unit="nats per token"),
    Plot(kind="train", key="answer_accuracy", title="Answer accuracy", unit="% of tokens"),
    Plot(kind="eval", key="answer_loss", title="Held-out answer loss", unit="nats per token"),
    Plot(kind="eval", key="contains_answer", title="Held-out answers containing a reference", unit="% of questions"),
    Plot(kind="eval", key="exact_match", title="Held-out exact-match rate", unit="% of questions"),
    Plot(kind="train", key="cosine_mean", title="Cosine reward", unit="mean ± std", spread="cosine_std"),
    Plot(kind="train", key="binary_mean", title="Binary reward", unit="mean ± std", spread="binary_std"),
    Plot(kind="train", key="reward_mean", title="Training reward", unit="mean ± std", spread="reward_std"),
    Plot(kind="train", key="target_probability", title="Probability of the next k tokens", unit="mean over positions"),
    Plot(kind="train", key="grad_norm", title="Gradient norm", unit="L2, before clipping"),
    Plot(
        kind="eval",
        key="nsp_snr",
        title="Signal-to-noise of the NSP gradient",
        unit="ratio so far ± standard error",
        spread="nsp_snr_stderr",
    ),
    Plot(kind="eval", key="nsp_ntp_cosine", title="Cosine of the NSP and NTP gradients", unit="cosine"),
    Plot(kind="train", key="answer_grad_norm", title="Gradient norm, answers", unit="L2, before clipping"),
    Plot(kind="train", key="clip_fraction", title="Clipped ratios", unit="% of tokens"),
    Plot(kind="answers", key="contains_answer", title="Answers containing a reference, so far", unit="% of prompts"),
    Plot(kind="answers", key="exact_match", title="Exact-match rate so far", unit="% of prompts"),
    Plot(kind="answers", key="loss_after", title="NTP loss so far", unit="nats per token"),
    Plot(kind="answers", key="entropy_after", title="Entropy so far", unit="nats per token"),
)


Symbol = Literal["circle", "diamond", "square", "triangle-up", "x"]
Dash = Literal["solid", "dash", "dot", "dashdot"]


@dataclass(frozen=True, kw_only=True)
class MethodStyle:
    """The style of a method in all figures: a colour, a symbol, a dash and a width."""

    label: str
    colour: str
    symbol: Symbol
    dash: Dash = "solid"
    "Dash of the line, which distinguishes methods of the same colour."
    width: float = 1.75
    "Width of the line. That of SFT is wide and drawn below the others, so that it shows where they coincide."


COLOURS = FIGURES
"Colours of methods; the live curves have the same hues, in this order, for light and dark pages."
GREY, BLUE, ORANGE, GREEN, PINK, OCHRE = COLOURS

WIDE = 4.0
"Width of the lines of SFT and nested SFT."

KNOWN_METHODS = {
    "base": MethodStyle(label="base", colour=GREY, symbol="square"),
    "sft": MethodStyle(label="SFT", colour=BLUE, symbol="circle", width=WIDE),
    "refine": MethodStyle(label="REFINE", colour=ORANGE, symbol="diamond"),
    "nested_sft": MethodStyle(label="nested SFT", colour=GREEN, symbol="triangle-up", width=WIDE),
    "nested_refine": MethodStyle(label="nested REFINE", colour=PINK, symbol="x"),
    "refine_memory": MethodStyle(label="REFINE by memory", colour=PINK, symbol="triangle-up"),
    "nested_refine_memory": MethodStyle(label="nested REFINE by memory", colour=OCHRE, symbol="square"),
    "expected": MethodStyle(label="expected match", colour=GREEN, symbol="square"),
    "weighted": MethodStyle(label="weighted NTP", colour=OCHRE, symbol="circle"),
    "longce": MethodStyle(label="LongCE", colour=OCHRE, symbol="diamond"),
    "dft": MethodStyle(label="DFT", colour=OCHRE, symbol="triangle-up"),
    "placebo": MethodStyle(label="placebo", colour=GREY, symbol="x"),
}
"Method -> style; a nested method that is not listed has the style of the method itself."
OTHER_STYLES: Sequence[tuple[str, Symbol]] = ((OCHRE, "x"), (GREEN, "triangle-up"), (PINK, "circle"))
DASHES: Sequence[Dash] = get_args(Dash)


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """Returns method -> style, in order of appearance.

    `none`, the model without adaptation, has the style of a base model; a method with the suffix `_release` or `_compute`
    has the style of the method itself and a label for its updates. A method may be an experiment's name (see
    `run_groups.group_names`): its label then lists the distinguishing settings, and each line has a dash that no
    other line of its colour has.
    """
    methods = [*dict.fromkeys(methods)]
    others = dict.fromkeys(look for method in methods if (look := looks_like(method)) not in KNOWN_METHODS)
    bases = dict(KNOWN_METHODS)
    for look, (colour, symbol) in zip(others, cycle(OTHER_STYLES)):
        bases[look] = MethodStyle(label=look, colour=colour, symbol=symbol)
    styles: dict[str, MethodStyle] = {}
    for method in methods:
        name, _, differing = method.partition(SEPARATOR)
        style = bases[looks_like(method)]
        nested = name.startswith("nested_")
        words = ["baseline (no adaptation)" if name == "none" else style.label]
        if nested and not looks_like(name).startswith("nested_"):
            words = [f"nested {style.label}"]
        if name.endswith("_release"):
            words.append("one inner update" if nested else "fewer updates")
        if name.endswith("_compute"):
            words.append("equal compute")
        before = sum(other.colour == style.colour for other in styles.values())
        label = ", ".join(filter(None, [*words, differing]))
        styles[method] = replace(style, label=label, dash=DASHES[before % len(DASHES)])
    return styles


def looks_like(method: str) -> str:
    """Returns the method whose colour and symbol a method uses."""
    name = method.partition(SEPARATOR)[0].removesuffix("_release").removesuffix("_compute")
    alone = name.removeprefix("nested_")
    if name == "none":
        return "base"
    return alone if name not in KNOWN_METHODS and alone in KNOWN_METHODS else name


def has_panel(frame: pd.DataFrame, panel: Plot) -> bool:
    """Returns whether `frame` (lines of one kind) has data for `panel`.

    A `reward_mean` that only repeats the cosine or the binary reward gets no separate panel.
    """
    if panel.key not in frame or not np.isfinite(frame[panel.key].astype(float)).any():
        return False
    rows = frame[frame[panel.key].notna()]
    others = [key for key in ("cosine_mean", "binary_mean") if panel.key == "reward_mean" and key in rows]
    return not any(np.allclose(rows["reward_mean"], rows[key]) for key in others)


def over_seeds(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Returns mean, min and max over seeds of column `key` per method and step: columns method, step, mean, min, max, seeds.

    Only steps that all of a method's seeds have are included; otherwise the mean would jump where one seed ends.
    """
    rows = frame[frame[key].notna()].drop_duplicates(["method", "seed", "step"], keep="last")  # repeated evaluations
    table = rows.groupby(["method", "step"])[key].agg(mean="mean", min="min", max="max", seeds="count").reset_index()
    return table[table["seeds"] == table["method"].map(rows.groupby("method")["seed"].nunique())].reset_index(drop=True)


def decimate(y: Float[np.ndarray, "n"], limit: int = 1000) -> Int[np.ndarray, "m"]:
    """Returns indices of at most `limit` points: the first, the last, and the minimum and maximum of each segment between.

    A segment without any finite value keeps a point, so that a gap remains visible. Raises ValueError for a limit below
    4.
    """
    if limit < 4:
        raise ValueError(f"limit must be at least 4, got {limit}")
    if len(y) <= limit:
        return np.arange(len(y))
    borders = np.linspace(1, len(y) - 1, (limit - 2) // 2 + 1).astype(int)
    finite = np.isfinite(y)
    low, high = np.where(finite, y, np.inf), np.where(finite, y, -np.inf)
    kept = {0, len(y) - 1}
    for start, stop in pairwise(borders):
        kept |= {start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())}
    return np.array(sorted(kept))
