"""The forms that only CUDA uses, computed on the CPU: attention on packed rows, and updates of chunks that run again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refine_lab.ops.lact import ChunkPlan, Rule, lact
from refine_lab.ops.short_conv import ConvInputs
from refine_lab.ops.window_attention import Packing, packed_attention, window_attention


def aligned_at_the_end(window: int):
    """torch's flash attention by its definition: row by row, the last query sees the last `window` keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int) -> Tensor:
        parts = []
        for row in range(len(starts_q) - 1):
            y, keys, values = (
                x[slice(*starts[row : row + 2].tolist())] for x, starts in ((q, starts_q), (k, starts_k), (v, starts_k))
            )
            assert len(y) <= most_q and len(keys) <= most_k
            last = torch.arange(len(y)).unsqueeze(1) + len(keys) - len(y)
            place = torch.arange(len(keys))
            seen = (place <= last) & (place > last - window)
            scores = torch.einsum("qhd,khd->hqk", y, keys) * q.shape[-1] ** -0.5
            parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
        return torch.cat(parts)

    return attend


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("before", [(0, 0, 0), (7, 7, 7), (50, 50, 50), (0, 3, 20)])
def test_packed_rows_see_what_blocks_see(length, before):
    window = 8
    q = torch.randn(3, length, 2, 6, dtype=torch.float64)
    k, v = torch.randn(2, 3, window - 1 + length, 2, 6, dtype=torch.float64)
    blocks = window_attention(q, k, v, torch.tensor(before), window)
    rows = Packing.of(torch.tensor(before), length, window)
    packed = packed_attention(q, k, v, rows, aligned_at_the_end(window))
    assert torch.allclose(packed, blocks, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("with_before", [False, True])
def test_windows_of_a_convolution_are_the_same_without_joining_its_inputs(length, with_before):
    before = torch.randn(2, 3, 5) if with_before else None
    joined, apart = (ConvInputs(before, torch.randn(2, length, 5, generator=generator(0)), 3) for _ in range(2))
    assert joined.joined.shape == (2, length + 3, 5)
    positions = torch.tensor([[0, 1, length - 1], [length - 1, 0, length // 2]])
    assert torch.equal(joined.at(positions), apart.at(positions)) and apart._joined is None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_updates_that_run_again_have_the_same_gradients_and_store_less():
    heads, width, size, length = 2, 6, 8, 40
    rule = Rule(size, use_muon=True, prenorm=True)
    memory = {name: torch.randn(1, heads, width, width) for name in ("w0", "w1", "w2")}
    norms = {name: w.norm(dim=-1, keepdim=True) for name, w in memory.items()}
    memory |= {f"{name}_sum": w.clone() for name, w in memory.items()}
    queries = torch.randn(2, heads, length, width)
    streams = {"kv": torch.randn(2, heads, length, 2 * width), "rates": torch.rand(2, heads, length, 3)}
    found, stored = [], []
    for recompute in (False, True):
        inputs = [x.clone().requires_grad_() for x in (queries, *streams.values(), *memory.values())]
        again = dict(zip(streams, inputs[1:3], strict=True))
        weights = dict(zip(memory, inputs[3:], strict=True))
        zeros = torch.zeros(2, dtype=torch.long)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x.nbytes), x)[1], lambda x: x):
            plan = ChunkPlan(zeros, length, size, zeros, 1)
            output, _ = lact(inputs[0], again, weights, norms, plan, rule, recompute=recompute)
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        stored.append(sum(kept))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert stored[1] < 0.5 * stored[0]
