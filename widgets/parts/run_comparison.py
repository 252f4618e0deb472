"""The differences of the selected runs from a reference: a choice of reference and measure, the table, and the conclusion."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from refine_lab.experiments.compare import names_of
from refine_lab.experiments.reference import default_reference
from refine_lab.experiments.stored_scores import HELD_OUT, stored_scores
from refine_lab.runs.run import Run
from refine_lab.text import printable
from widgets.core.base import sentence
from widgets.figures.conclusions import Conclusion, conclude
from widgets.figures.method_sentences import method_sentences
from widgets.figures.method_tables import heading
from widgets.figures.series import method_styles
from widgets.parts.controls import field, in_rows

TOO_FEW = "Select runs of at least two methods, or several runs and a single run as reference, to compare them."
NO_SCORES = "The selected runs have no measure in common yet; held-out measures appear after the first evaluation."

ABSENT = "The chosen reference has no scores in this measure."

Reference = tuple[str, str]
"""A method or a run: `method` or `run`, and its name."""


class RunComparison(ipywidgets.VBox):
    """Compares the runs given to `show` with a `reference` in one `measure`; both are chosen in dropdowns.

    `found` is the conclusion, or None, and `reason` says why there is none. Methods are those under which the runs are averaged
    (`experiments.run_groups.group_names`), paired over seeds and questions. With a single run as reference, each other
    run is compared with it.
    """

    def __init__(self) -> None:
        self.found: Conclusion | None = None
        self.reason = TOO_FEW
        self._runs: list[Run] = []
        self._setting = False
        self._first: str | None = None  # the measure that is shown if none is chosen
        self._scores: tuple[Any, Any] = (None, ({}, None))
        self.reference = field(ipywidgets.Dropdown, "compare with", None, "34em", options=[])
        self.measure = field(ipywidgets.Dropdown, "measure", None, "34em", options=[])
        self._shown = ipywidgets.HTML()
        scrolls = ipywidgets.Box([self._shown], layout=ipywidgets.Layout(overflow="auto"))
        heading = ipywidgets.HTML("<strong>Comparison of the selected runs</strong>")
        super().__init__([heading, in_rows([self.reference, self.measure]), scrolls])
        self.reference.observe(self._on_choice, "value")
        self.measure.observe(self._on_choice, "value")

    def show(self, runs: Sequence[Run]) -> None:
        """Compares these runs. The reference stays if it is among the new ones, and so does a measure that was chosen."""
        self._runs, self._scores = [*runs], (None, ({}, None))
        self._try(self._show)

    def _try(self, compare: Callable[[], None]) -> None:
        """Calls a function that compares, and shows what it raises in place of the conclusion."""
        try:
            compare()
        except (OSError, ValueError, LookupError, TypeError) as error:  # whatever the files of one run hold
            self.found, self.reason = None, f"The runs cannot be compared: {sentence(error)}"
            self._draw()

    def _show(self) -> None:
        methods = [*dict.fromkeys(names_of(self._runs))]
        styles, labels = method_styles(methods), run_labels(self._runs)
        options: list[tuple[str, Reference]] = []
        if len(methods) > 1:
            options = [(style.label, ("method", name)) for name, style in styles.items()]
        if len(self._runs) > 1:
            options += [(f"run {label}", ("run", name)) for name, label in labels.items()]
        first = ("method", default_reference(methods)) if len(methods) > 1 else options[0][1] if options else None
        self._choose(self.reference, options, first, self.reference.value)
        self._compare()

    def __repr__(self) -> str:
        return self.reason if self.found is None else repr(self.found)

    def _on_choice(self, change: Any) -> None:
        if not self._setting:
            self._try(self._compare)

    def _choose(self, dropdown: Any, options: Sequence[tuple[str, Any]], first: Any, kept: Any) -> None:
        """Sets the options of a dropdown, and its value to `kept` if that is among them, else to `first`."""
        values = [value for _, value in options]
        self._setting = True
        try:
            dropdown.options = [*options]
            dropdown.value = kept if kept in values else first
            dropdown.disabled = not options
        finally:
            self._setting = False

    def _compare(self) -> None:
        self.found, self.reason = None, TOO_FEW
        if self.reference.value is not None:
            kind, name = self.reference.value
            single = kind == "run"
            names = [run.name for run in self._runs] if single else names_of(self._runs)
            scores, step = self._scores_of(names, single)
            first = next(iter(scores), None)
            kept = None if self.measure.value == self._first else self.measure.value
            self._first = first
            self._choose(self.measure, [(heading(measure), measure) for measure in scores], first, kept)
            self.reason = NO_SCORES if first is None else ABSENT
            if first is not None and name in {*scores[self.measure.value]["method"]}:
                chosen, labels = self.measure.value, run_labels(self._runs) if single else None
                settings = {"reference": name, "labels": labels, "single": single, "wanted": names}
                self.found = conclude({chosen: scores[chosen]}, **settings)
                self.found.methods = method_sentences(names_of(self._runs))
                if step is not None and chosen.startswith(HELD_OUT):
                    at = f"Measured at step {step}, the last that all of these runs have reached."
                    self.found.note = " ".join(filter(None, (self.found.note, at)))
        self._draw()

    def _draw(self) -> None:
        """Shows the conclusion, or why there is none."""
        reason = f"<p>{html.escape(self.reason)}</p>"
        self._shown.value = reason if self.found is None else self.found._repr_html_()  # escaped too

    def _scores_of(self, names: list[str], single: bool) -> tuple[dict[str, Any], int | None]:
        """Returns the stored scores; they are read once for each selection. A run on its own counts as one seed."""
        if self._scores[0] != names:
            scores, step = stored_scores(self._runs, names)
            if single:
                scores = {measure: table.assign(seed=0) for measure, table in scores.items()}
            self._scores = names, (scores, step)
        return self._scores[1]


def run_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Returns run name -> its method and seed, with the name itself where two runs would have the same label."""
    names = names_of(runs)
    styles = method_styles(names)
    labels = {run.name: f"{styles[name].label}, seed {run.config.seed}" for run, name in zip(runs, names, strict=True)}
    counts = Counter(labels.values())
    return {name: printable(label if counts[label] == 1 else f"{label} ({name})") for name, label in labels.items()}
