"""A step in bfloat16 on the CPU: fast weights stay float32, losses stay close, what is kept and learned is float32."""

from __future__ import annotations

import pytest
import torch

from refine_lab.config import RefineConfig
from refine_lab.method.step import train_step
from refine_lab.models import FastWeightLM
from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM
from refine_lab.ops.head import token_stats
from refine_lab.rng import Draws
from tests.factories.step import make_batch, make_policy, train_state_for

METHOD = RefineConfig(num_chunks=4, margin=5, group_size=2)
SIZES = dict(hidden_size=24, num_hidden_layers=2, intermediate_size=40, vocab_size=53, initializer_range=0.05)

FAMILIES = {
    "delta_net": lambda: make_policy(torch.float32),
    "gated_deltanet": lambda: GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SIZES, num_heads=2, head_dim=8)),
    "lact": lambda: LaCTForCausalLM(
        LaCTConfig(**SIZES, num_attn_heads=3, num_lact_heads=2, lact_chunk_size=32, window_size=16, fp32_states=True)
    ),
}


@pytest.fixture(params=FAMILIES)
def policy(request) -> FastWeightLM:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def test_losses_are_close_and_masters_gradients_and_moments_are_float32(policy):
    batch, results = make_batch(), []
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    for dtype in ("float32", "bfloat16"):
        policy.load_state_dict(before)
        train_state = train_state_for(policy, METHOD, dtype=dtype)
        results.append(train_step(train_state, batch, Draws(seed=0, step=1)).metrics)
    exact, rounded = results
    for name in ("ntp_loss", "entropy_mean"):
        assert rounded[name] == pytest.approx(exact[name], rel=1e-2), name
        assert rounded[name] != exact[name], name  # bfloat16 it was
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.2)
    moments = [x for o in train_state.optimizers for s in o.state.values() for x in s.values() if x.ndim]
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert moments and all(x.dtype == torch.float32 for x in [*moments, *grads, *policy.parameters()])


def test_fast_weights_are_float32_wherever_they_are_taken(policy):
    batch = make_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trace = policy.read(batch.tokens, batch.lengths)
        states = [trace.final_state, trace.state_at(torch.tensor([[0, 50, 96]] * 3))]
        states.append(policy.read(batch.tokens[:, :1], state=states[0]).final_state)  # a token, as a rollout reads it
        states.append(policy.read(batch.tokens[:, :5], state=states[0]).final_state)
    with torch.no_grad():
        exact = policy.read(batch.tokens, batch.lengths).final_state
    for place, state in enumerate(states):
        for name, x in {**state.tensors, **state.shared}.items():
            if name.split(".")[1] in ("recurrent_state", "w0", "w1", "w2", "w0_momentum", "w1_momentum", "w2_momentum"):
                assert x.dtype == torch.float32, (place, name)
    for name, x in {**exact.tensors, **exact.shared}.items():
        found = {**states[0].tensors, **states[0].shared}[name]
        if x.is_floating_point() and x.norm() > 0:
            assert float((found - x).norm() / x.norm()) < 5e-2, name


def test_branches_that_cross_a_chunk_and_others_that_do_not_are_read_as_on_cuda(monkeypatch):
    """CUDA's autocast leaves `index_copy` alone, which then takes no two types; the CPU's would widen them."""
    plain = torch.Tensor.index_copy

    def strict(self, dim, index, source):
        assert self.dtype == source.dtype
        return plain(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy", strict)
    policy, batch = FAMILIES["lact"](), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        state = policy.read(batch.tokens, batch.lengths).state_at(torch.tensor([[10, 30]] * 3))
        read = policy.read(batch.tokens[[0, 0, 1, 1, 2, 2], :5], state=state)
    assert len(torch.unique(read.final_state.sources)) > len(torch.unique(state.sources)), "some crossed"


def test_a_slice_of_the_head_has_its_softmax_in_float32():
    """With a vocabulary of equal logits log p = -log V: bfloat16 sums of 4,000 ones would stop at 256."""
    hidden, weight = torch.ones(2, 4), torch.zeros(4000, 4)
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats(hidden, weight, torch.tensor([0, 1]))
    assert torch.allclose(stats.logprobs, torch.full((2,), -torch.tensor(4000.0).log()), atol=1e-5)
    assert torch.allclose(stats.entropies, torch.full((2,), torch.tensor(4000.0).log()), atol=1e-5)
