"""The rollouts that begin at the selected token, shown beside the document."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import traitlets

from refine_lab.runs.schema import ROLLOUT_TYPES, completed
from widgets.core.base import Widget
from widgets.core.packing import PACKED, pack
from widgets.parts.rollout_columns import rollout_columns
from widgets.parts.token_text import texts_of, token_decoder


class ClickResult(Widget):
    """The reference and the rollouts of one position, best reward first, and a sentence with their means.

    `decode`: as for `RolloutInspector`. `token` is the first token of the rollouts, as the map numbers them.
    """

    columns = traitlets.Dict().tag(**PACKED)
    "The rollouts of the position, as returned by `RolloutColumns.packed`; in a page without Python, all rollouts."
    token = traitlets.Int(-1).tag(sync=True)
    "The first token of the rollouts, or -1."
    chosen = traitlets.Int(-1).tag(sync=True)
    "The sample index of the rollout that was clicked last, or -1."
    reward = traitlets.Unicode("reward").tag(sync=True)
    "Name of the reward."

    def __init__(self, *, decode: Any) -> None:
        self._decode, self._known = token_decoder(decode), {}
        self._frame = completed(pd.DataFrame(columns=["step", *ROLLOUT_TYPES]))
        super().__init__(columns=self._packed(self._frame))

    def show(self, rollouts: pd.DataFrame, token: int, reward: str) -> None:
        """Shows the rollouts of a frame that begin at `token`."""
        self._frame = rollouts
        with self.hold_sync():
            self.columns, self.reward = self._packed(self.rollouts_at(token)), reward
            self.token, self.chosen = token, -1

    def rollouts_at(self, token: int) -> pd.DataFrame:
        """Returns the rollouts that begin at a token."""
        return self._frame[self._frame["position"] == token - 1]

    @property
    def sentence(self) -> str:
        """Describes the rollouts by their means, as the page does; empty without rollouts."""
        frame = self.rollouts_at(self.token)
        if frame.empty:
            return ""
        mean, best, match = frame["reward"].mean(), frame["reward"].max(), frame["binary"].mean()
        facts = f"mean {self.reward} reward {mean:.3f}, best {best:.3f}, exact-match rate {100 * match:.1f} %"
        return f"{len(frame)} rollout{'' if len(frame) == 1 else 's'}: {facts}, entropy {frame['entropy'].iloc[0]:.3f} nats"

    def page_state(self) -> dict[str, Any]:
        """Returns the state with the rollouts of all positions."""
        return super().page_state() | {"columns": pack(self._packed(self._frame))}

    def _packed(self, frame: pd.DataFrame) -> dict[str, Any]:
        return rollout_columns(frame.reset_index(drop=True), self._decode, self._known).packed()

    def __repr__(self) -> str:
        if not self.sentence:
            return "ClickResult: no rollouts"
        order = np.argsort(-self.rollouts_at(self.token)["reward"].to_numpy(), kind="stable")[:3]
        lines = [f"ClickResult at token {self.token}: {self.sentence}"]
        for _, row in self.rollouts_at(self.token).iloc[order].iterrows():
            lines.append(f"  {row['reward']:7.3f}  {self._text(row['rollout_ids'])}")
        return "\n".join(lines)

    def _text(self, ids: Any) -> str:
        return repr("".join(texts_of(self._decode, ids)))
