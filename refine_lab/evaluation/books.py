"""Next-token accuracy and loss on a folder of books, as the paper measures them on BookSum (figures 4 and E.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refine_lab.data.batches import padded
from refine_lab.evaluation.benchmark import Benchmark, Measured, Metric, Setting
from refine_lab.evaluation.harness_tasks import higher_is_better, jackknife
from refine_lab.evaluation.long_ppl import DOCUMENTS, Chooser, key_metrics, weighted_mean
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.texts import book_sequences
from refine_lab.ops.precision import autocast
from refine_lab.training.evaluation import next_token

NAMES = ("ntp_accuracy", "ntp_loss", "sampled_accuracy")
"""Measures of the next token."""
SEQUENCES, MOST_TOKENS = 9600, 16_384
"""Number of sequences and their maximum number of tokens (table C.1)."""


def weighted_metric(name: str, values: Sequence[float], weights: Sequence[int]) -> Metric:
    """Returns the weighted mean of a metric over sequences, with its jackknife standard error."""
    value, stderr = jackknife(weighted_mean, list(zip(values, weights, strict=True)))
    return Metric(value=value, stderr=stderr, higher_is_better=higher_is_better(name))


def measure(lm: RefineLM, setting: Setting) -> Measured:
    """Measures loss (nats per token) and accuracies of the next token; every token but the first counts alike.

    LongPPL is measured on the first `DOCUMENTS` sequences, since their key tokens cost three more readings.
    """
    length = min(setting.length or MOST_TOKENS, MOST_TOKENS)
    sequences = book_sequences(replace(setting, limit=setting.limit or SEQUENCES), lm.encoder, length)
    chooser = Chooser.of(lm, setting)

    def row_of(number: int, _: object) -> dict[str, Any]:
        ids = sequences[number]
        sequence = padded([np.array(ids)], (number,))
        chosen = chooser(lm, sequence) if number < DOCUMENTS else None
        with autocast(lm.device, lm.dtype):
            found = next_token(lm.policy, sequence, 1, chosen)
        key = {"key_loss": found.get("key_loss"), "key_tokens": found.get("key_tokens", 0)}
        return {"sample": number, "tokens": len(ids), **{name: found[name] for name in NAMES}, **key}

    rows = lm.divided(row_of, range(len(sequences)), lambda _: 1)
    weights = [row["tokens"] - 1 for row in rows]
    key_facts = {"key_tokens": sum(row["key_tokens"] for row in rows), "key_tokens_by": chooser.name}
    assert setting.books is not None  # `book_sequences` checks it
    return Measured(
        metrics={name: weighted_metric(name, [row[name] for row in rows], weights) for name in NAMES}
        | key_metrics(rows),
        count=len(rows),
        items=len({tuple(ids) for ids in sequences}),
        facts={"books": setting.books.name, "tokens": sum(weights), **key_facts},
        rows=rows,
    )


BENCHMARKS = [
    Benchmark(
        name="books",
        group="books",
        main="ntp_accuracy",
        by_length=True,
        measure=measure,
        about="next-token accuracy and loss on held-out books (figures 4 and E.1)",
    )
]
