"""Compiles the Triton kernels of a training step for GPUs that need not be there: `python -m benchmarks.aot --json FILE`.

Every tuning variant of fla's kernels and of ours, forward and backward, at the head shapes of published models, for sm_90
(H100, H200) and sm_80 (A100): registers per thread, bytes of spilled registers, shared memory, and whether the device has
that much. The exit status is 1 if no variant of one of fla's kernels fits, or if one of ours does not fit on sm_90.

Each case runs in a process of its own, since fla looks at the device when it is imported, and takes up to six minutes of
one core the first time; Triton's cache (`TRITON_CACHE_DIR`) makes it quick afterwards. Finished cases are kept in the file,
which has one row per kernel; the .csv file beside it has one row per variant.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write

ROOT = Path(__file__).parent.parent
HOPPER = "sm_90"

Row = dict[str, Any]

HEADER = "| kernel | variants | too large | spilling | registers | spilled bytes | shared bytes |"
COLUMNS = ("case", "kernel", "warps", "stages", "registers", "spilled_bytes", "shared_bytes", "fits", "constants")


# -- cases: what a process compiles ----------------------------------------------------------------------------------------


def delta_rule(key_heads: int, heads: int, dk: int, dv: int, *, gated: bool) -> None:
    """Runs the rule on fla's kernels as training does, forward and backward, from a state."""
    from refine_lab.ops.fla_delta_rule import fla_kernel

    q, k = (torch.zeros(1, 128, key_heads, dk, requires_grad=True) for _ in range(2))
    v, state = torch.zeros(1, 128, heads, dv, requires_grad=True), torch.zeros(1, heads, dk, dv, requires_grad=True)
    beta, gate = (torch.zeros(1, 128, heads, requires_grad=True) for _ in range(2))
    outputs, final = fla_kernel(q, k, v, beta, gate if gated else None, state)
    (outputs.sum() + final.sum()).backward()


