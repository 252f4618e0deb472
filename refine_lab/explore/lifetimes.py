"""How long a write lives: the effect of erasing a planted fact on the answer to its question, by distance.

The paper speaks of what a fast-weight memory keeps; this measures it. For every document one fact is erased (the writes
of its value and of `MARGIN` tokens on both sides) and the question is asked with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_lab.data.recall import RecallDocument, value_span
from refine_lab.explore.attribution import write_attribution
from refine_lab.explore.erasing import erase
from refine_lab.explore.states import written
from refine_lab.explore.targets import Target, TargetScores, score_target
from refine_lab.method.rollout import Branches
from refine_lab.models import FastWeightLM, Trace
from refine_lab.rng import Draws
from refine_lab.statistics.means import mean_interval
from refine_lab.validation import require

MARGIN = 1
"""Number of tokens before and after the value that are erased with it."""
BINS = 8
"""Number of groups of equal size into which `lifetime_curve` divides the documents."""


def write_lifetimes(
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[RecallDocument],
    *,
    attribute: bool = False,
) -> pd.DataFrame:
    """Returns a row for each document, whose only question is at its end and asks for a fact of one sentence.

    `distance`: tokens from the end of the value to the end of the question. `writes_since`: the sum of the write
    strengths of these tokens, as a mean over layers and heads. `logprob` and `logprob_erased`: of the answer, in nats.
    `effect`: their difference. `right` and `right_erased`: whether greedy decoding answers exactly. With `attribute`, `top`:
    the token with the largest effect by gradient, minus the nearest token of the value (0 on it); `right_top`: as
    `right_erased` for this token and `MARGIN` tokens on both sides; `right_random`: the same for a random token before
    the question that is not near the value.

    Raises ValueError for a document without exactly one question, or without its fact.
    """
    rows = []
    for number, document in enumerate(documents):
        require(len(document.questions) == 1, "the document's questions", len(document.questions), "1")
        (question,) = document.questions
        begin, end = value_span(tokenizer, document, question)
        ids = torch.tensor(document.tokens[: question.prompt_end])
        target = Target(position=len(ids) - 1, token_ids=tuple(question.answer_ids))
        with torch.no_grad(), written(policy) as strengths:
            trace = policy.read(ids.to(policy.device).unsqueeze(0))
        intact = _score(policy, trace, target)
        without = _score(policy, _erased(policy, trace, ids, begin, end), target)
        row = {
            "document": number,
            "distance": len(ids) - end,
            "writes_since": _written_since(strengths, end),
            "logprob": float(intact.logprobs),
            "logprob_erased": float(without.logprobs),
            "effect": float(intact.logprobs - without.logprobs),
            "right": bool(intact.greedy),
            "right_erased": bool(without.greedy),
        }
        if attribute:
            (top,) = write_attribution(policy, ids, target).top(1)
            near = range(begin - 2 * MARGIN, end + 2 * MARGIN)
            others = [token for token in range(question.start) if token not in near]
            require(len(others) > 0, "the document's tokens", question.start, "more than those near the value")
            generator = Draws(seed=0).generator(number, "random write")
            other = others[int(torch.randint(len(others), (), generator=generator))]
            row["top"] = top - min(max(top, begin), end - 1)
            for name, token in (("right_top", top), ("right_random", other)):
                trace_without = _erased(policy, trace, ids, token, token + 1)
                row[name] = bool(_score(policy, trace_without, target).greedy)
        rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def _erased(policy: FastWeightLM, trace: Trace, ids: Int[Tensor, "T"], begin: int, end: int) -> Trace:
    """Returns the trace without the writes of `begin` to `end` - 1 and of `MARGIN` tokens on both sides."""
    return erase(policy, trace, ids, range(max(0, begin - MARGIN), min(end + MARGIN, len(ids))))


@torch.no_grad()
def _score(policy: FastWeightLM, trace: Trace, target: Target) -> TargetScores:
    last = torch.tensor([[target.position]], device=policy.device)
    return score_target(policy, Branches.of(trace, last, 1), target)


def _written_since(strengths: dict[int, torch.Tensor], token: int) -> float:
    """Returns the summed write strengths [T, H] of the tokens from `token` on, as a mean over layers and heads."""
    if not strengths:
        return float("nan")
    return float(np.mean([layer[token:].sum(0).mean() for layer in strengths.values()]))


def lifetime_curve(rows: pd.DataFrame, by: str = "distance", bins: int = BINS) -> pd.DataFrame:
    """Returns the mean effect in groups of documents of equal size, in ascending order of `by`.

    Columns are `by` (the group's mean), `effect`, `low`, `high` (95 % interval by Student's t), `right` and `documents`.
    `rows` are as returned by `write_lifetimes`. Raises ValueError for an unknown `by` and fewer documents than groups.
    """
    require(by in ("distance", "writes_since"), "by", by, "'distance' or 'writes_since'")
    require(1 <= bins <= len(rows), "bins", bins, f"from 1 to {len(rows)}, the number of documents")
    groups = np.array_split(rows.sort_values(by, kind="stable").index, bins)
    found = []
    for group in groups:
        chosen = rows.loc[group]
        effect, low, high = mean_interval(chosen["effect"].to_numpy())
        means = {by: chosen[by].mean(), "effect": effect, "low": low, "high": high, "right": chosen["right"].mean()}
        found.append(means | {"documents": len(chosen)})
    return pd.DataFrame(found)
