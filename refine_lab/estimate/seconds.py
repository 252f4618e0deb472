"""The time of a step by a roofline: for every phase, the longer of the device's time and of Python's.

    device seconds = FLOPs of matrix products / PEAK + bytes of all other operations / BANDWIDTH
    host seconds   = operations that Python or autograd starts * HOST

The rates are those of `benchmarks.fake_gpu` for an H200, and real kernels are slower (docs/gpu.md). The numbers in `Pace`
were fitted to the operations that it counts for one block of DeltaNet-1.3B and of LaCT-760M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refine_lab.estimate.blocks import FULL, BlockMemory, Work
from refine_lab.estimate.memory import Setting
from refine_lab.estimate.models import Weights
from refine_lab.models import DeltaNetConfig
from refine_lab.models.lact import LaCTConfig
from refine_lab.ops.delta_rule import CHUNK_SIZE
from refine_lab.ops.fla_delta_rule import SEGMENT_SIZE
from refine_lab.ops.lact import NEWTON_SCHULZ

PEAK = 650e12
"""FLOP/s that products of matrices in bfloat16 reach."""
BANDWIDTH = 3.9e12
"""Bytes a second of the device's memory."""
HOST, LAUNCH = 7e-6, 3e-6
"""Seconds of the host for an operation, and least seconds of the device."""
CHUNK_SECONDS = 1.5e-6
"""Seconds of a chunk of 64 tokens in the kernels of the delta rule that pass through a row's chunks in turn."""
LINK, NETWORK, NODE = 450e9, 50e9, 8
"""Bytes a second that a GPU receives over NVLink, and from another node over InfiniBand (400 Gb/s each); GPUs of a node."""
LOGIT_BYTES, ENTROPY_BYTES = 30, 17
"""Bytes that the head moves for each logit, forward and again backward, and in addition for entropies."""
UPDATE_BYTES = 24
"""Bytes that clipping and AdamW move for each weight."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What one block does. Bytes are multiples of those that it saves, or of those of its states."""

    read: float
    backward: float
    states: float
    states_backward: float
    read_operations: tuple[int, int]
    "Operations of a block, and for each chunk (LaCT) or segment (DeltaNet) of 2,048 tokens."
    backward_operations: tuple[int, int]
    token_operations: int
    "Operations for one token of all rollouts."
    graph: bool
    "Whether these are one CUDA graph if the weights are not divided."
    rollout_operations: int
    "Operations that take states, read all rollouts once more, and run backward through both."


DELTANET = Pace(
    read=2.85,
    backward=7.3,
    states=10.0,
    states_backward=28.0,
    read_operations=(107, 39),
    backward_operations=(192, 61),
    token_operations=234,
    graph=True,
    rollout_operations=800,
)
LACT = Pace(
    read=7.5,
    backward=24.0,
    states=4.0,
    states_backward=8.0,
    read_operations=(0, 270),
    backward_operations=(-442, 850),
    token_operations=334,
    graph=False,
    rollout_operations=710,
)
PACES = {DeltaNetConfig: DELTANET, LaCTConfig: LACT}
AGAIN = 1.2
"""Operations of a block that is computed again, as a multiple of those of reading."""


def phases(config: Any, weights: Weights, block: BlockMemory, work: Work, setting: Setting) -> dict[str, float]:
    """Returns the estimated seconds of each phase of a step; `exchange` is what does not overlap."""
    pace, blocks, part = PACES[type(config)], weights.blocks, setting.activation_checkpointing
    products = 2 * weights.linear * work.tokens + _fast_weights(config, work)  # FLOPs of one block, forward
    chunk = config.lact_chunk_size if isinstance(config, LaCTConfig) else SEGMENT_SIZE
    chunks = -(-work.length // chunk)
    serial = 0.0 if isinstance(config, LaCTConfig) else work.length / CHUNK_SIZE * CHUNK_SECONDS
    read = products / PEAK + pace.read * block.saved / BANDWIDTH + serial
    read_host = _operations(pace.read_operations, chunks) * HOST
    feed_forward = 2 * weights.mlp * work.tokens / PEAK
    again = {"none": 0.0, "mlp": feed_forward + pace.read * block.mlp / BANDWIDTH, "blocks": read}[part]
    back = 2 * products / PEAK + pace.backward * block.saved / BANDWIDTH + 2 * serial
    back += again - (feed_forward / 3 if again else 0)  # all but the last product of the feed-forward layer
    back_host = _operations(pace.backward_operations, chunks) * HOST + (part == "blocks") * AGAIN * read_host
    rolls, logits = work.positions > 0, work.tokens * config.vocab_size
    head = 2 * work.tokens * weights.head / PEAK
    head_moves = logits * (LOGIT_BYTES + ENTROPY_BYTES * rolls) / BANDWIDTH
    found = {"read": blocks * max(read, read_host), "head": head + head_moves}
    device, host = blocks * back + 3 * head + head_moves, blocks * back_host
    if rolls:
        found["states"] = blocks * pace.states * block.states / BANDWIDTH
        found["rollouts"] = _rollouts(weights, work, pace, setting)
        device += blocks * pace.states_backward * block.states / BANDWIDTH
        host += blocks * pace.rollout_operations / 2 * HOST
    found["backward"] = max(device, host)
    summed = 0.0
    if setting.world_size > 1:
        found["exchange"], summed = _exposed(found, weights, work, setting)
    found = {name: setting.micro_batches * seconds for name, seconds in found.items()}
    found["update"] = UPDATE_BYTES * weights.all / setting.shares / BANDWIDTH + summed
    return found


def _operations(numbers: tuple[int, int], chunks: int) -> int:
    alone, each = numbers
    return max(alone + each * chunks, each)


def _fast_weights(config: Any, work: Work) -> int | float:
    """Returns the FLOPs of one block's memory, except fla's kernels: LaCT's fast weights and its window."""
    if not isinstance(config, LaCTConfig):
        return 0
    side = config.hidden_size // config.num_lact_heads
    found = work.tokens * config.hidden_size * (18 * config.fast_width + 4 * min(config.window_size, work.length / 2))
    updates = work.rows * (work.length // config.lact_chunk_size) * config.use_muon
    return found + updates * 3 * config.num_lact_heads * len(NEWTON_SCHULZ) * 6 * side**2 * config.fast_width


def _rollouts(weights: Weights, work: Work, pace: Pace, setting: Setting) -> float:
    """Returns the seconds of sampling rollouts token by token, and of reading them once more."""
    tokens = work.rollout_length - 1
    operations = weights.blocks * pace.token_operations * tokens
    half = operations / 2  # views start nothing on the device
    device = max(half * LAUNCH, tokens * 2 * FULL * weights.all / BANDWIDTH)
    host = 0.0 if pace.graph and setting.shares == 1 else operations * HOST
    return max(device, host) + weights.blocks * pace.rollout_operations / 3 * HOST


def _exposed(found: dict[str, float], weights: Weights, work: Work, setting: Setting) -> tuple[float, float]:
    """Returns the seconds of exchanges beyond the work beside them, and those of the sum of the gradients after it."""
    others, link = (setting.world_size - 1) / setting.world_size, LINK if setting.world_size <= NODE else NETWORK
    once = others * FULL * weights.all / link
    if not setting.sharded:
        return 0.0, 2 * once
    rolls = work.positions > 0
    pairs = [(found["read"], once), (found["backward"], once * (3 if rolls else 2))]  # weights, and gradients
    if rolls:
        pairs.append((found["rollouts"], once * work.rollout_length))
    return sum(max(0.0, exchange - compute) for compute, exchange in pairs), 0.0
