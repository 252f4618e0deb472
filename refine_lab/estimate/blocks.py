"""The memory of one block: which tensors it keeps, in bytes, and how many it needs while it runs.

Each term counts the tensors of one line of code, in elements for each token times the bytes of their dtype: `HALF` for
what layers compute under autocast to bfloat16, `FULL` for the residual stream, states and fast weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refine_lab.models import DeltaNetConfig
from refine_lab.models.lact import LaCTConfig
from refine_lab.ops.delta_rule import CHUNK_SIZE
from refine_lab.ops.fla_delta_rule import SEGMENT_SIZE
from refine_lab.refine_config import RefineConfig

HALF, FULL = 2, 4
"""Bytes of an element."""

READ_AT_ONCE = 4
"""Tokens by which a rollout of LaCT lengthens its open chunk and its window in the buffers of the sampling loop."""


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes of one block for one micro-batch. Fields that concern states are 0 without rollouts."""

    saved: float
    "Kept for the backward pass if nothing is recomputed."
    mlp: float
    "The part of `saved` that recomputing the feed-forward layer frees."
    inputs: float
    "Kept if the whole block is recomputed."
    working: float
    "Needed at once while the block is recomputed and its backward pass runs."
    update: float = 0.0
    "Needed at once for the backward pass of one update of the fast weights."
    trace: float = 0.0
    "Kept until the states have been taken, in addition to `saved`."
    trace_of_inputs: float = 0.0
    "The same in addition to `inputs`."
    states: float = 0.0
    "The states at the sampled positions, and what their backward pass reads."
    sampling: float = 0.0
    "Buffers that exist only while rollouts are sampled."
    state_backward: float = 0.0
    "Needed at once for the backward pass of the states of this block."
    state_gradients: float = 0.0
    "Gradients of the states, kept until the backward pass of the block."


@dataclass(frozen=True)
class Work:
    """What a micro-batch asks of every block: `rows` rows of `length` tokens, and rollouts by `refine`, if any."""

    rows: int
    length: int
    refine: RefineConfig | None
    open_chunk: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def positions(self) -> int:
        """Returns the number of positions at which states are taken."""
        return self.rows * self.refine.num_chunks if self.refine is not None and self.refine.needs_states else 0

    @property
    def rollout_length(self) -> int:
        return 0 if self.refine is None else self.refine.rollout_length

    @property
    def rollouts(self) -> int:
        return self.positions * self.refine.group_size if self.refine is not None and self.refine.rolls_out else 0


def deltanet_block(config: DeltaNetConfig, inner: int, work: Work) -> BlockMemory:
    """Returns the bytes of a block of DeltaNet, whose feed-forward layer has the width `inner`."""
    width, key, value, heads = config.hidden_size, config.key_dim, config.value_dim, config.num_heads
    projected = 2 * key + value  # q, k and v before their convolutions
    convolved = 2 * key + value  # q and k of unit length, and v
    kernel = CHUNK_SIZE * heads  # the products of keys within a chunk
    layer = 2 * width + projected + convolved + kernel + 2 * value  # two norms, ..., outputs, and their norm
    mlp = 3 * inner  # gate, up and their product
    saved = work.tokens * (HALF * (layer + mlp) + FULL * 2 * width)  # two sums of the residual
    matrix = FULL * key * value // heads  # the states of all heads
    segment = min(SEGMENT_SIZE, work.length)
    borders = work.tokens / segment * matrix  # the state before every segment
    again = work.positions * segment  # tokens that are read again to take states
    branches = max(work.positions, work.rollouts)
    return BlockMemory(
        saved=saved,
        mlp=work.tokens * HALF * mlp,
        inputs=work.tokens * FULL * width,
        working=saved + work.tokens * HALF * 2 * inner,  # gradients of gate, up and product
        trace=(work.tokens * HALF * key + borders) if work.positions else 0,  # keys before their norm
        trace_of_inputs=(work.tokens * HALF * (projected + key + value) + borders) if work.positions else 0,
        states=again * HALF * (2 * key + value + kernel) + (2 * work.positions + branches) * matrix,
        sampling=work.rollouts * (matrix + work.rollout_length * 20 * FULL * width),  # the rollouts are read once more
        state_backward=again * HALF * 5 * (key + value) + again // CHUNK_SIZE * 2 * matrix * HALF // FULL,
        state_gradients=(work.tokens * HALF * (projected + key + value) + borders) if work.positions else 0,
    )


def lact_block(config: LaCTConfig, inner: int, work: Work) -> BlockMemory:
    """Returns the bytes of a block of LaCT, whose feed-forward layer has the width `inner`."""
    width, heads, window, chunk = config.hidden_size, config.num_lact_heads, config.window_size, config.lact_chunk_size
    matrix = config.fast_width * width  # elements of one fast weight of all heads
    copies = 1 + config.ttt_prenorm + config.use_momentum  # the weights, their sums and their momenta
    hidden = config.fast_width * heads
    levels = (work.length - 1) // chunk + 1
    memories = work.rows * (levels - 1) * 3 * copies * FULL * matrix + 6 * FULL * matrix  # after every chunk; initial
    windows = HALF * 2 * work.rows * (work.length + window - 1) * width
    kv = work.tokens * HALF * 2 * width
    per_token = 3 * width + 2 * width + 2 * width + 4 * width + 5 * hidden + 2 * width  # see below
    # q, k, v; two norms; q and k turned; q and k scaled, then activated; the SwiGLU of the fast weights; outputs
    angles = 4 * width // config.num_attn_heads
    mlp = 3 * inner
    layer = HALF * (per_token + angles) + FULL * (3 * width + config.num_attn_heads + 4 * heads)
    saved = work.tokens * (layer + HALF * mlp + FULL * 2 * width) + windows + kv + memories
    saved += work.rows * levels * 3 * HALF * matrix
    open_chunk = _open_chunk(work, chunk) if work.open_chunk is None else work.open_chunk
    sources = min(work.positions, levels * work.rows)
    before = HALF * width * 2 * (window - 1 + open_chunk)  # bytes of a state: its window, and its open chunk
    drawn = 2 * before + HALF * width * 2 * (1 + 2 * READ_AT_ONCE)
    newton_schulz = 216 * matrix
    return BlockMemory(
        saved=saved,
        mlp=work.tokens * HALF * mlp,
        inputs=work.tokens * (FULL * width + FULL * 4 * heads) + kv + memories,
        working=saved + work.tokens * HALF * 2 * width,
        update=newton_schulz + 22 * HALF * min(chunk, work.length) * hidden * work.rows,
        trace_of_inputs=windows if work.positions else 0,
        states=sources * 3 * copies * FULL * matrix + work.positions * before,
        sampling=work.rollouts * drawn,
        state_gradients=(windows + sources * 3 * FULL * matrix) if work.positions else 0,
    )


def _open_chunk(work: Work, chunk: int) -> int:
    """Returns the tokens of the longest open chunk at positions in the middle of the row's chunks."""
    if not work.positions:
        return 0
    assert work.refine is not None
    size = work.length // work.refine.num_chunks
    return max((size // 2 + size * number) % chunk + 1 for number in range(work.refine.num_chunks))


def block_memory(config: Any, inner: int, work: Work) -> BlockMemory:
    if isinstance(config, LaCTConfig):
        return lact_block(config, inner, work)
    return deltanet_block(config, inner, work)
