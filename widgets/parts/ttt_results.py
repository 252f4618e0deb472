"""The results of the TTT panel: an adaptation with one method, and what several of them changed in one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby

from refine_lab.data.tasks.scores import contains_answer, exact_match
from refine_lab.explore.adapted import MeasuredPrompt
from refine_lab.explore.reading import DocumentReading
from refine_lab.statistics.rest_change import RestChange, RestDifference, rest_change, rest_difference
from refine_lab.text import replace_surrogates
from refine_lab.ttt_config import TTTConfig
from widgets.figures.series import KNOWN_METHODS
from widgets.parts.document_metrics import change_metrics, entropy_metric, rest_metric
from widgets.parts.token_document import Metric
from widgets.parts.ttt_prompt import BETWEEN, PanelPrompt


@dataclass(eq=False, kw_only=True)
class Adaptation:
    """An adaptation to the panel's prompt: its steps so far, and how the model reads and answers at its end."""

    label: str
    "The method, or several that followed each other, as the panel calls them."
    method: str
    "Name of the last method, which defines colour and symbol."
    config: TTTConfig
    steps: list[dict[str, float]]
    """One entry per step, from 0 (the original weights): `step`, `loss` and `entropy` of the adapted tokens, `rest_loss` if
    there is a remainder, and `reward` if there are rollouts."""
    before: int = 0
    "Number of updates that the weights had when it began."
    made: int = 0
    "Number of updates that it has made itself."
    after: MeasuredPrompt | None = None
    rest: RestChange | None = None
    kept: bool | None = None
    "Whether the worker has kept a copy of the weights at its end; None if they were not compared."

    @property
    def reading(self) -> DocumentReading:
        """Returns the statistics of the prompt's tokens at the end."""
        assert self.after is not None
        return self.after.reading

    def finish(self, prompt: PanelPrompt, before: MeasuredPrompt, after: MeasuredPrompt) -> None:
        """Sets what is known at the end; `before` is measured with the original weights."""
        self.after = after
        if (held := prompt.held) is not None:
            losses = (held.rest(each.reading.losses[1:]) for each in (before, after))
            self.rest = rest_change(*losses, seed=self.config.seed)


def method_name(config: TTTConfig) -> str:
    """Returns the name of a configuration's method, one of `recipes.methods.ORDER`."""
    return "sft" if config.refine is None else config.refine.method


def in_turn(methods: Sequence[str]) -> str:
    """Returns the labels of methods that followed each other, such as `SFT, then REFINE`."""
    labels = [KNOWN_METHODS[name].label if name in KNOWN_METHODS else name for name, _ in groupby(methods)]
    return ", then ".join(labels)


def differences(prompt: PanelPrompt, results: Sequence[Adaptation]) -> list[RestDifference]:
    """Returns the difference in the loss on the remainder of each pair of methods; none if nothing is held out."""
    held, found = prompt.held, []
    if held is None:
        return []
    for one, other in combinations([each for each in results if each.after is not None], 2):
        losses = [held.rest(each.reading.losses[1:]) for each in (one, other)]
        found.append(rest_difference(one.label, losses[0], other.label, losses[1], seed=other.config.seed))
    return found


# -- answers ---------------------------------------------------------------------------------------------------------


def answer_rows(prompt: PanelPrompt, before: MeasuredPrompt, results: Sequence[Adaptation]) -> list[dict[str, str]]:
    """Returns a row of text per answer, before adaptation and after each method, and one with the reference answers."""
    rows = [_answer_row("before adaptation", prompt, before, None)]
    for each in results:
        if each.after is not None:
            rows.append(_answer_row(f"after {each.label}", prompt, each.after, before.reference_logprob))
    if prompt.references:
        rows.append({"label": "reference", "answer": replace_surrogates(BETWEEN.join(prompt.references))})
    return rows


def _answer_row(label: str, prompt: PanelPrompt, measured: MeasuredPrompt, before: float | None) -> dict[str, str]:
    row = {"label": label, "answer": replace_surrogates(measured.answer), "verdict": verdict(measured.answer, prompt)}
    value = measured.reference_logprob
    if value is not None:
        change = "" if before is None else f" ({_signed(value - before)})"
        row["logprob"] = f"{value:.3f}{change}".replace("-", "−")
    return row


def verdict(answer: str, prompt: PanelPrompt) -> str:
    """Returns whether an answer is right, and by which score; empty without a reference."""
    if not prompt.references:
        return ""
    if exact_match(answer, prompt.references) == 1:
        return "right (exact match)"
    return "right (contains the reference)" if contains_answer(answer, prompt.references) == 1 else "wrong"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


# -- the coloured document -------------------------------------------------------------------------------------------


def token_metrics(prompt: PanelPrompt, before: MeasuredPrompt, results: Sequence[Adaptation]) -> list[Metric]:
    """Returns the metrics of each token: its changes after each method, how the methods differ, and its entropies."""
    done = [each for each in results if each.after is not None]
    changes, levels = [], [entropy_metric(before.reading, "before")]
    for each in done:
        reading = each.reading
        own = change_metrics(before.reading, reading)
        if prompt.held is not None:
            own.insert(0, rest_metric(before.reading, reading, prompt.held))
        after = entropy_metric(reading, "after")
        if len(done) > 1:
            own, after = [_of_method(metric, each) for metric in own], _of_method(after, each)
        changes.append(own)
        levels.append(after)
    between = [_difference(prompt, one, other) for one, other in combinations(done, 2)]
    firsts = [own[0] for own in changes]
    return [*between, *firsts, *(metric for own in changes for metric in own[1:]), *levels]


def _of_method(metric: Metric, adaptation: Adaptation) -> Metric:
    title = f"{metric.title}, {adaptation.label}"
    return replace(metric, name=f"{metric.name}_{adaptation.method}", title=title)


def _difference(prompt: PanelPrompt, one: Adaptation, other: Adaptation) -> Metric:
    """Returns the loss of each token after the second method minus that after the first, on the remainder if there is one."""
    title = f"NTP loss after {other.label} minus after {one.label}"
    if prompt.held is not None:
        metric, title = rest_metric(one.reading, other.reading, prompt.held), f"{title}, held-out remainder"
    else:
        metric = change_metrics(one.reading, other.reading)[1]
    return replace(metric, name=f"loss_{other.method}_minus_{one.method}", title=title)


# -- the status ------------------------------------------------------------------------------------------------------


def end_sentence(prompt: PanelPrompt, before: MeasuredPrompt, results: Sequence[Adaptation], stopped: bool) -> str:
    """Returns the sentence about the loss and entropy of the adapted tokens before and after."""
    last = results[-1]
    steps = " and ".join(dict.fromkeys(f"{_updates(each)}" for each in results))
    end = " (stopped)" if stopped else " (stopping criterion reached)" if last.made < last.config.steps else ""
    first = prompt.levels(before.reading)
    changes = []
    for name in ("loss", "entropy"):
        values = [f"{prompt.levels(each.reading)[name]:.3f}" for each in results if each.after is not None]
        if len(values) > 1:
            values = [f"{value} ({each.label})" for value, each in zip(values, results, strict=False)]
        changes.append(f"{name} {first[name]:.3f} → {', '.join(values)}")
    unit = "nats per token" if prompt.held is None else "nats per token of the adapted part"
    each, separator = (" each", "; ") if len(results) > 1 else ("", ", ")
    return f"After {steps}{each}{end}: {separator.join(changes)} ({unit}, from the original weights)."


def _updates(adaptation: Adaptation) -> str:
    count = adaptation.before + adaptation.made
    return f"{count} step{'s' if count != 1 else ''}"
