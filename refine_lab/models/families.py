"""Maps a config.json to the configuration and model classes of its family, and to its settings."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from refine_lab.data.files import refuse_pointer
from refine_lab.models.base import FastWeightLM
from refine_lab.models.configuration import number
from refine_lab.models.deltanet import DeltaNetForCausalLM
from refine_lab.models.fla_models import FLA_MODELS, FLA_REFUSED, fla_family
from refine_lab.models.gated_deltanet import GatedDeltaNetForCausalLM
from refine_lab.models.hub import Place
from refine_lab.models.hybrids import HYBRIDS, REFUSED, hybrid_family
from refine_lab.models.lact import LaCTForCausalLM
from refine_lab.runs.files import read_json
from refine_lab.validation import ConfigError, require, unknown

MODEL_TYPES: dict[str, type[FastWeightLM]] = {
    "delta_net": DeltaNetForCausalLM,
    "gated_deltanet": GatedDeltaNetForCausalLM,
    "lact_swiglu": LaCTForCausalLM,
}
"""`model_type` of a config.json -> our own model. `family` also knows other types."""

NO_EFFECT = frozenset({"auto_map", "torch_dtype", "_commit_hash", "_attn_implementation_autoset", "chunk_size"})
"""Fields without an effect on our models, which transformers or earlier versions of flash-linear-attention write."""

FORMER_FIELDS = {"norm_first": False, "share_conv_kernel": False, "use_rope": False, "elementwise_affine": True}
"""Fields of earlier versions of flash-linear-attention, with the value that matches what is done here.

