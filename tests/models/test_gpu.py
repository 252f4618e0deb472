"""CUDA against the CPU for every family: outputs, states, gradients, a step in bfloat16; parts run again; our kernels.

Small random models, so that all of it takes minutes. Bounds are relative, of the norm over a whole tensor (for gradients:
over all of them), and named by what they allow for.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.method.step import train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM, State
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM
from refine_lab.rng import Draws
from refine_lab.types import Batch
from tests.factories.step import train_state_for
from tests.support.comparisons import compare_kernels
from tests.support.state_contract import by_row

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:the gated delta rule runs in plain torch")]

DEVICE = "cuda"
VOCABULARY = 211
METHOD = RefineConfig(num_chunks=4, margin=5, group_size=2)

BF16_KERNELS = {"values": 3e-2, "gradients": 6e-2}
"""fla's kernels read and write bfloat16 (8 bits: 4e-3 a rounding) whatever the model's dtype; their states are float32."""
FLOAT32 = {"values": 1e-3, "gradients": 2e-3}
"""Torch on both sides, sums in another order; Newton-Schulz and chunks of updates amplify what differs."""
BF16_AUTOCAST = 3e-2
"""Of the next-token loss of a step in bfloat16 against one in float32."""


def deltanet() -> FastWeightLM:
    sizes = dict(hidden_size=128, num_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY, initializer_range=0.05)
    return DeltaNetForCausalLM(DeltaNetConfig(**sizes))


def gated_deltanet() -> FastWeightLM:
    sizes = dict(hidden_size=128, head_dim=32, num_heads=2, num_v_heads=4, num_hidden_layers=2)
    return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes, vocab_size=VOCABULARY, initializer_range=0.05))


def lact(**fields) -> FastWeightLM:
    sizes = dict(hidden_size=128, num_attn_heads=4, num_lact_heads=2, num_hidden_layers=2, initializer_range=0.05)
    chunks = dict(lact_chunk_size=64, window_size=64, fp32_states=True, w0_w2_low_rank=8)
    return LaCTForCausalLM(LaCTConfig(**sizes, **chunks, vocab_size=VOCABULARY, **fields))


def hybrid(family: str) -> FastWeightLM:
    from tests.factories.hybrids import make  # small and random; its vocabulary is smaller than that here

    return make(family, torch.float32, vocab_size=VOCABULARY)


FAMILIES = {
    "delta_net": (deltanet, BF16_KERNELS),
    "gated_deltanet": (gated_deltanet, BF16_KERNELS),
    "lact": (lact, FLOAT32),
    "lact-muon": (lambda: lact(use_muon=True, ttt_prenorm=True), {"values": 1e-2, "gradients": 2e-2}),
    **{name: (lambda name=name: hybrid(name), BF16_KERNELS) for name in ("qwen3_next", "qwen3_5_text", "olmo_hybrid")},
}


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[FastWeightLM, dict[str, float]]:
    torch.manual_seed(0)
    make, bounds = FAMILIES[request.param]
    return make().float(), bounds


def make_batch(lengths: tuple[int, ...] = (700, 333, 512)) -> Batch:
    tokens = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    return Batch(tokens=tokens, lengths=torch.tensor(lengths), sequence_ids=tuple(range(len(lengths))))


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value.cpu().double() - expected.cpu().double()).norm() / expected.cpu().double().norm()).detach())


def real(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The hidden states of real tokens, of all rows."""
    return hidden[torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(-1)]


def measured(policy: FastWeightLM, batch: Batch) -> tuple[Tensor, State, Tensor, list[Tensor | None]]:
    """Hidden states, states inside the rows and in a continuation of five, and the gradient of a loss on all of it."""
    positions = torch.tensor([[0, 63, 64, 331]] * len(batch.lengths), device=batch.tokens.device)
    trace = policy.read(batch.tokens, batch.lengths)
    state = trace.state_at(positions)
    following = batch.tokens[:, :20].reshape(-1, 5)[: state.rows]
    after = policy.read(following, state=state).hidden_states
    hidden = real(trace.hidden_states, batch.lengths)
    ids = torch.arange(len(hidden), device=hidden.device) % VOCABULARY
    stats, later = policy.head(hidden, ids), policy.head(after, following)
    loss = (stats.entropies - stats.logprobs).mean() - later.logprobs.mean()
    return hidden, state, after, list(torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True))


def whole(gradients: list[Tensor | None]) -> Tensor:
    return torch.cat([x.flatten().cpu() for x in gradients if x is not None])


