"""An estimate with its standard error: confidence interval, two-sided test, and test of equivalence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from refine_lab.statistics.means import CONFIDENCE
from refine_lab.validation import require


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value whose distance from the truth, in units of `stderr`, follows Student's t with `df` degrees of freedom."""

    value: float
    stderr: float
    "Standard error; NaN if the data do not determine it, and then intervals and p-values are NaN too."
    df: float

    def interval(self, level: float = CONFIDENCE) -> tuple[float, float]:
        """Returns the two-sided confidence interval at a level between 0 and 1."""
        require(0 < level < 1, "level", level, "strictly between 0 and 1")
        half = float(stats.t.ppf((1 + level) / 2, self.df)) * self.stderr
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Returns the two-sided p-value of the hypothesis that the true value is 0."""
        return float(2 * stats.t.sf(abs(self.value) / self.stderr, self.df))

    def equivalence(self, margin: float) -> float:
        """Returns the p-value of the hypothesis that the true value is outside (-margin, margin).

        These are two one-sided tests (TOST; Schuirmann, 1987): p is the larger of the two, and it is below 0.05 exactly
        if the 90 % interval lies within the margin. The margin is a difference that would not matter, and has to be
        chosen before the data are seen. Raises ConfigError for a margin that is not above 0.
        """
        require(margin > 0 and math.isfinite(margin), "margin", margin, "a number above 0")
        above = stats.t.sf((self.value + margin) / self.stderr, self.df)
        below = stats.t.cdf((self.value - margin) / self.stderr, self.df)
        return float(max(above, below))


UNKNOWN = float("nan")


def undetermined(value: float) -> Estimate:
    """Returns an estimate without a standard error."""
    return Estimate(value=value, stderr=UNKNOWN, df=UNKNOWN)
