"""From a name to a model and its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from refine_lab.data.corpus import Manifest, load_manifest
from refine_lab.data.tokenizer import check_tokenizer
from refine_lab.models.base import FastWeightLM
from refine_lab.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.run_files import checkpoints

MODEL_TYPES: dict[str, tuple[type, type[FastWeightLM]]] = {"delta_net": (DeltaNetConfig, DeltaNetForCausalLM)}
"""`model_type` of a config.json -> our configuration and model."""

NO_SETTINGS = frozenset({"auto_map", "torch_dtype", "_commit_hash", "_attn_implementation_autoset"})
"""Written into a config.json by transformers, besides its own fields, and of no effect on ours."""

FORMER_FIELDS = {"elementwise_affine": True, "norm_first": False, "share_conv_kernel": False}
"""Fields of earlier versions of flash-linear-attention, with the one value that says what is done here anyway."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

SHIPPED = Path(__file__).parent / "shipped"
"""The models that come with the package, a folder each."""

MANIFEST = "manifest.json.gz"
"""Beside the weights of a model trained on the Python corpus: its files, with their hashes."""


def register() -> None:
    """Make transformers' auto classes know our models.

    flash-linear-attention registers the same `model_type`s, and whoever comes last wins there; `load_model` asks our own
    table and never depends on it.
    """
    for model_type, (config, model) in MODEL_TYPES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def load_model(
    name: str | Path, *, device: str = "auto", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    """A model and its tokenizer, in evaluation mode on `device`.

    `name` is a shipped model (`tiny-deltanet`), a run directory (its last checkpoint), a folder with config.json and
    safetensors, `org/repo` on the hub, or `new:FOLDER`: the folder's configuration with weights drawn from `seed`.

    Raises FileNotFoundError where nothing is found, naming where it was looked for, and ValueError for a model of another
    family, weights that do not fit the configuration, or a tokenizer that does not fit the embedding.
    """
    name, drawn = str(name), str(name).startswith("new:")
    folder = resolve(name.removeprefix("new:"))
    config_class, model_class = _family(folder)
    config = _configuration(config_class, folder)
    if drawn:
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
    else:
        model = _load_weights(model_class, config, folder, dtype)
    tokenizer = _tokenizer(folder)
    check_tokenizer(tokenizer, config.vocab_size)
    return model.to(resolve_device(device)).eval(), tokenizer


def manifest_of(name: str | Path) -> Manifest | None:
    """The manifest of the Python corpus that the model of that name was trained on, or None where it has none."""
    path = resolve(str(name).removeprefix("new:")) / MANIFEST
    return load_manifest(path) if path.is_file() else None


def resolve(name: str) -> Path:
    """The local folder that holds the model of that name; downloads it from the hub where it is an `org/repo`."""
    shipped, path = SHIPPED / name, Path(name).expanduser()
    if name and "/" not in name and shipped.is_dir():
        return shipped
    if (path / "checkpoints").is_dir():
        return _last_checkpoint(path)
    if path.is_dir():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    known = ", ".join(sorted(x.name for x in SHIPPED.glob("*"))) or "none"
    raise FileNotFoundError(
        f"there is no model {name!r}: not among the shipped ones ({known}), not a run directory or folder, not an org/repo"
    )


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that torch does not know or have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be 'auto', 'cpu' or, where there is a GPU, 'cuda' or 'cuda:N', got {device!r}")
    return torch.device(device)


def _family(folder: Path) -> tuple[type, type[FastWeightLM]]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a model's configuration: {error}") from error
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{path} names model_type {model_type!r}; allowed are {', '.join(map(repr, MODEL_TYPES))}")
    return MODEL_TYPES[model_type]


def _configuration(config_class: type, folder: Path) -> Any:
    """The folder's configuration; a field that nothing here honours is refused."""
    path = folder / "config.json"
    known = {x.name for x in dataclasses.fields(config_class)} | set(PreTrainedConfig().to_dict()) | NO_SETTINGS
    for name, value in json.loads(path.read_text()).items():
        if name in FORMER_FIELDS and value is not FORMER_FIELDS[name]:
            raise ValueError(f"{path} sets {name} to {value!r}; allowed is {FORMER_FIELDS[name]}")
        if name not in known and name not in FORMER_FIELDS:
            raise ValueError(f"{path} sets {name!r}, which is no field of {config_class.__name__}")
    try:
        return config_class.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {_one_line(error)}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} holds no tokenizer: it has no tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library `tokenizers` raises nothing narrower
        raise ValueError(f"the tokenizer in {folder} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _load_weights(model_class: type[FastWeightLM], config, folder: Path, dtype: torch.dtype) -> FastWeightLM:
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no weights: it has no .safetensors file")
    try:
        model, info = model_class.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )  # sizes that differ are told below, in one sentence
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {_one_line(error)}") from error
    for name, stored, built in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {name} is {list(stored)}, not {list(built)}"
        )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}
    for kind, names in wrong.items():
        if names:
            raise ValueError(f"the weights in {folder} do not fit its config.json: {kind} {', '.join(names[:3])}")
    return model


def _last_checkpoint(run: Path) -> Path:
    steps = checkpoints(run)
    if not steps:
        raise FileNotFoundError(f"the run {run} has no checkpoint yet")
    return steps[-1][1]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"there is no model {name!r}: not a folder here, and the hub did not give it ({reason})"
        ) from error
