"""Runs lm-evaluation-harness tasks: the built-in ones, and ones built from samples of prompts and answers."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

from refine_lab.evaluation.benchmark import Measured, Metric, Missing, Setting
from refine_lab.evaluation.model import UNLIMITED, RefineLM
from refine_lab.evaluation.packages import harness

Score = Callable[[Mapping[str, Any], list[str]], dict[str, float]]
"""Returns the scores of the answers to a sample, keyed by metric name, like the harness's `process_results`."""

LOWER = ("perplexity", "ppl", "bits_per_byte", "loss", "empty_answer", "leading_newline")
"""Substrings of the names of metrics for which lower values are better."""


def prompts_task(
    name: str,
    docs: Sequence[Mapping[str, Any]],
    score: Score,
    metrics: Sequence[str],
    *,
    max_tokens: int,
    until: Sequence[str] = (),
    skip_newlines: bool = False,
) -> Any:
    """Returns a task of the harness whose samples have `input`, `gen_prefix`, `outputs` and `item`.

    `item` identifies a distinct sample. `skip_newlines` as in `StopRule`.
    """
    import datasets

    base: Any = harness("api.task").ConfigurableTask

    class PromptsTask(base):
        def download(self, *arguments: Any, **settings: Any) -> None:
            self.dataset = {"test": datasets.Dataset.from_list([dict(doc) for doc in docs])}

    listed = [{"metric": name, "aggregation": "mean", "higher_is_better": higher_is_better(name)} for name in metrics]
    settings = {"do_sample": False, "max_gen_toks": max_tokens, "until": list(until), "skip_newlines": skip_newlines}
    return PromptsTask(
        config={
            "task": name,
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": lambda doc: doc["input"],
            "doc_to_target": lambda doc: doc["outputs"],
            "target_delimiter": " " if any(doc["gen_prefix"] for doc in docs) else "",
            "gen_prefix": "{{gen_prefix}}",
            "process_results": score,
            "metric_list": listed,
            "generation_kwargs": settings,
        }
    )


def higher_is_better(metric: str) -> bool:
    """Returns whether higher values of a metric are better."""
    return not any(part in metric for part in LOWER)


def measure_task(lm: RefineLM, task: Any, setting: Setting, facts: Mapping[str, Any]) -> Measured:
    """Evaluates a task of the harness and returns its metrics, with jackknife standard errors over samples."""
    name = task.config.task
    kept, left_out = kept_samples(lm, task, setting)
    lm.counts.clear()
    with patch.object(harness("api.task"), "tqdm", lambda docs, **_: docs):
        found = harness("evaluator").evaluate(
            lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, samples={name: kept}, bootstrap_iters=0
        )
    samples = found["samples"][name]
    names = samples[0]["metrics"]
    aggregation = task.aggregation()
    better = task.higher_is_better()
    metrics = {}
    for metric in names:
        value, stderr = jackknife(aggregation[metric], [sample[metric] for sample in samples])
        upward = bool(better.get(metric, higher_is_better(metric)))
        metrics[metric] = Metric(value=value, stderr=stderr, higher_is_better=upward)
    counts = {f"prompts {what}": n for what, n in lm.counts.items() if n and what != "prompts"}
    return Measured(
        metrics=metrics,
        count=len(samples),
        items=len({item_of(sample) for sample in samples}),
        facts={**facts, **counts, **({"prompts left out": left_out} if left_out else {})},
        rows=[sample_row(sample, names) for sample in samples],
    )


def kept_samples(lm: RefineLM, task: Any, setting: Setting) -> tuple[list[int], int]:
    """Returns the indices of the samples to evaluate, and how many are dropped because they are too long.

    Raises `Missing` if no sample is left.
    """
    docs = task.eval_docs
    kept = list(range(min(len(docs), setting.limit or len(docs))))
    every = len(kept)
    if setting.over_limit == "drop" and lm.max_length < UNLIMITED and task.OUTPUT_TYPE == "generate_until":
        room = int((task.config.generation_kwargs or {}).get("max_gen_toks", 0))
        kept = [i for i in kept if len(lm.tok_encode(prompt_of(task, docs[i]))) + room <= lm.max_length]
    if not kept:
        raise Missing(
            f"no sample of {task.config.task!r} has at most {lm.max_length} tokens, the maximum prompt length"
        )
    return kept, every - len(kept)


def prompt_of(task: Any, doc: Mapping[str, Any]) -> str:
    """Returns the prompt of a sample without examples before it."""
    return task.fewshot_context(doc, 0, gen_prefix=task.doc_to_prefix(doc))


def jackknife(aggregate: Callable[[list[Any]], float], values: list[Any]) -> tuple[float, float | None]:
    """Returns an aggregate of the values and its jackknife standard error; for a mean this is s / sqrt(n)."""
    whole, n = float(aggregate(values)), len(values)
    if n < 2:
        return whole, None
    if all(isinstance(value, (int, float)) for value in values) and math.isclose(whole, statistics.fmean(values)):
        return whole, statistics.stdev(values) / math.sqrt(n)
    without = [float(aggregate(values[:i] + values[i + 1 :])) for i in range(n)]
    return whole, math.sqrt((n - 1) * statistics.pvariance(without))


def item_of(sample: Mapping[str, Any]) -> str:
    """Returns what makes a sample different from others: its question or prompt, or the harness's digest of the sample."""
    return str(sample["doc"].get("item") or sample["doc_hash"])


def sample_row(sample: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Returns a sample of the harness as a row: what was asked and answered, and the metrics that are numbers.

    `item` is a digest of `item_of`, the same for the same question or prompt in every evaluation.
    """
    arguments = sample["arguments"][0]
    target = sample["target"]
    return {
        "sample": int(sample["doc_id"]),
        "item": hashlib.sha256(item_of(sample).encode()).hexdigest()[:24],
        "prompt": str(arguments[0]),
        "answers": [str(answer[0]) for answer in sample["resps"]],
        "references": [str(each) for each in (target if isinstance(target, list) else [target])],
        **{name: float(sample[name]) for name in metrics if isinstance(sample[name], (int, float))},
    }
