"""Two models on one document: what each predicts better, the losses of both with an interval, and rollouts in pairs.

A and B are models or checkpoints with the same tokenizer. Every difference is B minus A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from transformers import PreTrainedTokenizerBase

from refine_lab.explore.client import Worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.futures import RequestCancelled, then
from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollout_pairs import pair_rollouts
from refine_lab.explore.rollouts import rollout_frame
from refine_lab.method.rewards import cosine
from refine_lab.models.loading import load_tokenizer
from refine_lab.statistics.blocks import BlockEstimate, block_bootstrap
from refine_lab.statistics.means import CONFIDENCE
from refine_lab.statistics.rest_change import signed
from refine_lab.text import replace_surrogates
from refine_lab.training.evaluation import MOST_KEY_LOSS
from refine_lab.training.key_tokens import THRESHOLD
from refine_lab.validation import require


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """The mean loss of A and of B over some tokens, in nats, and the estimated difference."""

    a: float
    b: float
    change: BlockEstimate
    "B minus A: below 0, B predicts the tokens better."
    equal: bool
    "Whether every token has the same loss, bit for bit."

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the difference: 0 to 0 if all losses are equal, NaN if it is undetermined."""
        return (0.0, 0.0) if self.equal else self.change.interval()

    @property
    def verdict(self) -> str:
        """Returns which model predicts the tokens better, that the difference is not beyond noise, or that it is unknown."""
        low, high = self.interval
        if self.equal:
            return "A and B predict every token of this document identically"
        if high < 0 or low > 0:
            return f"{'B' if high < 0 else 'A'} predicts this document better"
        if math.isnan(low):
            return "Whether the difference is beyond noise cannot be determined from this document"
        return "No difference beyond noise on this document"


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadingPair:
    """A document with the statistics of its tokens under two models, and its key tokens."""

    token_ids: np.ndarray
    a: DocumentReading
    b: DocumentReading
    key_tokens: Bool[np.ndarray, "T"]
    "The tokens whose long-short difference under `key_model` is at least `key_tokens.THRESHOLD`."
    key_model: str
    seed: int = 0
    "Seed of the bootstrap."

    def changes(self) -> dict[str, Float[np.ndarray, "T"]]:
        """Returns B minus A for each token, in nats: `logprob`, `entropy`, and `long_short` if both models have it.

        The long-short differences of two models are comparable if both are read in the same windows; otherwise
        `long_short` is left out.
        """
        found = {"logprob": self.b.logprobs - self.a.logprobs, "entropy": self.b.entropies - self.a.entropies}
        one, other = self.a.long_short, self.b.long_short
        if one is not None and other is not None and (np.isnan(one) == np.isnan(other)).all():
            found["long_short"] = other - one
        return found

    @cached_property
    def loss(self) -> LossChange:
        """Returns the losses of all tokens but the first, which no model predicts."""
        return self._change(np.arange(1, len(self.token_ids)))

    @cached_property
    def key_loss(self) -> LossChange | None:
        """Returns the losses of the key tokens, whose exponentials are LongPPL; None without any key token."""
        chosen = np.flatnonzero(self.key_tokens)
        return self._change(chosen) if len(chosen) else None

    def _change(self, tokens: np.ndarray) -> LossChange:
        a, b = (reading.losses[tokens].astype(float) for reading in (self.a, self.b))
        change = block_bootstrap(b - a, seed=self.seed)
        return LossChange(a=float(a.mean()), b=float(b.mean()), change=change, equal=bool((a == b).all()))

    def measures(self) -> pd.DataFrame:
        """Returns the loss, the perplexity and LongPPL of both models, one row each.

        `difference`, `low` and `high`: B minus A of the loss, in nats per token, with its 95 % interval. Rows of
        perplexities have B divided by A in their place, which is the exponential of the difference of the loss. `tokens`
        is the number of tokens. LongPPL is left out if there is no key token.
        """
        rows, loss, key = [], self.loss, self.key_loss
        rows.append(_row("loss", loss, lambda value: value))
        rows.append(_row("perplexity", loss, _perplexity))
        if key is not None:
            rows.append(_row("LongPPL", key, _perplexity))
        return pd.DataFrame(rows)

    def details(self) -> str:
        """Returns the difference of the loss with its interval and what the interval does not cover."""
        found = self.loss
        change, (low, high) = found.change, found.interval
        interval = "cannot be determined" if math.isnan(low) else f"{signed(low)} to {signed(high)}"
        return (
            f"The loss of B minus that of A is {signed(change.value)} nats per token ({CONFIDENCE:.0%} interval {interval}; "
            f"paired block bootstrap over {change.count:,} tokens, block length {change.block_length}, seed {self.seed}). The "
            "interval is for more text like this document; it does not cover other documents or training seeds."
            f"{change.caution('compared')}"
        )

    def key_details(self) -> str:
        """Returns which tokens are key tokens and who chose them."""
        count, whose = int(self.key_tokens.sum()), f"{self.key_model} predicts"
        rule = f"that {whose} at least {THRESHOLD:g} nat better from the whole prefix than from its last tokens alone"
        if not count:
            return f"LongPPL is left out: this document has no key token, that is, no token {rule}."
        tokens = "key tokens" if count > 1 else "key token"
        chosen = f"LongPPL is over the same {count:,} {tokens} for both models: the {tokens[4:]} {rule}."
        favours = f" This choice favours {self.key_model}; a third model can choose them instead."
        return chosen + favours * (self.key_model in ("A", "B"))


