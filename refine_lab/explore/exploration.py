"""One document under one model, and every "what if" about it: which positions, which rollouts, which rewards.

The model is the worker's; what it gave is kept here, so that another reward, grouping, selection or a smaller k is arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refine_lab.config import RefineConfig, require
from refine_lab.draws import Draws
from refine_lab.explore.client import Worker
from refine_lab.explore.futures import finished, then
from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollouts import PrefixRollouts, assess
from refine_lab.models.loading import resolve
from refine_lab.rewards import REWARDS
from refine_lab.selection import select_positions, selection_probabilities
from refine_lab.text import sound
from refine_lab.ttt.adaptation import fitted
from refine_lab.types import RewardFunction

MOST_TOKENS = 65_536
"""Of a document."""

Key = tuple[int, float, int]
"""What rollouts are kept under: position, temperature, seed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Document:
    """A text as a model's tokenizer cuts it, and what the model made of it."""

    text: str
    token_ids: np.ndarray
    reading: DocumentReading


class Exploration:
    """What a notebook asks of a model about a document. Nothing here waits but `Future.result`.

    `rewards` are functions of the user's own by name, beside `cosine`, `binary` and `hybrid`. A position t is that of a
    prefix's last token; the token at t + 1 is the first that is rolled out.
    """

    def __init__(
        self, worker: Worker, model: str = "tiny-deltanet", rewards: dict[str, RewardFunction] | None = None
    ) -> None:
        """Raises FileNotFoundError or ValueError for a model whose tokenizer is not there, and ValueError for a name that is
        one of the three."""
        for name in rewards or {}:
            require(name not in REWARDS, "the name of a reward of your own", name, f"another than {', '.join(REWARDS)}")
        self.worker, self.model = worker, model
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(model))
        self.rewards: dict[str, RewardFunction] = REWARDS | {
            name: _own(name, function) for name, function in (rewards or {}).items()
        }
        self.method = RefineConfig(group_size=8, group_by="prefix")
        self.reward, self.seed = "cosine", 0
        self.document: Document | None = None
        self._kept: dict[Key, PrefixRollouts] = {}

    def tokens_of(self, text: str) -> np.ndarray:
        """The text as token ids, [T] int32. Raises ValueError for fewer than two tokens or more than `MOST_TOKENS`."""
        ids = np.array(self.tokenizer(sound(text), add_special_tokens=False)["input_ids"], dtype=np.int32)
        require(2 <= len(ids) <= MOST_TOKENS, "a document's tokens", len(ids), f"from 2 to {MOST_TOKENS}")
        return ids

    def read(self, text: str) -> Future[Document]:
        """Have the document read; when it has been, it is `document`, and what was rolled out before is forgotten."""
        ids = self.tokens_of(text)

        def keep(reading: DocumentReading) -> Document:
            self.document = Document(text=text, token_ids=ids, reading=reading)
            self._kept.clear()
            return self.document

        return then(self.worker.submit("read", model=self.model, token_ids=ids), keep)

    def read_by(self, model: str) -> Future[DocumentReading]:
        """The document as another model reads it: another one, a run, a checkpoint of a step.

        The future raises FileNotFoundError or ValueError for a model that is not there, or to which the text is other tokens.
        """
        known = self._known
        return self.worker.submit("read", model=model, token_ids=known.token_ids, text=sound(known.text))

    # -- which positions ----------------------------------------------------------------------------------------------

    @property
    def fitting(self) -> RefineConfig:
        """The method as it fits the document: a short one has a smaller margin, or fewer chunks.

        Raises ValueError for no document and for one without room for a rollout.
        """
        return fitted(self.method, len(self._known.token_ids))

    def probabilities(self) -> Float[np.ndarray, "T"]:
        """The probability with which each position of the document is selected within its chunk (eq. 6)."""
        return self._probabilities()[0].numpy()

    def targets(self) -> list[int]:
        """The positions that are drawn with `seed`, one a chunk."""
        lengths, draws = torch.tensor([len(self._known.token_ids)]), Draws(seed=self.seed)
        chosen = select_positions(self._probabilities(), lengths, [0], draws, self.fitting.num_chunks)
        return chosen[0].tolist()

    def chunk_borders(self) -> list[int]:
        """The first position of every chunk; a tail of fewer than c tokens at the end belongs to none."""
        size, count = len(self._known.token_ids) // self.fitting.num_chunks, self.fitting.num_chunks
        return [size * i for i in range(count)]

    def can_start(self, position: int) -> bool:
        """Whether k true tokens follow the position, so that rollouts can be compared with them."""
        return 0 <= position < len(self._known.token_ids) - self.method.rollout_length

    def _probabilities(self) -> torch.Tensor:
        about = np.append(self._known.reading.entropies[1:], 0.0)  # selection's H_t is about the token at t + 1
        row = torch.tensor(about, dtype=torch.float64)[None]
        return selection_probabilities(row, torch.tensor([row.shape[1]]), self.fitting)

    # -- rollouts and their rewards -----------------------------------------------------------------------------------

    def roll_out(self, positions: Sequence[int]) -> Future[list[PrefixRollouts]]:
        """Have n rollouts of k tokens made of each position that has not as many yet; those of all of them."""
        document, wanted = self._known, list(dict.fromkeys(positions))
        missing = [position for position in wanted if self._covering(position) is None]
        keys = {position: self._key(position) for position in missing}

        def keep(made: list[PrefixRollouts]) -> list[PrefixRollouts]:
            if self.document is document:
                self._kept |= {keys[each.position]: each for each in made}
            return made

        if not missing:
            return finished([])
        method = self.method
        settings = {"n": method.group_size, "k": method.rollout_length, "temperature": method.temperature}
        asked = self.worker.submit(
            "rollouts", model=self.model, token_ids=document.token_ids, positions=missing, seed=self.seed,
            version=document.reading.version, **settings,
        )  # fmt: skip
        return then(asked, keep)

    def frame(self, positions: Sequence[int] | None = None) -> pd.DataFrame:
        """The rollouts of these positions (None: of all) under the present settings, with rewards (see `rollouts.assess`).

        Of more and of longer rollouts the first n count, with their first k tokens. Raises ValueError where there are none.
        """
        asked = sorted({key[0] for key in self._kept}) if positions is None else list(dict.fromkeys(positions))
        found = [each for position in asked if (each := self._covering(position)) is not None]
        chosen = [each.first(self.method.group_size) for each in found]
        group_by = self.method.group_by
        return assess(chosen, self.rewards[self.reward], k=self.method.rollout_length, group_by=group_by)

    def set(self, **changes: Any) -> None:
        """Change `reward`, `seed` or fields of the method. Raises ValueError for what cannot be, and changes nothing then."""
        reward, seed = changes.pop("reward", self.reward), changes.pop("seed", self.seed)
        require(reward in self.rewards, "reward", reward, "one of " + ", ".join(map(repr, self.rewards)))
        whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        require(whole and int(seed) >= 0, "seed", seed, "a whole number of at least 0")
        seed = int(seed)
        method = replace(self.method, **changes)
        self.reward, self.seed, self.method = reward, seed, method

    def _key(self, position: int) -> Key:
        return position, self.method.temperature, self.seed

    def _covering(self, position: int) -> PrefixRollouts | None:
        """What is kept of the position, where it is as many and as long as the method asks."""
        kept = self._kept.get(self._key(position))
        wide = kept is not None and all(
            have >= want
            for have, want in zip(kept.shape, (self.method.group_size, self.method.rollout_length), strict=True)
        )
        return kept if wide else None

    @property
    def _known(self) -> Document:
        if self.document is None:
            raise ValueError("no document has been read yet")
        return self.document


def _own(name: str, function: RewardFunction) -> RewardFunction:
    """A reward of the user's own, whose errors name it; one that would end the process is one too."""

    @wraps(function)
    def reward(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error}") from error

    return reward
