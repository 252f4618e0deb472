"""Our own metrics: rewards at fixed targets, exact recall, and the loss on the unseen remainder of a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData
from refine_lab.evaluation.adapting import adapted_to
from refine_lab.evaluation.benchmark import Benchmark, Measured, Metric, Missing, Setting
from refine_lab.evaluation.harness_tasks import higher_is_better, jackknife
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.reading import text_logprobs
from refine_lab.evaluation.texts import document_batch, text_facts
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import next_token_stats, roll_out
from refine_lab.ops.precision import autocast
from refine_lab.rng import Draws
from refine_lab.training.evaluation import fixed_targets, recall_documents, recalled
from refine_lab.training.held_out_rest import HeldOutRest
from refine_lab.types import Batch, Rollouts

ROLLOUT_LENGTHS = (1, 3, 5, 7, 9)
"""Lengths k of the rollouts (table 7)."""
PAPER_LENGTH, CHUNKS = 5, 8
"""The paper's k and c, for the metrics by position and by entropy."""
KINDS = ("word-1", "word-4", "word-12", "number-1")
"""Kinds of recall document; the number counts the facts."""
DOCUMENTS = 64
"""Documents per metric, unless a limit is set."""
REWARD_NAMES = ("cosine", "binary", "hybrid")
PARTS = ("first", "middle", "last")
"""Names of the thirds of a document's positions, and of the thirds of the entropies at its targets in ascending order."""


def mean_metric(name: str, values: Sequence[float]) -> Metric:
    """Returns the mean of a metric over documents, with its standard error."""
    value, stderr = jackknife(fmean, [float(each) for each in values])
    return Metric(value=value, stderr=stderr, higher_is_better=higher_is_better(name))


# -- rewards -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout_rows(lm: RefineLM, batch: Batch, k: int, draws: Draws) -> list[dict[str, Any]]:
    """Returns a row for each rollout of k tokens from fixed positions of each document, with its rewards."""
    refine = fixed_targets(CHUNKS, k)

    def rows_of(start: int, _: object) -> list[dict[str, Any]]:
        micro = batch.rows(start, start + lm.batch_size).to(lm.device)
        flat = torch.zeros(micro.tokens.shape, device=lm.device)
        with autocast(lm.device, lm.dtype):
            trace = lm.policy.read(micro.tokens, micro.lengths)
            entropies = next_token_stats(lm.policy, trace, micro, entropy=True).entropies
            found, _ = roll_out(lm.policy, trace, flat, micro, refine, REWARDS["hybrid"], draws)
        return _rows(found, entropies.gather(1, found.positions), micro, k)

    count = len(batch.lengths)
    parts = lm.divided(rows_of, range(0, count, lm.batch_size), lambda start: min(lm.batch_size, count - start))
    return [row for rows in parts for row in rows]


def _rows(found: Rollouts, entropies: Float[Tensor, "B C"], micro: Batch, k: int) -> list[dict[str, Any]]:
    documents = np.repeat(np.array(micro.sequence_ids), found.positions.shape[1]).tolist()
    columns = (found.positions, entropies, found.cosine, found.binary, found.rewards)
    names = ("position", "entropy", *REWARD_NAMES)
    values = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return [
        {"document": document, "k": k, **dict(zip(names, each, strict=True))}
        for document, each in zip(documents, values, strict=True)
    ]


