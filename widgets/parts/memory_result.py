"""A prediction with and without some writes, side by side, and the writes that it depends on most."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import traitlets
from jaxtyping import Float

from refine_lab.explore.attribution import Cell, WriteAttribution
from refine_lab.explore.erasing import Erasure, Prediction
from refine_lab.explore.targets import Target
from refine_lab.text import replace_surrogates
from widgets.core.base import Widget
from widgets.core.packing import PACKED
from widgets.figures.tables import visible
from widgets.parts.memory_metrics import heads_named, listed
from widgets.parts.token_text import Decode, texts_of

STRONGEST = 12
"""Number of listed writes."""


MOST_CONTEXT = 90
"""Maximum number of characters of the document that the heading repeats."""
MOST_NAMED = 6
"""Number of random tokens that the sentence about the control lists."""
LISTED = (
    "Each number is the signed effect of a write, as in the text. The size, by which the writes are ordered, is the sum of its "
    "absolute effects in the heads."
)
"""Explains the two numbers of a listed write."""
WHY = (
    "A write depends on its token and on those before it, so a fact is often stored with the token after it, such as the full "
    "stop of its sentence."
)
"""Explains why the strongest write is often not that of the word that is asked for."""


class MemoryResult(Widget):
    """What is explained, the prediction with and without the erased writes, and the strongest writes.

    Pressing a write sets `place`, to which the document then scrolls.
    """

    result = traitlets.Dict().tag(**PACKED)
    "Texts of the view; set by `show`."
    place = traitlets.List(traitlets.Int()).tag(sync=True)
    "First and last token of the write that was pressed last."

    def show(
        self,
        attribution: WriteAttribution | None,
        prediction: Prediction,
        target: Target,
        decode: Decode,
        *,
        cells: Collection[Cell] | None = None,
        erasure: Erasure | None = None,
        control: Erasure | None = None,
        tokens: Sequence[int] = (),
        model: str = "",
    ) -> None:
        """Shows a prediction, and the attribution once it is known.

        `control`: an erasure of as many random tokens, beside `erasure`. `tokens`: the document's token ids. `model`: the
        model in words.
        """
        columns = [_column("With all writes", prediction, target, decode)]
        change = ""
        if erasure is not None:
            first = min(erasure.erased)
            sides = [
                ("With all writes", erasure.before, erasure.losses_before),
                ("Without the erased writes", erasure.after, erasure.losses_after),
            ]
            if control is not None:
                count = len(control.erased)
                title = f"Without {count} random token{'s' if count > 1 else ''}"
                sides.append((title, control.after, control.losses_after))
            columns = [_column(title, made, target, decode, (first, losses)) for title, made, losses in sides]
            change = erased_sentence(erasure, target, attribution)
            change += control_sentence(control, target) if control is not None else ""
        strongest = []
        if attribution is not None:
            signed, effects = attribution.signed(cells), attribution.by_token(cells)
            strongest = [
                {
                    "token": token,
                    "text": _text(decode, [tokens[token]]),
                    "sign": "raises" if signed[token] > 0 else "lowers",
                }
                | {"effect": f"{number(signed[token], sign=True)} nats", "size": number(effects[token])}
                for token in attribution.top(STRONGEST, cells)
            ]
        self.result = {
            "model": model,
            "context": f"After “{before(tokens[: target.position + 1], decode)}”:" if len(tokens) else "",
            "question": explained(target, decode),
            "own": own_answer(prediction, target, decode),
            "columns": columns,
            "change": change,
            "strongest": strongest,
            "why": [LISTED, WHY],
            "listed": f"Strongest writes in {heads_named(cells)}",
        }

    @property
    def conclusion(self) -> str:
        """Returns the result in one sentence: what erasing changes, or the prediction and its strongest write."""
        if not self.result or self.result["change"]:
            return self.result.get("change", "")
        text = f"{self.result['question']} is {self.result['columns'][0]['facts'][0][1]}"
        for write in self.result["strongest"][:1]:
            text += f"; the strongest write, that of token {write['token']:,} “{write['text']}”,"
            text += f" has a signed effect of {write['effect']} and {write['sign']} it"
        return f"{text}."

    def clear(self) -> None:
        """Empties the view."""
        self.result = {}

    def __repr__(self) -> str:
        if not self.result:
            return "no prediction is explained yet"
        lines = [line for line in (self.result[name] for name in ("model", "context", "question", "own")) if line]
        for column in self.result["columns"]:
            facts = ", ".join(f"{name} {value}" for name, value in column["facts"])
            lines.append(f"  {column['title']}: {facts}; answer {column['answer']!r}")
        lines += [f"  {self.result['change']}"] if self.result["change"] else []
        if self.result["strongest"]:
            lines.append(f"  {self.result['listed']}:")
            lines += [
                f"    {w['token']} {w['text']!r}: {w['effect']} (size {w['size']}), {w['sign']} it"
                for w in self.result["strongest"]
            ]
        return "\n".join(lines)


def explained(target: Target, decode: Decode) -> str:
    """Returns what is explained, as a heading."""
    text = f"log p of “{_text(decode, target.token_ids)}”"
    if target.against:
        text += f" minus log p of “{_text(decode, target.against)}”"
    return f"{text} after token {target.position:,}"


def before(tokens: Sequence[int], decode: Decode) -> str:
    """Returns the end of the text before what is explained: its last line, or the last words of a long one."""
    text = replace_surrogates("".join(texts_of(decode, [*tokens[-MOST_CONTEXT:]]))).strip()
    line = text.rpartition("\n")[2]
    if len(line) > MOST_CONTEXT:
        line = line[-MOST_CONTEXT:].partition(" ")[2] or line[-MOST_CONTEXT:]
    cut = len(line) < len(text) or len(tokens) > MOST_CONTEXT
    return ("…" if cut else "") + visible(line)


def own_answer(prediction: Prediction, target: Target, decode: Decode) -> str:
    """Returns a sentence with the model's own most likely token where that is another one; empty where it is the explained."""
    own, first = int(prediction.alternatives[0]), target.token_ids[0]
    if own == first:
        return ""
    text = f"The model itself says “{_text(decode, [own])}” here ({_percent(prediction.probabilities[0])})"
    if target.against or len(target.token_ids) > 1:
        return f"{text}."
    return f"{text}, not “{_text(decode, [first])}” ({_percent(math.exp(prediction.value))})."