`share_conv_kernel`, `use_rope` and `chunk_size` (a kernel's) were in DeltaNetConfig in 2024, `norm_first` there and in
GatedDeltaNetConfig until 2025 (sustcsonglin/flash-linear-attention, fla/models/*/configuration_*.py at bec2845 and
before), and `elementwise_affine` in its other families. Later training recipes (fla-org/flame, configs/) use none of
them.
"""

FORMER_NAMES = {"rms_norm_eps": "norm_eps"}
"""Former field name in the same versions -> current name."""

FORMER_VALUES = {"attn_mode": {"fused_chunk": "chunk"}}
"""Field -> kernel removed since those versions -> the kernel that fla names as its replacement, with the same results."""

REASONS = FLA_REFUSED | REFUSED
"""`model_type` -> why it is refused."""

MOST_LAYERS = 1000
"""Maximum number of layers of a model."""

NOT_READ = {
    "quantization_config": "quantised weights are not read",
    "transformers_weights": "weights are read only from files with the usual names",
}
"""Fields of any config.json -> why they are refused if set."""

NOT_RUN = "it is not executed unless trust_remote_code=True is passed to load_model, which training runs never do"


def register() -> None:
    """Registers our models with transformers' auto classes.

    flash-linear-attention registers the same `model_type`s, and the last registration wins; `load_model` uses our own
    table and never depends on it.
    """
    for model_type in MODEL_TYPES:
        config, model = family(model_type)
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def family(model_type: str) -> tuple[type, type[FastWeightLM]]:
    """Returns the configuration and model classes for a `model_type`, importing what a third-party family needs.

    Raises ValueError for an unknown type, and, with the reason, for a refused one.
    """
    if model_type in MODEL_TYPES:
        model: Any = MODEL_TYPES[model_type]
        return model.config_class, model
    if model_type in HYBRIDS:
        return hybrid_family(model_type)
    if model_type in FLA_MODELS:
        return fla_family(model_type)
    if reason := REASONS.get(model_type):
        raise ValueError(f"model_type {model_type!r}, which is not supported: {reason}")
    allowed = ", ".join(map(repr, [*MODEL_TYPES, *HYBRIDS, *FLA_MODELS]))
    raise ConfigError("model_type", model_type, allowed, f"model_type {model_type!r}; allowed values: {allowed}")


def configured(
    place: Place, trust_remote_code: bool = False, settings: Mapping[str, int | float] | None = None
) -> tuple[Any, type[FastWeightLM]]:
    """Returns a place's configuration, with the numbers in `settings` replaced, and its model class.

    An empty model is built from it, so that an unusable configuration is refused before any weights are located.

    Raises FileNotFoundError if there is no config.json, and ValueError for one that cannot be used.
    """
    path = place.folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{place.folder} contains no model: it has no config.json")
    fields = read_json(refuse_pointer(path))
    config_class, model_class = _classes(place, fields, trust_remote_code)
    with _refusing(str(path)):
        _refuse_many_layers(fields)
        for name, reason in NOT_READ.items():
            if any(
                part.get(name) is not None for part in (fields, fields.get("text_config")) if isinstance(part, dict)
            ):
                raise ValueError(f"it sets {name!r}: {reason}")
        if fields.get("model_type") in MODEL_TYPES:
            config = config_class.from_dict(_settings(fields, config_class))
        else:
            config = config_class.from_pretrained(place.folder)
    numbers = changed(config, settings) if settings else None
    with _refusing(f"{path} with {dict(settings)}" if settings else str(path)), torch.device("meta"):
        _refuse_many_layers(numbers or {})
        config = config if numbers is None else type(config).from_dict(numbers)
        model_class(deepcopy(config))
    return config, model_class


def _refuse_many_layers(fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for a number of layers that takes minutes to build."""
    for part in (fields, fields.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        require(not number(layers) or layers <= MOST_LAYERS, "num_hidden_layers", layers, f"at most {MOST_LAYERS:,}")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns any error into one sentence: third-party configurations and models raise errors of every kind."""
    try:
        yield
    except ConfigError as error:
        sentence = f"{what} cannot be used: {one_line(error)}"
        raise ConfigError(error.field, error.value, error.allowed, sentence) from error
    except Exception as error:
        raise ValueError(f"{what} cannot be used: {one_line(error)}") from error


def _classes(place: Place, fields: dict[str, Any], trust_remote_code: bool) -> tuple[type, type[FastWeightLM]]:
    path, code, model_type = place.folder / "config.json", fields.get("auto_map"), fields.get("model_type")
    if model_type is None and not code:
        raise ValueError(f"{path} has no model_type: it is not the configuration of a model")
    try:
        return family(str(model_type))
    except (ValueError, ImportError) as error:
        if not code or str(model_type) in REASONS:
            raise ValueError(f"{path} names {error}") from error
    return _remote_family(place, code, trust_remote_code)


def changed(config: Any, settings: Mapping[str, int | float]) -> dict[str, Any]:
    """Returns a configuration's fields with some numbers replaced, keeping the type of each where possible.

    Raises ValueError for a name that is not a numeric field and for a value that is not a number.
    """
    fields = config.to_dict()
    numbers = {name: x for name, x in fields.items() if isinstance(x, (int, float)) and not isinstance(x, bool)}
    for name, value in settings.items():
        if name not in numbers:
            raise unknown(f"number of {type(config).__name__}", name, numbers)
        require(number(value) and abs(value) <= sys.float_info.max, f"the setting {name}", value, "a number")
        fields[name] = int(value) if isinstance(numbers[name], int) and value == int(value) else float(value)
    return fields


def _settings(fields: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Translates a config.json to current names and values; a field that has no meaning here is refused."""
    own = {x.name for x in dataclasses.fields(config_class)} | set(PreTrainedConfig().to_dict())
    for former, name in FORMER_NAMES.items():
        if former in fields and fields.get(name, fields[former]) != fields[former]:
            raise ValueError(f"it sets {name} to {fields[name]!r} and {former}, its former name, to {fields[former]!r}")
    settings = {}
    for name, value in fields.items():
        name = name if name in own else FORMER_NAMES.get(name, name)
        if name in own:
            settings[name] = FORMER_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        elif name in FORMER_FIELDS:
            require(value == FORMER_FIELDS[name], name, value, str(FORMER_FIELDS[name]))
        elif name not in NO_EFFECT:
            raise ValueError(f"it sets {name!r}, which is not a field of {config_class.__name__}")
    return settings


def _remote_family(place: Place, code: Any, trust_remote_code: bool) -> tuple[type, type[FastWeightLM]]:
    """Returns a repository's own classes if the caller allows it and the model is a `FastWeightLM`."""
    path = place.folder / "config.json"
    names = {kind: code_name(code, kind) for kind in ("AutoConfig", "AutoModelForCausalLM")}
    if not trust_remote_code:
        raise ValueError(f"{path} needs code of its own ({names['AutoModelForCausalLM']}): {NOT_RUN}")
    for kind, name in names.items():
        if name == "None":
            raise ValueError(f"{path} needs code of its own, and its auto_map names no {kind}")
    place.fetch(["*.py"])
    with _refusing(f"the code that {path} names"):
        config, model = (get_class_from_dynamic_module(name, str(place.folder)) for name in names.values())
    if isinstance(model, type) and issubclass(model, FastWeightLM):
        return config, model
    raise ValueError(
        f"{names['AutoModelForCausalLM']} of {place.folder} is not a FastWeightLM: its state is not an immutable value"
    )


def code_name(code: Any, kind: str) -> str:
    named = code.get(kind) if isinstance(code, dict) else code
    return str(next(filter(None, named), "")) if isinstance(named, (list, tuple)) else str(named)


def one_line(error: Exception) -> str:
    """Returns an error's text in at most 300 characters, without torch's stack, and with its type where needed."""
    kind, text = type(error).__name__, " ".join(str(error).split("Exception raised from")[0].split())
    text = f"{kind}: {text}" if isinstance(error, (LookupError, ArithmeticError)) else text or kind
    return text if len(text) <= 300 else f"{text[:300]}..."
