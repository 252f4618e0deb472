"""Writes docs/results/evidence.md, the means and contrasts of the registered experiments, and the figure frontier.png.

It also updates the tables of experiment 1 in docs/results/README.md and the result in the project's README.md, which are
between comments.

    python -m benchmarks.evidence_page [--out docs/results]

Both come from evidence.csv and evidence_items.csv alone. The figure needs Chromium, as `benchmarks.static_figures` does.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.evidence import (
    MARGIN,
    RESULTS,
    ROOT,
    Experiment,
    contrasts_of,
    experiments,
    frontiers,
    paired_contrasts,
)
from benchmarks.evidence_posttrain import METHODS as POST_METHODS
from benchmarks.evidence_posttrain import questions_asked
from benchmarks.evidence_posttrain import runs as post_runs
from benchmarks.evidence_ttt import runs as rest_runs
from benchmarks.static_figures import draw
from refine_lab.experiments.evidence import BASE, ITEMS, KEYS, TABLE, VARIANTS, item_scores, questions_of, read_table
from refine_lab.runs.durable import replace_bytes, replace_text
from refine_lab.statistics.contrasts import compare_methods
from refine_lab.validation import require
from widgets.figures.series import method_styles
from widgets.figures.trade_off import frontier_figure

PAGE, FIGURE = "evidence.md", "frontier.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- tables of experiment 1: begin -->", "<!-- tables of experiment 1: end -->"
"""Comments in README.md between which the tables of experiment 1 are."""
RESULT_BEGIN, RESULT_END = "<!-- one result: begin -->", "<!-- one result: end -->"
"""Comments in the project's README.md around the result of experiment 1."""
TASK = "number-1 1024"
"""Task of the figure: experiments 1 and 2."""
LABELS = {
    "base": "before training",
    "sft": "SFT",
    "refine": "REFINE",
    "refine_memory": "REFINE by memory",
    "expected_memory": "expected match by memory",
    "expected_memory_windows": "expected match by memory, windows",
    "expected_entropy": "expected match by entropy",
    "weighted": "weighted NTP by memory",
    "longce": "LongCE",
    "dft": "DFT",
    "placebo": "placebo of REFINE by memory",
}
MEASURES = {"exact_recall": ("recall (%)", 100, 1), "longppl": ("LongPPL", 1, 2), "ntp_loss": ("NTP loss", 1, 4)}
"""Columns of the table of means: heading, scale and digits."""
UNITS = {
    "exact_recall": ("points of recall", 100, 1),
    "answers": ("points of right answers", 100, 1),
    "key_loss": ("nats of loss on key tokens", 1, 3),
    "ntp_loss": ("nats of next-token loss", 1, 4),
    "rest_change": ("nats", 1, 4),
}
"""Columns of the tables of contrasts: unit, scale and digits."""


