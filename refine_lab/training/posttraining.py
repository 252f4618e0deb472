"""One step of post-training: updates on a batch's prompts, then one on its answers (paper, section 4.3).

The procedure is first-order and its updates are permanent: the same optimizer makes both kinds of update in sequence,
and none is undone or differentiated through. The inner updates are those of mid-training, on the prompts alone.
"""

from __future__ import annotations

from refine_lab.config import TrainConfig
from refine_lab.host import host, indices
from refine_lab.method.step import OptimizerUpdate, StepResult, TrainState, split, train_step
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import hidden_states_only
from refine_lab.ops.head import TokenStats
from refine_lab.rng import Draws
from refine_lab.types import PromptBatch


def nested_step(train_state: TrainState[TrainConfig], batch: PromptBatch, draws: Draws) -> StepResult:
    """Makes the inner updates on the prompts, if `config.nested`, and the outer update on the answers.

    Metrics of the inner updates are named as in `train_step`; those of the outer update begin with `answer_`.
    """
    inner = StepResult({"updates": 0.0}, None)
    if train_state.config.nested:
        inner = train_step(train_state, batch.prompts, draws)
    outer = _answer_update(train_state, batch)
    outer["answer_grad_norm"] = outer.pop("grad_norm")
    if skipped := inner.metrics.get("skipped_updates", 0.0) + outer.get("skipped_updates", 0.0):
        outer["skipped_updates"] = skipped
    return StepResult({**inner.metrics, **outer, "updates": inner.metrics["updates"] + 1}, inner.rollouts)


def answer_stats(policy: FastWeightLM, batch: PromptBatch) -> TokenStats:
    """Returns statistics of every answer token given all tokens before it, [A] for the A answer tokens, row by row."""
    with hidden_states_only():
        hidden = policy.read(batch.sequences.tokens, batch.sequences.lengths).hidden_states
    found = host(batch.loss_mask).nonzero(as_tuple=True)
    rows, places = (indices(x, hidden.device) for x in found)
    return policy.head(hidden[rows, places - 1], batch.sequences.tokens[rows, places], entropy=False)


def _answer_update(train_state: TrainState[TrainConfig], batch: PromptBatch) -> dict[str, float]:
    """Makes an update on the mean of -log p(answer token | prompt, answer so far) over all answer tokens."""
    update, total = OptimizerUpdate(train_state), int(host(batch.loss_mask).sum())
    for start, micro in split(batch.sequences, train_state.config.micro_batch_size, train_state.workers):
        with train_state.autocast():
            stats = answer_stats(train_state.policy, batch.rows(start, start + len(micro.lengths)))
            loss = -stats.logprobs.sum() / total
        update.add(loss, {"answer_loss": loss.detach(), "answer_accuracy": stats.is_top1.sum() / total})
    return update.apply()
