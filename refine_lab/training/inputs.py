"""The inputs of a run besides its configuration: digests of texts, prompts and model files.

Every run stores the digests in `inputs.json` and is resumed only if they are unchanged, since files can change under
the same name. Files are identified by content, so a copied folder is the same input, while a file of equal size and
modification time need not be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_lab.config import DataConfig, TrainConfig, to_json
from refine_lab.data.corpus import Manifest
from refine_lab.data.sources import source_digests
from refine_lab.data.tasks.prompts import Example, prompts_digest
from refine_lab.models.hub import TOKENIZER_FILES, Place, locate
from refine_lab.runs.checkpoints import OPTIMIZER
from refine_lab.runs.durable import digest
from refine_lab.runs.files import write_json
from refine_lab.runs.run import Run, list_runs
from refine_lab.runs.started import Change, Sources, accept, changes_of, refusal, sources_of
from refine_lab.runs.writer import RunWriter
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import path_of


def inputs_of(model: str, examples: Iterable[Example]) -> dict[str, Any]:
    """Returns a task run's inputs: count and digest of examples, model digests, and `begins_with`.

    `begins_with` are the tokens that precede every prompt.
    """
    examples = tuple(examples)
    begins = list(examples[-1].prompt_ids[: examples[-1].begins]) if examples else []
    digests = {"prompts_digest": prompts_digest(examples), "model": model_digests(model)}
    return {"prompts": len(examples), **digests, "begins_with": begins}


Tokens = Mapping[str, Sequence[np.ndarray]]
"""Source -> the token arrays of its splits."""


def text_inputs(
    model: str, data: DataConfig, manifest: Manifest | None, tokens: Tokens | None = None
) -> dict[str, Any]:
    """Returns a text run's inputs: digests of each source's files (see `text_digests`) and of the model's files."""
    return {"texts": text_digests(data, manifest, tokens), "model": model_digests(model)}


def text_digests(data: DataConfig, manifest: Manifest | None, tokens: Tokens | None = None) -> dict[str, Any]:
    """Returns source -> file -> digest.

    A data set of the library `datasets` is identified by its tokens, and only if they are given.
    """
    texts: dict[str, dict[str, str]] = {}
    for source in data.sources:
        if not source.startswith("datasets:"):
            texts[source] = source_digests(source, manifest)
        elif tokens is not None:
            whole = hashlib.sha256()
            for array in tokens[source]:
                whole.update(np.ascontiguousarray(array).tobytes())
            texts[source] = {"tokens": whole.hexdigest()[:24]}
    return texts


def model_digests(model: str) -> dict[str, str]:
    """Returns file -> digest of what `load_model` reads; for a model on the hub, its commit, which identifies the content.

    For `new:` names the weights are excluded, since fresh ones are initialised.
    """
    place = locate(model.removeprefix("new:"))
    if place.hub is not None:
        return {place.hub.repo: str(place.hub.revision)}
    names = ["config.json", "tokenizer_config.json", *TOKENIZER_FILES]
    weights = [] if model.startswith("new:") else sorted(place.folder.glob("*.safetensors"))
    files = [path for path in (place.folder / name for name in names) if path.is_file()]
    return {path.name: digest(path) for path in [*files, *weights] if path.name != OPTIMIZER}


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any], config: Any) -> list[Change]:
    """Compares recorded with current inputs; the sentence of each change is "FILE has changed", "is gone" or "is new".

    `config` is the run's `TrainConfig` or `TTTRunConfig`. Only fields present in both are compared. Runs of earlier
    versions recorded the model by size and modification time.
    """
    found: list[Change] = []
    model: str = config.model
    if "prompts" in now and any(recorded.get(name) != now[name] for name in ("prompts", "prompts_digest")):
        digests = recorded.get("prompts_digest"), now["prompts_digest"]
        found.append(_change("prompts", f"the content of {config.task.source!r} has changed", *digests))
    begins = recorded.get("begins_with", now.get("begins_with")), now.get("begins_with", recorded.get("begins_with"))
    if begins[0] != begins[1]:
        sentence = "the special token that texts begin with (add_bos) has changed"
        found.append(_change("begins_with", sentence, *begins))
    texts = now.get("texts", {})
    for source, files in recorded.get("texts", {}).items():
        if source in texts:
            for file, what, *digests in _differences(files, texts[source]):
                found.append(_change("texts", f"{_named(source, file)} {what}", *digests))
    if "model" in recorded and "model" in now:
        for file, what, *digests in _differences(recorded["model"], now["model"]):
            found.append(_change("model", f"{file!r} of the model {model!r} {what}", *digests))
    elif "weights_digest" in recorded:
        digests = recorded["weights_digest"], _by_time(locate(model.removeprefix("new:")))
        if digests[0] != digests[1]:
            found.append(_change("model", f"a file of the model {model!r} has changed", *digests))
    return found