INTRODUCTION = """# The registered experiments

This page is generated from `evidence.csv` and `evidence_items.csv` by `python -m benchmarks.evidence_page`. The questions,
measures, budgets and margins were [registered](../log.md) before any run, except that experiment 5 and the rule for items
were registered when eight runs had finished, experiment 7 when 29 had, and experiment 8 when 48 had. ± is the standard
deviation over seeds. Intervals are 95 % intervals over seeds and items; documents that ask about the same key are one item.
The intervals are interim as long as registered runs are missing. The p-values are Holm-corrected over the registered
contrasts of each measure.

*By memory* means: at positions whose next tokens are much more likely given the whole prefix than given the last tokens
alone. [method.md](../method.md#methods-that-can-be-compared) defines the methods.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evidence.csv, and of the page")
    out: Path = parser.parse_args().out
    chromium = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    if chromium is None:
        parser.error("the figure needs Chromium: install it, or name it in the environment variable CHROMIUM")
    replace_text(out / PAGE, page(out))
    readme = out / "README.md"
    if readme.is_file():
        text = with_tables(readme.read_text(encoding="utf-8"), out)
        replace_text(readme, text)
        if out == RESULTS:
            replace_text(README, with_result(README.read_text(encoding="utf-8"), text))
    (picture,) = draw([frontier_figure(frontier_rows(out)).to_plotly_json()], chromium)
    replace_bytes(out / FIGURE, picture)


def page(out: Path) -> str:
    """Returns the page as Markdown: for every experiment with runs its question, means and contrasts."""
    lines = [INTRODUCTION]
    for name, experiment in experiments().items():
        lines += _section(name, experiment, out)
    lines += [*_post_training(out), *_remainders(out)]
    return "\n".join(lines)


def with_tables(readme: str, out: Path) -> str:
    """Returns the text of README.md with the present tables of experiment 1 between the two comments."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    require(bool(found), "README.md", readme[:80], f"a text with the comments {BEGIN} and {END}")
    experiment, table = experiments()["1"], _table(out, "1")
    missing = len(experiment.runs) - len(table)
    state = (
        f"Interim: {missing} of {len(experiment.runs)} registered runs are missing."
        if missing
        else "All runs have finished."
    )
    lines = ["", "", state, ""]
    if len(table):
        contrasts = contrasts_of(experiment, "1", out, TASK, experiment.primary, questions_of(experiment.runs[0]))
        lines += [*_means(table), "", *_contrasts(contrasts, experiment.primary)]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def with_result(readme: str, results: str) -> str:
    """Returns the text of the project's README.md with the result that the tables in `results` show."""
    before, _, rest = readme.partition(RESULT_BEGIN)
    _, found, after = rest.partition(RESULT_END)
    require(bool(found), "README.md", readme[:80], f"a text with the comments {RESULT_BEGIN} and {RESULT_END}")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if line.startswith("| ")]
    best = LABELS["expected_memory"]
    recall = {row[0]: row[3].partition(" ")[0] for row in rows if row[:2] in ([best, "1"], [LABELS["sft"], "–"])}
    (difference,) = (row for row in rows if row[0] == f"{best} (1) – {LABELS['sft']}")
    text = (
        f"One result{' (interim)' if 'Interim:' in results else ''}: after 60 updates, {best} answers {recall[best]} % of "
        f"the questions about planted facts exactly right, and SFT {recall[LABELS['sft']]} %. The paired difference is "
        f"{difference[1].replace(' (', ' points (')}, a 95 % interval over {difference[2]} seeds and {difference[3]} items "
        "([docs/results](docs/results/README.md#when-refine-pays))."
    )
    return f"{before}{RESULT_BEGIN}\n{text}\n{RESULT_END}{after}"


def _section(name: str, experiment: Experiment, out: Path) -> Iterator[str]:
    table = _table(out, name)
    yield from (f"## Experiment {name}", "", experiment.question, "")
    yield f"{len(table)} of {len(experiment.runs)} registered runs have finished."
    yield ""
    if not len(table):
        return
    for task in dict.fromkeys(table["task"]):
        yield from (f"### {_title(task)}", "", *_means(table[table["task"] == task]), "")
        questions = questions_of(next(run for run in experiment.runs if run.task == task))
        for measure in dict.fromkeys([experiment.primary, "ntp_loss", "key_loss"]):
            yield from _contrasts(contrasts_of(experiment, name, out, task, measure, questions), measure)
        yield from _other_measures(out, name, task)
    if name == "2":
        yield from _frontiers(out)


def _table(out: Path, name: str | None = None) -> pd.DataFrame:
    table = read_table(out / TABLE)
    if not len(table):
        return table
    table = table if name is None else table[table["experiment"] == name]
    return table.assign(**{each: pd.to_numeric(table[each]) for each in MEASURES})


def _means(table: pd.DataFrame) -> Iterator[str]:
    yield f"| method | coefficient | seeds | {' | '.join(heading for heading, *_ in MEASURES.values())} |"
    yield "|---|---|---|" + "---|" * len(MEASURES)
    for (method, coefficient), own in table.groupby(["method", "coefficient"], sort=False):
        cells = [f"{LABELS.get(str(method), method)}", coefficient or "–", str(len(own))]
        for measure, (_, scale, digits) in MEASURES.items():
            mean, spread = own[measure].mean() * scale, own[measure].std() * scale
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(own) > 1 else ""))
        yield f"| {' | '.join(map(str, cells))} |"


