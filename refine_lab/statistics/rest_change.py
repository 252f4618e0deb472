"""How adaptation to the beginning of a document changes the loss on its unseen remainder, and whether this is a gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from refine_lab.statistics.blocks import BlockEstimate, block_bootstrap
from refine_lab.statistics.means import CONFIDENCE
from refine_lab.validation import require


@dataclass(frozen=True, kw_only=True)
class RestChange:
    """The mean loss of the held-out remainder before and after adaptation, and the estimated change, in nats per token."""

    before: float
    after: float
    change: BlockEstimate
    "After minus before: below 0 the remainder is predicted better."
    seed: int

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the change; NaN if the changes of the tokens do not determine it."""
        return self.change.interval()

    @property
    def verdict(self) -> str:
        """Returns `a gain beyond noise` if the interval is below 0, and `no gain beyond noise` in every other case."""
        low, high = self.interval
        if high < 0:
            return "a gain beyond noise"
        return "no gain beyond noise, and the loss rises" if low > 0 else "no gain beyond noise"

    @property
    def sentence(self) -> str:
        """Returns the result as one sentence: the verdict and the details."""
        return f"{self.verdict[0].upper()}{self.verdict[1:]}: {self.details}"

    @property
    def details(self) -> str:
        """Returns the change with its interval, the block length and the seed, as the second half of a sentence."""
        (low, high), estimate = self.interval, self.change
        interval = f"{CONFIDENCE:.0%} interval {signed(low)} to {signed(high)}"
        if np.isnan(low):
            interval = "an interval cannot be determined"
        return (
            f"the loss on the held-out remainder changes by {signed(estimate.value)} nats per token, from {self.before:.4f} to "
            f"{self.after:.4f} ({interval}; block bootstrap over {estimate.count:,} tokens, block length "
            f"{estimate.block_length}, seed {self.seed}).{self.caution}"
        )

    @property
    def caution(self) -> str:
        """Returns a sentence, after a space, if few tokens are held out; otherwise an empty string."""
        return self.change.caution("held out")

    def row(self) -> dict[str, float | int | str]:
        """Returns the values by name: `tokens`, `before`, `after`, `change`, `low`, `high`, `block_length`, `verdict`."""
        low, high = self.interval
        estimate = self.change
        numbers = {"before": self.before, "after": self.after, "change": estimate.value, "low": low, "high": high}
        return {"tokens": estimate.count, **numbers, "block_length": estimate.block_length, "verdict": self.verdict}


def rest_change(before: Float[np.ndarray, "R"], after: Float[np.ndarray, "_"], *, seed: int = 0) -> RestChange:
    """Compares the losses of each token of the held-out remainder, in nats, before and after adaptation.

    The change is the mean of after - before over the R tokens, with its standard error from `block_bootstrap`, since
    the changes of neighbouring tokens are correlated. It is for other text of the same kind after this one adaptation.
    Raises ConfigError for unequal lengths and for losses that are not finite.
    """
    require(before.shape == after.shape, "losses after adaptation", len(after), f"{len(before)} tokens, as before it")
    change = block_bootstrap(after.astype(float) - before.astype(float), seed=seed)
    return RestChange(before=float(before.mean()), after=float(after.mean()), change=change, seed=seed)


@dataclass(frozen=True, kw_only=True)
class RestDifference:
    """The difference between two methods in the loss on one held-out remainder, after adaptation from the same weights."""

    first: str
    second: str
    change: RestChange
    "From the losses after the first method to those after the second, token by token."

    @property
    def verdict(self) -> str:
        """Returns which method predicts the remainder better, or `no difference beyond noise` if the interval contains 0.

        Without an interval, it says that neither can be determined.
        """
        low, high = self.change.interval
        if np.isnan(low):
            return "whether the methods differ beyond noise cannot be determined"
        if high < 0:
            return f"{self.second} is better beyond noise"
        return f"{self.first} is better beyond noise" if low > 0 else "no difference beyond noise"

    @property
    def details(self) -> str:
        """Returns the difference with its interval, and what it does not cover, as the second half of a sentence."""
        (low, high), change = self.change.interval, self.change
        interval = "an interval cannot be determined"
        if not np.isnan(low):
            interval = f"{CONFIDENCE:.0%} interval {signed(low)} to {signed(high)}"
        return (
            f"the loss on the held-out remainder is {change.after:.4f} nats per token after {self.second} and "
            f"{change.before:.4f} after {self.first}, a difference of {signed(change.change.value)} ({interval}), for this "
            f"document and seed alone.{change.caution}"
        )


def rest_difference(
    first: str, losses: Float[np.ndarray, "R"], second: str, others: Float[np.ndarray, "_"], *, seed: int = 0
) -> RestDifference:
    """Compares the losses of each token of the held-out remainder after two methods, paired by token, as `rest_change`."""
    return RestDifference(first=first, second=second, change=rest_change(losses, others, seed=seed))


def signed(value: float) -> str:
    """Formats a number of nats with its sign."""
    return f"{value:+.4f}".replace("-", "−")
