"""One document under one model, and every "what if" about it: which positions, which rollouts, which rewards.

The model is the worker's; what it gave is kept here, so that another reward, grouping, selection or a smaller k is arithmetic.
What is kept saves time alone: a rollout that is made anew is the same bit for bit (see `rollouts.rollouts_at`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from refine_lab.config import RefineConfig, require
from refine_lab.data.text import sound
from refine_lab.data.tokenizer import beginning
from refine_lab.explore.client import Worker
from refine_lab.explore.futures import finished, then
from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollouts import PrefixRollouts, assess, assess_alone
from refine_lab.method.custom_reward import of_inputs
from refine_lab.method.rewards import REWARDS
from refine_lab.method.selection import select_positions, selection_probabilities
from refine_lab.models.loading import load_tokenizer
from refine_lab.rng import Draws
from refine_lab.training.adaptation import fitted
from refine_lab.types import RewardFunction, RewardInputs

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

    `rewards` are functions of the user's own by name, beside the built-in ones. A position t is that of a prefix's last
    token; the token at t + 1 is the first that is rolled out.
    """

    def __init__(
        self,
        worker: Worker,
        model: str = "tiny-deltanet",
        rewards: dict[str, RewardFunction] | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Raises FileNotFoundError or ValueError for a model whose tokenizer is not there, and ValueError for the
        name of a built-in reward."""
        for name in rewards or {}:
            require(name not in REWARDS, "the name of a reward of your own", name, f"another than {', '.join(REWARDS)}")
        self.worker, self.model, self.add_bos = worker, model, add_bos
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
        self.rewards: dict[str, RewardFunction] = REWARDS | {
            name: _own(name, function) for name, function in (rewards or {}).items()
        }
        self.method = RefineConfig(group_size=8, group_by="prefix")
        self.reward, self.seed = "cosine", 0
        self.document: Document | None = None
        self._kept: dict[Key, list[PrefixRollouts]] = {}

    def tokens_of(self, text: str) -> np.ndarray:
        """The text as token ids, [T] int32, with a BOS token before it as `add_bos` says (see `DataConfig`).

        Raises ValueError for fewer than two tokens or more than `MOST_TOKENS`.
        """
        own = self.tokenizer(sound(text), add_special_tokens=False)["input_ids"]
        ids = np.array([*beginning(self.tokenizer, self.add_bos), *own], dtype=np.int32)
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
        return self.worker.submit(
            "read", model=model, token_ids=known.token_ids, text=sound(known.text), add_bos=self.add_bos
        )

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
        """The positions that the settings and `seed` select, one a chunk, in the order of the document."""
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
        """Have n rollouts of k tokens made of each position that lacks them; the future gives those that were made."""
        document, wanted = self._known, list(dict.fromkeys(positions))
        missing = [position for position in wanted if not self.covers(position)]
        keys = {position: self._key(position) for position in missing}

        def keep(made: list[PrefixRollouts]) -> list[PrefixRollouts]:
            for each in made if self.document is document else []:
                before = self._kept.get(keys[each.position], [])
                self._kept[keys[each.position]] = [
                    each,
                    *(other for other in before if not _covers(each, *other.shape)),
                ]
            return made

        if not missing:
            return finished([])
        method = self.method
        asked = self.worker.submit(
            "rollouts",
            model=self.model,
            token_ids=document.token_ids,
            positions=missing,
            n=method.group_size,
            k=method.rollout_length,
            temperature=method.temperature,
            seed=self.seed,
            version=document.reading.version,
        )
        return then(asked, keep)

    def covers(self, position: int) -> bool:
        """Whether the position's rollouts under the present settings are there."""
        return self._kept_of(position) is not None

    def frame(self, positions: Sequence[int] | None = None, clicked: Sequence[int] = ()) -> pd.DataFrame:
        """The rollouts of these positions (None: of those that are selected) under the present settings, with rewards.

        Rows as `rollouts.assess` gives them, and a column `clicked`: rollouts of `clicked` positions that are not among
        `positions` follow, each position rewarded alone (see `rollouts.assess_alone`), so that no number of the others
        depends on them. Where more or longer rollouts are kept, the first n count, with their first k tokens. Raises
        ValueError for no positions, and for a position without rollouts under these settings.
        """
        return self.framing(positions, clicked)()

    def framing(
        self, positions: Sequence[int] | None = None, clicked: Sequence[int] = ()
    ) -> Callable[[], pd.DataFrame]:
        """`frame` as a function to be called later, from any thread: with the settings and rollouts of now."""
        asked = self.targets() if positions is None else list(dict.fromkeys(positions))
        apart = sorted({*clicked} - {*asked})
        chosen, alone = self._rolled(asked), self._rolled(apart)
        reward, method = self.rewards[self.reward], self.method
        settings = {"k": method.rollout_length, "group_by": method.group_by}

        def frame() -> pd.DataFrame:
            parts = [assess(chosen, reward, **settings).assign(clicked=False)]
            parts += [assess_alone(each, reward, **settings).assign(clicked=True) for each in alone]
            return pd.concat(parts, ignore_index=True)

        return frame

    def _rolled(self, positions: Sequence[int]) -> list[PrefixRollouts]:
        """What is kept of each position: the first n."""
        found = {position: self._kept_of(position) for position in positions}
        for position, each in found.items():
            if each is None:
                raise ValueError(f"position {position} has no rollouts under these settings: roll out from it first")
        return [each.first(self.method.group_size) for each in found.values() if each is not None]

    def _kept_of(self, position: int) -> PrefixRollouts | None:
        """Kept rollouts of the position that are as many and as long as the method asks."""
        wanted = self.method.group_size, self.method.rollout_length
        return next((each for each in self._kept.get(self._key(position), []) if _covers(each, *wanted)), None)

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

    @property
    def _known(self) -> Document:
        if self.document is None:
            raise ValueError("no document has been read yet")
        return self.document


def _covers(rollouts: PrefixRollouts, n: int, k: int) -> bool:
    return rollouts.shape[0] >= n and rollouts.shape[1] >= k


def _own(name: str, function: RewardFunction) -> RewardFunction:
    """A reward of the user's own, whose errors name it; one that would end the process is one too."""
    compute = of_inputs(function)

    def reward(inputs: RewardInputs) -> Any:
        try:
            return compute(inputs)
        except (Exception, SystemExit) as error:
            raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error}") from error

    reward.__name__ = getattr(function, "__name__", name)
    return reward
