"""How often a training step waits for the device, on torch's meta device, whose tensors have no values to read."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import refine_lab.host as host_module
from refine_lab.config import RefineConfig
from refine_lab.host import derived, host, known, to_device
from refine_lab.method.rewards import reward_function
from refine_lab.method.step import train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM
from refine_lab.models.state import State
from refine_lab.rng import Draws
from refine_lab.training.prefetch import Prefetched, prefetched
from refine_lab.types import Batch
from tests.factories.step import VOCABULARY, make_batch, train_state_for

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": VOCABULARY}
MODELS = {
    "delta": lambda: DeltaNetForCausalLM(DeltaNetConfig(**SIZES, num_heads=2)),
    "lact": lambda: LaCTForCausalLM(
        LaCTConfig(**SIZES, num_attn_heads=4, num_lact_heads=2, lact_chunk_size=32, window_size=16, ttt_prenorm=True)
    ),
}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch knows no autocast for the meta device."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    off = {"meta": nullcontext}
    monkeypatch.setattr(torch, "autocast", lambda kind, *a, **b: off.get(kind, lambda: autocast(kind, *a, **b))())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))


def transferred(x: Tensor) -> Tensor:
    """Values in place of those that a device would send: positions in their chunks, true checks, no reward to refuse."""
    values = torch.arange(x.numel(), dtype=x.dtype) % 4 * 20 + 10
    return values if len(values) > 1 else torch.zeros_like(values)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that receives the size of every transfer to the CPU."""
    waits: list[int] = []
    monkeypatch.setattr(host_module, "transfer", lambda x: (waits.append(x.numel()), transferred(x))[1])
    return waits


@pytest.mark.parametrize("part", ["none", "blocks"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_for_positions_rewards_the_norm_and_its_metrics(model, part, monkeypatch):
    """Everything else that decides in Python is known on the CPU: any other value that is read raises on this device."""
    waits = counted(monkeypatch)
    policy = MODELS[model]().to("meta")
    checkpoint_activations(policy, part)
    train_state = train_state_for(policy, RefineConfig(num_chunks=4, margin=5, group_size=2))
    train_state = replace(train_state, reward=reward_function("cosine"))
    batch = make_batch().to("meta")
    result = train_step(train_state, batch, Draws(seed=0, step=1))
    assert waits == [3 * 4 + 2, 1, 7, 6]
    assert result.rollouts is not None and result.metrics["updates"] == 1


def test_a_step_without_rollouts_waits_once(monkeypatch):
    waits = counted(monkeypatch)
    train_state = train_state_for(MODELS["delta"]().to("meta"), None, micro_batch_size=1)
    train_step(train_state, make_batch().to("meta"), Draws(seed=0, step=1))
    assert waits == [3]


def test_a_copy_on_the_cpu_follows_its_tensor_and_is_asked_for_once(monkeypatch):
    waits = counted(monkeypatch)
    lengths = to_device(torch.tensor([3, 5]), "meta")
    state = State({"x": torch.zeros(2, 1, device="meta")}, lengths).repeat(2).select([3, 0])
    assert host(state.lengths).tolist() == [5, 3] and not waits
    unknown = torch.zeros(2, dtype=torch.long, device="meta")
    assert not known(derived(torch.add, lengths, unknown))
    assert host(unknown).tolist() == [10, 30] == host(unknown).tolist() and waits == [2]


def test_prefetched_batches_are_those_of_the_data_in_any_order():
    data = Prefetched(Numbered(), torch.device("cpu"))
    assert [data.batch(step, 2).tokens.tolist() for step in (0, 1, 2, 7, 3)] == [[[n] * 4] * 2 for n in (0, 1, 2, 7, 3)]
    assert prefetched(data, torch.device("cpu")) is data


class Numbered:
    def batch(self, step: int, batch_size: int) -> Batch:
        return Batch(
            tokens=torch.full((batch_size, 4), step),
            lengths=torch.full((batch_size,), 4),
            sequence_ids=(*range(batch_size),),
        )
