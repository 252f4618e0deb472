"""A model that is being adapted: its original weights beside the adapted ones, its answers with either, and its saved copy."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from refine_lab.config import to_json
from refine_lab.evaluation.reading import continuation_stats, read_prompts
from refine_lab.explore.reading import DocumentReading
from refine_lab.models import FastWeightLM
from refine_lab.models.loading import MANIFEST, manifest_of
from refine_lab.runs.durable import publishing
from refine_lab.runs.environment import environment
from refine_lab.runs.files import write_json
from refine_lab.runs.run import runs_dir
from refine_lab.training.adaptation import padded_batch, preserve_weights
from refine_lab.training.held_out_rest import HeldOutRest
from refine_lab.training.history import history_of, save_history
from refine_lab.ttt_config import TTTConfig
from refine_lab.validation import path_of, require

TokenIds = Int[np.ndarray, "T"]
RestIds = Int[np.ndarray, "R"]
RECORD = "adaptation.json"
"""File beside saved weights: the model that was adapted, and how."""


MOST_KEPT = 8 * 2**30
"""Maximum number of bytes in memory that the copies of a model's adapted weights take together."""


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptWeights:
    """A copy in main memory of adapted weights, and how they were adapted."""

    values: dict[int, torch.Tensor]
    "The parameters that differ from the original ones, by their index in `preserve_weights.copies`."
    adaptations: list[dict[str, Any]]


@dataclass(kw_only=True)
class LoadedModel:
    """A model in memory; `restored` keeps a copy of its original weights while they are adapted."""

    policy: FastWeightLM
    tokenizer: Any
    origin: str  # the files that the weights came from: their folder, and the modification time of the newest
    restored: preserve_weights | None = None
    updates: int = 0
    moves: int = 0
    adapting: bool = False
    loaded: str | None = None  # digest of the weights as loaded, computed before their first update
    # since the weights were loaded or reset: method, settings, tokens and updates of every adaptation, in order
    adaptations: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, KeptWeights] = field(default_factory=dict)  # by the name of the adaptation, until a reset

    def require_idle(self) -> None:
        """Raises ValueError while the model is being adapted."""
        if self.adapting:
            raise ValueError("the model is being adapted: stop the adaptation first")

    def restore(self) -> int:
        """Restores the original weights bit for bit and returns the number of updates undone."""
        undone, self.updates, self.adaptations = self.updates, 0, []
        if self.restored is not None:
            restored, self.restored = self.restored, None
            restored.__exit__(None, None, None)
        return undone

    def keep(self, name: str, *, first: bool) -> bool:
        """Copies the adapted weights under a name, until a reset; `first` drops the earlier copies.

        Returns False, and copies nothing, if all copies together would exceed `MOST_KEPT`. Raises ValueError for weights
        that are not adapted.
        """
        if first:
            self.kept = {}
        if self.restored is None:
            raise ValueError("the weights are the original ones: adapt the model before they are kept")
        pairs = enumerate(self.restored.copies)
        changed = {number: own for number, (own, original) in pairs if not torch.equal(own, original)}
        held = [tensor for each in self.kept.values() for tensor in each.values.values()]
        if sum(tensor.numel() * tensor.element_size() for tensor in [*held, *changed.values()]) > MOST_KEPT:
            return False
        values = {number: own.detach().to("cpu", copy=True) for number, own in changed.items()}
        self.kept[name] = KeptWeights(values=values, adaptations=copy.deepcopy(self.adaptations))
        return True

    @contextmanager
    def weights_of(self, name: str | None) -> Iterator[list[dict[str, Any]]]:
        """Gives the model the kept weights of that name inside a `with` block, and yields how they were adapted.

        None stands for the current weights. Raises ValueError if they are the original ones, and for another name.
        """
        if name is None:
            if not self.updates:
                raise ValueError("the weights are the original ones: adapt the model before you save it")
            yield self.adaptations
            return
        allowed = f"one of {', '.join(self.kept)}" if self.kept else "none: no compared weights are kept"
        require(name in self.kept, "the method whose weights are saved", name, allowed)
        kept, copies = self.kept[name], self.restored.copies if self.restored is not None else []
        with exchanged((own, kept.values.get(number, other)) for number, (own, other) in enumerate(copies)):
            yield kept.adaptations

    @property
    def version(self) -> str:
        """Returns an identifier of the weights: files and updates change it, and a reset restores the earlier one."""
        return f"{self.origin}, {self.moves if self.restored is not None else 0} updates"