def _change(name: str, sentence: str, before: Any, now: Any) -> Change:
    both = "" if before is None or now is None else f" (from {before} to {now})"
    return Change(name, before, now, sentence + both)


def settle(run: Run, now: Mapping[str, Any], overrides: Collection[str] = ()) -> None:
    """Records the inputs of a run that starts training, and raises an error for a resumed one whose inputs have changed.

    Changes of the inputs in `overrides` are accepted and recorded. A run of an earlier version without a record is
    resumed, and a notice is printed. Resuming fails if the run started without a BOS token that its tokenizer adds and
    would now continue with it.
    """
    recorded, begun = run.inputs, run.latest_checkpoint() is not None
    if begun and now.get("begins_with") and "begins_with" not in (recorded or {}) and run.config.data.add_bos is None:
        raise ValueError(
            f"{run.path} was started without the special token that the tokenizer puts before a text, and would continue "
            "with it: set data.add_bos to false in its config.json, or start a new run"
        )
    if recorded is None and begun:
        print(
            f"{run.path} has no record of its inputs, so it is not known whether they have changed since it started",
            flush=True,
        )
        return
    merged = {**now, **(recorded or {})}
    if recorded is not None:
        accepted = refuse_changes(run, now, overrides)
        if "texts" in now:  # digests that were not known when the run was created
            merged["texts"] = {**now["texts"], **recorded.get("texts", {})}
        for name in {change.name for change in accepted}:
            merged |= {key: now[key] for key in (name, f"{name}_digest") if key in now}
        accept(run, accepted)
        begun = begun and not accepted and merged.get("texts") == recorded.get("texts")  # else a text was added
    if not begun and merged != recorded:
        write_json(run.path / "inputs.json", merged)


def resume_or_create(
    configs: Sequence[TrainConfig | TTTRunConfig],
    folder: Path,
    inputs: Mapping[str, Any] | None = None,
    *,
    reward_source: str | None = None,
    selection_source: str | None = None,
    fresh: bool = False,
) -> list[Run]:
    """Returns, for each configuration, the newest run in `folder` with it, finished or not, or else a new run.

    Only runs with the same custom functions are considered and, if `inputs` are given (see `inputs_of`), with the same
    inputs; forks, and runs whose settings were changed after their start, are not. `fresh` creates new runs only.
    """
    wanted = {to_json(config) for config in configs}
    sources = {"reward": reward_source, "selection": selection_source}
    there = [] if fresh else [run for run in list_runs(folder) if to_json(run.config) in wanted]
    there = [run for run in there if _as_started(run, sources)]
    if inputs is not None:
        there = [run for run in there if run.inputs and not changes(run.inputs, inputs, run.config)]
    found = {to_json(run.config): run for run in there}  # the newest last
    new = {"reward_source": reward_source, "selection_source": selection_source, "inputs": inputs}
    return [found.get(to_json(config)) or new_run(config, folder, **new) for config in configs]


def _as_started(run: Run, sources: Sources) -> bool:
    """Returns whether a run has its first settings and these functions, so that a new run would do the same."""
    started = run.started
    same = sources_of(run.path) == sources
    return same and not started.get("parent") and not started.get("changes") and not changes_of(run)


def new_run(
    config: TrainConfig | TTTRunConfig,
    folder: Path,
    *,
    reward_source: str | None = None,
    selection_source: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    parent: Mapping[str, Any] | None = None,
) -> Run:
    """Creates a run directory in `folder`, without starting a process."""
    with RunWriter.create(
        config, folder, reward_source=reward_source, selection_source=selection_source, inputs=inputs, parent=parent
    ) as writer:
        return writer.run


def refuse_changes(run: Run, now: Mapping[str, Any], overrides: Collection[str] = ()) -> list[Change]:
    """Returns the changes of a run's inputs that `overrides` accept.

    Raises ValueError, naming a file, for any other change since the run started.
    """
    found = changes(run.inputs or {}, now, run.config)
    if refused := [change for change in found if change.name not in overrides]:
        raise ValueError(refusal(run, "inputs", refused))
    return found


def _differences(
    before: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Yields the name of each file that differs, what has happened to it, and both digests."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            what = "is gone" if name not in now else "is new" if name not in before else "has changed"
            yield name, what, before.get(name), now.get(name)


def _named(source: str, file: str) -> str:
    if source == "python":
        return f"{file!r} of the Python corpus"
    if source.startswith("datasets:"):
        return f"the text of {source!r}"
    path = path_of("source", source)
    return repr(str(path / file if path.is_dir() else path))


def _by_time(place: Place) -> str:
    """Returns the digest of a model in earlier versions' form: name, size and modification time of its files."""
    weights = hashlib.sha256()
    for path in sorted([*place.folder.glob("*.safetensors"), place.folder / "config.json"]):
        size = path.stat()
        weights.update(repr((path.name, size.st_size, size.st_mtime_ns)).encode())
    return weights.hexdigest()
