"""Makes strings safe to encode and to print (surrogates, control characters, long values); names durations and signals."""

from __future__ import annotations

import signal
import unicodedata

QUOTED = 200
"""Maximum number of characters of a value that a message quotes."""
ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters on which a terminal acts: controls, changes of direction, surrogates, separators."""


def replace_surrogates(text: str) -> str:
    """Returns the text with each unpaired surrogate, which UTF-8 cannot encode, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def refuse_surrogates(text: str, place: str) -> None:
    """Raises ValueError, which begins with `place`, for a string with an unpaired surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} contains an unpaired surrogate at character {error.start}") from error


def printable(text: str) -> str:
    r"""Returns the text with each character in `ACTING` written as its escape, such as `\x1b`; line ends are kept."""
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ACTING and c != "\n" else c for c in text)


def shorten(text: str, most: int = QUOTED) -> str:
    """Returns the text cut to `most` characters, with its full length where it is cut."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def quote(value: object) -> str:
    """Returns `repr(value)`, which contains no character in `ACTING`, cut to `QUOTED` characters."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, or a list nested as deeply
        return f"a value of type {type(value).__name__}"


def duration(seconds: float) -> str:
    """Returns a duration in seconds, in minutes from two minutes on, or in hours from two hours on."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def signal_name(number: int) -> str:
    """Returns the name of a signal, or `signal N` for a real-time signal, which has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