@dataclass(frozen=True, kw_only=True)
class AdaptationStep:
    """An update of `Session.adapt`: its metrics, and the model's loss and entropy on the prompt after it."""

    number: int
    metrics: dict[str, float]
    tokens_per_second: float
    loss: float  # mean next-token loss of the tokens after the update, in nats
    entropy: float  # mean entropy after the update, in nats
    note: str | None  # which settings of the method were reduced for a short prompt
    rest_loss: float | None = None  # the same loss of the held-out remainder, if there is one


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredPrompt:
    """What a model does with a prompt: the statistics of its tokens, its greedy answer, and the score of a reference."""

    reading: DocumentReading
    answer: str
    reference_logprob: float | None
    "Log-probability of the reference answer after the prompt, summed over its tokens, in nats; none without a reference."


def original_weights(preserved: preserve_weights | None) -> AbstractContextManager[None]:
    """Exchanges adapted weights for the original ones inside a `with` block (see `exchanged`).

    `preserved` holds the original weights; None means that the model has not been adapted.
    """
    return exchanged([] if preserved is None else preserved.copies)


@contextmanager
def exchanged(pairs: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Exchanges parameters and other tensors inside a `with` block, and puts the parameters back bit for bit.

    The two tensors of a pair change places, which needs no memory. After an error the parameters are back, too, also if
    it occurs while they are exchanged.
    """
    done: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        for parameter, other in pairs:
            _exchange(parameter, other)
            done.append((parameter, other))
        yield
    finally:
        for parameter, other in done:
            _exchange(parameter, other)


def _exchange(parameter: torch.Tensor, other: torch.Tensor) -> None:
    with torch.inference_mode(False):
        parameter.data, other.data = other.data, parameter.data


def reference_logprob(policy: FastWeightLM, prompt: Sequence[int], reference: Sequence[int]) -> float | None:
    """Returns the log-probability of the tokens of a reference after a prompt, in nats; None for an empty reference.

    Raises ValueError if prompt and reference exceed the model's context or have tokens outside its vocabulary.
    """
    if not reference:
        return None
    padded_batch(policy, [torch.tensor([*prompt, *reference])])
    ((logprob, _),) = continuation_stats(policy, read_prompts(policy, [prompt]), [reference], [0])
    return logprob


def free_folder(name: str) -> Path:
    """Returns the path of a folder to create: a name is one under `runs_dir()`, and so is `runs/NAME`.

    Raises ValueError for an empty name, another relative path, and a path where something exists already.
    """
    require(bool(name.strip()), "the folder", name, "a name under runs/, or an absolute path")
    path = path_of("the folder", name.strip())
    if not path.is_absolute():
        parts = path.parts[1:] if path.parts[0] == "runs" else path.parts
        plain = len(parts) == 1 and parts[0] not in (".", "..")
        require(plain, "the folder", name, "a name under runs/, or an absolute path")
        path = runs_dir() / parts[0]
    require(not path.exists(), "the folder", name, "one that does not exist yet")
    return path


def saved_models() -> list[Path]:
    """Returns the folders under `runs_dir()` with weights that `save_adapted` wrote, newest first."""
    found = [path.parent for path in runs_dir().glob(f"[!.]*/{RECORD}")]
    return sorted(found, key=lambda folder: ((folder / RECORD).stat().st_mtime, folder.name), reverse=True)


def save_adapted(
    folder: Path,
    policy: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    origin: str,
    adaptations: Sequence[dict[str, Any]],
) -> None:
    """Writes a folder that `load_model` reads: the weights, the configuration, the tokenizer, and a record in `RECORD`.

    `model` is the name of the model that was adapted, and `origin` the files that its weights came from. What is known
    of its training is stored with it. The folder appears when it is complete.
    """
    history = history_of(model)
    adapted = "it was adapted to the documents listed in " + RECORD
    manifest = None if model.startswith("new:") else manifest_of(model)
    with publishing(folder) as unfinished:
        policy.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if manifest is not None:
            manifest.save(unfinished / MANIFEST)
        save_history(replace(history, unknown=(*history.unknown, adapted)), unfinished)
        record = {"format_version": 1, "model": model, "origin": origin, "adaptations": [*adaptations]}
        write_json(unfinished / RECORD, record | {"environment": environment()})


def record_of(config: TTTConfig, token_ids: TokenIds) -> dict[str, Any]:
    """Returns the record of an adaptation that has made no update yet."""
    method = "sft" if config.refine is None else config.refine.method
    text = {"tokens": len(token_ids), "token_digest": hashlib.blake2b(token_ids.tobytes(), digest_size=16).hexdigest()}
    return {"method": method, "updates": 0, **text, "settings": json.loads(to_json(config))}


def with_rest(token_ids: TokenIds, rest: RestIds | None) -> tuple[Int[np.ndarray, "_"], HeldOutRest | None]:
    """Returns the tokens to read after each step, and which of them are the remainder."""
    if rest is None:
        return token_ids, None
    parts = HeldOutRest(first=len(token_ids), stop=len(token_ids) + len(rest))
    return np.concatenate([token_ids, rest]), parts