def _contrasts(table: pd.DataFrame, measure: str, label: Callable[[str], str] | None = None) -> Iterator[str]:
    """Yields a table of contrasts; `label` gives the words for a method of the table, `_label` by default."""
    if not len(table):
        return
    label = label or _label
    unit, scale, digits = UNITS[measure]
    yield f"| difference | {unit} | seeds | items | p (Holm) | p (equivalence) |"
    yield "|---|---|---|---|---|---|"
    for row in table.to_dict("records"):
        value, low, high = (f"{row[key] * scale:+.{digits}f}" for key in ("difference", "low", "high"))
        names = " – ".join(label(row[side]) for side in ("method", "against"))
        tests = f"{_p(row['p_holm'])} | {_p(row['p_equivalence'])}"
        yield f"| {names} | {value} ({low} to {high}) | {row['seeds']} | {row['items']} | {tests} |"
    yield ""


def _frontiers(out: Path) -> Iterator[str]:
    table = frontiers(out)
    if not len(table):
        return
    yield "Mean difference of recall at equal next-token loss, over the losses that both curves cover:"
    yield ""
    yield "| curves | points of recall | seeds | p |"
    yield "|---|---|---|---|"
    for row in table.to_dict("records"):
        value, low, high = (f"{row[key] * 100:+.1f}" for key in ("difference", "low", "high"))
        names = " – ".join(LABELS[row[side]] for side in ("method", "against"))
        yield f"| {names} | {value} ({low} to {high}) | {row['seeds']} | {_p(row['p'])} |"
    yield ""


def _other_measures(out: Path, name: str, task: str) -> Iterator[str]:
    """Yields a table of the measures of a task that only the items have, in percent: rare names, other kinds of facts."""
    items = read_table(out / ITEMS)
    own = (items["experiment"] == name) & (items["task"] == task) & ~items["measure"].isin(UNITS) if len(items) else []
    items = items[own] if len(items) else items
    if not len(items):
        return
    measures = list(dict.fromkeys(items["measure"]))
    scores = items.assign(mean=[100 * np.mean([float(x) for x in values.split()]) for values in items["values"]])
    yield f"| method | coefficient | seeds | {' | '.join(f'{each} (%)'.replace('_', ' ') for each in measures)} |"
    yield "|---|---|---|" + "---|" * len(measures)
    for (method, coefficient), own in scores.groupby(["method", "coefficient"], sort=False):
        groups = [own.loc[own["measure"] == measure, "mean"] for measure in measures]
        cells = [LABELS.get(str(method), method), coefficient or "–", own["seed"].nunique()]
        cells += [f"{each.mean():.1f}" + (f" ± {each.std():.1f}" if len(each) > 1 else "") for each in groups]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def _post_training(out: Path) -> Iterator[str]:
    """Yields experiment 7: right answers after post-training, and the differences from nested SFT."""
    table, registered = _table(out, "7"), post_runs()
    table = table[table["task"] == registered[0].key[2]] if len(table) else table
    yield from ("## Experiment 7, post-training", "")
    yield from (
        "Does the next-sequence loss help in post-training if earlier questions in the prompt have answers?",
        "",
    )
    yield from (f"{len(table)} of {len(registered)} registered runs have finished.", "")
    if not len(table):
        return
    yield "| method | seeds | right answers (%) |"
    yield "|---|---|---|"
    for method, own in table.groupby("method", sort=False):
        recall, spread = own["exact_recall"].mean() * 100, own["exact_recall"].std() * 100
        mean = f"{recall:.1f}" + (f" ± {spread:.1f}" if len(own) > 1 else "")
        yield f"| {_style_label(str(method))} | {len(own)} | {mean} |"
    yield ""
    scores = item_scores(out, "answers", "7")
    scores = scores.assign(item=scores["item"].map(dict(enumerate(questions_asked()))))
    pairs = [(method, "nested_sft") for method in POST_METHODS if method not in ("sft", "nested_sft")]
    yield from _contrasts(paired_contrasts(scores, pairs, MARGIN["answers"]), "answers", _style_label)


