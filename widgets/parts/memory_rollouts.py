"""Rollouts with all writes to the memory and without the erased ones, in pairs with the same random numbers."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.explore.erasing import Erasure, Prediction
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.futures import together
from refine_lab.explore.rollout_pairs import pair_rollouts
from refine_lab.explore.rollouts import PrefixRollouts, rollout_frame
from refine_lab.explore.targets import Target
from refine_lab.method.rewards import cosine
from refine_lab.validation import MOST_SEED, require
from widgets.parts.cancelling_panel import CancellingPanel
from widgets.parts.controls import in_rows, number_field
from widgets.parts.number_field import show_refusals
from widgets.parts.rollout_pairs import RolloutPairs
from widgets.parts.token_text import token_decoder

NAMES = ("all writes", "erased")
"""Short names of the two sides."""


class MemoryRollouts(CancellingPanel):
    """Rolls out from the explained position with all writes and without the erased ones.

    `follow` says which position and erasure are meant. The reference is what follows in the document, and at its end the
    greedy answer with all writes. Everything works without a page: `roll_out`, `fields` and `pairs`.
    """

    def __init__(self, exploration: Exploration) -> None:
        super().__init__()
        self.exploration = exploration
        self._asked: tuple[Target, Prediction, Erasure] | None = None
        self._version: str | None = None
        self.rollout_pairs = RolloutPairs(hint="press Roll out both")
        self.fields = {
            "n": number_field("pairs (n)", 4, 1, 64),
            "k": number_field("tokens (k)", 5, 1, 64),
            "temperature": number_field("temperature", 1.0, 0.01, 10, step=0.1, whole=False),
            "seed": number_field("seed", 0, 0, MOST_SEED),
        }
        show_refusals(self, self.fields.values())
        tooltip = "Roll out from the explained position with all writes and without the erased ones"
        button = self.button("roll_out", tooltip, "Roll out both")
        self.children = [in_rows([*self.fields.values(), button, self.cancel_button]), self.notice, self.rollout_pairs]
        self._show_or_hide()

    @property
    def pairs(self) -> pd.DataFrame:
        """Returns the pairs of rollouts that are shown, as `rollout_pairs.pair_rollouts` does."""
        return self.rollout_pairs.pairs

    def use(self, exploration: Exploration) -> None:
        """Uses another model, of which nothing is explained yet."""
        self.exploration = exploration
        self.follow(None, None, None)

    def follow(
        self, target: Target | None, prediction: Prediction | None, erasure: Erasure | None, version: str | None = None
    ) -> None:
        """Sets what is explained and erased; rollouts for something else are removed, and without an erasure it is hidden.

        `version`: that of the weights of the prediction and the erasure, which must still be those of the model.
        """
        self._version = version
        known = None not in (target, prediction, erasure)
        asked: Any = (target, prediction, erasure) if known else None
        before = self._asked
        if (before is None) != (asked is None) or (
            before and any(x is not y for x, y in zip(before, asked, strict=True))
        ):
            self._asked = asked
            self.rollout_pairs.show(pd.DataFrame(), str, "")
            self.report("")
            self._show_or_hide()

    def roll_out(self) -> Future[Any]:
        """Rolls out with and without the erased writes, and shows the rollouts in pairs; the future then completes.

        The future raises ValueError while nothing is erased, and for more tokens than the reference has.
        """
        asked, exploration = self._asked, self.exploration
        settings = {name: field.value for name, field in self.fields.items()}
        self.report("Rolling out with and without the erased writes…")

        def ask() -> Future[list[Any]]:
            if asked is None:
                raise ValueError("nothing is erased yet: mark tokens, and press Erase")
            target, prediction, erasure = asked
            ids = exploration._known.token_ids
            if target.position == len(ids) - 1:
                ids = np.append(ids, np.array(prediction.answer_ids, dtype=ids.dtype))
            room = len(ids) - 1 - target.position
            require(settings["k"] <= room, "tokens (k)", settings["k"], f"at most {room}, as many as the reference has")
            request = {"model": exploration.model, "token_ids": ids, "positions": [target.position], **settings}
            request["version"] = self._version
            without = {"erased": erasure.erased, "cells": erasure.cells}
            made = [self.request(exploration.worker, "rollouts", **request, **each) for each in ({}, without)]
            return together(made)

        def show(made: list[list[PrefixRollouts]]) -> None:
            if asked is self._asked and exploration is self.exploration:
                pairs = _paired(*made)
                target = asked[0] if asked else None
                assert target is not None
                end = target.position == len(exploration._known.token_ids) - 1
                reference = "the greedy answer with all writes" if end else "the document"
                title = (
                    f"Rollouts after token {target.position:,} with the same random numbers (reference: {reference})"
                )
                self.rollout_pairs.show(pairs, token_decoder(exploration.tokenizer), title, NAMES)
                self.report(f"{len(pairs):,} pairs of rollouts after token {target.position:,}.")

        return self.after(ask, show)

    def shown(self) -> list[RolloutPairs]:
        """Returns the view of the rollouts if there are any."""
        return [] if self.pairs.empty else [self.rollout_pairs]

    def __repr__(self) -> str:
        return "\n".join(["MemoryRollouts", *self.notice.lines(), repr(self.rollout_pairs)])

    def _show_or_hide(self) -> None:
        self.layout.display = "none" if self._asked is None else ""


def _paired(intact: list[PrefixRollouts], edited: list[PrefixRollouts]) -> pd.DataFrame:
    return pair_rollouts(rollout_frame(intact, cosine), rollout_frame(edited, cosine))
