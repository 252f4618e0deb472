"""What `tests/benchmarks/test_fake_gpu.py` asks of the fake device, in a process of its own: torch learns of devices once.

`python -m tests.support.fake_gpu` prints the figures of small steps, and of steps and operations with planted faults, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.fake_gpu.device import prepare

if "torch" not in sys.modules:
    prepare()

import torch
from torch import Tensor

from benchmarks.fake_gpu.phases import Case
from benchmarks.fake_gpu.report import best_micro_batch, measure
from benchmarks.fake_gpu.watch import watching
from refine_lab.estimate.models import PUBLISHED
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM

WIDTH, LAYERS, LENGTH = 64, 2, 512
PHASES = ("midtrain", "posttrain", "ttt", "evaluation", "explore")


def small_deltanet() -> FastWeightLM:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_heads": 2, "vocab_size": 96}
    return DeltaNetForCausalLM(DeltaNetConfig(**sizes))


def small_lact() -> FastWeightLM:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attn_heads": 2, "num_lact_heads": 2}
    return LaCTForCausalLM(LaCTConfig(**sizes, vocab_size=96, lact_chunk_size=128, window_size=128, use_muon=True))


def two_layers(name: str) -> Callable[[], FastWeightLM]:
    """Returns what makes a published model with two layers of its own widths."""

    def make() -> FastWeightLM:
        config = PUBLISHED[name]()
        config.num_hidden_layers = LAYERS
        return DeltaNetForCausalLM(config) if isinstance(config, DeltaNetConfig) else LaCTForCausalLM(config)

    return make


def peaks() -> dict[str, Any]:
    """Returns GiB by part of steps that `refine_lab.estimate` is compared with."""
    deltanet, lact = (partial(Case, model=two_layers(name), length=4096) for name in ("DeltaNet-1.3B", "LaCT-760M"))
    shared = measure(deltanet(workers=8))
    return {
        "deltanet": measure(deltanet(activation_checkpointing="none"))["peak_gib"],
        "lact": measure(lact())["peak_gib"],
        "sft": measure(lact(method="sft", rows=2))["peak_gib"],
        "shared": shared["peak_gib"],
        "exchanges": shared["workers"],
    }


# -- faults in one layer of a model --------------------------------------------------------------------------------------


def with_fault(fault: Callable[[Tensor], Tensor]) -> Callable[[], FastWeightLM]:
    """Returns what makes a model whose last layer passes the product of its gate's projection through `fault`."""

    def make() -> FastWeightLM:
        policy = small_deltanet()
        projection: Any = policy.model.layers[-1].mlp.gate_proj
        forward = projection.forward
        projection.forward = lambda x: fault(forward(x))
        return policy

    return make


def from_the_cpu(y: Tensor) -> Tensor:
    return y + torch.zeros(y.shape[-1], dtype=y.dtype)


def waiting(y: Tensor) -> Tensor:
    return y * y.mean().item()


def promoted(y: Tensor) -> Tensor:
    return y * torch.ones(y.shape[-1], device=y.device)


# -- single operations ---------------------------------------------------------------------------------------------------


def waits_of(act: Callable[[], object]) -> int:
    """Returns how often an operation waits for the device."""
    with watching() as watch:
        act()
        return watch.synchronisations.total()


def waits() -> dict[str, int]:
    def cuda(*values: int) -> Tensor:
        return torch.arange(*values, device="cuda")

    acts = {
        "a copy to the device": lambda: torch.ones(3).to("cuda"),
        "an asynchronous copy to the device": lambda: torch.ones(3).to("cuda", non_blocking=True),
        "a copy to the CPU": lambda: torch.ones(3, device="cuda").cpu(),
        "arithmetic on the device": lambda: cuda(5).sum() + cuda(5).max(),
        "a number": lambda: int(cuda(5).sum()),
        "a number of the CPU": lambda: int(torch.arange(5).sum()),
        "a list": lambda: cuda(5).tolist(),
        "a truth value": lambda: bool((cuda(5) < 9).all()),
        "places that are not zero": lambda: cuda(5).nonzero(),
        "a choice by a mask": lambda: cuda(5)[cuda(5) > 2],
        "a choice by places": lambda: cuda(5)[cuda(2)],
        "distinct values": lambda: torch.unique(cuda(5)),
    }
    return {name: waits_of(act) for name, act in acts.items()}


def values() -> dict[str, Any]:
    """Returns values that decide what a step does next: known ones, and those assumed for unknown ones."""
    with watching():
        lengths, unknown = torch.tensor([7, 5], device="cuda"), torch.randn(4, 3, device="cuda")
        lengths += 1
        return {
            "shape of a choice": list(lengths[lengths > 6].shape),
            "maximum": int(lengths.max()),
            "halves": (lengths // 2).tolist(),
            "an unknown number": float(unknown.sum()),
            "a finite loss": bool(torch.isfinite(unknown.mean())),
            "all of unknown": bool((unknown > 0).all()),
            "any of unknown": bool((unknown > 0).any()),
        }


def memory() -> dict[str, float]:
    """Returns the peak of three tensors of one MiB, two of which are in memory at once, and a view of one."""
    mebi = 2**18  # float32
    with watching() as watch:
        watch.begin()
        first = torch.zeros(mebi, device="cuda")
        view = first.view(2, -1)
        second = first + 1
        del first, second
        third = view * 2
        del third, view
        return {"mib": sum(x.nbytes for x in watch.ledger.at_peak()) / 2**20, "made": len(watch.ledger.made())}


def main() -> None:
    case = partial(Case, length=LENGTH, activation_checkpointing="none")
    faults = {"from_the_cpu": from_the_cpu, "waiting": waiting, "promoted": promoted}
    one = measure(case(model=small_deltanet))
    found = {
        "phases": {phase: measure(case(model=small_deltanet, phase=phase)) for phase in PHASES[1:]} | {"midtrain": one},
        "lact": measure(case(model=small_lact)),
        "sft": measure(case(model=small_deltanet, method="sft")),
        "blocks": measure(Case(model=small_deltanet, length=LENGTH)),
        "two rows": measure(case(model=small_deltanet, rows=2)),
        "search": best_micro_batch(case(model=small_deltanet), one, memory=3 * one["peak_gib"]["total"]),
        "no room": best_micro_batch(case(model=small_deltanet), one, memory=one["peak_gib"]["total"] / 2),
        "faults": {name: measure(case(model=with_fault(fault))) for name, fault in faults.items()},
        "parameters": sum(p.numel() for p in small_deltanet().parameters()),
        "waits": waits(),
        "values": values(),
        "memory": memory(),
        "peaks": peaks(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
