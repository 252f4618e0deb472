"""One step of post-training: updates on a batch's prompts, then one on its answers (paper, section 4.3).

The procedure is first-order and its updates are permanent: the same optimizer makes both kinds of update in sequence,
and none is undone or differentiated through. The inner updates are those of mid-training, on the prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from refine_lab.config import TrainConfig
from refine_lab.method.step import Learner, StepResult, split, train_step, update
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import hidden_states_only
from refine_lab.ops.head import TokenStats
from refine_lab.rng import Draws
from refine_lab.types import Lessons


def nested_step(learner: Learner[TrainConfig], lessons: Lessons, draws: Draws) -> StepResult:
    """Makes the inner updates on the prompts, if `config.nested`, and the outer update on the answers.

    Metrics of the inner updates are named as in `train_step`; those of the outer update begin with `answer_`.
    """
    inner = StepResult({"updates": 0.0}, None)
    if learner.config.nested:
        inner = train_step(learner, lessons.prompts, draws)
    outer = update(learner, _answer_losses(learner, lessons))
    outer["answer_grad_norm"] = outer.pop("grad_norm")
    return StepResult({**inner.metrics, **outer, "updates": inner.metrics["updates"] + 1}, inner.rollouts)


def answer_stats(policy: FastWeightLM, lessons: Lessons) -> TokenStats:
    """Returns statistics of every answer token given all tokens before it, [A] for the A answer tokens, row by row."""
    with hidden_states_only():
        hidden = policy.read(lessons.whole.tokens, lessons.whole.lengths).hidden_states
    rows, places = answer_places(lessons)
    return policy.head(hidden[rows, places - 1], lessons.whole.tokens[rows, places], entropy=False)


def answer_places(lessons: Lessons) -> tuple[Int[Tensor, "A"], Int[Tensor, "A"]]:
    """Returns row and column of every answer token."""
    place = torch.arange(lessons.whole.tokens.shape[1], device=lessons.whole.tokens.device)
    starts, ends = lessons.prompts.lengths.unsqueeze(1), lessons.whole.lengths.unsqueeze(1)
    rows, places = ((starts <= place) & (place < ends)).nonzero(as_tuple=True)
    return rows, places


def _answer_losses(learner: Learner, lessons: Lessons) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields each micro-batch's share of the mean loss -log p(answer token | prompt, answer so far) over all answer tokens."""
    total = lessons.num_answer_tokens
    for start, micro in split(lessons.whole, learner.config.micro_batch_size):
        with learner.autocast():
            stats = answer_stats(learner.policy, lessons.rows(start, start + len(micro.lengths)))
            loss = -stats.logprobs.sum() / total
        yield loss, {"answer_loss": loss.detach(), "answer_accuracy": stats.greedy.sum() / total}
