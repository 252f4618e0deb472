"""Caches models and documents: a document is not read again until the weights change."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tokenizer import beginning
from refine_lab.explore.adapted import (
    AdaptationStep,
    LoadedModel,
    MeasuredPrompt,
    RestIds,
    TokenIds,
    free_folder,
    original_weights,
    record_of,
    reference_logprob,
    save_adapted,
    with_rest,
)
from refine_lab.explore.attribution import Cell, WriteAttribution, write_attribution
from refine_lab.explore.document_cache import CachedDocument, DocumentCache
from refine_lab.explore.erasing import Erasure, Prediction, predict
from refine_lab.explore.erasing import erase as erase_writes
from refine_lab.explore.interruption import interruptible
from refine_lab.explore.lens import LayerLens, layer_lens
from refine_lab.explore.reading import DocumentReading, long_short, read_document, statistics_of
from refine_lab.explore.rollouts import PrefixRollouts, rollouts_at
from refine_lab.explore.states import StateSummary, summarise, written
from refine_lab.explore.targets import Target
from refine_lab.explore.transplant import Counterfactual, counterfactual
from refine_lab.models import load_model
from refine_lab.models.hub import own_folder, resolve
from refine_lab.ops.precision import use_tf32
from refine_lab.training.adaptation import Adapter, fewer_chunks, padded_batch, preserve_weights
from refine_lab.training.answers import answers_to
from refine_lab.ttt_config import TTTConfig
from refine_lab.validation import require

MODELS = 3
"""Number of cached models; the least recently used is dropped first, unless its weights are adapted."""


class Session:
    """Models and documents of one process; every call names its model as `load_model` does, and the model stays loaded.

    Documents are token ids, [T] int32. A call raises ValueError or FileNotFoundError with a sentence for invalid
    requests.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self.between: Callable[[], None] = lambda: None
        "Called before each token of a rollout and each module of a pass; an exception that it raises ends the call."
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._documents = DocumentCache()

    def interruptible(self) -> AbstractContextManager[None]:
        """Lets `between` end the calls in a `with` block, also within a forward or backward pass."""
        return interruptible(self.between)

    def open(self, model: str) -> dict[str, Any]:
        """Loads the model; returns `parameters`, `updates`, their `methods`, whether it is `adapting`, and `kept` copies."""
        held = self._held(model)
        methods = [each["method"] for each in held.adaptations if each["updates"]]
        state = {"updates": held.updates, "methods": methods, "adapting": held.adapting, "kept": [*held.kept]}
        return {"parameters": sum(p.numel() for p in held.policy.parameters()), **state}

    def as_loaded(self, model: str) -> bool:
        """Returns whether the weights are bitwise as loaded."""
        return self._held(model).loaded in (None, self.fingerprint(model))

    def read(
        self, model: str, token_ids: TokenIds, text: str | None = None, add_bos: bool | None = None
    ) -> DocumentReading:
        """Returns the statistics of each token under the model's current weights.

        A run with a newer checkpoint, or a folder with other weights, is loaded again, unless its weights are adapted.
        If `text` is given, raises ValueError if the model's own tokenizer gives other tokens for it.
        """
        self._refresh(model)
        if text is not None:
            tokenizer = self._held(model).tokenizer
            ids = [*beginning(tokenizer, add_bos), *tokenizer(text, add_special_tokens=False)["input_ids"]]
            allowed = "one that tokenises this document identically"
            require(ids == token_ids.tolist(), "a model to compare with", model, allowed)
        return self._compared(model, token_ids).reading

    def expect(self, model: str, version: str | None) -> None:
        """Raises ValueError unless the weights are still those of a reading's `version`; the worker checks every request."""
        if version is not None and version != self._held(model).version:
            raise ValueError("the weights have changed since this document was read: read it again")

    def rollouts(
        self,
        model: str,
        token_ids: TokenIds,
        positions: Sequence[int],
        *,
        version: str | None = None,
        erased: Sequence[int] = (),
        cells: Sequence[Cell] | None = None,
        **settings: Any,
    ) -> list[PrefixRollouts]:
        """Makes rollouts from positions of the document (see `rollouts_at`), without reading it again.

        `erased` and `cells`: as in `erase`; the rollouts are those of the model without these writes.

        Raises ValueError if the weights are no longer those of the reading's `version`.
        """
        self.expect(model, version)
        known, policy = self._read(model, token_ids, tuple(erased), cells), self._held(model).policy
        return rollouts_at(policy, known.reading, known.trace, positions, between=self.between, **settings)

    # -- what the memory holds ---------------------------------------------------------------------------------------------

    def attribute(self, model: str, token_ids: TokenIds, target: Target) -> WriteAttribution:
        """Returns the effect of every write on the target (see `attribution.write_attribution`)."""
        return write_attribution(self._held(model).policy, torch.from_numpy(token_ids).long(), target)

    def predict(
        self,
        model: str,
        token_ids: TokenIds,
        position: int,
        continuation: Sequence[int] = (),
        against: Sequence[int] = (),
        answer_tokens: int = 8,
    ) -> tuple[Target, Prediction]:
        """Returns a target and the prediction there; without a continuation, the target is the most probable next token."""
        policy, known = self._held(model).policy, self._read(model, token_ids)
        require(1 <= position < len(token_ids), "position", position, f"from 1 to {len(token_ids) - 1}")
        target = Target(position=position, token_ids=tuple(continuation) or (0,), against=tuple(against))
        if not continuation:
            greedy = predict(policy, known.trace, target, 1, 1).answer_ids
            target = replace(target, token_ids=greedy)
        return target, predict(policy, known.trace, target, answer_tokens)

    def erase(
        self,
        model: str,
        token_ids: TokenIds,
        erased: Sequence[int],
        target: Target,
        cells: Sequence[Cell] | None = None,
        answer_tokens: int = 8,
    ) -> Erasure:
        """Returns the predictions with and without the writes of the `erased` tokens, in all heads or the given ones."""
        policy, intact = self._held(model).policy, self._read(model, token_ids)
        without = self._read(model, token_ids, tuple(erased), cells)
        return Erasure(
            erased=tuple(erased),
            cells=None if cells is None else tuple(cells),
            before=predict(policy, intact.trace, target, answer_tokens),
            after=predict(policy, without.trace, target, answer_tokens),
            losses_before=intact.reading.losses,
            losses_after=without.reading.losses,
        )

    def lens(self, model: str, token_ids: TokenIds, position: int, token: int | None = None) -> LayerLens:
        """Returns the prediction after each layer at a position (see `lens.layer_lens`)."""
        policy, known = self._held(model).policy, self._read(model, token_ids)
        return layer_lens(policy, known.trace, torch.from_numpy(token_ids).long(), position, token)

    def counterfactual(
        self,
        model: str,
        token_ids: TokenIds,
        changed: TokenIds,
        question: Sequence[int],
        answers: tuple[Sequence[int], Sequence[int]],
    ) -> Counterfactual:
        """Returns which heads carry what two versions of a document differ in (see `transplant.counterfactual`)."""
        return counterfactual(self._held(model).policy, token_ids.tolist(), changed.tolist(), question, answers)

    def save_state(
        self,
        model: str,
        token_ids: TokenIds,
        position: int,
        path: str,
        erased: Sequence[int] = (),
        cells: Sequence[Cell] | None = None,
    ) -> str:
        """Writes the state after a token, without the writes of the `erased` tokens, for `State.load`; returns the path."""
        require(0 <= position < len(token_ids), "position", position, f"from 0 to {len(token_ids) - 1}")
        require(not Path(path).exists(), "the file of a state", path, "the path of a file that does not exist yet")
        known = self._read(model, token_ids, tuple(erased), cells)
        state = known.trace.state_at(torch.tensor([[position]], device=self._held(model).policy.device))
        self.between()  # a call that has been cancelled writes no file
        state.save(path)
        return path

    def states(self, model: str, token_ids: TokenIds, positions: Sequence[int]) -> StateSummary:
        """Summarises the fast weights at increasing positions of the document (see `states.summarise`)."""
        known = self._compared(model, token_ids)
        summary = summarise(known.trace, positions, known.writes, self._held(model).policy.FAST_WEIGHTS)
        return replace(summary, long_short=known.reading.long_short)

    def answer(self, model: str, token_ids: TokenIds, rule: AnswerRule) -> str:
        """Returns the greedily decoded answer to the prompt as text, ended and cut by `rule`."""
        held = self._held(model)
        padded_batch(held.policy, [torch.from_numpy(token_ids)])  # raises for what is no prompt
        return answers_to(held.policy, held.tokenizer, [token_ids.tolist()], rule)[0]

    def measure(
        self,
        model: str,
        token_ids: TokenIds,
        rule: AnswerRule,
        reference_ids: Sequence[int] = (),
        weights: Literal["original", "adapted"] = "adapted",
    ) -> MeasuredPrompt:
        """Reads the prompt, answers it and scores a reference answer, with the model's current or its original weights."""
        self._refresh(model)
        held, ids = self._held(model), token_ids.tolist()
        current = weights == "adapted" or held.restored is None
        with original_weights(None if current else held.restored):
            if current:
                reading = self._read(model, token_ids).reading
            else:  # which is not cached, since the adapted weights return at the end
                reading, _ = read_document(held.policy, torch.from_numpy(token_ids).long())
            return MeasuredPrompt(
                reading=reading,
                answer=self.answer(model, token_ids, rule),
                reference_logprob=reference_logprob(held.policy, ids, reference_ids),
            )

    def adapt(
        self,
        model: str,
        token_ids: TokenIds,
        config: TTTConfig,
        rest: RestIds | None = None,
        weights: Literal["original", "adapted"] = "adapted",
    ) -> Iterator[AdaptationStep]:
        """Adapts to the prompt (test-time training) and yields after each step; the weights stay updated until `reset`.

        `rest`: tokens that follow the prompt and are not adapted to. After each step, the prompt and this remainder are read
        once, and the loss on it is reported beside that of the prompt. Adaptation ends when the caller stops
        iterating. `weights`: `original` restores the original weights first, and `adapted` continues from the current
        ones. Raises RuntimeError, before the first step, if the restored weights are not bitwise as loaded.
        """
        held, prompt = self._held(model), torch.from_numpy(token_ids).long()
        adapter = Adapter(held.policy, config)  # raises before anything is changed
        batch = padded_batch(held.policy, [prompt])
        whole, parts = with_rest(token_ids, rest)
        padded_batch(held.policy, [torch.from_numpy(whole).long()])  # raises for what cannot be read
        note = fewer_chunks(config, len(prompt))
        if weights == "original" and held.restored is not None:
            held.restore()
            self._forget(model)
            if not self.as_loaded(model):
                raise RuntimeError(f"the weights of {model!r} differ from those that were loaded, after their reset")
        if held.restored is None:
            held.loaded = held.loaded or self.fingerprint(model)
            held.restored = preserve_weights(held.policy, on_interrupt=False)  # `reset` alone restores
            held.restored.__enter__()
        record = record_of(config, token_ids)
        held.adaptations.append(record)
        held.adapting = True
        try:
            for update in adapter.adapt(batch):
                held.updates, held.moves = held.updates + 1, held.moves + 1
                record["updates"] += 1
                self._forget(model)
                reading = self._read(model, whole).reading
                losses, entropies = reading.losses[1:], reading.entropies[1:]
                if not np.isfinite(losses).all():
                    raise FloatingPointError(
                        f"training diverged (the loss is NaN or infinite); try an lr below {config.lr}"
                    )
                yield AdaptationStep(
                    number=update.number,
                    metrics=update.metrics,
                    tokens_per_second=update.tokens_per_second,
                    loss=float((parts.adapted(losses) if parts else losses).mean()),
                    entropy=float((parts.adapted(entropies) if parts else entropies).mean()),
                    note=note,
                    rest_loss=float(parts.rest(losses).mean()) if parts else None,
                )
        finally:
            held.adapting = False

    def reset(self, model: str) -> int:
        """Restores the loaded weights bit for bit, drops kept ones, and returns the number of updates undone.

        Raises ValueError while the model is being adapted.
        """
        held = self._held(model)
        held.require_idle()
        held.kept = {}
        self._forget(model)
        return held.restore()

    def keep(self, model: str, name: str, first: bool = False) -> bool:
        """Keeps a copy of the adapted weights under a name, for `save`, until a reset (see `LoadedModel.keep`)."""
        return self._held(model).keep(name, first=first)

    def save(self, model: str, folder: str, name: str | None = None) -> Path:
        """Saves adapted weights as a new folder that `load_model` reads, and returns its path (see `save_adapted`).

        `name`: that of kept weights; none: the current ones. Raises ValueError while the model is being adapted, as
        `LoadedModel.weights_of` and as `free_folder` do.
        """
        held = self._held(model)
        held.require_idle()
        with held.weights_of(name) as adaptations:
            path = free_folder(folder)
            save_adapted(path, held.policy, held.tokenizer, model, held.origin, adaptations)
        return path

    def fingerprint(self, model: str) -> str:
        """Returns a digest of every parameter's bytes: the same before an adaptation and after its reset."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in self._held(model).policy.named_parameters():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def forget(self) -> None:
        """Drops all cached forward passes to free memory."""
        self._documents.clear()

    def _held(self, model: str) -> LoadedModel:
        if model not in self._models:
            origin = _origin(model)
            policy, tokenizer = load_model(model, device=self.device)
            use_tf32(policy.device)
            self._models[model] = LoadedModel(policy=policy, tokenizer=tokenizer, origin=origin)
            for name in [name for name, held in self._models.items() if held.restored is None and name != model]:
                if len(self._models) > MODELS:
                    del self._models[name]
                    self._forget(name)
        self._models.move_to_end(model)
        return self._models[model]

    def _refresh(self, model: str) -> None:
        """Drops a model whose folder's files have changed since it was loaded."""
        held = self._models.get(model)
        if held is not None and held.restored is None and own_folder(model) and held.origin != _origin(model):
            del self._models[model]
            self._forget(model)

    def _read(
        self, model: str, token_ids: TokenIds, erased: tuple[int, ...] = (), cells: Sequence[Cell] | None = None
    ) -> CachedDocument:
        """Returns a document, read once; without the writes of the `erased` tokens, only what follows them is read again."""
        digest = hashlib.blake2b(np.ascontiguousarray(token_ids, dtype=np.int32).tobytes()).hexdigest()
        if erased:
            digest += f" without {sorted(set(erased))} in {'all heads' if cells is None else sorted(set(cells))}"
        key = model, digest
        if key not in self._documents:
            held, ids = self._held(model), torch.from_numpy(token_ids).long()
            if erased:
                intact = self._read(model, token_ids)
                with torch.no_grad():
                    trace = erase_writes(held.policy, intact.trace, ids, erased, cells)
                reading, writes = statistics_of(held.policy, trace, ids), intact.writes
            else:
                with written(held.policy) as writes:
                    reading, trace = read_document(held.policy, ids)
            self._documents.add(key, CachedDocument(replace(reading, version=held.version), trace, writes))
        self._documents.move_to_end(key)
        return self._documents[key]

    def _compared(self, model: str, token_ids: TokenIds) -> CachedDocument:
        """Returns a document whose reading has the long-short difference, which an adaptation does not need."""
        known = self._read(model, token_ids)
        if known.reading.long_short is not None:
            return known
        difference = long_short(self._held(model).policy, known.reading)
        if difference is not None:
            known = replace(known, reading=replace(known.reading, long_short=difference))
            self._documents[next(reversed(self._documents))] = known
        return known

    def _forget(self, model: str) -> None:
        for key in [key for key in self._documents if key[0] == model]:
            del self._documents[key]


def _origin(model: str) -> str:
    """Returns the folder that a name refers to now, and its newest modification time. Raises as `resolve`."""
    folder = resolve(model.removeprefix("new:"))
    return f"{folder} at {max((path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()), default=0)}"
