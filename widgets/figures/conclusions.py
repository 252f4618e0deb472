"""Differences from a reference as a table, under one sentence that says what they show and what they do not show."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import pandas as pd

from refine_lab.data.tasks.items import FEWEST_ITEMS
from refine_lab.experiments.reference import (
    default_reference,
    differences_from,
    not_compared,
    scores_by_item,
    scores_by_seed,
)
from refine_lab.validation import unknown
from widgets.figures.conclusion_sentences import bounded, sentences_of
from widgets.figures.method_sentences import method_sentences
from widgets.figures.method_tables import ITEMS, digits_of, format_p, format_value, heading, shown_difference
from widgets.figures.plotting import require_data
from widgets.figures.series import method_styles
from widgets.figures.tables import Table

HEAD = "font-weight: 600; line-height: 1.4; max-width: 72em; margin-bottom: 0"
"""Style of the first sentence."""
DETAILS = "line-height: 1.4; max-width: 72em"
"""Style of what follows it, and of the methods below the table."""


class Conclusion(Table):
    """A table of differences from a reference under a first sentence, `head`, and others, `details`.

    `methods` maps the label of each compared method to a sentence that says what it does; these are below the table.
    """

    def __init__(
        self,
        data: pd.DataFrame,
        caption: str,
        *,
        head: str,
        details: str = "",
        note: str = "",
        methods: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data, caption, note=note)
        self.head, self.details, self.methods = head, details, dict(methods or {})

    @property
    def sentence(self) -> str:
        """Returns all sentences above the table."""
        return " ".join(filter(None, (self.head, self.details)))

    def __repr__(self) -> str:
        methods = [f"{label}: {sentence}" for label, sentence in self.methods.items()]
        return "\n".join([self.sentence, super().__repr__(), *methods])

    def _repr_html_(self) -> str:
        head = f"<p style='{HEAD}'>{html.escape(self.head)}</p>"
        details = f"<p style='{DETAILS}'>{html.escape(self.details)}</p>" if self.details else ""
        methods = "".join(
            f"<br><strong>{html.escape(label)}</strong>: {html.escape(sentence)}"
            for label, sentence in self.methods.items()
        )
        methods = f"<p style='{DETAILS}'>The methods:{methods}</p>" if methods else ""
        return head + details + super()._repr_html_() + methods


def conclusion(
    answers: pd.DataFrame,
    measures: str | Sequence[str] = "contains_answer",
    *,
    reference: str | None = None,
    per_seed: Sequence[Mapping[str, object]] | pd.DataFrame = (),
    labels: Mapping[str, str] | None = None,
) -> Conclusion:
    """Compares every method with `reference` in each measure, and concludes about the first measure that has values.

    `answers` has a row for each method, seed and prompt, as for `refine_lab.statistics.answer_scores`. A measure that is
    not in it is taken from `per_seed`, which has a row for each method and seed. `reference`: a method; none: see
    `refine_lab.experiments.reference.default_reference`. `labels`: names of methods, if they are not those of the figures.
    Raises ValueError if no two methods have one of the measures, and ConfigError for an unknown reference.
    """
    measures = [measures] if isinstance(measures, str) else [*measures]
    rows, found = pd.DataFrame(per_seed), {}
    for measure in measures:
        if measure in answers and answers[measure].notna().any():
            scores = scores_by_item(answers, measure)
        elif measure in rows and rows[measure].notna().any():
            scores = scores_by_seed(rows, measure)
        else:
            continue
        if scores["method"].nunique() > 1:
            found[measure] = scores
    return conclude(found, reference=reference, labels=labels)


def conclude(
    scores: Mapping[str, pd.DataFrame],
    *,
    reference: str | None = None,
    labels: Mapping[str, str] | None = None,
    single: bool = False,
    wanted: Sequence[str] = (),
) -> Conclusion:
    """Returns the conclusion of tables of scores by measure; see `conclusion`.

    Each table has the columns `refine_lab.statistics.contrasts.SCORE_COLUMNS`. `single`: whether its methods are single runs.
    `wanted`: further methods, which are named also if they have no scores.
    """
    require_data("conclusion", len(scores) > 0, "no two methods have one of these measures")
    methods = [*dict.fromkeys(name for table in scores.values() for name in table["method"])]
    against = default_reference(methods) if reference is None else reference
    methods = [*dict.fromkeys([*methods, *wanted])]
    named = dict(labels or {}) or {name: style.label for name, style in method_styles(methods).items()}
    tables = {
        measure: bounded(measure, differences_from(table, against))
        for measure, table in scores.items()
        if against in {*table["method"]}
    }
    if not tables:
        raise unknown("reference", against, methods)
    first, differences = next(iter(tables.items()))
    absent = dict.fromkeys(methods, "scores") | not_compared(scores[first], against)
    absent = {name: lacks for name, lacks in absent.items() if name not in {against, *differences["method"]}}
    lines = [line for measure, table in tables.items() for line in _lines(measure, table, named)]
    tests = max((int(table["p_holm"].notna().sum()) for table in tables.values()), default=0)
    corrected = f"The p-values are corrected by Holm for the {tests} comparisons of a measure." if tests > 1 else ""
    head, details = sentences_of(first, scores[first], differences, against, named, absent, single=single)
    return Conclusion(
        pd.DataFrame(lines),
        f"Differences from {named[against]} [95 % intervals]",
        head=head,
        details=details,
        note=" ".join(filter(None, (_few(differences), corrected))),
        methods={} if single else method_sentences(methods),
    )


def _few(differences: pd.DataFrame) -> str:
    """Returns a sentence that warns of few distinct questions; the intervals are over them too."""
    items = int(differences["items"].max()) if len(differences) else 0
    if items <= 1 or items >= FEWEST_ITEMS:
        return ""
    return f"There are only {items} distinct questions, fewer than {FEWEST_ITEMS}, so the intervals over them are approximate."


def _lines(measure: str, table: pd.DataFrame, named: Mapping[str, str]) -> list[dict[str, object]]:
    digits = digits_of(measure, table)
    return [
        {
            "measure": heading(measure),
            "method": named[row["method"]],
            named[row["against"]]: format_value(measure, row["against_value"], (), digits=digits),
            "value": format_value(measure, row["value"], (), digits=digits),
            "difference": format_value(
                measure,
                shown_difference(measure, row["value"], row["against_value"], digits),
                (row["low"], row["high"]),
                signed=True,
                digits=digits,
            ),
            "p (Holm)": format_p(row["p_holm"]),
            "interval over": "none" if row["over"] == "nothing" else row["over"].replace("items", "questions"),
            "seeds": row["seeds"],
            ITEMS: row["items"] if row["items"] > 1 else "–",
        }
        for row in table.to_dict("records")
    ]
