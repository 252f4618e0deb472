"""fla's cache as a value and segments read again: on the CPU with a layer of our own, on CUDA with fla's models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from refine_lab.models import DeltaNetForCausalLM, FastWeightLM, State, fla_models, load_model
from refine_lab.models.families import MODEL_TYPES, family, register
from refine_lab.models.fla_models import FLA_MODELS, FLA_REFUSED, from_cache, plan, to_cache
from refine_lab.models.hybrids import REFUSED
from tests.factories.fla_models import Double, small, tokens_of
from tests.factories.loading import SIZES, change, same_tensors, save_small_model
from tests.support.refusals import naming, refused


@pytest.fixture
def policy(monkeypatch) -> Double:
    monkeypatch.setattr(fla_models, "SEGMENT", 16)
    return Double(PreTrainedConfig()).double().eval()


def gradients(policy: FastWeightLM, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def branches_and_rereading(policy, text, lengths, positions, branches) -> tuple[Tensor, Tensor]:
    state = policy.read(text, lengths).state_at(positions)
    fast = policy.read(branches, state=state).hidden_states
    rows = [row for row in range(len(text)) for _ in range(positions.shape[1])]
    alone = []
    for branch, (row, position) in enumerate(zip(rows, positions.flatten().tolist(), strict=True)):
        whole = torch.cat([text[row, : position + 1], branches[branch]]).unsqueeze(0)
        alone.append(policy.read(whole).hidden_states[:, position + 1 :])
    return fast, torch.cat(alone)


def test_a_state_is_that_of_the_prefix_read_alone_with_its_gradients(policy):
    text, lengths = tokens_of(2, 70), torch.tensor([70, 49])
    positions = torch.tensor([[0, 1, 2, 14, 15, 16, 17, 30, 31, 32, 62, 63, 64, 69], [*range(0, 28, 2)]])
    fast, naive = branches_and_rereading(policy, text, lengths, positions, tokens_of(28, 4, seed=1))
    assert torch.allclose(fast, naive, rtol=1e-11, atol=1e-11)
    a, b = (gradients(policy, x.sin().sum()) for x in (fast, naive))
    for name in b:
        assert torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-11), name


def test_a_state_goes_on_from_a_state_and_none_is_changed(policy, tmp_path):
    text, more = tokens_of(2, 20), tokens_of(2, 23, seed=1)
    with torch.no_grad():
        state = policy.read(text).final_state
        before = {name: x.clone() for name, x in state.tensors.items()}
        one = policy.read(more[:, :1], state=state)  # in place, in the layer
        assert torch.equal(one.hidden_states, policy.read(more[:, :1], state=state).hidden_states)
        later = policy.read(more, torch.tensor([23, 18]), state).state_at(torch.tensor([[0, 16, 22], [1, 15, 17]]))
    assert all(torch.equal(x, before[name]) for name, x in state.tensors.items())
    assert later.lengths.tolist() == [21, 37, 43, 22, 36, 38]
    later.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    for i, (row, length) in enumerate([(0, 1), (0, 17), (0, 23), (1, 2), (1, 16), (1, 18)]):
        alone = policy.read(torch.cat([text[row], more[row, :length]]).unsqueeze(0)).final_state
        for name, x in alone.tensors.items():
            assert torch.allclose(loaded.tensors[name][i], x[0], atol=1e-12), (name, i)


def test_a_state_of_other_rows_is_refused(policy):
    state = policy.read(tokens_of(2, 20)).final_state
    with refused("the rows of a state", 2, "3"):
        policy.read(tokens_of(3, 4), state=state)


def test_a_rest_is_read_in_few_batches_without_pads(policy):
    trace = policy.read(tokens_of(4, 64))
    policy.model.seen.clear()
    positions = torch.tensor([[20, 30], [22, 40], [60, 62], [35, 46]])  # rests of 5, 15, 7, 9, 13, 15, 4, 15 tokens
    trace.state_at(positions)
    sizes = [size for _, size in policy.model.seen]
    assert sizes == sorted(set(sizes), reverse=True)  # a batch a size
    assert sum(rows * size for rows, size in policy.model.seen) == sum(
        (p + 1) % 16 for p in positions.flatten().tolist()
    )


@pytest.mark.parametrize("tokens", [*range(1, 40), 511, 512, 513, 514, 1023, 1024, 1025, 5000])
def test_a_plan_ends_where_it_should_in_pieces_that_differ(tokens):
    found = plan(tokens)
    assert found.border * 512 + sum(found.pieces) == tokens
    assert len(set(found.pieces)) == len(found.pieces) and sum(found.pieces) <= 513
    assert (1 in found.pieces) == (tokens == 1)


def test_a_cache_becomes_named_tensors_and_comes_back_as_a_copy():
    tensors = {
        "0.recurrent_state": torch.randn(2, 3),
        "1.conv_state.0": torch.randn(2, 4),
        "1.conv_state.1": torch.ones(2),
    }
    cache = to_cache(tensors)
    assert isinstance(cache[1]["conv_state"], tuple) and cache[0]["conv_state"] is None
    back = from_cache(cache, 2)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], x) for name, x in tensors.items())
    cache[1]["conv_state"][0].zero_()
    assert tensors["1.conv_state.0"].any()


@pytest.mark.parametrize(
    ("state", "facts"),
    [
        ({"attn_state": (torch.ones(2, 5), torch.ones(2, 5))}, ["attn_state.0", [2, 5], "2 rows"]),
        ({"recurrent_state": torch.ones(3, 2)}, ["recurrent_state", [3, 2]]),
        ({"recurrent_state": {"a": 1}}, ["recurrent_state", "dict"]),
        ({"conv_state": (None,)}, ["conv_state.0", "NoneType"]),
    ],
)
def test_a_state_of_another_kind_is_refused_by_name(state, facts):
    with naming(ValueError, "layer 0", *facts):
        from_cache([state], 2)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("retnet", "its layers keep keys and values, or positions"),
        ("mamba2", "transformers changes its cache in place"),
        ("samba", "fla can continue it from a cache only one token at a time"),
        ("hgrn", "a kernel of fla drops the gradient"),
        ("lightnet", "its state has not been checked here"),
    ],
)
def test_what_is_not_taken_is_refused_with_the_reason(model_type, reason):
    with pytest.raises(ValueError, match=f"model_type '{model_type}', which is not supported: {reason}"):
        family(model_type)


def test_every_model_of_fla_is_taken_or_refused():
    models = pytest.importorskip("fla.models", reason="flash-linear-attention is not installed here")
    classes = [x for x in vars(models).values() if isinstance(x, type) and issubclass(x, PreTrainedConfig)]
    types = {config_class.model_type for config_class in classes}
    assert len(types) > 20 and types <= {*FLA_MODELS, *FLA_REFUSED, *MODEL_TYPES, *REFUSED}
    assert FLA_MODELS.keys() <= types and not FLA_MODELS.keys() & FLA_REFUSED.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # fla's own about Comba and RWKV7
@pytest.mark.parametrize("model_type", FLA_MODELS)
def test_flas_models_are_built_and_refuse_the_cpu_in_one_sentence(model_type, tmp_path):
    model = small(model_type)
    theirs = type(model).__mro__[3]
    assert theirs.__module__.startswith("fla.models") and theirs.__name__ == type(model).__name__
    with naming(RuntimeError, type(model).__name__, "CUDA", "cpu"):
        model.read(tokens_of(1, 4))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model(tmp_path) -> Path:
    return save_small_model(tmp_path)


def test_load_model_does_not_depend_on_who_registered_last(small_model):
    fla = pytest.importorskip("fla.models", reason="flash-linear-attention is not installed here")
    AutoConfig.register("delta_net", fla.DeltaNetConfig, exist_ok=True)
    AutoModelForCausalLM.register(fla.DeltaNetConfig, fla.DeltaNetForCausalLM, exist_ok=True)
    try:
        assert type(load_model(small_model)[0]) is DeltaNetForCausalLM
    finally:
        register()
    assert type(load_model(small_model)[0]) is DeltaNetForCausalLM


def test_other_models_of_fla_are_loaded_for_cuda_and_refused_elsewhere(tmp_path, small_model, monkeypatch):
    theirs, _, model_class = fla_pair("GLA")
    theirs.save_pretrained(tmp_path / "gla")
    load_model(small_model)[1].save_pretrained(tmp_path / "gla")
    with naming(ValueError, tmp_path / "gla", "cuda", "cpu"):
        load_model(tmp_path / "gla", device="cpu")
    monkeypatch.setattr("refine_lab.models.fla_models.FlaLM.devices", ("cuda", "cpu"))
    policy, _ = load_model(tmp_path / "gla", device="cpu")
    assert isinstance(policy, FastWeightLM)
    same_tensors(policy, theirs.state_dict())
    policy.save_pretrained(tmp_path / "ours")
    same_tensors(model_class.from_pretrained(tmp_path / "ours"), theirs.state_dict())
    change(tmp_path / "gla", model_type="retnet")
    with naming(ValueError, tmp_path / "gla", "model_type 'retnet'"):
        load_model(tmp_path / "gla")


def fla_pair(kind: str, **fields):
    """A small random model of fla's own class, and fla's two classes."""
    models = pytest.importorskip("fla.models", reason="flash-linear-attention is not installed here")
    config_class, model_class = getattr(models, f"{kind}Config"), getattr(models, f"{kind}ForCausalLM")
    heads = {"head_dim": 16} if kind == "GatedDeltaNet" else {}
    config = config_class(**{**SIZES, "vocab_size": 400, **heads, **fields})
    return model_class(config), config_class, model_class


@pytest.mark.parametrize("kind", ("DeltaNet", "GatedDeltaNet"))
@pytest.mark.parametrize(
    ("fields", "saving"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {"max_shard_size": "20KB"}),
        ({"use_gate": True}, {"max_shard_size": "20KB"}),
    ],
    ids=("plain", "tied in shards", "gate in shards"),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_fla_saves_we_load_and_the_other_way_round(tmp_path, small_model, kind, fields, saving, dtype):
    theirs, _, model_class = fla_pair(kind, **fields)
    theirs.to(dtype).save_pretrained(tmp_path / "fla", **saving)
    load_model(small_model)[1].save_pretrained(tmp_path / "fla")
    ours, _ = load_model(tmp_path / "fla")
    assert type(ours).__module__.startswith("refine_lab.models.")
    same_tensors(ours, theirs.state_dict())
    tied = ours.lm_head.weight.data_ptr() == ours.model.embeddings.weight.data_ptr()
    assert tied == fields.get("tie_word_embeddings", False)
    ours.save_pretrained(tmp_path / "ours", **saving)
    back = model_class.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    same_tensors(back, ours.state_dict())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # fla's own about Comba and RWKV7
@pytest.mark.parametrize("model_type", FLA_MODELS)
def test_flas_models_branch_as_they_reread(model_type):
    """Tolerance 2e-2: bfloat16 rounds by 4e-3, and short pieces run in other kernels than whole prefixes."""
    policy = small(model_type).cuda().bfloat16()
    text, branches = tokens_of(2, 600).cuda(), tokens_of(8, 5, seed=1).cuda()
    positions = torch.tensor([[0, 62, 63, 512], [64, 511, 513, 590]]).cuda()
    fast, naive = branches_and_rereading(policy, text, torch.tensor([600, 600]).cuda(), positions, branches)
    assert float((fast - naive).norm() / naive.norm()) < 2e-2
    a, b = (gradients(policy, x.float().sin().sum()) for x in (fast, naive))
    largest = max(float(x.norm()) for x in b.values())
    assert max(float((a[name] - x).norm()) for name, x in b.items()) < 2e-2 * largest
