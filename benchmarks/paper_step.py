"""The paper's own procedure on the same model, as its release does it, for comparison of cost alone.

A forward over the sequences for entropies; every prefix copied and padded on the left to full length; k tokens generated
from every copy; a pass over every copy for old logprobs and hidden states; forward and backward over every copy for the
policy loss; and forward and backward over the sequences for the next-token loss.

DeltaNet generates with a cache. The release's LaCT has none: every token generated reads its whole copy again, and the pads
before it are tokens like others, which enter the fast weights and shift the borders of chunks. So it is done here, since
it decides the amount of computation; the layers are ours in either case, and what the release's own cost is not told
(nor FSDP, Ray, or moving weights to a second engine). The hybrids and GatedDeltaNet, which the release does not have,
go the way of DeltaNet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refine_lab.method.advantages import advantages
from refine_lab.method.losses import ntp_loss, policy_loss
from refine_lab.method.rewards import cosine
from refine_lab.method.selection import select_positions, selection_probabilities
from refine_lab.method.step import TrainState, next_token_stats
from refine_lab.models import FastWeightLM
from refine_lab.rng import Draws
from refine_lab.types import Batch, RewardInputs

WITHOUT_CACHE = ("lact_swiglu",)
"""`model_type` of those that the release decodes by reading everything again, pads included."""


def paper_step(train_state: TrainState, batch: Batch, draws: Draws) -> None:
    """One step of the released procedure with one update on the batch."""
    policy, refine = train_state.policy, train_state.config.refine
    assert refine is not None
    length, k = batch.tokens.shape[1], refine.rollout_length
    with torch.no_grad():
        trace = policy.read(batch.tokens, batch.lengths)
        stats = next_token_stats(policy, trace, batch, entropy=True)
        probabilities = selection_probabilities(torch.nn.functional.pad(stats.entropies, (0, 1)), batch.lengths, refine)
        positions = select_positions(probabilities, batch.lengths, batch.sequence_ids, draws, refine.num_chunks)
        copies, mask = _padded_copies(batch, positions, length)
        if policy.config.model_type in WITHOUT_CACHE:
            mask = torch.ones_like(mask)
            tokens = torch.cat([_generate_by_reading(policy, rows, k) for rows, _ in _micro(train_state, copies, mask)])
        else:
            tokens = policy.generate(
                copies, attention_mask=mask, max_new_tokens=k, min_new_tokens=k, do_sample=True, top_k=0, pad_token_id=0
            )
        whole_mask = torch.cat([mask, mask.new_ones(len(mask), k)], 1)
        index = positions.unsqueeze(-1) + torch.arange(1, k + 1)
        truth_hidden = trace.hidden_at(index.flatten(1)).view(-1, k, trace.hidden_states.shape[-1])
        truth_ids = batch.tokens.gather(1, index.flatten(1)).view(-1, k)
        parts = [_over_copies(train_state, rows, m, k) for rows, m in _micro(train_state, tokens, whole_mask)]
        old_logprobs, hidden = (torch.cat(x) for x in zip(*parts, strict=True))
        inputs = RewardInputs(
            rollout_ids=tokens[:, -k:],
            target_ids=truth_ids,
            hidden_states=hidden,
            target_hidden_states=truth_hidden,
            logprobs=old_logprobs,
        )
        rewards = cosine(inputs)
        advantage = advantages(rewards, refine.num_chunks, refine.group_size, refine.group_by)
    for optimizer in train_state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    size = _copies_at_once(train_state)
    for (rows, m), old, weight in zip(
        _micro(train_state, tokens, whole_mask), old_logprobs.split(size), advantage.split(size), strict=True
    ):
        logprobs, _ = _over_copies(train_state, rows, m, k)
        loss, _ = policy_loss(logprobs, old, weight, refine.clip_eps, refine.dual_clip, old_logprobs.numel())
        (refine.nsp_coef * loss).backward()
    stats = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=False)
    (refine.ntp_coef * ntp_loss(stats.logprobs, batch.lengths, batch.num_targets)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), train_state.config.max_grad_norm)
    for optimizer in train_state.optimizers:
        optimizer.step()


def _padded_copies(batch: Batch, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Every prefix, padded on the left to `length`, and the mask of its real tokens."""
    rows = positions.numel()
    copies, mask = batch.tokens.new_zeros(rows, length), batch.tokens.new_zeros(rows, length)
    for place, position in enumerate(positions.flatten().tolist()):
        prefix = batch.tokens[place // positions.shape[1], : position + 1]
        copies[place, length - len(prefix) :] = prefix
        mask[place, length - len(prefix) :] = 1
    return copies, mask


def _generate_by_reading(policy: FastWeightLM, tokens: Tensor, k: int) -> Tensor:
    """`tokens` and k sampled ones behind, for each of which all before it is read from the start."""
    for _ in range(k):
        logits = policy.lm_head(policy.read(tokens).hidden_states[:, -1])
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def _copies_at_once(train_state: TrainState) -> int:
    """As many rows as the sequences of a micro-batch."""
    return train_state.config.micro_batch_size


def _micro(train_state: TrainState, tokens: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = _copies_at_once(train_state)
    return list(zip(tokens.split(size), mask.split(size), strict=True))


def _over_copies(train_state: TrainState, tokens: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logprobs [R, k] and hidden states [R, k, D] of the last k tokens, by a forward over all of them."""
    policy = train_state.policy
    hidden = policy.model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return policy.head(hidden[:, -k - 1 : -1], tokens[:, -k:]).logprobs, hidden[:, -k:]
