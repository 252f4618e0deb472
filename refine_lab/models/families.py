"""Maps a config.json to the configuration and model classes of its family, and to its settings."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from refine_lab.data.files import refuse_pointer
from refine_lab.models.base import FastWeightLM
from refine_lab.models.configuration import number
from refine_lab.models.fla_models import FLA_MODELS, FLA_REFUSED, fla_family
from refine_lab.models.hub import Place
from refine_lab.models.hybrids import HYBRIDS, REFUSED, hybrid_family
from refine_lab.validation import ConfigError, unknown

MODEL_TYPES: dict[str, tuple[str, str, str]] = {
    "delta_net": ("refine_lab.models.deltanet", "DeltaNetConfig", "DeltaNetForCausalLM"),
    "gated_deltanet": ("refine_lab.models.gated_deltanet", "GatedDeltaNetConfig", "GatedDeltaNetForCausalLM"),
    "lact_swiglu": ("refine_lab.models.lact", "LaCTConfig", "LaCTForCausalLM"),
}
"""`model_type` of a config.json -> our own module, configuration and model. `family` also knows other types."""

NO_SETTINGS = frozenset({"auto_map", "torch_dtype", "_commit_hash", "_attn_implementation_autoset"})
"""Fields that transformers writes into a config.json besides its own and that have no effect on our models."""

FORMER_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "norm_first": (False,),
    "share_conv_kernel": (False,),
    "use_rope": (False,),
    "elementwise_affine": (True,),
    "chunk_size": None,
}
"""Fields of earlier versions of flash-linear-attention, with the values that match what is done here (None: any value).

