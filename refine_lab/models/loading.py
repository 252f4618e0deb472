"""Loads a model and its tokenizer by name."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from refine_lab.data.corpus import Manifest, load_manifest
from refine_lab.data.files import refuse_pointer, refuse_pointers
from refine_lab.data.tokenizer import check_tokenizer
from refine_lab.models.base import FastWeightLM
from refine_lab.models.families import NOT_RUN, code_name, configured, one_line
from refine_lab.models.hub import TOKENIZER_FILES, Place, has_tokenizer, locate, resolve
from refine_lab.runs.files import read_json
from refine_lab.validation import require

MANIFEST = "manifest.json.gz"
"""File beside the weights of a model trained on the Python corpus, with the corpus files and their hashes."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "model.pt")
"""Names of pickled weights, which are read only if the caller allows it; the first kind found is used."""

TENSORS_PER_LAYER = 2000
"""Maximum number of tensors per layer; a layer of Qwen3-Next, whose experts are stored one by one, has about 1,600."""
LONGEST_HEADER = 100_000_000
"""Maximum number of bytes of a safetensors header, as in the library."""

_SHARD = re.compile(r"[^/\\*?\[\]]+\.safetensors")


def load_model(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    settings: Mapping[str, int | float] | None = None,
) -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, in evaluation mode on `device`.

    `name` is a shipped model (`tiny-deltanet`), a run directory (its last checkpoint), a folder with config.json and
    safetensors, or on the hub `org/repo`, `org/repo:subfolder`, `org/repo@revision`, `org/repo:subfolder@revision` (or
    `revision` given separately). `new:NAME` uses only the configuration of any of these and initialises the weights
    from `seed`. `settings` override numbers of the configuration, such as a LaCT's window or chunk.

    Our own classes read models saved by others; code that comes with a model is neither fetched nor run.
    `trust_remote_code` allows it, for a tokenizer and for the repository's own `FastWeightLM`; `allow_pickle` allows
    weights in `PICKLES` if there are no safetensors, and only tensors are read from them.

    If the configuration ties head and embedding but the file holds two that differ, both are loaded,
    `tie_word_embeddings` is set to False in the model's configuration, and a warning is given.

    Raises FileNotFoundError if nothing is found, naming the places searched, and ValueError for a model of another
    family, weights that do not fit the configuration, a tokenizer that does not fit the embedding, and what is not
    allowed.
    """
    place, config, model_class, target = prepared(
        name, device=device, revision=revision, trust_remote_code=trust_remote_code, settings=settings
    )
    tokenizer = _tokenizer(place.tokenizer, trust_remote_code)
    check_tokenizer(tokenizer, config.get_text_config().vocab_size)
    if str(name).startswith("new:"):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
    else:
        model = _load_weights(model_class, config, place, dtype, allow_pickle)
    return model.to(target).eval(), tokenizer


def prepared(
    name: str | Path,
    *,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, int | float] | None = None,
) -> tuple[Place, Any, type[FastWeightLM], torch.device]:
    """Returns what `load_model` determines before reading weights: the model's place, configuration, class and device.

    Raises what `load_model` raises for them.
    """
    target = resolve_device(device)
    place = locate(str(name).removeprefix("new:"), revision)
    config, model_class = configured(place, trust_remote_code, settings)
    if target.type not in model_class.devices:
        devices = " and ".join(model_class.devices)
        raise ValueError(f"{str(name)!r} is a {config.model_type}, which runs on {devices} only, not on {target}")
    return place, config, model_class, target


def manifest_of(name: str | Path) -> Manifest | None:
    """Returns the manifest of the Python corpus that the model of that name was trained on, or None."""
    path = resolve(str(name).removeprefix("new:")) / MANIFEST
    return load_manifest(path) if path.is_file() else None


def load_tokenizer(name: str | Path, *, cached: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the model of that name, with `cached` without asking the hub. Raises as `load_model`."""
    return _tokenizer(locate(str(name).removeprefix("new:"), cached=cached).tokenizer, trust_remote_code=False)


