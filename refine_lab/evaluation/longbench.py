"""The twelve English LongBench tasks used in the paper (Bai et al., 2024; table 5) with the harness's prompts and scores.

The paper's parquet files are used unchanged; LongBench's own .jsonl files are put into the harness's prompts. Answers
are cut as in the paper's release (`refine_lab.evaluation.cutting`), and every sample of at most 16,384 tokens is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from refine_lab.data.files import json_lines
from refine_lab.data.tasks.scores import exact_match
from refine_lab.evaluation.benchmark import Benchmark, Measured, Missing, Setting, find_file, readable
from refine_lab.evaluation.cutting import CUTS, CutRule, cut_figures, stop_texts
from refine_lab.evaluation.harness_tasks import measure_task, prompts_task
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.packages import harness
from refine_lab.evaluation.ruler_qa import read_rows
from refine_lab.evaluation.trec import CLASSES

MOST_TOKENS = 16_384
"""Maximum length in tokens, including the answer, of a sample that is scored (table C.1)."""
PAPER_BATCH = 8
"""Batch size in the paper, which drops the last batch if it is incomplete."""
SCORERS = ("fuzzywuzzy", "jieba", "rouge")
WHERE = (
    "the paper's files are in data/longbench of https://github.com/princetonvisualai/ReFINE, LongBench's own at "
    "https://huggingface.co/datasets/THUDM/LongBench"
)


class LongBenchTask(NamedTuple):
    """A task's metric in the harness, how its answers are cut, and the paper's number of samples (table C.1)."""

    metric: str
    cut: CutRule
    paper_count: int


TASKS = {
    "narrativeqa": LongBenchTask("qa_f1", "first_line", 56),
    "qasper": LongBenchTask("qa_f1", "first_line", 184),
    "multifieldqa_en": LongBenchTask("qa_f1", "first_line", 136),
    "hotpotqa": LongBenchTask("qa_f1", "first_line", 96),
    "2wikimqa": LongBenchTask("qa_f1", "first_line", 184),
    "qmsum": LongBenchTask("rouge", "whole", 104),
    "multi_news": LongBenchTask("rouge", "whole", 192),
    "samsum": LongBenchTask("rouge", "first_line_after_newlines", 152),
    "trec": LongBenchTask("classification", "first_line_after_newlines", 200),
    "triviaqa": LongBenchTask("qa_f1", "first_line_after_newlines", 120),
    "lcc": LongBenchTask("code_sim", "whole", 488),
    "repobench-p": LongBenchTask("code_sim", "whole", 320),
}


def scorer(task: str) -> Callable[[Mapping[str, Any], str], float]:
    """Returns the harness's score of a cut answer against the references of a sample, the best of them.

    A reference that normalises to nothing never counts as found. Raises ValueError if a package is missing.
    """
    metrics = harness("tasks.longbench.metrics", *SCORERS)
    function = getattr(metrics, f"get_{TASKS[task].metric}_score")

    def score(doc: Mapping[str, Any], answer: str) -> float:
        (value,) = function({"answers": doc["outputs"], "all_classes": CLASSES}, [answer]).values()
        return float(value)

    return score


def metrics_of(task: str) -> tuple[str, ...]:
    """Returns the names of a task's metrics."""
    stripped = ("score_after_newlines",) if TASKS[task].cut == "first_line" else ()
    accuracy = ("accuracy",) if task == "triviaqa" else ()
    return ("score", *accuracy, *stripped, "leading_newline", "empty_answer")


def score_sample(task: str, doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Returns the metrics of one generated text; `score_after_newlines` strips leading newlines before it is cut."""
    rule, text, score = TASKS[task].cut, results[0], scorer(task)
    answer = CUTS[rule](text)
    found = {"score": score(doc, answer), **cut_figures(rule, text)}
    if task == "triviaqa":
        found["accuracy"] = exact_match(answer, doc["outputs"])
    if rule == "first_line":
        found["score_after_newlines"] = score(doc, CUTS["first_line_after_newlines"](text))
    return {name: found[name] for name in metrics_of(task)}


def paper_docs(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the samples of one of the paper's files, and the maximum number of tokens of their answers."""
    rows = read_rows(path)
    docs = [
        {"input": row["prompt"], "gen_prefix": "", "outputs": list(row["answers"]), "item": row["prompt"]}
        for row in rows
    ]
    return docs, max(int(row["max_gen_tokens"]) for row in rows)


def released_docs(path: Path, task: str) -> tuple[list[dict[str, Any]], int]:
    """Returns the samples of one of LongBench's .jsonl files in the harness's prompts, and the tokens of their answers."""
    config = harness("tasks.longbench._generate_config")
    template = config.dataset2prompt[task]
    docs = []
    for _, row in json_lines(path):
        prompt = template.format(context=row["context"], question=row["input"])
        docs.append({"input": prompt, "gen_prefix": "", "outputs": list(row["answers"]), "item": prompt})
    return docs, int(config.dataset2maxlen[task])


def docs_of(setting: Setting, task: str) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """Returns a task's samples of at most 16,384 tokens, the tokens of their answers, and where they come from.

    The paper's files contain only samples that are short enough with its tokenizer. Raises `Missing` without a file.
    """
    path = find_file(setting, [f"{task}_*.parquet", f"{task}.jsonl"], WHERE)
    with readable(path):
        docs, tokens = paper_docs(path) if path.suffix == ".parquet" else released_docs(path, task)
    if path.suffix == ".parquet":
        return docs, tokens, {"file": path.name, "samples in the paper": TASKS[task].paper_count}
    short = [
        doc for doc in docs if len(setting.tokenizer(doc["input"], verbose=False).input_ids) + tokens <= MOST_TOKENS
    ]
    if not short:
        raise Missing(f"{str(path)!r} has no sample of at most {MOST_TOKENS} tokens")
    longer = len(docs) - len(short)
    return short, tokens, {"file": path.name, f"longer than {MOST_TOKENS} tokens": longer}


def measure(lm: RefineLM, setting: Setting, name: str) -> Measured:
    """Measures one task."""
    task = name.removeprefix("longbench_")
    docs, tokens, facts = docs_of(setting, task)
    if setting.paper_rows:
        docs = docs[: len(docs) - len(docs) % PAPER_BATCH]
    rule = TASKS[task].cut
    generation = {"max_tokens": tokens, "until": stop_texts(rule), "skip_newlines": True}
    made = prompts_task(name, docs, partial(score_sample, task), metrics_of(task), **generation)
    return measure_task(lm, made, setting, facts)


BENCHMARKS = [
    Benchmark(
        name=f"longbench_{task}",
        group="longbench",
        main="score",
        measure=partial(measure, name=f"longbench_{task}"),
        about=f"{found.metric} (table 5)",
    )
    for task, found in TASKS.items()
]