def loss_after(token: int, losses: Float[np.ndarray, "T"]) -> float:
    """Returns the mean loss of the tokens after a token, in nats; NaN if there are none."""
    return float(losses[token + 1 :].mean()) if token + 1 < len(losses) else math.nan


def predicted_change(erasure: Erasure, target: Target, attribution: WriteAttribution) -> float:
    """Returns by how much the target changes to first order, in nats: the negative sum of the erased effects."""
    erased = [token for token in erasure.erased if token <= target.position]
    return -float(attribution.signed(erasure.cells)[erased].sum())


def erased_sentence(erasure: Erasure, target: Target, attribution: WriteAttribution | None) -> str:
    """Returns one sentence: what is erased, by how much the target changes, and what the gradient predicts."""
    before, after = erasure.before.value, erasure.after.value
    tokens = f"token{'s' if len(erasure.erased) > 1 else ''} {listed(erasure.erased)}"
    name = "the contrast" if target.against else "log p"
    moved = "falls" if after < before else "rises" if after > before else "stays"
    text = f"Without the writes of {tokens} in {heads_named(erasure.cells)}, {name} {moved} from {number(before)}"
    text += f" to {number(after)} nats, a change of {number(after - before, sign=True)}"
    if attribution is None:
        return f"{text}."
    predicted = number(predicted_change(erasure, target, attribution), sign=True)
    return (
        f"{text}. This is exact. The effects of the writes, which are gradients, predict {predicted}: they are a local "
        "approximation, so trust the erasure where the two differ."
    )


def control_sentence(control: Erasure, target: Target) -> str:
    """Returns one sentence: what the target is without as many random tokens."""
    name = "the contrast" if target.against else "log p"
    shown = listed(control.erased[:MOST_NAMED]) + ("…" if len(control.erased) > MOST_NAMED else "")
    count = f"{len(control.erased)} random token{'s' if len(control.erased) > 1 else ''} ({shown})"
    return f" Without {count}, {name} is {number(control.after.value)} nats."


def number(value: float, sign: bool = False) -> str:
    """Returns a value in nats with two decimals, more if it is small, with a minus sign."""
    digits = 2 if abs(value) >= 0.1 or value == 0 else 4
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _column(
    title: str, prediction: Prediction, target: Target, decode: Decode, rest: tuple[int, Any] | None = None
) -> dict[str, Any]:
    """Returns a column of the table. `rest`: the first erased token, and the loss of every token of the document."""
    name = "contrast" if target.against else "log p"
    facts = [[name, f"{number(prediction.value)} nats"]]
    if not target.against:
        facts.append(["probability", _percent(math.exp(prediction.value))])
    of = "rank" if len(target.token_ids) == 1 else "rank of its first token"
    facts.append([of, f"{prediction.rank:,}"])
    if rest is not None:
        loss = loss_after(*rest)
        value = "no later tokens" if math.isnan(loss) else f"{loss:.4f} nats"
        facts.append([f"mean next-token loss after token {rest[0]:,} (the first erased one)", value])
    likely = zip(prediction.alternatives.tolist(), prediction.probabilities.tolist(), strict=True)
    first = target.token_ids[0]
    alternatives = [[_text(decode, [token]), chance, token == first] for token, chance in likely]
    answer = _text(decode, prediction.answer_ids)
    return {"title": title, "facts": facts, "alternatives": alternatives, "answer": answer}


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%"  # a number stays on the line of its unit


def _text(decode: Decode, tokens: Sequence[int]) -> str:
    return visible(replace_surrogates("".join(texts_of(decode, tokens))))