def _remainders(out: Path) -> Iterator[str]:
    """Yields experiment 7: the changes of the loss on the remainder of documents, and their differences from SFT."""
    table, registered = _table(out, "7"), rest_runs()
    table = table[table["task"].isin({run.task for run in registered})] if len(table) else table
    yield from (
        "## Experiment 7, test-time training",
        "",
        "Does adapting to the first half of a document lower the loss on its second half?",
        "",
    )
    yield f"{len(table)} of {len(registered)} registered rows have been measured."
    yield ""
    if not len(table):
        return
    scores = item_scores(out, "rest_change", "7")
    scores = scores.assign(method=scores["method"] + " " + scores["task"])  # the contrasts of all tasks are one family
    names = {f"{run.label} {run.task}": run for run in registered}
    pairs = [(name, name.replace(run.method, "sft", 1)) for name, run in names.items() if run.method != "sft"]
    contrasts = paired_contrasts(scores, pairs, MARGIN["rest_change"])
    for task in dict.fromkeys(table["task"]):
        yield from (f"### {task.rpartition(' ')[0].capitalize()}", "")
        yield "| method (learning rate, updates) | seeds | change of the loss (nats) |"
        yield "|---|---|---|"
        for label in dict.fromkeys(table.loc[table["task"] == task, "method"]):
            own = scores[scores["method"] == f"{label} {task}"]
            yield f"| {_rest_label(label)} | {own['seed'].nunique()} | {_change(own)} |"
        yield ""
        if len(contrasts):
            own = contrasts[contrasts["method"].str.endswith(f" {task}")]
            yield from _contrasts(own, "rest_change", lambda name: _rest_label(name.partition(" ")[0]))


def _change(scores: pd.DataFrame) -> str:
    """Returns the mean of the scores of one method, with its interval over seeds and items where there are two seeds."""
    if scores["seed"].nunique() < 2:
        return f"{scores['score'].mean():+.4f}"
    both = pd.concat([scores.assign(method="own"), scores.assign(method="none", score=0.0)])
    (row,) = compare_methods(both, [("own", "none")]).to_dict("records")
    return f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def _style_label(method: str) -> str:
    return method_styles([method])[method].label


def _rest_label(label: str) -> str:
    """Returns the words for a method of test-time training with its learning rate and number of updates."""
    method, lr, steps = label.rsplit("_", 2)
    return f"{_style_label(method)} ({lr.removeprefix('lr')}, {steps.removeprefix('steps')})"


def _title(task: str) -> str:
    """Returns a heading for a task of the table, such as `number-1 1024`."""
    names, _, length = task.rpartition(" ")
    facts = {"number-1": "One planted number (`number-1`)", "python number-1": "Python without planted facts"}
    return f"{facts.get(names, names)}, rows of {int(length):,} tokens"


def _label(text: str) -> str:
    method, _, coefficient = text.partition(" ")
    return LABELS.get(method, method) + (f" ({coefficient})" if coefficient else "")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def frontier_rows(out: Path) -> pd.DataFrame:
    """Returns the runs of the figure: those of experiments 1 and 2 whose method has no other settings of its own.

    DFT is left out: its next-token loss is far to the right of all others.
    """
    table = _table(out)
    if not len(table):
        return table
    kept = (
        table["experiment"].isin(["1", "2"]) & (table["task"] == TASK) & table["method"].isin(LABELS.keys() - {"dft"})
    )
    table = table[kept].drop_duplicates([*KEYS[1:]])
    methods = [BASE if name == BASE else VARIANTS[name][0] for name in table["method"]]
    coefficients = pd.to_numeric(table["coefficient"])
    return table.assign(method=methods, label=table["method"].map(LABELS), coefficient=coefficients)


if __name__ == "__main__":
    main()