def resolve_device(device: str) -> torch.device:
    """Returns the torch device; `auto` is CUDA if available. Raises ConfigError for an unknown or missing device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"(cpu|cuda)(:(\d+))?", device)
    exists = found is not None and (found[1] == "cpu" or int(found[3] or 0) < torch.cuda.device_count())
    require(exists, "device", device, "'auto', 'cpu' or, if there is a GPU, 'cuda' or 'cuda:N'")
    return torch.device(device)


# -- the tokenizer ---------------------------------------------------------------------------------------------------


def _tokenizer(place: Place, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a place, with its own code only if the caller allows it."""
    folder, path = place.folder, place.folder / "tokenizer_config.json"
    refuse_pointers(folder, TOKENIZER_FILES)
    code = code_name(read_json(refuse_pointer(path)).get("auto_map"), "AutoTokenizer") if path.is_file() else "None"
    if code != "None":
        if not trust_remote_code:
            raise ValueError(f"{path} needs code of its own ({code}): {NOT_RUN}")
        place.fetch(["*.py", "*.txt"])
    elif not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} contains no tokenizer: it has no tokenizer.json")
    elif not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        installed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        if missing := [name for name, there in installed.items() if not there]:
            needs = "a tokenizer.model alone, which needs sentencepiece and protobuf"
            raise ValueError(f"the tokenizer in {folder} is {needs}; not installed here: {', '.join(missing)}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library `tokenizers` raises nothing narrower
        raise ValueError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error


# -- the weights -----------------------------------------------------------------------------------------------------


def _load_weights(
    model_class: type[FastWeightLM], config: Any, place: Place, dtype: torch.dtype, allow_pickle: bool
) -> FastWeightLM:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    folder, pickled = place.folder, _fetch_weights(place, allow_pickle, layers)
    how = dict(state_dict=_unpickled(pickled)) if pickled else dict(use_safetensors=True, local_files_only=True)
    how |= dict(config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    try:  # what does not fit is refused below, in one sentence
        with _without_report():
            model, info = model_class.from_pretrained(None if pickled else folder, **how)
    except Exception as error:  # of transformers, safetensors, torch and the system, for files of every kind of damage
        raise ValueError(f"the weights in {folder} cannot be read: {one_line(error)}") from error
    wrong = [f"{name} is {list(stored)}, not {list(built)}" for name, stored, built in sorted(info["mismatched_keys"])]
    for kind in ("missing_keys", "unexpected_keys"):
        wrong += [f"{kind} {', '.join(sorted(map(str, info[kind]))[:3])}"] if info[kind] else []
    if wrong:
        raise ValueError(f"the weights in {folder} do not match its config.json: {wrong[0]}")
    _agree_on_tying(model, folder)
    return model


def _agree_on_tying(model: FastWeightLM, folder: Path) -> None:
    """Sets `tie_word_embeddings` to False, with a warning, if the file holds a head that differs from the embedding.

    transformers then loads both tensors, but its configuration still declares them tied: `tie_weights()` would discard
    the head.
    """
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
        warnings.warn(
            f"config.json in {folder} sets tie_word_embeddings to True, but the weights contain a head that differs from the "
            "embedding: both are loaded as they are, and tie_word_embeddings is now False",
            stacklevel=4,
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """Hides transformers' table of mismatched weights, which are reported in one sentence; other messages pass.

    The table of a failed conversion also passes, since the error that follows refers to it.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "LOAD REPORT" not in message or "CONVERSION" in message


def _refuse_many_tensors(folder: Path, files: Iterable[str], layers: int) -> None:
    """Raises ValueError if the headers of safetensors files list absurdly many tensors, which take minutes to load."""
    count, most = 0, TENSORS_PER_LAYER * (layers + 1)
    for name in files:
        with (folder / name).open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), LONGEST_HEADER))
            count += header.count(b'"data_offsets"')
    if count > most:
        raise ValueError(
            f"the weights in {folder} hold {count:,} tensors; at most {most:,} are read for {layers} layers"
        )


def _fetch_weights(place: Place, allow_pickle: bool, layers: int) -> list[Path]:
    """Fetches only the files with the weights. Returns the pickled ones if there are no others."""
    folder = place.folder
    sharded = (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()
    files = _shards(folder / INDEX) if sharded else [WEIGHTS]
    place.fetch(files)
    missing = [file for file in files if not (folder / file).is_file()]
    refuse_pointers(folder, files)
    _refuse_many_tensors(folder, [file for file in files if file not in missing], layers)
    if missing and sharded:
        raise FileNotFoundError(f"{folder} lacks {missing[0]} of {INDEX}: {len(missing)} of {len(files)} files")
    return _fetch_pickled(place, allow_pickle) if missing else []


def _fetch_pickled(place: Place, allow_pickle: bool) -> list[Path]:
    there = place.files()
    names = next((found for kind in PICKLES if (found := matching(there, kind))), [])
    if not names:
        raise FileNotFoundError(f"{place.folder} contains no weights: it has no {WEIGHTS}")
    if not allow_pickle:
        raise ValueError(
            f"{place.folder} contains only pickled weights ({names[0]}), which are not read unless "
            "allow_pickle=True is passed to load_model; for a training run, load it that way, save model and tokenizer to a "
            "folder with save_pretrained, and pass that folder"
        )
    place.fetch(names)
    refuse_pointers(place.folder, names)
    return [place.folder / name for name in names]


def _shards(index: Path) -> list[str]:
    shards = read_json(refuse_pointer(index)).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} names no weights: it has no weight_map")
    for name in shards.values():
        fits = isinstance(name, str) and _SHARD.fullmatch(name) is not None
        require(fits, str(index), name, "an index of .safetensors files beside it")
    return sorted(set(shards.values()))


def _unpickled(paths: list[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises errors of every kind
            raise ValueError(f"the weights in {path} cannot be read: {one_line(error)}") from error
        items = found.items() if isinstance(found, dict) else ()
        if not items or not all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in items):
            raise ValueError(f"the weights in {path} cannot be read: it contains something other than named tensors")
        tensors |= found
    return tensors