class TwoModels:
    """Requests about two models and a document. Only `Future.result` blocks.

    `key_model` names the model that chooses the key tokens of LongPPL; None is A. A choice by one of the compared models
    favours that model. `submit`: sends the requests in place of `worker.submit`; where one is cancelled, the future raises
    RequestCancelled. Raises FileNotFoundError or ValueError for a missing model, and ValueError for models with different
    tokenizers.
    """

    def __init__(
        self,
        worker: Worker,
        a: str,
        b: str,
        *,
        key_model: str | None = None,
        add_bos: bool | None = None,
        submit: Callable[..., Future[Any]] | None = None,
    ) -> None:
        self.worker, self.a, self.b, self.key_model = worker, a, b, key_model
        self._submit = submit or worker.submit
        self._exploration = Exploration(worker, a, add_bos=add_bos)
        self.tokenizer: PreTrainedTokenizerBase = self._exploration.tokenizer
        for name in {b, key_model} - {a, None}:
            same = load_tokenizer(str(name)).get_vocab() == self.tokenizer.get_vocab()
            require(same, "a model to compare with", name, f"one with the tokenizer of {a!r}")

    def read(self, text: str) -> Future[ReadingPair]:
        """Requests a forward pass of each model over the document.

        The future raises ValueError for a model that tokenises the text differently, and for losses that are not finite.
        """
        ids = self._exploration.tokens_of(text)
        names = [self.a, self.b, *([] if self.key_model in (None, self.a, self.b) else [self.key_model])]
        request = {"token_ids": ids, "text": replace_surrogates(text), "add_bos": self._exploration.add_bos}

        def paired(*found: Any) -> ReadingPair:
            readings = _complete(found)
            for name, reading in zip(names, readings, strict=True):
                wrong = int((~np.isfinite(reading.logprobs[1:])).sum())
                require(
                    not wrong, "a model to compare", name, f"one whose losses are finite ({wrong:,} tokens are not)"
                )
            chosen = dict(zip(names, readings, strict=True))[self.key_model or self.a]
            difference = np.zeros(len(ids)) if chosen.long_short is None else np.nan_to_num(chosen.long_short)
            return ReadingPair(
                token_ids=ids,
                a=readings[0],
                b=readings[1],
                key_tokens=difference >= THRESHOLD,
                key_model=self._called(self.key_model or self.a),
            )

        return then(paired, *(self._submit("read", model=name, **request) for name in names))

    def roll_out(self, pair: ReadingPair, position: int, **settings: Any) -> Future[pd.DataFrame]:
        """Requests rollouts of both models from the prefix that ends at `position`, with the same random numbers.

        `settings`: `n`, `k`, `temperature` and `seed` of `rollouts.rollouts_at`. The uniform numbers that tokens are sampled
        with depend only on the seed, the position and the rollout's index, so equal models give equal rollouts. The future
        returns `rollout_pairs.pair_rollouts`, with the cosine reward, and raises ValueError for a position without k
        following tokens.
        """
        request = {"token_ids": pair.token_ids, "positions": [position], **settings}

        def paired(*found: Any) -> pd.DataFrame:
            a, b = _complete(found)
            return pair_rollouts(rollout_frame(a, cosine), rollout_frame(b, cosine))

        versions = ((self.a, pair.a.version), (self.b, pair.b.version))
        asked = [self._submit("rollouts", model=name, version=version, **request) for name, version in versions]
        return then(paired, *asked)

    def _called(self, name: str) -> str:
        return {self.b: "B", self.a: "A"}.get(name, repr(name))


def _complete(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the results of requests. Raises RequestCancelled if one of them was cancelled."""
    if any(each is None for each in found):
        raise RequestCancelled
    return found


def likely_tokens(pair: ReadingPair, token: int) -> pd.DataFrame:
    """Returns the most likely tokens in place of a token under both models, one row per rank, from the most likely on.

    Columns for `a` and `b`: the token id `id_a`, its probability `p_a`, and `elsewhere_a`, the token's rank in the other
    model's list, from 1, or 0 if it is not among them. Raises ValueError for a token that has none.
    """
    last = len(pair.token_ids) - 1
    require(1 <= token <= last, "a token", token, f"from 1 to {last}: no model predicts the first one")
    a, b = pair.a.alternatives[token], pair.b.alternatives[token]
    columns: dict[str, Any] = {"rank": np.arange(1, len(a) + 1)}
    for name, reading, own, other in (("a", pair.a, a, b), ("b", pair.b, b, a)):
        columns |= {
            f"id_{name}": own,
            f"p_{name}": reading.probabilities[token],
            f"elsewhere_{name}": ranks_elsewhere(own[None], other[None])[0],
        }
    return pd.DataFrame(columns)


def ranks_elsewhere(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the rank in `other` of each token of `own`, both [T, A] and ordered, from 1; 0 for an absent token."""
    same = own[:, :, None] == other[:, None, :]
    return np.where(same.any(2), same.argmax(2) + 1, 0).astype(np.uint8)


def _row(name: str, found: LossChange, scale: Any) -> dict[str, Any]:
    low, high = found.interval
    values = {"A": scale(found.a), "B": scale(found.b), "difference": scale(found.b - found.a)}
    return {"measure": name, **values, "low": scale(low), "high": scale(high), "tokens": found.change.count}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, MOST_KEY_LOSS)) if not math.isnan(loss) else math.nan
