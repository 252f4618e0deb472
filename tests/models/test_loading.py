"""Loading: configurations, weights and tokenizers of our own and of others, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from refine_lab.data.tokenizer import train_tokenizer
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM, load_model
from refine_lab.models.families import family, register
from refine_lab.models.loading import resolve_device
from refine_lab.validation import ConfigError
from tests.factories.hybrids import make
from tests.factories.loading import TEXTS, change, same_tensors, save_small_model
from tests.support.refusals import naming, refused


@pytest.fixture
def small_model(tmp_path) -> Path:
    return save_small_model(tmp_path)


# -- our own checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_by_name_and_by_the_auto_class(small_model):
    policy, tokenizer = load_model(small_model)
    register()  # whoever registered last is whom the auto class knows
    auto = AutoModelForCausalLM.from_pretrained(small_model)
    assert type(auto) is DeltaNetForCausalLM
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert torch.equal(auto(ids).logits, policy(ids).logits)
    drawn = [load_model(f"new:{small_model}", seed=seed)[0].lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def damaged(folder, name: str):
    if name == "family":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
        return ValueError, "model_type 'bert'; allowed values: 'delta_net'"
    if name == "json":
        (folder / "config.json").write_text("{")
        return ValueError, "config.json is damaged"
    if name == "no weights":
        (folder / "model.safetensors").unlink()
        return FileNotFoundError, "it has no model.safetensors"
    if name == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
        return ValueError, "cannot be read"
    config = json.loads((folder / "config.json").read_text())
    if name == "layers":
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        return ValueError, "do not match its config.json: missing_keys model.layers.2"
    if name == "tokenizer":
        make = DeltaNetConfig(hidden_size=32, num_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=300)
        DeltaNetForCausalLM(make).save_pretrained(folder)
        return ValueError, "tokens, but the model has 300 embeddings"
    (folder / "config.json").unlink()
    return FileNotFoundError, "it has no config.json"


@pytest.mark.parametrize("what", ("family", "json", "no weights", "truncated", "layers", "tokenizer", "nothing"))
def test_a_bad_model_folder_is_refused_in_one_sentence(small_model, what, caplog, monkeypatch):
    kind, text = damaged(small_model, what)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(kind) as caught:
        load_model(small_model)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert "LOAD REPORT" not in caplog.text  # transformers' table of the same


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "the tokenizer in .* cannot be read"),
        ("tokenizer.json", "{}", "the tokenizer in .* cannot be read"),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json is damaged"),
        ("tokenizer.json", None, "contains no tokenizer: it has no tokenizer.json"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_sentence(small_model, file, text, message):
    (small_model / file).unlink()
    if text is not None:
        (small_model / file).write_text(text)
    with pytest.raises(ValueError if text is not None else FileNotFoundError, match=message) as caught:
        load_model(small_model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"vocab_size": 512}, ["model.embeddings.weight", [400, 32], [512, 32]]),
        ({"model_type": None}, ["model_type"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["'quantization_config'"]),
        ({"hidden_size": 10**30}, ["Overflow when unpacking long long"]),  # torch's words
        ({"rms_norm_eps": 0.5}, ["norm_eps", 1e-06, "rms_norm_eps", 0.5]),
        ({"conv_kernel": 3}, ["'conv_kernel'", "DeltaNetConfig"]),
        ({"norm_first": True}, ["norm_first", True]),
        ({"num_heads": 0}, ["DeltaNetConfig.num_heads", 0]),
        ({"hidden_size": "abc"}, ["DeltaNetConfig.hidden_size", "'abc'"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(small_model, fields, facts):
    path = small_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with naming(ValueError, "config.json", *facts) as caught:
        load_model(small_model)
    assert "\n" not in str(caught.value)


def test_fields_that_change_nothing_are_read_over(small_model):
    path = small_model / "config.json"
    before = load_model(small_model)[0].state_dict()
    others = {"torch_dtype": "float32", "auto_map": {}, "_name_or_path": "a", "elementwise_affine": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **others}))
    after = load_model(small_model)[0].state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_device_that_is_not_there_is_refused():
    for device in ("tpu", "cpu:x", "cuda:99"):
        with refused("device", device):
            resolve_device(device)


def test_what_is_not_run_is_not_needed_by_a_family_of_ours(small_model):
    change(small_model, auto_map={"AutoModelForCausalLM": "modeling_small.Small"})
    (small_model / "modeling_small.py").write_text("raise SystemExit('this ran')\n")
    assert type(load_model(small_model)[0]) is DeltaNetForCausalLM
    assert type(load_model(small_model, trust_remote_code=True)[0]) is DeltaNetForCausalLM


# -- released checkpoints: former fields, precisions, shards, padding ------------------------------------------------------


def test_a_configuration_of_2024_is_read_as_todays(small_model):
    former = dict(norm_first=False, share_conv_kernel=False, use_rope=False, chunk_size=64, attn_mode="fused_chunk")
    path = small_model / "config.json"
    now = json.loads(path.read_text())
    now.pop("norm_eps")
    path.write_text(json.dumps({**now, **former, "rms_norm_eps": 1e-3}))
    config = load_model(small_model)[0].config
    assert (config.norm_eps, config.attn_mode) == (1e-3, "chunk")
    assert not hasattr(config, "rms_norm_eps") and not hasattr(config, "use_rope")
    change(small_model, use_rope=True)
    with refused("use_rope", True, "False"):
        load_model(small_model)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_checkpoint_in_bfloat16_loads_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    policy, _ = load_model(save_small_model(tmp_path))
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    again, _ = load_model(tmp_path, dtype=dtype)
    assert {x.dtype for x in again.parameters()} == {dtype}
    same_tensors(again, policy.state_dict())


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    policy, tokenizer = load_model(save_small_model(tmp_path / "whole"))
    folder = tmp_path / "sharded"
    policy.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    same_tensors(load_model(folder)[0], policy.state_dict())
    shards[1].unlink()
    with naming(FileNotFoundError, shards[1].name, "model.safetensors.index.json", f"1 of {len(shards)}"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with naming(ValueError, "model.safetensors.index.json", "weight_map"):
        load_model(folder)


@pytest.mark.parametrize("named", ("weights.bin", "/etc/passwd", "../a.safetensors", "sub/a.safetensors", "*", 3))
def test_an_index_names_safetensors_beside_it_and_nothing_else(small_model, named):
    tensors = load_file(small_model / "model.safetensors")
    (small_model / "model.safetensors").unlink()
    torch.save(tensors, small_model / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, named)}
    (small_model / "model.safetensors.index.json").write_text(json.dumps(index))
    for allowed in (False, True):
        with refused(str(small_model / "model.safetensors.index.json"), named):
            load_model(small_model, allow_pickle=allowed)


def test_transformers_is_told_to_read_safetensors_alone(small_model, monkeypatch):
    """The second lock: were a pickle overlooked here, it would not be opened there."""
    torch.save(load_file(small_model / "model.safetensors"), small_model / "pytorch_model.bin")
    (small_model / "model.safetensors").unlink()
    monkeypatch.setattr("refine_lab.models.loading._fetch_weights", lambda *_: [])
    with pytest.raises(ValueError, match=r"cannot be read: .*no file named model\.safetensors"):
        load_model(small_model)


def test_an_embedding_may_be_larger_than_its_tokenizer_and_not_smaller(tmp_path):
    policy, tokenizer = load_model(save_small_model(tmp_path / "padded", vocab_size=512))
    assert (policy.config.vocab_size, len(tokenizer)) == (512, 384)
    save_small_model(tmp_path / "cut", vocab_size=383)
    with naming(ValueError, 384, 383):
        load_model(tmp_path / "cut")


def test_a_tokenizer_of_sentencepiece_alone_names_the_packages_it_takes(small_model, monkeypatch):
    (small_model / "tokenizer.json").rename(small_model / "tokenizer.model")
    monkeypatch.setattr("refine_lab.models.loading.is_sentencepiece_available", lambda: False)
    with naming(ValueError, "tokenizer.model", ": sentencepiece"):
        load_model(small_model)


# -- pickles and code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ("pytorch_model.bin", "model.pt"))
def test_pickled_weights_are_read_only_where_the_caller_says_so(small_model, file):
    policy, _ = load_model(small_model)
    torch.save(policy.state_dict(), small_model / file)
    (small_model / "model.safetensors").unlink()
    message = (
        rf"contains only pickled weights \({file}\), which are not read unless allow_pickle=True is passed to load_model; "
        "for a training run, load it that way, save model and tokenizer to a folder with save_pretrained, and pass that folder$"
    )
    with pytest.raises(ValueError, match=message):
        load_model(small_model)
    torch.save({"optimizer": 1}, small_model / "model_optim.pt")  # not the weights', whatever its name begins with
    loaded, tokenizer = load_model(small_model, allow_pickle=True)
    same_tensors(loaded, policy.state_dict())
    for part in (loaded, tokenizer):
        part.save_pretrained(small_model / "for a run")
    same_tensors(load_model(small_model / "for a run")[0], policy.state_dict())


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("content", (Harmful(), [1, 2], None, {}, {1: torch.ones(1)}, b"", b"abc"))
def test_of_a_pickle_nothing_but_tensors_is_read(small_model, capsys, content):
    (small_model / "model.safetensors").unlink()
    if isinstance(content, bytes):  # half a file
        (small_model / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, small_model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"the weights in .*pytorch_model\.bin cannot be read: .") as caught:
        load_model(small_model, allow_pickle=True)
    assert "\n" not in str(caught.value) and "this ran" not in capsys.readouterr().out


OWN_MODEL = """
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM


class Config(DeltaNetConfig):
    model_type = "of_its_own"


class Model(DeltaNetForCausalLM):
    config_class = Config


class NoPolicy:
    pass


def function(config):
    return Model(config)
"""


def with_code(folder: Path, name: str) -> None:
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": f"modeling_own.{name}"}
    change(folder, model_type="of_its_own", auto_map=names)


@pytest.fixture
def code_cache(tmp_path, monkeypatch) -> None:
    """Where transformers keeps the code that it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_code_of_a_repository_is_run_only_where_the_caller_says_so(small_model, code_cache):
    with_code(small_model, "Model")
    message = r"needs code of its own \(modeling_own\.Model\): it is not executed unless .* passed to load_model"
    with pytest.raises(ValueError, match=message):
        load_model(small_model)
    policy, _ = load_model(small_model, trust_remote_code=True)
    assert isinstance(policy, DeltaNetForCausalLM) and type(policy).__name__ == "Model"
    assert torch.equal(policy.lm_head.weight, load_file(small_model / "model.safetensors")["model.embeddings.weight"])


def test_code_that_is_no_policy_is_refused(small_model, code_cache):
    for name in ("NoPolicy", "function"):
        with_code(small_model, name)
        with naming(ValueError, f"modeling_own.{name}", "FastWeightLM"):
            load_model(small_model, trust_remote_code=True)
    (small_model / "broken.py").write_text("raise RuntimeError('not here')\n")
    for module in ("absent", "broken"):
        change(small_model, auto_map={"AutoConfig": f"{module}.Config", "AutoModelForCausalLM": f"{module}.Model"})
        with pytest.raises(ValueError, match=r"the code that .*config\.json names cannot be used: ") as caught:
            load_model(small_model, trust_remote_code=True)
        assert "\n" not in str(caught.value)
    change(small_model, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    with naming(ValueError, "auto_map", "AutoConfig"):
        load_model(small_model, trust_remote_code=True)


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class Own(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_with_code_of_its_own_is_read_only_where_the_caller_says_so(small_model, code_cache):
    path, names = small_model / "tokenizer_config.json", {"AutoTokenizer": [None, "own_tokenizer.Own"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names, "tokenizer_class": "Own"}))
    (small_model / "own_tokenizer.py").write_text(OWN_TOKENIZER)
    message = r"tokenizer_config\.json needs code of its own \(own_tokenizer\.Own\): it is not executed unless"
    with pytest.raises(ValueError, match=message):
        load_model(small_model)
    _, tokenizer = load_model(small_model, trust_remote_code=True)
    assert type(tokenizer).__name__ == "Own" and tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "model"),
    [
        ("delta_net", "DeltaNetConfig", "DeltaNetForCausalLM"),
        ("gated_deltanet", "GatedDeltaNetConfig", "GatedDeltaNetForCausalLM"),
        ("lact_swiglu", "LaCTConfig", "LaCTForCausalLM"),
        ("qwen3_next", "Qwen3NextConfig", "Qwen3NextForCausalLM"),
        ("qwen3_5_text", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
        ("qwen3_5", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
        ("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
        ("olmo_hybrid", "OlmoHybridConfig", "OlmoHybridForCausalLM"),
    ],
)
def test_a_model_type_has_its_classes(model_type, config, model):
    found = family(model_type)
    assert (found[0].__name__, found[1].__name__) == (config, model)
    assert issubclass(found[0], PreTrainedConfig) and issubclass(found[1], FastWeightLM)


@pytest.mark.parametrize("kind", ("Qwen3_5", "Qwen3_5Moe"))
@pytest.mark.parametrize("tied", (False, True))
def test_the_text_part_of_a_multimodal_checkpoint_is_loaded(tmp_path, small_model, kind, tied):
    import transformers

    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16
    )
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    text |= dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8)
    text |= dict(linear_value_head_dim=8, vocab_size=512, tie_word_embeddings=tied)
    text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    if kind == "Qwen3_5":
        text = {name: value for name, value in text.items() if "expert" not in name and "moe" not in name}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    whole.save_pretrained(tmp_path / "whole")
    load_model(small_model)[1].save_pretrained(tmp_path / "whole")
    policy, _ = load_model(tmp_path / "whole", device="cpu")
    theirs = {
        n.replace("model.language_model.", "model."): x for n, x in whole.state_dict().items() if "visual" not in n
    }
    same_tensors(policy, theirs)
    assert isinstance(policy, FastWeightLM) and policy.config.model_type.endswith("_text")
    assert (policy.lm_head.weight.data_ptr() == policy.model.embed_tokens.weight.data_ptr()) == tied
    policy.save_pretrained(tmp_path / "text")
    load_model(small_model)[1].save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(again).__module__.startswith("transformers.")
    same_tensors(again, theirs)
    same_tensors(load_model(tmp_path / "text", device="cpu")[0], theirs)


