"""Exploration of one document with one model: target positions, rollouts and rewards under changing settings.

The worker holds the model; its results are cached here, so that a change of reward, grouping, selection or a smaller k
needs no further model call. The cache only saves time: a recomputed rollout is bitwise identical (see
`rollouts.rollouts_at`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from refine_lab.config import BUILT_IN_SELECTIONS as SELECTIONS
from refine_lab.config import RefineConfig
from refine_lab.data.tokenizer import beginning
from refine_lab.explore.client import Worker
from refine_lab.explore.futures import finished, then
from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollouts import PrefixRollouts, rollout_frame
from refine_lab.method.copies import copied_tokens
from refine_lab.method.custom_selection import checked_selection
from refine_lab.method.memory import gains
from refine_lab.method.rewards import REWARDS
from refine_lab.method.selection import select_positions, selection_probabilities
from refine_lab.models.loading import load_tokenizer
from refine_lab.rng import Draws
from refine_lab.text import replace_surrogates
from refine_lab.training.adaptation import fit_to_length
from refine_lab.types import RewardFunction, SelectionFunction, SelectionInputs
from refine_lab.validation import MOST_CHARACTERS, MOST_SEED, ConfigError, require

MOST_TOKENS = 65_536
"""Maximum number of tokens in a document."""
MOST_KEPT = 1 << 30
"""Bytes of cached rollouts above which the oldest ones of other seeds and temperatures are dropped."""
SETTINGS = (
    *("reward", "group_by", "rollout_length", "group_size", "temperature"),
    *("num_chunks", "selection", "tau", "smoothing_kernel", "seed"),
)
"""Names of the settings that an exploration has, in the order of the page."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Document:
    """A tokenised text and the model's statistics of it."""

    text: str
    token_ids: np.ndarray
    reading: DocumentReading


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A request for rollouts that the worker has not completed."""

    document: Document
    positions: frozenset[int]
    temperature: float
    seed: int
    n: int
    k: int
    asked: Future[Any]  # the worker's
    made: Future[list[PrefixRollouts]]  # completes when the rollouts are cached


class Exploration:
    """A notebook's queries about a model and a document. Only `Future.result` blocks.

    `rewards` and `selections` are custom functions by name, in addition to the built-in ones. A position t is that of a
    prefix's last token; the token at t + 1 is the first rollout token.
    """

    def __init__(
        self,
        worker: Worker,
        model: str = "tiny-deltanet",
        rewards: dict[str, RewardFunction] | None = None,
        add_bos: bool | None = None,
        selections: dict[str, SelectionFunction] | None = None,
    ) -> None:
        """Raises FileNotFoundError or ValueError if the model's tokenizer is missing, and ValueError for a built-in name."""
        for kind, custom, known in (("reward", rewards, REWARDS), ("selection", selections, SELECTIONS)):
            for name in custom or {}:
                require(name not in known, f"the name of a custom {kind}", name, f"different from {', '.join(known)}")
        self.worker, self.model, self.add_bos = worker, model, add_bos
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
        self.rewards = REWARDS | dict(rewards or {})
        self.selections = {name: checked_selection(function) for name, function in (selections or {}).items()}
        self._selection: str | None = None
        self.refine = RefineConfig(group_size=8, group_by="prefix")
        self.reward, self.seed = "cosine", 0
        self.document: Document | None = None
        self._kept: dict[tuple[int, float, int], list[PrefixRollouts]] = {}
        self._readings: set[Future[DocumentReading]] = set()
        self._pending: list[Request] = []
        self._lock = threading.Lock()

    def tokens_of(self, text: str) -> np.ndarray:
        """Returns the text as token ids, [T] int32, with a BOS token before it depending on `add_bos` (see `DataConfig`).

        Raises ValueError for fewer than two tokens or more than `MOST_TOKENS`.
        """
        require(len(text) <= MOST_CHARACTERS, "a document's characters", len(text), f"at most {MOST_CHARACTERS:,}")
        ids = self.tokenizer(replace_surrogates(text), add_special_tokens=False)["input_ids"]
        ids = np.array([*beginning(self.tokenizer, self.add_bos), *ids], dtype=np.int32)
        if not 2 <= len(ids) <= MOST_TOKENS:
            held = f"has {len(ids):,} token{'' if len(ids) == 1 else 's'}" if text else "is empty"
            sentence = f"the document {held}; 2 to {MOST_TOKENS:,} tokens are allowed"
            raise ConfigError("a document's tokens", len(ids), f"from 2 to {MOST_TOKENS}", sentence)
        return ids

    def read(self, text: str) -> Future[Document | None]:
        """Requests a forward pass over the document; when it completes, it sets `document` and discards earlier rollouts.

        The future returns None, and nothing is set, if the reading has been cancelled.
        """
        ids = self.tokens_of(text)

        def keep(reading: DocumentReading | None) -> Document | None:
            with self._lock:
                if reading is None or asked not in self._readings:
                    return None
                self.document = Document(text=text, token_ids=ids, reading=reading)
                self._kept.clear()
                return self.document

        asked = self.worker.submit("read", model=self.model, token_ids=ids)
        self._readings.add(asked)
        made = then(keep, asked)
        made.add_done_callback(lambda _: self._readings.discard(asked))
        return made

    def cancel_reading(self) -> None:
        """Cancels the pending requests of `read`, which then set nothing, and of `read_by`."""
        with self._lock:
            readings, self._readings = self._readings, set()
        for asked in readings:
            self.worker.cancel(asked)

    def read_by(self, model: str) -> Future[DocumentReading | None]:
        """Requests a forward pass over the document by another model, run or checkpoint; None if it has been cancelled.

        The future raises FileNotFoundError or ValueError for a missing model, or one that tokenises the text
        differently.
        """
        ids, text = self._known.token_ids, replace_surrogates(self._known.text)
        asked = self.worker.submit("read", model=model, token_ids=ids, text=text, add_bos=self.add_bos)
        self._readings.add(asked)
        asked.add_done_callback(self._readings.discard)
        return asked

    # -- which positions ----------------------------------------------------------------------------------------------

    @property
    def fitting(self) -> RefineConfig:
        """Returns the method adjusted to the document: a short one has a smaller margin, or fewer chunks.

        Raises ValueError without a document and for one too short for a rollout.
        """
        return fit_to_length(self.refine, len(self._known.token_ids))

    def probabilities(self) -> Float[np.ndarray, "T"]:
        """Returns the probability that each position of the document is selected within its chunk (eq. 6)."""
        row = self._scores()
        return selection_probabilities(row, torch.tensor([row.shape[1]]), self.fitting)[0].numpy()

    def _scores(self) -> Float[torch.Tensor, "1 T"]:
        """Returns the score of each position (see `places.place_scores`); differences are those of `reading.long_short`."""
        reading, refine = self._known.reading, self.refine
        compared = np.zeros(len(reading.logprobs)) if reading.long_short is None else np.nan_to_num(reading.long_short)
        entropies, logprobs, differences = (
            torch.from_numpy(np.append(values[1:], 0.0)).unsqueeze(0)  # index t is about the token at t + 1
            for values in (reading.entropies, reading.logprobs, compared)
        )
        if refine.selection == "memory":
            return gains(differences, refine.rollout_length)
        if refine.selection not in ("copy", "custom"):
            return entropies.double()
        tokens = torch.from_numpy(reading.token_ids).long().unsqueeze(0)
        lengths = torch.tensor([tokens.shape[1]])
        if refine.selection == "copy":
            return copied_tokens(tokens, lengths, refine.window, refine.rollout_length)
        assert self._selection is not None
        inputs = SelectionInputs(
            tokens=tokens,
            lengths=lengths,
            entropies=entropies,
            logprobs=logprobs,
            rollout_length=refine.rollout_length,
            difference=lambda: differences.clone(),
        )
        return self.selections[self._selection](inputs)

    @property
    def selection(self) -> str:
        """Returns the name of the selection, which is that of the function for a custom one."""
        return self._selection or self.refine.selection

    def targets(self) -> list[int]:
        """Returns the positions that the settings and `seed` select, one per chunk, in document order."""
        row = torch.from_numpy(self.probabilities())[None]
        draws, num_chunks = Draws(seed=self.seed), self.fitting.num_chunks
        return select_positions(row, torch.tensor([row.shape[1]]), [0], draws, num_chunks)[0].tolist()

    def chunk_borders(self) -> list[int]:
        """Returns the first position of every chunk; a tail of fewer than c tokens belongs to no chunk."""
        count = self.fitting.num_chunks
        return [len(self._known.token_ids) // count * i for i in range(count)]

    def can_start(self, position: int) -> bool:
        """Returns whether k reference tokens follow the position, so that rollouts can be compared with them."""
        return 0 <= position < len(self._known.token_ids) - self.refine.rollout_length

    # -- rollouts and their rewards -----------------------------------------------------------------------------------

    def roll_out(self, positions: Sequence[int]) -> Future[list[PrefixRollouts]]:
        """Requests n rollouts of k tokens from each position that lacks them; the future returns the new ones.

        Rollouts that a pending request will make are not requested twice.
        """
        missing = {position for position in positions if not self.covers(position)}
        with self._lock:
            pending = [each for each in self._pending if self._makes(each, missing)]
        missing -= {position for each in pending for position in each.positions}
        made = [each.made for each in pending]
        if missing:
            made.append(self._request([position for position in dict.fromkeys(positions) if position in missing]))
        return then(lambda *parts: [each for part in parts for each in part], *made) if made else finished([])

    def _request(self, missing: list[int]) -> Future[list[PrefixRollouts]]:
        document = self._known
        keys = {position: self._key(position) for position in missing}

        def keep(made: list[PrefixRollouts] | None) -> list[PrefixRollouts]:
            for each in made or [] if self.document is document else []:
                before = self._kept.get(key := keys[each.position], [])
                self._kept[key] = [each, *(other for other in before if not _covers(each, *other.shape))]
            self._drop_oldest()
            return made or []  # None if the request was cancelled

        settings: dict[str, Any] = {"n": self.refine.group_size, "k": self.refine.rollout_length, "seed": self.seed}
        settings["temperature"] = self.refine.temperature
        arguments = {"model": self.model, "token_ids": document.token_ids, "version": document.reading.version}
        asked = self.worker.submit("rollouts", positions=missing, **arguments, **settings)
        made = then(keep, asked)
        request = Request(document=document, positions=frozenset(missing), asked=asked, made=made, **settings)
        with self._lock:
            self._pending = [*(each for each in self._pending if not each.made.done()), request]
        return made

    def _drop_oldest(self) -> None:
        """Drops the oldest rollouts of other seeds and temperatures while all together have more than `MOST_KEPT` bytes."""
        sizes = {key: sum(each.nbytes for each in made) for key, made in [*self._kept.items()]}
        excess = sum(sizes.values()) - MOST_KEPT
        for key, size in sizes.items():
            if excess > 0 and key[1:] != self._key(0)[1:]:
                self._kept.pop(key, None)
                excess -= size

    def _makes(self, request: Request, positions: Collection[int]) -> bool:
        """Returns whether a pending request will make rollouts of one of these positions for the current settings."""
        refine = self.refine
        same = (request.document, request.temperature, request.seed) == (self.document, refine.temperature, self.seed)
        enough = request.n >= refine.group_size and request.k >= refine.rollout_length
        return same and enough and not request.made.done() and not request.positions.isdisjoint(positions)

    def cancel(self, wanted: Collection[int] = ()) -> int:
        """Cancels the pending requests that make no rollouts of `wanted` positions for the current settings.

        Returns their number. The future of a cancelled request returns no rollouts.
        """
        with self._lock:
            superseded = [each for each in self._pending if not self._makes(each, wanted) and not each.made.done()]
            self._pending = [each for each in self._pending if each not in superseded]
        for each in superseded:
            self.worker.cancel(each.asked)
        return len(superseded)

    def covers(self, position: int) -> bool:
        """Returns whether the position has rollouts for the current settings."""
        return self._kept_of(position) is not None

    def frame(self, positions: Sequence[int] | None = None, clicked: Sequence[int] = ()) -> pd.DataFrame:
        """Returns the rollouts of these positions (None: the selected ones) under the current settings, with rewards.

        Rows are as in `rollouts.rollout_frame`, with an additional column `clicked`: rollouts of `clicked` positions that are
        not among `positions` follow, with each position rewarded separately, so that they do not affect the others; their
        advantages are NaN if the selected positions are one group. If more or longer rollouts are cached, the first n are
        used, with their first k tokens. Raises ValueError for no positions, and for a position without rollouts under
        these settings.
        """
        return self.framing(positions, clicked)()

    def framing(
        self,
        positions: Sequence[int] | None = None,
        clicked: Sequence[int] = (),
        through: Callable[[RewardFunction], RewardFunction] = lambda reward: reward,
    ) -> Callable[[], pd.DataFrame]:
        """Returns `frame` as a function to call later, from any thread, with the current settings and rollouts.

        `through` wraps the reward, as `RewardJob.by_position` does.
        """
        selected = self.targets() if positions is None else list(dict.fromkeys(positions))
        chosen, apart = self._rolled(selected), self._rolled(sorted({*clicked} - {*selected}))
        reward, k, group_by = through(self.rewards[self.reward]), self.refine.rollout_length, self.refine.group_by

        def frame() -> pd.DataFrame:
            parts = [rollout_frame([each], reward, k=k) for each in apart]
            if group_by == "sequence":
                parts = [part.assign(advantage=np.float32(np.nan)) for part in parts]
            chosen_part = rollout_frame(chosen, reward, k=k, group_by=group_by).assign(clicked=False)
            return pd.concat([chosen_part, *(part.assign(clicked=True) for part in parts)], ignore_index=True)

        return frame

    def _rolled(self, positions: Sequence[int]) -> list[PrefixRollouts]:
        """Returns the first n cached rollouts of each position."""
        found = []
        for position in positions:
            if (kept := self._kept_of(position)) is None:
                raise ValueError(f"position {position} has no rollouts under these settings: roll out from it first")
            found.append(kept.first(self.refine.group_size))
        return found

    def _kept_of(self, position: int) -> PrefixRollouts | None:
        """Returns cached rollouts of the position with at least the method's n and k, or None."""
        wanted = self.refine.group_size, self.refine.rollout_length
        return next((each for each in self._kept.get(self._key(position), []) if _covers(each, *wanted)), None)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the values of `SETTINGS` by name, as `set` takes them."""
        own = ("reward", "seed", "selection")
        return {name: getattr(self if name in own else self.refine, name) for name in SETTINGS}

    def set(self, **changes: Any) -> None:
        """Changes `reward`, `seed` or fields of the method. Raises ValueError for an invalid value and then changes nothing."""
        own = self._selection
        if "selection" in changes:
            name = changes["selection"]
            own = name if name in self.selections else None
            allowed = ", ".join(map(repr, (*SELECTIONS, *self.selections)))
            require(own is not None or name in SELECTIONS, "selection", name, f"one of {allowed}")
            changes["selection"] = name if own is None else "custom"
        reward, seed = changes.pop("reward", self.reward), changes.pop("seed", self.seed)
        require(reward in self.rewards, "reward", reward, "one of " + ", ".join(map(repr, self.rewards)))
        valid = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) and 0 <= seed <= MOST_SEED
        require(bool(valid), "seed", seed, f"a whole number from 0 to {MOST_SEED:,}")
        self.refine = replace(self.refine, **changes)
        self.reward, self.seed, self._selection = reward, int(seed), own

    def _key(self, position: int) -> tuple[int, float, int]:
        return position, self.refine.temperature, self.seed

    @property
    def _known(self) -> Document:
        if self.document is None:
            raise ValueError("no document has been read yet")
        return self.document


def _covers(rollouts: PrefixRollouts, n: int, k: int) -> bool:
    return rollouts.shape[0] >= n and rollouts.shape[1] >= k
