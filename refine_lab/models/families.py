"""From a config.json to the classes of its family and its settings."""

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
from refine_lab.models.checks import number
from refine_lab.models.fla_models import FLA_MODELS, FLA_REFUSED, fla_family
from refine_lab.models.hub import Place
from refine_lab.models.hybrids import HYBRIDS, REFUSED, hybrid_family
from refine_lab.validation import ConfigError, unknown

MODEL_TYPES: dict[str, tuple[str, str, str]] = {
    "delta_net": ("refine_lab.models.deltanet", "DeltaNetConfig", "DeltaNetForCausalLM"),
    "gated_deltanet": ("refine_lab.models.gated_deltanet", "GatedDeltaNetConfig", "GatedDeltaNetForCausalLM"),
    "lact_swiglu": ("refine_lab.models.lact", "LaCTConfig", "LaCTForCausalLM"),
}
"""`model_type` of a config.json -> our own module, configuration and model. `family` knows the others."""

NO_SETTINGS = frozenset({"auto_map", "torch_dtype", "_commit_hash", "_attn_implementation_autoset"})
"""Written into a config.json by transformers, besides its own fields, and of no effect on ours."""

FORMER_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "norm_first": (False,),
    "share_conv_kernel": (False,),
    "use_rope": (False,),
    "elementwise_affine": (True,),
    "chunk_size": None,
}
"""Fields of earlier versions of flash-linear-attention, with the values that say what is done here anyway (None: any).

`share_conv_kernel`, `use_rope` and `chunk_size` (a kernel's) stood in DeltaNetConfig in 2024, `norm_first` there and in
GatedDeltaNetConfig until 2025 (sustcsonglin/flash-linear-attention, fla/models/*/configuration_*.py at bec2845 and before),
`elementwise_affine` in its other families. Training recipes since then (fla-org/flame, configs/) have none of them.
"""

FORMER_NAMES = {"rms_norm_eps": "norm_eps"}
"""Of the same versions: what a field was called -> what it is called now."""

FORMER_VALUES = {("attn_mode", "fused_chunk"): "chunk"}
"""Of the same versions: a kernel that is gone -> the one of equal results that fla names in its place."""

REASONS = FLA_REFUSED | REFUSED
"""`model_type` -> why it is not taken."""

NOT_READ = {
    "quantization_config": "quantised weights are not read",
    "transformers_weights": "weights are read from files of the usual names only",
}
"""Fields of any config.json -> why a value of theirs is refused."""

NOT_RUN = "it is not run unless load_model is told trust_remote_code=True, which no training run does"


def register() -> None:
    """Make transformers' auto classes know our models.

    flash-linear-attention registers the same `model_type`s, and whoever comes last wins there; `load_model` asks our own
    table and never depends on it.
    """
    for model_type in MODEL_TYPES:
        config, model = family(model_type)
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def family(model_type: str) -> tuple[type, type[FastWeightLM]]:
    """The configuration and the model class for a `model_type`; what a family needs is imported when it is asked for.

    Raises ValueError for one that is not allowed, with the reason where it is refused for one.
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
    """The configuration of a place, with the numbers of `settings` in it, and the model class that it asks for.

    An empty model is built of it: what none can be built of is refused before any weights are looked for.
    Raises FileNotFoundError where there is no config.json, and ValueError for one that cannot be used.
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
    """In one sentence, whatever is raised: the configurations and models of others raise errors of every kind."""
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
    """The fields of a configuration with some of its numbers replaced, each by one of the same type where it can be.

    Raises ValueError for a name that is no number's and for a value that is none.
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
    """The JSON object in a file. Raises ValueError where it holds none, and for a git-lfs pointer."""
    refuse_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object: it is a {type(fields).__name__}")
    return fields


def _settings(fields: dict[str, Any], config_class: type) -> dict[str, Any]:
    """A config.json as today's: former names and values translated; a field that nothing here honours is refused."""
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
    """The classes that a repository brings along: taken where the caller says so, and the model is a `FastWeightLM`."""
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
    """What an error says, cut at 300 letters and before the stack that torch writes behind; with its kind where it needs it."""
    text = " ".join(str(error).split("Exception raised from")[0].split()) or type(error).__name__
    if isinstance(error, (LookupError, ArithmeticError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."
