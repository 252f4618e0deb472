"""The memory of one block: which tensors it keeps, in bytes, and how many it needs while it runs.

Each term counts the tensors of one line of code, in elements for each token times the bytes of their dtype: `HALF` for
what layers compute under autocast to bfloat16, `FULL` for the residual stream, states and fast weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from refine_lab.models import DeltaNetConfig
from refine_lab.models.lact import LaCTConfig
from refine_lab.ops.delta_rule import CHUNK_SIZE
from refine_lab.ops.fla_delta_rule import SEGMENT_SIZE
from refine_lab.refine_config import RefineConfig

Bytes = int | float

HALF, FULL = 2, 4
"""Bytes of an element."""

READ_AT_ONCE = 4
"""Tokens by which sampling lengthens LaCT's open chunk before the last token is drawn."""
NEWTON_SCHULZ_BYTES = 216
"""Bytes for each element of a fast weight that the backward pass of Newton-Schulz needs: 15 + 10 + 5 tensors of all three
matrices in 16 bits and 3 in 32 bits.
"""


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes of one block for one micro-batch. Fields that concern states are 0 without rollouts."""

    saved: Bytes
    "Kept for the backward pass if nothing is recomputed."
    mlp: Bytes
    "The part of `saved` that recomputing the feed-forward layer frees."
    inputs: Bytes
    "Kept if the whole block is recomputed."
    working: Bytes
    "Needed at once while the block is recomputed and its backward pass runs."
    update: Bytes = 0
    "Needed at once for the backward pass of one update of the fast weights."
    trace: Bytes = 0
    "Kept until the states have been taken, in addition to `saved`."
    trace_of_inputs: Bytes = 0
    "The same in addition to `inputs`."
    states: Bytes = 0
    "The states at the sampled positions, and what their backward pass reads."
    sampling: Bytes = 0
    "Buffers that exist only while rollouts are sampled."
    state_backward: Bytes = 0
    "Needed at once for the backward pass of the states of this block."
    state_gradients: Bytes = 0
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
    """Returns the bytes of a block of LaCT, whose feed-forward layer has the width `inner`.

    The inputs of a chunk's update and the fast weights after it are kept even if the block is recomputed, since each update
    is recomputed on its own.
    """
    width, heads, window, chunk = config.hidden_size, config.num_lact_heads, config.window_size, config.lact_chunk_size
    matrix = config.fast_width * width  # elements of one fast weight of all heads
    copies = 1 + config.ttt_prenorm + config.use_momentum  # the weights, their sums and their momenta
    levels = (work.length - 1) // chunk + 1
    memories = (
        FULL * matrix * (work.rows * (levels - 1) * 3 * copies + 6)
    )  # after every chunk; initial ones, and as given
    windows = HALF * 2 * work.rows * (work.length + window - 1) * width  # keys and values, and the window before them
    kv, rates = HALF * 2 * width, FULL * 4 * heads  # keys, values and learning rates of the updates
    hidden = 5 * config.fast_width * heads  # within the SwiGLU of the fast weights
    attention = (
        3 * width + 2 * width + 2 * width
    )  # q, k and v; q and k turned; the window's outputs, and the sum of both
    queries = 2 * width + 2 * width  # q and k scaled, and activated
    angles = 4 * width // config.num_attn_heads
    half = 2 * width + attention + queries + hidden + angles  # and two norms
    full = (
        2 * width + 3 * width + config.num_attn_heads
    )  # two sums of the residual, and the norm of the memory's outputs
    mlp = 3 * inner  # gate, up and their product
    saved = work.tokens * (HALF * (half + mlp) + FULL * full + kv + rates) + windows + memories
    saved += work.rows * levels * 3 * HALF * matrix  # fast weights in 16 bits
    open_chunk = _open_chunk(work, chunk) if work.open_chunk is None else work.open_chunk
    sources = min(work.positions, levels * work.rows)  # chunks from which rollouts start
    state = HALF * 2 * width * (window - 1 + open_chunk)
    update = work.rows * HALF * 22 * min(chunk, work.length) * config.fast_width * heads  # within the update of a chunk
    return BlockMemory(
        saved=saved,
        mlp=work.tokens * HALF * mlp,
        inputs=work.tokens * (FULL * width + kv + rates) + memories,
        working=saved + work.tokens * HALF * 2 * width,
        update=update + NEWTON_SCHULZ_BYTES * matrix,
        trace_of_inputs=windows if work.positions else 0,
        states=sources * 3 * copies * FULL * matrix + work.positions * state,
        sampling=work.rollouts * (2 * state + HALF * 2 * width * (1 + 2 * READ_AT_ONCE)),
        state_gradients=(windows + sources * 3 * FULL * matrix) if work.positions else 0,
    )


def _open_chunk(work: Work, chunk: int) -> int:
    """Returns the tokens of the longest open chunk at positions in the middle of the row's chunks."""
    if not work.positions:
        return 0
    assert work.refine is not None
    size = work.length // work.refine.num_chunks
    return max((size // 2 + size * number) % chunk + 1 for number in range(work.refine.num_chunks))


def block_memory(config: DeltaNetConfig | LaCTConfig, inner: int, work: Work) -> BlockMemory:
    """Returns the bytes of a block of one of the two families."""
    if isinstance(config, LaCTConfig):
        return lact_block(config, inner, work)
    return deltanet_block(config, inner, work)
