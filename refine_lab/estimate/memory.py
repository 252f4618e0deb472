"""The peak of a step's memory: the largest of a few moments, each of which is a sum of named terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refine_lab.estimate.blocks import FULL, HALF, BlockMemory, Bytes, Work
from refine_lab.estimate.models import Weights
from refine_lab.ops.head import HEAD_ROWS
from refine_lab.workers import BUCKET

PARTS = ("weights", "gradients", "moments", "activations", "gathered")
"""Parts of the peak. `activations` are all tensors that are none of the others: also copies of weights in 16 bits, states,
and what a single operation needs. `gathered` are weights of other workers.
"""

HEAD, LAST_BLOCK, FIRST_BLOCK = "backward of the head", "backward of the last block", "backward of the first block"
UPDATE, ROLLOUTS, STATES = "update", "rollouts", "backward of the states"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is recomputed, the optimizer, the workers that share the step and, if `sharded`, the model, and micro-batches."""

    activation_checkpointing: str
    optimizer: str
    world_size: int
    sharded: bool
    micro_batches: int = 1

    @property
    def shares(self) -> int:
        return self.world_size if self.sharded else 1


def moments(
    weights: Weights, block: BlockMemory, work: Work, width: int, vocabulary: int, setting: Setting
) -> dict[str, dict[str, Bytes]]:
    """Returns bytes by part at every moment at which memory can be largest, by the moment's name."""
    activations = _activations(weights, block, work, width, vocabulary, setting.activation_checkpointing)
    rolls, ends = STATES in activations, FULL * weights.ends
    late = weights.all - weights.block - (0 if rolls or weights.tied else weights.embedding)
    gradients = {
        HEAD: FULL * weights.head,
        ROLLOUTS: 0,
        STATES: ends,
        LAST_BLOCK: ends if rolls else FULL * weights.head,
        FIRST_BLOCK: FULL * late / setting.shares,
        UPDATE: FULL * weights.all / setting.shares,
    }
    if setting.micro_batches > 1:  # those of the earlier micro-batches are there, and new ones are added to them
        gradients[LAST_BLOCK] -= FULL * weights.head
        gradients = {
            name: gradients[UPDATE] + size * (name not in (FIRST_BLOCK, UPDATE)) for name, size in gradients.items()
        }
    muon = FULL * weights.hidden_matrices if setting.optimizer == "muon" else 0  # one moment instead of two
    gathered = FULL * max(2 * weights.embedding, 3 * weights.block) if setting.shares > 1 else 0
    model = {
        "weights": FULL * weights.all / setting.shares,
        "moments": (2 * FULL * weights.all - muon) / setting.shares,
    }
    if setting.world_size > setting.shares:  # gradients are summed in buckets
        activations[UPDATE] += FULL * min(max(BUCKET, weights.head), weights.all)
    return {
        name: {**model, "gradients": gradients[name], "activations": size, "gathered": gathered}
        for name, size in activations.items()
    }


def _activations(
    weights: Weights, block: BlockMemory, work: Work, width: int, vocabulary: int, part: str
) -> dict[str, Bytes]:
    """Returns the bytes of activations at each moment, if `part` of the model is recomputed."""
    blocks, stream = weights.blocks, FULL * work.tokens * width  # the hidden states of all tokens
    narrow = stream * HALF / FULL  # the same in 16 bits
    ends = 2 * stream + narrow  # the embedding's output, and the last norm's in both widths
    kept = blocks * {"none": block.saved, "mlp": block.saved - block.mlp, "blocks": block.inputs}[part]
    trace = blocks * (block.trace_of_inputs if part == "blocks" else block.trace)
    norm = 4 * stream  # the backward pass of the last norm
    working = {"none": norm, "mlp": block.mlp * 5 / 3, "blocks": block.working}[part]
    first = 0 if part == "blocks" else stream  # the embedding's output; else it is the first block's input
    again = 0 if part == "none" else working
    copies = HALF * blocks * weights.linear  # of the linear layers, in 16 bits
    saved = {"none": copies, "mlp": copies - HALF * blocks * weights.mlp, "blocks": 0}[
        part
    ]  # those for the backward pass
    head, logits = HALF * weights.head, min(HEAD_ROWS, work.tokens) * vocabulary * (3 * HALF + FULL)
    rolls = work.positions > 0
    found: dict[str, Bytes] = {
        HEAD: (copies if rolls else saved) + head + kept + blocks * block.states + ends + logits + narrow,
        LAST_BLOCK: saved + (copies if rolls else 0) + kept + blocks * block.state_gradients + first + working,
        FIRST_BLOCK: HALF * weights.linear + kept / blocks + max(again, block.update),
        UPDATE: 0,
    }
    if rolls:
        found[ROLLOUTS] = copies + 3 * head + kept + trace + blocks * (block.states + block.sampling) + ends
        waiting = (blocks - 1) * max(block.states, block.state_gradients) + block.states
        found[STATES] = saved + copies + head + kept + waiting + block.state_backward + ends + stream
    return found


def largest(found: Mapping[str, Mapping[str, Bytes]]) -> str:
    """Returns the name of the moment with the largest sum."""
    return max(found, key=lambda name: sum(found[name].values()))
