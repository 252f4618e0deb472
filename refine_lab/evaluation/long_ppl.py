"""LongPPL: perplexity on key tokens, which a model predicts better from the whole prefix than from its last tokens.

The definition is that of Fang et al. (2024; arXiv 2410.23771) with the thresholds of `refine_lab.training.key_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from refine_lab.evaluation.benchmark import Benchmark, Measured, Metric, Missing, Setting
from refine_lab.evaluation.harness_tasks import higher_is_better, jackknife
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.texts import document_batch, text_facts
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_model
from refine_lab.ops.precision import autocast
from refine_lab.training.evaluation import MOST_KEY_LOSS, next_token
from refine_lab.training.key_tokens import key_tokens, short_contexts
from refine_lab.types import Batch

DOCUMENTS = 64
"""Documents on which LongPPL is measured, unless a limit is set."""


@dataclass(frozen=True)
class Chooser:
    """The model that selects the key tokens, and its name."""

    policy: FastWeightLM
    name: str

    @classmethod
    def of(cls, lm: RefineLM, setting: Setting) -> Chooser:
        """Returns `setting.key_model`, or the evaluated model itself if it is none.

        Raises `Missing` if the model cannot be loaded, or has another vocabulary.
        """
        name = setting.key_model
        if name is None:
            return cls(lm.policy, lm.name)
        try:
            policy, tokenizer = load_model(name, device=str(lm.device), seed=lm.seed)
        except (OSError, ValueError) as error:
            raise Missing(f"the model that selects key tokens, {name!r}, cannot be loaded: {error}") from error
        if tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise Missing(
                f"the model that selects key tokens, {name!r}, has another vocabulary: choose one with --key-model"
            )
        return cls(policy, name)

    def __call__(self, lm: RefineLM, batch: Batch) -> Bool[Tensor, "B S"]:
        """Returns the key tokens of documents, which are read one at a time."""
        with autocast(lm.device, lm.dtype):
            return key_tokens(self.policy, batch, micro_batch_size=1)


def key_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Returns `long_ppl` and `key_loss` over all key tokens, with jackknife standard errors over documents.

    A row has the number `key_tokens` of a document's key tokens and their mean loss `key_loss`. Without any key token the
    metrics are left out.
    """
    pairs = [(row["key_loss"], row["key_tokens"]) for row in rows if row.get("key_tokens")]
    if not pairs:
        return {}
    metrics = {}
    for name, aggregate in (("long_ppl", _perplexity), ("key_loss", weighted_mean)):
        value, stderr = jackknife(aggregate, pairs)
        metrics[name] = Metric(value=value, stderr=stderr, higher_is_better=higher_is_better(name))
    return metrics


def weighted_mean(pairs: Sequence[tuple[float, int]]) -> float:
    """Returns the mean of values with weights."""
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _perplexity(pairs: Sequence[tuple[float, int]]) -> float:
    return math.exp(min(weighted_mean(pairs), MOST_KEY_LOSS))


def measure(lm: RefineLM, setting: Setting) -> Measured:
    """Measures the perplexity and the loss of key tokens, and the loss of all tokens, in documents of one length.

    Raises `Missing` if no document has a key token.
    """
    length = setting.length or 1024
    batch = document_batch(setting, lm.encoder, length, DOCUMENTS)
    chooser = Chooser.of(lm, setting)

    def row_of(number: int, _: object) -> dict[str, Any]:
        row = batch.rows(number, number + 1)
        chosen = chooser(lm, row)
        with autocast(lm.device, lm.dtype):
            found = next_token(lm.policy, row, 1, chosen)
        key = {"key_loss": found.get("key_loss"), "key_tokens": found.get("key_tokens", 0)}
        return {"sample": number, "tokens": length, "ntp_loss": found["ntp_loss"], **key}

    rows = lm.divided(row_of, range(len(batch.lengths)), lambda _: 1)
    metrics = key_metrics(rows)
    if not metrics:
        least = 2 * short_contexts(chooser.policy).window
        raise Missing(
            f"no document of {length} tokens has a key token, which has at least {least} tokens before it: choose a "
            "longer length, or longer texts with --books"
        )
    value, stderr = jackknife(lambda losses: sum(losses) / len(losses), [row["ntp_loss"] for row in rows])
    metrics["ntp_loss"] = Metric(value=value, stderr=stderr, higher_is_better=False)
    facts = {**text_facts(setting), "key_tokens": sum(row["key_tokens"] for row in rows), "key_tokens_by": chooser.name}
    items = len({tuple(row) for row in batch.tokens.tolist()})
    return Measured(metrics=metrics, count=len(rows), items=items, facts=facts, rows=rows)


BENCHMARKS = [
    Benchmark(
        name="long_ppl",
        group="own",
        main="long_ppl",
        by_length=True,
        measure=measure,
        about="perplexity of tokens that need more than the last tokens of their prefix (LongPPL)",
    )
]
