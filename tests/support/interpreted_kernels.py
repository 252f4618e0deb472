"""The Triton kernels against their torch references: run by test_kernels.py under the interpreter, by test_gpu.py on CUDA.

A file of its own, since TRITON_INTERPRET must be set before Triton is imported. Shapes are tiny: the interpreter is slow.
"""

from __future__ import annotations

import os

import pytest
import torch

from refine_lab.ops import head as plain_head
from refine_lab.ops.delta_rule import _through_chunks
from refine_lab.ops.kernels import chunks
from refine_lab.ops.kernels import head as kernel_head

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float64, torch.float32) if INTERPRETED else (torch.float32,)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
TOLERANCE_OF_CHUNKS = TOLERANCE if INTERPRETED else {torch.float32: 2e-3}  # there products are tf32: 11 bits


def relative(value: torch.Tensor, target: torch.Tensor) -> float:
    return float(((value - target).double().norm() / target.double().norm().clamp_min(1e-12)).detach())


def make(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).to(DEVICE)


# -- the head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("width", (1, 2, 17, 64, 131))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16))
def test_statistics_of_rows(dtype, width, temperature, monkeypatch):
    monkeypatch.setattr(kernel_head, "BLOCK", 32)  # several blocks a row, the last one not full
    logits = (3 * make(5, width)).to(dtype)
    ids = torch.randint(width, (5,), device=DEVICE)
    ids[0] = logits[0].argmax()
    for entropy in (True, False):
        target = plain_head.row_statistics(logits.clone(), ids, temperature, entropy)
        found = kernel_head.row_statistics(logits.clone(), ids, temperature, entropy)
        for name, a, b in zip(("logprobs", "entropies", "is_top1"), found, target, strict=True):
            assert a.dtype == b.dtype, name
            tolerance = TOLERANCE.get(dtype, 2e-5)
            assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance), (name, entropy)
    assert found[2][0]


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("used", ((1, 0), (0, 1), (1, 1)))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16))
def test_gradients_of_logits(dtype, used, temperature, monkeypatch):
    monkeypatch.setattr(kernel_head, "BLOCK", 32)
    logits, ids = (3 * make(5, 71)).to(dtype), torch.randint(71, (5,), device=DEVICE)
    logprobs, entropies, _ = plain_head.row_statistics(logits.clone(), ids, temperature, True)
    grads = tuple(torch.randn_like(logprobs) if on else None for on in used)
    arguments = (ids, logprobs, entropies, grads, temperature)
    target = plain_head.logit_gradients_(logits.clone(), *arguments)
    found = kernel_head.logit_gradients_(logits.clone(), *arguments)
    assert found.dtype == target.dtype == dtype
    assert relative(found, target) < TOLERANCE.get(dtype, 8e-3)  # one step of bfloat16: the interpreter truncates


def test_a_row_far_below_its_first_block():
    """Sums that must be rescaled by exp(-200): nothing overflows and nothing is lost."""
    logits = make(3, 9, dtype=torch.float32)
    logits[:, -1] += 200
    ids = torch.tensor([0, 8, 3], device=DEVICE)
    target = plain_head.row_statistics(logits.clone(), ids, 1.0, True)
    found = kernel_head.row_statistics(logits.clone(), ids, 1.0, True)
    assert all(torch.allclose(a.double(), b.double(), atol=1e-4) for a, b in zip(found, target, strict=True))


def test_the_whole_head_on_the_kernels(monkeypatch):
    """Through the switch, in slices: values and gradients are those of the head without kernels."""
    monkeypatch.setattr(plain_head, "HEAD_ROWS", 4)
    dtype = DTYPES[0]
    hidden, weight = make(9, 6, dtype=dtype).requires_grad_(), make(21, 6, dtype=dtype).requires_grad_()
    ids, upstream = torch.randint(21, (9,), device=DEVICE), make(2, 9, dtype=dtype)
    results, calls = [], []
    real = kernel_head.row_statistics
    monkeypatch.setattr(kernel_head, "row_statistics", lambda *a: calls.append(1) or real(*a))
    for switch in ("", "head"):
        monkeypatch.setenv("REFINE_KERNELS", switch)
        stats = plain_head.token_stats(hidden, weight, ids, temperature=0.8)
        loss = (stats.logprobs * upstream[0] + stats.entropies * upstream[1]).sum()
        results.append((*stats, *torch.autograd.grad(loss, (hidden, weight))))
    assert len(calls) == 3  # of the second round, one a slice
    for name, a, b in zip(("logprobs", "entropies", "is_top1", "dhidden", "dweight"), *results, strict=True):
        assert relative(b.double(), a.double()) < TOLERANCE[dtype], name


# -- the delta rule's chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("shape", ((1, 1, 2, 3, 5), (4, 2, 16, 16, 16), (3, 2, 8, 20, 33), (2, 1, 64, 8, 6)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_through_chunks_with_gradients(dtype, shape, gated):
    n, groups, length, dk, dv = shape
    state, u0 = make(groups, dk, dv, dtype=dtype), make(n, groups, length, dv, dtype=dtype)
    keys, w = (make(n, groups, length, dk, dtype=dtype) * 0.1 for _ in range(2))
    kept = torch.rand(n, groups, 1, 1, dtype=dtype).to(DEVICE)
    inputs = [x.requires_grad_() for x in (state, keys, u0, w, *([kept] if gated else []))]
    upstream = make(n, groups, dk, dv, dtype=dtype), make(n, groups, length, dv, dtype=dtype)
    results = []
    for function in (_through_chunks, chunks.through_chunks):
        found = function(state, keys, u0, w, kept.unbind(0) if gated else None)
        loss = sum((x * y).sum() for x, y in zip(found, upstream, strict=True))
        results.append((*found, *torch.autograd.grad(loss, inputs, allow_unused=True)))
    for name, a, b in zip(("states", "updates", "dS", "dk", "du", "dw", "dg"), *results, strict=False):
        if a is None or (n == 1 and a.norm() == 0):  # nothing follows the only chunk: its keys and gate are not used
            assert b is None or b.norm() == 0, name
        else:
            assert relative(b, a) < TOLERANCE_OF_CHUNKS[dtype], name
