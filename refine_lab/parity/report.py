"""The gate's result: one row per comparison, a table, and one sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """One comparison: a quantity's largest relative error over all branches with one prefix length, and its location."""

    quantity: str
    prefix: int
    error: float
    tolerance: float
    where: str

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # not for NaN

    def __str__(self) -> str:
        off = f"off by {self.error:.1e}, allowed {self.tolerance:.0e}"
        return f"{self.quantity} after {self.prefix} tokens ({self.where}) is {off}"


@dataclass(frozen=True)
class Parity:
    """The gate's result; it prints as a table and a sentence."""

    subject: str
    rows: tuple[Comparison, ...]
    layer: str | None = None
    "The first layer whose outputs differ, if one was found."

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)

    @property
    def sentence(self) -> str:
        """Returns what holds, or what fails first and where."""
        wrong = [row for row in self.rows if not row.holds]
        if not wrong:
            return f"parity holds for {self.subject} in all of {len(self.rows)} comparisons"
        layer = f"; {self.layer} is the first layer that differs" if self.layer else ""
        return f"parity fails for {self.subject} in {len(wrong)} of {len(self.rows)} comparisons: {wrong[0]}{layer}"

    def check(self) -> None:
        """Raises RuntimeError with the sentence if parity does not hold, which stops a notebook cell."""
        if not self.holds:
            raise RuntimeError(self.sentence)

    def __str__(self) -> str:
        """Relative errors by prefix and quantity; `!` marks those above the tolerance in the last row."""
        quantities = list(dict.fromkeys(row.quantity for row in self.rows))
        cells = {(row.prefix, row.quantity): row for row in self.rows}
        lines = ["  prefix" + "".join(f"{name:>11} " for name in quantities)]
        for prefix in sorted({row.prefix for row in self.rows}):
            found = [cells[prefix, name] for name in quantities]
            lines.append(f"{prefix:8d}" + "".join(f"{row.error:11.1e}{' ' if row.holds else '!'}" for row in found))
        allowed = [max(row.tolerance for row in self.rows if row.quantity == name) for name in quantities]
        lines.append(" allowed" + "".join(f"{tolerance:11.0e} " for tolerance in allowed))
        return "\n".join([*map(str.rstrip, lines), self.sentence])
