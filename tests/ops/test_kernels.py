"""The Triton kernels: equal to their torch references under the interpreter, compiled for a GPU that need not be there.

The comparisons themselves are in tests/support/interpreted_kernels.py; on CUDA test_gpu.py runs them again.
"""

from __future__ import annotations

import os

import pytest
import torch

from refine_lab.ops.head import token_stats
from refine_lab.ops.kernels import chosen
from tests.support.comparisons import under_the_interpreter
from tests.support.refusals import refused

triton = pytest.importorskip("triton", reason="Triton is not installed here")


def test_under_the_interpreter_kernels_equal_their_references():
    """Values and gradients, odd sizes, the head through its switch; and every comparison did run."""
    done = under_the_interpreter("interpreted_kernels.py")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.parametrize("word", ("heads", "head, chunk"))
def test_a_kernel_that_is_none_is_refused(monkeypatch, word):
    monkeypatch.setenv("REFINE_KERNELS", word)
    with refused("kernel in REFINE_KERNELS", allowed="head, chunks") as error:
        token_stats(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]))
    assert repr(error.value.value) in str(error.value)


def test_kernels_are_off_unless_asked_for_and_stay_off_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("REFINE_KERNELS", raising=False)
    assert not chosen("head", torch.zeros(1))
    monkeypatch.setenv("REFINE_KERNELS", " head, chunks,")
    assert not chosen("head", torch.zeros(1))  # there is no CPU for it to run on
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("head", torch.zeros(1)) and chosen("chunks", torch.zeros(1))


def compiled(kernel, pointers: dict[str, str], numbers: str, constants: dict, **options):
    """The kernel for an H100 or H200, by Triton's own compiler and ptxas: neither needs the device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**pointers, **dict.fromkeys(numbers.split(), "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_kernels_compile_for_a_gpu_at_the_shapes_of_the_paper(tmp_path, monkeypatch):
    """Vocabulary in blocks of 4,096; heads of 128 (DeltaNet-1.3B) and 256 (GatedDeltaNet), within an SM's shared memory."""
    from refine_lab.ops.kernels import chunks, head

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def floats(names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), "*fp32")

    built = []
    common = {"TEMPERATURE": 1.0, "BLOCK": head.BLOCK}
    pointers = {"logits": "*bf16", "token_ids": "*i64", **floats("logprobs entropies"), "is_top1": "*i1"}
    built.append(compiled(head._statistics, pointers, "width", {**common, "ENTROPY": True}))
    rest = floats("log_normalisers entropies d_logprobs d_entropies")
    built.append(compiled(head._gradients, {"logits": "*bf16", "token_ids": "*i64", **rest}, "width", common))
    for dk, gated in ((128, False), (256, True)):
        constants = {"L": 64, "K": dk, "V": chunks.COLUMNS, **({} if gated else {"kept": None})}
        options = {"num_warps": chunks.WARPS, "num_stages": chunks.stages(dk)}
        for kernel, names in (
            (chunks._forward, "first keys u0 w kept states updates"),
            (chunks._backward, "d_states d_u keys w kept after d_u0 d_first"),
        ):
            pointers = floats(names if gated else names.replace("kept ", ""))
            built.append(compiled(kernel, pointers, "chunks length dk dv", constants, **options))
    for kernel in built:
        assert len(kernel.asm["cubin"]) > 1000
        assert kernel.metadata.shared <= 227 * 1024, kernel.metadata.name
