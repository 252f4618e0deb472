"""Model FLOP/s utilisation and peak memory of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_lab.training import utilisation
from refine_lab.training.utilisation import Utilisation, flops_per_token
from tests.factories import hybrids, lact
from tests.factories.step import make_batch

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 80, "vocab_size": 100}


def test_what_a_token_costs_is_counted_by_hand():
    policy = DeltaNetForCausalLM(DeltaNetConfig(**SIZES, num_heads=2))
    layer = 4 * 64 * 64 + 2 * 64 + 3 * 64 * 80  # q, k, v, o; beta; gate, up, down. Convolutions are no matrices
    rule = 2 * 6 * 32 * 32
    assert flops_per_token(policy, 512) == 6 * (3 * layer + 64 * 100) + 3 * 3 * rule


def test_wide_values_and_short_windows_count_with_their_own_sizes():
    gated = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SIZES, num_heads=2, head_dim=16, expand_v=2.0))
    matrices = sum(p.numel() for p in gated.parameters() if p.ndim == 2) - 64 * 100
    assert flops_per_token(gated, 512) == 6 * matrices + 3 * 3 * (2 * 6 * 16 * 32)
    windowed = lact.make_lact()
    config = windowed.config
    short, long = (flops_per_token(windowed, length) for length in (8, 16))
    assert short is not None and long is not None and config.window_size >= 8
    assert long - short == 3 * config.num_hidden_layers * 4 * 4 * config.hidden_size
    assert flops_per_token(hybrids.make("qwen3_next"), 512) is None


def test_a_step_on_cuda_has_its_memory_and_utilisation(monkeypatch):
    policy = DeltaNetForCausalLM(DeltaNetConfig(**SIZES, num_heads=2))
    clock, reset = iter([0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]), []
    monkeypatch.setattr(utilisation.time, "monotonic", lambda: next(clock))
    usage, read = Utilisation(policy), [make_batch((500, 524))]
    usage.begin()
    speed = {"seconds": 0.5, "tokens_per_second": 2048.0}
    assert usage.figures(read) == speed  # on the CPU
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    usage._cuda = True
    usage.begin()
    assert reset == [policy.device]
    monkeypatch.setattr(utilisation, "peak_flops", lambda: (None, None))
    assert usage.figures(read) == {**speed, "peak_memory_gib": 1.5}
    monkeypatch.setattr(utilisation, "peak_flops", lambda: ("H200", 1e12))
    flops = flops_per_token(policy, 512)
    assert flops is not None
    usage.begin()
    assert usage.figures(read) == {**speed, "peak_memory_gib": 1.5, "mfu": pytest.approx(1024 * flops / 0.5e12)}
    usage._devices = 4  # which share the sequences
    usage.begin()
    assert usage.figures(read)["mfu"] == pytest.approx(1024 * flops / 2e12)
