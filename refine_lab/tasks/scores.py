"""How an answer is scored against its references: exact match, recall, and the F1 of their words.

An answer counts up to its first newline (as in the paper's RULER and LongBench evaluation). Each score is that of the best
reference, from 0 to 1; NaN where there is none.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where answer and reference are the same text but for case, punctuation, articles and spaces (SQuAD's)."""
    return _best(answer, references, lambda said, right: float(_normalised(said) == _normalised(right)))


def recall(answer: str, references: Sequence[str]) -> float:
    """1 where a reference is contained in the answer, case ignored (NVIDIA's RULER, `string_match_part`; the paper's)."""
    return _best(answer, references, lambda said, right: float(right.strip().lower() in said.lower()))


def f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over the words of the normalised texts (SQuAD's)."""
    return _best(answer, references, _word_f1)


def first_line(answer: str) -> str:
    """What of an answer counts: up to the first newline, without spaces around it."""
    return answer.partition("\n")[0].strip()


def _best(answer: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    said, right = first_line(answer), [reference for reference in references if reference.strip()]
    return max((score(said, reference) for reference in right), default=math.nan)


def _word_f1(said: str, right: str) -> float:
    words, wanted = _normalised(said).split(), _normalised(right).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def _normalised(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, then without articles, single spaces."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
