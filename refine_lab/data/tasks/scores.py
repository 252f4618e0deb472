"""How an answer is scored against its references: exact match, recall, and the F1 of their words.

The whole text is scored; the task's rule has decided before which part of the generated text is the answer
(`refine_lab.data.tasks.rules`). Each score is that of the best reference, from 0 to 1; NaN without references. The paper
scores RULER by recall; its scores for LongBench (ROUGE, code similarity, classes) are not here, except the F1 of words.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

SCORES = ("recall", "exact_match", "f1")
"""Every score of an answer, each from 0 to 1."""


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where answer and reference are the same text but for case, punctuation, articles and spaces (SQuAD's).

    A reference of which these leave nothing, such as `A` or `?!`, is compared as it stands.
    """
    return _best(answer, references, _same)


def recall(answer: str, references: Sequence[str]) -> float:
    """1 where a reference is contained in the answer, case ignored (NVIDIA's RULER, `string_match_part`; the paper's)."""
    return _best(answer, references, lambda said, right: float(right.strip().lower() in said.lower()))


def f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over the words of the normalised texts (SQuAD's).

    A reference whose normalised text is empty is compared as `exact_match` does.
    """
    return _best(answer, references, _word_f1)


def _best(answer: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    right = [reference for reference in references if reference.strip()]
    return max((score(answer, reference) for reference in right), default=math.nan)


def _same(said: str, right: str) -> float:
    wanted = _normalised(right)
    return float(_normalised(said) == wanted if wanted else said.strip() == right.strip())


def _word_f1(said: str, right: str) -> float:
    words, wanted = _normalised(said).split(), _normalised(right).split()
    if not words or not wanted:
        return _same(said, right)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def _normalised(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, then without articles, single spaces."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