def fused(width: int, inner: int, head: int) -> None:
    """Runs fla's norms, SwiGLU and short convolutions as a block calls them, forward and backward."""
    from refine_lab.ops.fused import fused_rms_norm, swiglu_kernel
    from refine_lab.ops.short_conv import ConvInputs, fused_conv_silu

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    residual = leaf(1, 128, width, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before, _ = fused_rms_norm(torch.nn.RMSNorm(width, eps=1e-6), residual)
        after, total = fused_rms_norm(torch.nn.RMSNorm(width, eps=1e-6), leaf(1, 128, width), residual)
        heads, _ = fused_rms_norm(torch.nn.RMSNorm(head, eps=1e-6), leaf(1, 128, 4, head))
        product = swiglu_kernel(leaf(1, 128, inner), leaf(1, 128, inner))
    y = fused_conv_silu(ConvInputs(leaf(1, 3, width), leaf(1, 128, width), 3), leaf(width, 1, 4, dtype=torch.float32))
    torch.stack([x.float().sum() for x in (before, after, total, heads, product, y)]).sum().backward()


def chunks(dk: int, *, gated: bool) -> None:
    """Runs our kernel of the state through all chunks, forward and backward."""
    from refine_lab.ops.kernels.chunks import through_chunks

    state, u0 = torch.zeros(2, dk, 128, requires_grad=True), torch.zeros(3, 2, 64, 128, requires_grad=True)
    keys, w = (torch.zeros(3, 2, 64, dk, requires_grad=True) for _ in range(2))
    kept = torch.zeros(3, 2, 1, 1, requires_grad=True)
    states, updates = through_chunks(state, keys, u0, w, list(kept.unbind(0)) if gated else None)
    (states.sum() + updates.sum()).backward()


def head(vocabulary: int) -> None:
    """Runs our kernels of the head's statistics and of the logits' gradients."""
    from refine_lab.ops.kernels.head import logit_gradients_, row_statistics

    logits, ids = torch.zeros(4, vocabulary, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long)
    for entropy in (False, True):
        logprobs, entropies, _ = row_statistics(logits, ids, 1.0, entropy)
        logit_gradients_(logits, ids, logprobs, entropies, (logprobs, entropies if entropy else None), 1.0)


def ours() -> None:
    for dk, gated in ((128, False), (128, True), (256, True)):
        chunks(dk, gated=gated)
    head(32_000)


CASES = {
    "DeltaNet-1.3B": lambda: delta_rule(16, 16, 128, 128, gated=False),
    "GatedDeltaNet-1.3B": lambda: delta_rule(6, 6, 256, 512, gated=True),  # fla's default configuration
    "Qwen3-Next": lambda: delta_rule(16, 32, 128, 128, gated=True),
    "layers": lambda: fused(2048, 5632, 128),  # of DeltaNet-1.3B
    "ours": ours,
}
"""Name of a case -> what runs its kernels once."""


def compile_case(name: str, target: str) -> dict[str, Any]:
    """Returns the rows of a case and its seconds; every launch compiles and does nothing."""
    from benchmarks.aot_device import GPUS, Compiled, pretend

    pretend(GPUS[target])
    compiled, began, error = Compiled(GPUS[target]).listening(), time.perf_counter(), None
    try:
        CASES[name]()
    except Exception as raised:  # Triton's own classes: a kernel of which no variant fits, or that does not compile
        error = f"{type(raised).__name__}: {str(raised).splitlines()[0]}"
    return {"seconds": time.perf_counter() - began, "variants": compiled.rows, "error": error}


# -- the table -------------------------------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[Row]:
    """Returns one row per kernel: its variants, how many do not fit or spill, and the extremes over those that fit."""
    kernels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kernels[row["kernel"]].append(row)
    table = []
    for kernel, variants in sorted(kernels.items()):
        fitting = [row for row in variants if row["fits"]]
        extremes = {
            name: [min(row[name] for row in fitting), max(row[name] for row in fitting)] if fitting else None
            for name in ("registers", "spilled_bytes", "shared_bytes")
        }
        spilling = sum(row["spilled_bytes"] > 0 for row in fitting)
        counts = {"variants": len(variants), "too_large": len(variants) - len(fitting), "spilling": spilling}
        table.append({"kernel": kernel, **counts, **extremes})
    return table


def faults(cases: dict[str, Any]) -> list[str]:
    """Returns a sentence for every case that raised, kernel without a variant that fits, and misfit of ours on Hopper."""
    found = []
    for name, case in cases.items():
        if case["error"]:
            found.append(f"{name}: {case['error']}")
        every = name == f"{HOPPER} ours"
        for row in case["kernels"]:
            if row["too_large"] and (every or row["too_large"] == row["variants"]):
                many = f"{row['too_large']} of {row['variants']} variants need"
                found.append(f"{name}: {many} more shared memory than a block has, of {row['kernel']}")
    return found


def span(low_high: list[int] | None) -> str:
    """Returns an extreme pair as text."""
    if low_high is None:
        return "none fits"
    low, high = low_high
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def markdown(case: dict[str, Any]) -> list[str]:
    """Returns the rows of a case's table in docs/gpu_kernels.md."""
    return [
        f"| `{row['kernel']}` | {row['variants']} | {row['too_large']} | {row['spilling']} | {span(row['registers'])} | "
        f"{span(row['spilled_bytes'])} | {span(row['shared_bytes'])} |"
        for row in case["kernels"]
    ]


def show(name: str, case: dict[str, Any]) -> None:
    """Prints the table of a case."""
    print(f"{name} ({sum(row['variants'] for row in case['kernels'])} variants, {case['seconds']:.0f} s): {HEADER}")
    print(*markdown(case), sep="\n", flush=True)


def in_its_own_process(name: str, target: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.aot", "--case", name, "--target", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        return {"seconds": 0.0, "variants": [], "error": (done.stderr.strip().splitlines() or ["it ended"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def write_variants(path: Path, case: str, variants: list[Row]) -> None:
    """Replaces the rows of a case in a table with one row per variant."""
    rows: list[Row] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["case"] != case]
    for variant in variants:
        constants = " ".join(f"{name}={value}" for name, value in variant["constants"].items())
        rows.append({**variant, "case": case, "constants": constants})
    with path.open("w", encoding="utf-8", newline="") as file:
        names: list[str] = list(COLUMNS)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="the file that the figures are written to")
    parser.add_argument("--targets", default="sm_90,sm_80", help="GPU architectures with commas between them")
    parser.add_argument("--cases", default=",".join(CASES), help="cases with commas between them")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # what the process of one case is called with
    parser.add_argument("--target", default=HOPPER, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(compile_case(chosen.case, chosen.target)))
        return 0
    if chosen.json is None:
        parser.error("the following arguments are required: --json")
    cases = json.loads(chosen.json.read_text(encoding="utf-8"))["cases"] if chosen.json.is_file() else {}
    for name in chosen.cases.split(","):
        for target in chosen.targets.split(","):
            key = f"{target} {name}"
            if key not in cases or cases[key]["error"]:
                case = in_its_own_process(name, target)
                cases[key] = {name: case[name] for name in ("seconds", "error")} | {
                    "kernels": summary(case["variants"])
                }
                write_variants(chosen.json.with_suffix(".csv"), key, case["variants"])
                write(chosen.json, {"cases": cases}, device="none: compiled ahead of time", triton=_triton_version())
            show(key, cases[key])
    found = faults(cases)
    print("\n".join(found) if found else "every kernel has a variant that fits, and all of ours fit on sm_90")
    return 1 if found else 0


def _triton_version() -> str:
    import triton

    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