`share_conv_kernel`, `use_rope` and `chunk_size` (a kernel's) were in DeltaNetConfig in 2024, `norm_first` there and in
GatedDeltaNetConfig until 2025 (sustcsonglin/flash-linear-attention, fla/models/*/configuration_*.py at bec2845 and
before), and `elementwise_affine` in its other families. Later training recipes (fla-org/flame, configs/) use none of
them.
"""

FORMER_NAMES = {"rms_norm_eps": "norm_eps"}
"""Former field name in the same versions -> current name."""

FORMER_VALUES = {("attn_mode", "fused_chunk"): "chunk"}
"""Removed kernel of the same versions -> the kernel of equal results that fla names as its replacement."""

REASONS = FLA_REFUSED | REFUSED
"""`model_type` -> why it is refused."""

NOT_READ = {
    "quantization_config": "quantised weights are not read",
    "transformers_weights": "weights are read from files of the usual names only",
}
"""Fields of any config.json -> why they are refused if set."""

NOT_RUN = "it is not run unless load_model is told trust_remote_code=True, which no training run does"


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
    """Returns the configuration and model classes for a `model_type`, importing what the family needs.

    Raises ValueError for an unknown type, and, with the reason, for a refused one.
    """
    if model_type in MODEL_TYPES:
        module, config, model = MODEL_TYPES[model_type]
        return getattr(import_module(module), config), getattr(import_module(module), model)
    if model_type in HYBRIDS:
        return hybrid_family(model_type)
    if model_type in FLA_MODELS:
        return fla_family(model_type)
    if reason := REASONS.get(model_type):
        raise ValueError(f"model_type {model_type!r}, which is refused: {reason}")
    allowed = ", ".join(map(repr, [*MODEL_TYPES, *HYBRIDS, *FLA_MODELS]))
    raise ConfigError("model_type", model_type, allowed, f"model_type {model_type!r}; allowed are {allowed}")


def configured(
    place: Place, trust_remote_code: bool = False, settings: Mapping[str, int | float] | None = None
) -> tuple[Any, type[FastWeightLM]]:
    """Returns a place's configuration, with the numbers in `settings` replaced, and its model class.

    An empty model is built from it, so that an unusable configuration is refused before any weights are located.

    Raises FileNotFoundError if there is no config.json, and ValueError for one that cannot be used.
    """
    path = place.folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{place.folder} holds no model: it has no config.json")
    fields = read_json(path)
    config_class, model_class = _classes(place, fields, trust_remote_code)
    with _refusing(str(path)):
        _refuse_unread(fields)
        if fields.get("model_type") in MODEL_TYPES:
            config = config_class.from_dict(_settings(fields, config_class))
        else:
            config = config_class.from_pretrained(place.folder)
    numbers = changed(config, settings) if settings else None
    with _refusing(f"{path} with {dict(settings)}" if settings else str(path)), torch.device("meta"):
        config = config if numbers is None else type(config).from_dict(numbers)
        model_class(deepcopy(config))
    return config, model_class


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
    path, code = place.folder / "config.json", fields.get("auto_map")
    model_type = fields.get("model_type")
    if model_type is None and not code:
        raise ValueError(f"{path} has no model_type: it is not the configuration of a model")
    try:
        return family(str(model_type))
    except (ValueError, ImportError) as error:
        if not code or str(model_type) in REASONS:
            raise ValueError(f"{path} names {error}") from error
    return _remote_family(place, code, trust_remote_code)


def _refuse_unread(fields: dict[str, Any]) -> None:
    text = fields.get("text_config")
    for name, reason in NOT_READ.items():
        if any(part.get(name) is not None for part in (fields, text) if isinstance(part, dict)):
            raise ValueError(f"it sets {name!r}: {reason}")


def changed(config: Any, settings: Mapping[str, int | float]) -> dict[str, Any]:
    """Returns a configuration's fields with some numbers replaced, keeping the type of each where possible.

    Raises ValueError for a name that is not a numeric field and for a value that is not a number.
    """
    fields = config.to_dict()
    numbers = {name: x for name, x in fields.items() if isinstance(x, (int, float)) and not isinstance(x, bool)}
    for name, value in settings.items():
        if name not in numbers:
            raise unknown(f"number of {type(config).__name__}", name, numbers)
        if not number(value) or abs(value) > sys.float_info.max:
            raise ConfigError(f"the setting {name}", value, "a number")
        whole = isinstance(numbers[name], int) and value == int(value)
        fields[name] = int(value) if whole else float(value)
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ValueError if there is none, and for a git-lfs pointer."""
    refuse_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object: it is a {type(fields).__name__}")
    return fields


def _settings(fields: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Translates a config.json to current names and values; a field that has no meaning here is refused."""
    own = {x.name for x in dataclasses.fields(config_class)} | set(PreTrainedConfig().to_dict())
    for former, name in FORMER_NAMES.items():
        if former in fields and fields.get(name, fields[former]) != fields[former]:
            raise ValueError(f"it sets {name} to {fields[name]!r} and {former}, its former name, to {fields[former]!r}")
    settings = {}
    for name, value in fields.items():
        name = FORMER_NAMES.get(name, name) if name not in own else name
        if name in own:
            former = (name, value) if isinstance(value, str) else None
            settings[name] = FORMER_VALUES.get(former, value) if former else value
        elif name in FORMER_FIELDS:
            allowed = FORMER_FIELDS[name]
            if allowed is not None and value not in allowed:
                sentence = f"it sets {name} to {value!r}; allowed is {allowed[0]}"
                raise ConfigError(name, value, str(allowed[0]), sentence)
        elif name not in NO_SETTINGS:
            raise ValueError(f"it sets {name!r}, which is no field of {config_class.__name__}")
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
    if not (isinstance(model, type) and issubclass(model, FastWeightLM)):
        raise ValueError(
            f"{names['AutoModelForCausalLM']} of {place.folder} is no FastWeightLM: it has no state as a value"
        )
    return config, model


def code_name(code: Any, kind: str) -> str:
    named = code.get(kind) if isinstance(code, dict) else code
    return str(next(filter(None, named), "")) if isinstance(named, (list, tuple)) else str(named)


def one_line(error: Exception) -> str:
    """Returns an error's text in at most 300 characters, without torch's stack, and with its type where needed."""
    text = " ".join(str(error).split("Exception raised from")[0].split()) or type(error).__name__
    if isinstance(error, (LookupError, ArithmeticError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."
