"""What each method does, in the glossary's sentences: beside comparisons, and in the tooltips of the run table."""

from __future__ import annotations

from collections.abc import Iterable

from refine_lab.experiments.run_groups import SEPARATOR
from widgets.core.glossary import TERMS, explain
from widgets.figures.series import method_styles


def method_sentence(method: str) -> str:
    """Returns what a method does, without the settings of its runs; empty for a method that the glossary lacks."""
    label = method_label(method)
    first, *updates = label.split(", ")
    alone = first.removeprefix("nested ")
    nested = [TERMS["nested"]] if alone != first else []
    return " ".join(filter(None, [explain(alone), *nested, *map(explain, updates)]))


def method_label(method: str) -> str:
    """Returns a method's label without the settings of its runs."""
    name = method.partition(SEPARATOR)[0]
    return method_styles([name])[name].label


def method_sentences(methods: Iterable[str]) -> dict[str, str]:
    """Returns label -> sentence of the methods that the glossary has, each once."""
    named = {method_label(method): method_sentence(method) for method in methods}
    return {label: sentence for label, sentence in named.items() if sentence}