def by_document(name: str, rows: Sequence[Mapping[str, Any]], reward: str) -> Metric:
    """Returns the mean of a reward over documents: the rollouts of one document are not independent."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(row["document"], []).append(row[reward])
    return mean_metric(name, [fmean(group) for group in groups.values()])


def thirds(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the rows in three parts of equal size by a column, from the lowest values."""
    ordered = sorted(rows, key=lambda row: (row[column], row["document"], row["position"]))
    size = -(-len(ordered) // len(PARTS))
    return {part: ordered[i * size : (i + 1) * size] for i, part in enumerate(PARTS) if ordered[i * size :]}


def measure_rewards(lm: RefineLM, setting: Setting) -> Measured:
    """Measures the rewards of one rollout from each of eight fixed positions of each document, for several lengths k.

    The positions and the random numbers of the rollouts depend on the seed alone. For the paper's k there are also the
    means by third of the positions, and by third of the entropies at the targets.
    """
    length = setting.length or 1024
    batch = document_batch(setting, lm.encoder, length, DOCUMENTS)
    lengths = [k for k in ROLLOUT_LENGTHS if fixed_targets(CHUNKS, k).fits(length)]
    if not lengths:
        raise Missing(f"a document of {length} tokens is too short for rollouts from {CHUNKS} chunks")
    rows = [row for k in lengths for row in rollout_rows(lm, batch, k, Draws(seed=setting.seed))]
    metrics: dict[str, Metric] = {}
    for k in lengths:
        here = [row for row in rows if row["k"] == k]
        for reward in REWARD_NAMES:
            metrics[name] = by_document(name := f"{reward}_k{k}", here, reward)
            if k == PAPER_LENGTH:
                for column in ("position", "entropy"):
                    for part, found in thirds(here, column).items():
                        metrics[name] = by_document(name := f"{reward}_k{k}_{column}_{part}", found, reward)
    count = len(batch.lengths)
    return Measured(metrics=metrics, count=count, items=different(batch), facts=text_facts(setting), rows=rows)


def different(batch: Batch) -> int:
    """Returns the number of distinct documents in a batch."""
    return len({tuple(row) for row in batch.tokens.tolist()})


# -- recall --------------------------------------------------------------------------------------------------------------


def measure_recall(lm: RefineLM, setting: Setting) -> Measured:
    """Measures the fraction of facts of recall documents that are recalled exactly, for several numbers of facts."""
    length, count = setting.length or 1024, setting.limit or DOCUMENTS
    data = DataConfig(sequence_length=length, validation_sequences=1, add_bos=lm.add_bos)
    try:
        held_out = SequenceData(data, setting.tokenizer, setting.seed, "validation", setting.manifest)
        asked = {kind: recall_documents(kind, count, length, held_out) for kind in KINDS}
    except ValueError as error:
        raise Missing(f"recall documents of {length} tokens cannot be made: {error}") from error
    metrics: dict[str, Metric] = {}
    rows: list[dict[str, Any]] = [{"sample": i} for i in range(count)]
    for number, (kind, documents) in enumerate(asked.items(), start=1):
        with autocast(lm.device, lm.dtype):
            shares = [fmean(right) for right in recalled(lm.policy, documents, lm.batch_size, lm.workers)]
        metrics[name] = mean_metric(name := f"exact_recall_{kind}", shares)
        for row, share in zip(rows, shares, strict=True):
            row[name] = share
        lm.on_batch(number, len(KINDS))
    items = len({tuple(document.tokens) for document in asked["word-1"]})
    facts = text_facts(replace(setting, books=None))
    return Measured(metrics=metrics, count=count, items=items, facts=facts, rows=rows)


# -- test-time training --------------------------------------------------------------------------------------------------


def measure_unseen_rest(lm: RefineLM, setting: Setting) -> Measured:
    """Measures the loss on the second half of each document before and after adapting to its first half.

    The adapted model reads the document from its beginning. This measures test-time training without a question.
    """
    if lm.ttt is None:
        raise Missing("'unseen_rest' measures test-time training: set --ttt to sft or refine")
    length = setting.length or 1024
    batch = document_batch(setting, lm.encoder, length, DOCUMENTS)
    held = HeldOutRest(first=length // 2, stop=length)
    lm.counts.clear()

    def row_of(tokens: list[int], counts: Counter[str]) -> dict[str, float]:
        before = rest_loss(lm, tokens, held)
        with adapted_to(lm.policy, [tokens[: held.first]], lm.ttt, counts):
            after = rest_loss(lm, tokens, held)
        return {"loss_before": before, "loss_after": after, "loss_change": after - before}

    found = lm.divided(row_of, batch.tokens.tolist(), lambda _: 1)
    rows = [{"sample": number, **row} for number, row in enumerate(found)]
    metrics = {name: mean_metric(name, [row[name] for row in rows]) for name in rows[0] if name != "sample"}
    facts = {**text_facts(setting), **{name: n for name, n in lm.counts.items() if n}}
    return Measured(metrics=metrics, count=len(rows), items=different(batch), facts=facts, rows=rows)


def rest_loss(lm: RefineLM, tokens: Sequence[int], held: HeldOutRest) -> float:
    """Returns the mean loss in nats on the held-out remainder of a document, which is read once from its beginning."""
    with autocast(lm.device, lm.dtype):
        (logprobs,) = text_logprobs(lm.policy, [tokens])
    return -float(held.rest(logprobs).mean())


BENCHMARKS = [
    Benchmark(name=name, group="own", main=main, by_length=True, measure=measure, about=about)
    for name, main, measure, about in (
        ("rewards", f"hybrid_k{PAPER_LENGTH}", measure_rewards, "rewards of rollouts from fixed positions"),
        ("recall", "exact_recall_word-4", measure_recall, "exact recall of planted facts"),
        (
            "unseen_rest",
            "loss_change",
            measure_unseen_rest,
            "loss on the remainder of a document after adapting to its beginning",
        ),
    )
]