def test_a_state_dict_with_the_released_names_of_lact_loads(tmp_path, small_model):
    config_class, model_class = family("lact_swiglu")
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attn_heads=2, num_lact_heads=2, lact_chunk_size=16, window_size=16
    )
    fields = dict(w0_w2_low_rank=4, use_muon=True, intermediate_size=48, vocab_size=400)
    config = config_class(**sizes, **fields, ttt_nope=True, fp32_states=True)
    model = model_class(config)
    released = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    layer = {name.removeprefix("model.layers.0.attn.") for name in released if name.startswith("model.layers.0.attn.")}
    assert {"qkv.weight", "o_proj.weight", "lr_proj.weight", "lr_proj.bias", "w1", "w0.w_left", "w2.w_right"} <= layer
    config.save_pretrained(tmp_path)
    change(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_lact.LaCTForCausalLM"}, torch_dtype="bfloat16")
    save_file(released, tmp_path / "model.safetensors", {"format": "pt"})
    same_tensors(load_model(tmp_path)[0], released)


def test_the_auto_class_knows_our_families():
    register()
    assert AutoConfig.for_model("lact_swiglu").__class__.__name__ == "LaCTConfig"


def test_settings_change_numbers_of_the_configuration_and_nothing_else(small_model):
    policy, _ = load_model(small_model, settings={"norm_eps": 1e-3, "max_position_embeddings": 64.0})
    assert policy.config.norm_eps == 1e-3 and policy.config.max_position_embeddings == 64
    assert policy.model.norm.eps == 1e-3
    with refused("number of DeltaNetConfig", "norm_epsilon"):
        load_model(small_model, settings={"norm_epsilon": 1.0})
    with refused("DeltaNetConfig.conv_size", 0, "a positive whole number"):
        load_model(small_model, settings={"conv_size": 0})
    with naming(ValueError, "config.json", "32]", "64]"):
        load_model(small_model, settings={"hidden_size": 64})
    nan = float("nan")
    with refused("the setting norm_eps", nan, "a number"):
        load_model(small_model, settings={"norm_eps": nan})


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    make("qwen3_next", torch.float32, vocab_size=400).save_pretrained(folder)
    train_tokenizer(TEXTS, 400).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"layer_types": ["linear_attention"] * 3}, r"`num_hidden_layers` \(4\) must be equal to"),
        (
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types must be a list of 'linear_attention' and 'full_attention'",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads must be above 0, got 0"),
        ({"hidden_act": "none such"}, "KeyError: 'none such'"),
        ({"text_config": {"hidden_size": 3}}, "it sets text_config, which a qwen3_next does not have"),
        ({"quantization_config": {"quant_method": "fp8"}}, "it sets 'quantization_config': quantised weights are"),
        ({"transformers_weights": "a.safetensors"}, "it sets 'transformers_weights': weights are read only from files"),
    ],
)
def test_a_hybrids_configuration_is_refused_in_one_sentence(hybrid, tmp_path, fields, message):
    shutil.copytree(hybrid, tmp_path, dirs_exist_ok=True)
    change(tmp_path, **fields)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json cannot be used: .*{message}") as caught:
        load_model(tmp_path)
    assert type(caught.value) in (ValueError, ConfigError) and "\n" not in str(caught.value)


def test_settings_of_a_hybrid_are_of_their_fields_type(hybrid):
    policy, _ = load_model(hybrid, settings={"rms_norm_eps": 1, "max_position_embeddings": 64.0})
    assert policy.config.rms_norm_eps == 1.0 and policy.model.norm.eps == 1.0
    assert policy.config.max_position_embeddings == 64 and type(policy.config.max_position_embeddings) is int
    for name, value, kind in [("num_hidden_layers", 3, ValueError), ("rms_norm_eps", -1, ConfigError)]:
        with naming(kind, f"{hybrid}/config.json with {{'{name}': {value}}}", name) as caught:
            load_model(hybrid, settings={name: value})
        assert type(caught.value) is kind and "\n" not in str(caught.value)
