"""Held-out measures: next-token loss and accuracy, rewards at fixed targets, recall of planted facts.

They are computed in the caller's arithmetic: a run evaluates under its own autocast (`TrainState.autocast`). Each
micro-batch's trace is freed before the next one is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from statistics import fmean

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_lab.config import RefineConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.recall import RecallDocument, make_document
from refine_lab.data.tasks import scores
from refine_lab.data.tasks.batches import prompt_batch
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import next_token_stats, roll_out, split
from refine_lab.models.base import FastWeightLM
from refine_lab.models.decoding import greedy
from refine_lab.models.state import hidden_states_only
from refine_lab.rng import Draws
from refine_lab.training.answers import answer
from refine_lab.training.posttraining import answer_stats
from refine_lab.types import Batch
from refine_lab.workers import ALONE, Workers

EVALUATION_SEED = 20_260_216
"""Seed of every draw in an evaluation, whatever the training seed: the same for all runs and steps."""
RECALL_KINDS = ("word-1", "number-1")
"""Kinds of document that recall is measured on."""
MOST_KEY_LOSS = 300.0
"""Bound of the mean loss of key tokens before exp, in nats, so that a diverged model's LongPPL is a number."""


@torch.no_grad()
def next_token(
    policy: FastWeightLM,
    batch: Batch,
    micro_batch_size: int = 4,
    key_tokens: Bool[Tensor, "B S"] | None = None,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """Returns `ntp_loss` in nats per token, `ntp_accuracy` by argmax, and `sampled_accuracy`, the released code's metric.

    The release samples a token and compares it with the reference x; they agree with probability p(x), so a token
    counts as a match if one fixed uniform number for it is below p(x). If `key_tokens` (see `training.key_tokens`) marks
    any token, `key_loss` is the mean loss of those in nats, `long_ppl` = exp(`key_loss`) their perplexity (LongPPL; Fang
    et al., 2024), and `key_tokens` their number. The `workers` divide the micro-batches among themselves.
    """
    draws = Draws(seed=EVALUATION_SEED)

    def sums_of(part: tuple[int, Batch]) -> list[float]:
        start, micro = part[0], part[1].to(policy.device)
        with hidden_states_only():
            stats = next_token_stats(policy, policy.read(micro.tokens, micro.lengths), micro, entropy=False)
        width = stats.logprobs.shape[1]
        real = torch.arange(width, device=policy.device) < (micro.lengths - 1).unsqueeze(1)
        uniforms = draws.uniforms(micro.sequence_ids, "sampled_accuracy", (width,)).to(policy.device)
        matched = uniforms < stats.logprobs.double().exp()
        columns = [(x.double() * real).sum() for x in (-stats.logprobs, stats.is_top1, matched)]
        if key_tokens is not None:
            key = key_tokens[start : start + len(real), :width].to(policy.device)
            columns.append(-stats.logprobs.double()[key].sum())
        return torch.stack(columns).tolist()

    parts = workers.map(sums_of, list(split(batch, micro_batch_size)))
    totals = [sum(column) for column in zip(*parts, strict=True)]
    loss, accuracy, sampled = (total / batch.num_targets for total in totals[:3])
    found = {"ntp_loss": loss, "ntp_accuracy": accuracy, "sampled_accuracy": sampled}
    return found | (key_measures(totals[3], int(key_tokens.sum())) if key_tokens is not None else {})


def key_measures(loss: float, count: int) -> dict[str, float]:
    """Returns `long_ppl`, `key_loss` and `key_tokens` of `count` key tokens with a total loss in nats; nothing for none."""
    if not count:
        return {}
    mean = loss / count
    return {"long_ppl": math.exp(min(mean, MOST_KEY_LOSS)), "key_loss": mean, "key_tokens": count}


@torch.no_grad()
def answer_measures(
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rule: AnswerRule,
    micro_batch_size: int = 8,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """Returns teacher-forced `answer_loss` (nats per token) and `answer_accuracy`, and the mean scores of decoded answers.

    The scores are `contains_answer` and `exact_match`. The `workers` divide the micro-batches among themselves.
    """

    def sums_of(start: int) -> list[float]:
        rows = range(start, min(start + micro_batch_size, len(examples)))
        stats = answer_stats(policy, prompt_batch([examples[i] for i in rows], tuple(rows)).to(policy.device))
        sums = torch.stack([-stats.logprobs.double().sum(), stats.is_top1.double().sum()])
        return [*sums.tolist(), float(len(stats.logprobs))]

    parts = workers.map(sums_of, range(0, len(examples), micro_batch_size))
    loss, top1, tokens = (sum(column) for column in zip(*parts, strict=True))
    loss, accuracy = loss / tokens, top1 / tokens
    written = answer(policy, tokenizer, examples, rule, micro_batch_size, workers)
    pairs = [(text, example.answers) for text, example in zip(written, examples, strict=True)]
    means = {
        score.__name__: fmean(score(*pair) for pair in pairs) for score in (scores.contains_answer, scores.exact_match)
    }
    return {"answer_loss": loss, "answer_accuracy": accuracy, **means}


@torch.no_grad()
def rewards_at_fixed_targets(
    policy: FastWeightLM, batch: Batch, num_chunks: int = 8, rollout_length: int = 5, micro_batch_size: int = 4
) -> dict[str, float]:
    """Returns mean `cosine` and `binary` reward of one rollout from each fixed position of held-out rows.

    Positions are uniform and the same for every model, as are the uniform numbers that tokens are sampled with.
    """
    refine = fixed_targets(num_chunks, rollout_length)
    draws, rewards = Draws(seed=EVALUATION_SEED), []
    for _, micro in split(batch, micro_batch_size):
        micro = micro.to(policy.device)
        flat = torch.zeros(micro.tokens.shape, device=policy.device)
        trace = policy.read(micro.tokens, micro.lengths)
        rollouts, _ = roll_out(policy, trace, flat, micro, refine, REWARDS["cosine"], draws)
        del trace  # freed before the next one is made
        rewards.append(torch.stack([rollouts.cosine, rollouts.binary]))
    cosine, binary = torch.cat(rewards, 1).double().mean(1).tolist()
    return {"cosine": cosine, "binary": binary}


def fixed_targets(num_chunks: int, rollout_length: int) -> RefineConfig:
    """Returns the settings by which the fixed positions are chosen."""
    return RefineConfig(selection="uniform", num_chunks=num_chunks, rollout_length=rollout_length)


@torch.no_grad()
def exact_recall(policy: FastWeightLM, documents: Sequence[RecallDocument], micro_batch_size: int = 16) -> float:
    """Returns the fraction of questions answered exactly, token for token, by greedy generation, from 0 to 1."""
    return fmean(chain.from_iterable(recalled(policy, documents, micro_batch_size)))


@torch.no_grad()
def recalled(
    policy: FastWeightLM, documents: Sequence[RecallDocument], micro_batch_size: int = 16, workers: Workers = ALONE
) -> list[list[bool]]:
    """Returns for each document whether each of its questions is answered exactly, as in `exact_recall`.

    The `workers` divide the micro-batches among themselves.
    """
    asked = [(document.tokens[: q.prompt_end], q.answer_ids) for document in documents for q in document.questions]

    def right_of(start: int) -> list[bool]:
        prompts, answers = zip(*asked[start : start + micro_batch_size], strict=True)
        written = greedy(policy, prompts, max(map(len, answers)))
        return [row[: len(answer)] == list(answer) for row, answer in zip(written.tolist(), answers, strict=True)]

    rest = chain.from_iterable(workers.map(right_of, range(0, len(asked), micro_batch_size)))
    return [[next(rest) for _ in document.questions] for document in documents]


def recall_documents(kind: str, count: int, num_tokens: int, held_out: SequenceData) -> list[RecallDocument]:
    """Makes `count` documents of at most `num_tokens` tokens with facts in held-out text, the same for every model."""
    text, draws = next(iter(held_out.tokens.values())), Draws(seed=EVALUATION_SEED)
    generators = (draws.generator(i, f"recall {kind}") for i in range(count))
    tokenizer, part, beginning = held_out.tokenizer, held_out.split, held_out.beginning
    return [make_document(kind, num_tokens, text, g, tokenizer, part, beginning=beginning) for g in generators]


def held_out_measures(
    policy: FastWeightLM,
    held_out: SequenceData,
    *,
    num_chunks: int = 8,
    rollout_length: int = 5,
    key_tokens: Bool[Tensor, "B S"] | None = None,
) -> dict[str, float]:
    """Returns the measures of held-out rows: next token, and rewards at fixed targets.

    The rewards are omitted if the held-out rows are too short for a rollout from each of `num_chunks` chunks, and
    LongPPL if no held-out token is a key token (see `next_token`).
    """
    validation = held_out.validation()
    measured = next_token(policy, validation, key_tokens=key_tokens)
    if fixed_targets(num_chunks, rollout_length).fits(int(validation.lengths.min())):
        measured |= rewards_at_fixed_targets(policy, validation, num_chunks, rollout_length)
    return measured


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Returns bits per byte of a text of `num_bytes` bytes and `num_tokens` tokens with mean `loss` in nats per token."""
    return loss * num_tokens / num_bytes / math.log(2)