def test_outputs_states_and_gradients_are_those_of_the_cpu(family):
    policy, bounds = family
    batch = make_batch()
    hidden, state, after, gradients = measured(policy, batch)
    policy.to(DEVICE)
    found = measured(policy, batch.to(DEVICE))
    assert relative(found[0], hidden) < bounds["values"], "hidden states"
    parts = [(state.tensors, found[1].tensors), (by_row(state), by_row(found[1]))]
    for name, x, y in ((name, x, there[name]) for here, there in parts for name, x in here.items()):
        if x.is_floating_point() and x.norm() > 0:
            assert y.dtype == x.dtype, name
            assert relative(y, x) < bounds["values"], name
    assert relative(found[2], after) < bounds["values"], "hidden states of a continuation"
    assert relative(whole(found[3]), whole(gradients)) < bounds["gradients"]


@pytest.mark.parametrize("width", (1, 5, 64, 511, 513))
def test_reads_of_any_width_go_on_from_a_state(family, width):
    """What generation and rollouts ask for, short of a segment and past it: the same as one reading."""
    policy, bounds = family
    policy.to(DEVICE)
    tokens = make_batch((600,)).to(DEVICE).tokens
    with torch.no_grad():
        whole_reading = policy.read(tokens)
        first = policy.read(tokens[:, : 600 - width])
        second = policy.read(tokens[:, 600 - width :], state=first.final_state)
    assert relative(second.hidden_states, whole_reading.hidden_states[:, -width:]) < bounds["values"]


def test_a_step_in_bfloat16_keeps_float32_masters_and_states(family):
    policy, _ = family
    batch = make_batch()
    expected = train_step(train_state_for(copy.deepcopy(policy), METHOD), batch, Draws(seed=0, step=1))
    train_state = train_state_for(policy.to(DEVICE), METHOD, dtype="bfloat16", lr=1e-4)
    first = train_step(train_state, batch.to(DEVICE), Draws(seed=0, step=1)).metrics
    assert first["ntp_loss"] == pytest.approx(expected.metrics["ntp_loss"], rel=BF16_AUTOCAST)
    assert first["entropy_mean"] == pytest.approx(expected.metrics["entropy_mean"], rel=BF16_AUTOCAST)
    assert first["grad_norm"] > 0
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.parameters())
    moments = [x for o in train_state.optimizers for s in o.state.values() for x in s.values() if x.ndim]
    assert moments and all(x.dtype == torch.float32 for x in moments)
    with torch.no_grad(), train_state.autocast():
        state = policy.read(batch.tokens.to(DEVICE), batch.lengths.to(DEVICE)).final_state
    named = {name.partition(".")[2]: x for name, x in {**state.tensors, **state.shared}.items()}
    fast = [named[name] for name in ("recurrent_state", "w0", "w1", "w2") if name in named]
    assert fast and all(x.dtype == torch.float32 for x in fast)
    for step in range(2, 6):
        last = train_step(train_state, batch.to(DEVICE), Draws(seed=0, step=step)).metrics
    assert last["ntp_loss"] < first["ntp_loss"]


@pytest.mark.parametrize("part", ("mlp", "blocks"))
def test_parts_that_run_again_give_the_same_gradients(family, part):
    policy, _ = family
    if part not in policy.RECOMPUTABLE:
        pytest.skip(f"{type(policy).__name__} does not run its {part} again")
    batch = make_batch().to(DEVICE)
    policy.to(DEVICE)
    plain = measured(policy, batch)
    checkpoint_activations(policy, part)
    again = measured(policy, batch)
    assert torch.equal(plain[0], again[0])
    assert relative(whole(again[3]), whole(plain[3])) < 1e-5  # sums by atomic additions have no fixed order


def test_kernels_equal_their_references_on_the_device():
    done = compare_kernels({})
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("switch", ("head", "chunks", "head,chunks"))
@pytest.mark.parametrize("make", (deltanet, gated_deltanet))
def test_a_reading_on_our_kernels_is_that_without_them(make, switch, monkeypatch):
    torch.manual_seed(0)
    policy, batch = make().to(DEVICE), make_batch().to(DEVICE)
    monkeypatch.setenv("REFINE_KERNELS", "")
    plain = measured(policy, batch)
    monkeypatch.setenv("REFINE_KERNELS", switch)
    found = measured(policy, batch)
    assert relative(found[0], plain[0]) < BF16_KERNELS["values"]
    assert relative(whole(found[3]), whole(plain[3])) < BF16_KERNELS["gradients"]
    for name, x in plain[1].tensors.items():
        assert relative(found[1].tensors[name], x) < BF16_KERNELS["values"], name
