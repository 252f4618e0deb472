"""Scores of an answer against its references: exact match, whether it contains a reference, and word F1.

The whole text is scored; the task's rule has already extracted the answer from the generated text
(`refine_lab.data.tasks.rules`). Each score is that of the best reference, from 0 to 1; NaN without references. The
paper scores RULER by `contains_answer`; of its scores for LongBench (ROUGE, code similarity, classification) only word F1 is
implemented.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

SCORES = ("contains_answer", "exact_match", "f1")
"""Names of all scores; each ranges from 0 to 1."""


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if answer and reference are equal up to case, punctuation, articles and spaces (as in SQuAD).

    A reference that normalises to nothing, such as `A` or `?!`, is compared verbatim.
    """
    return _best(answer, references, _same)


def contains_answer(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if the answer contains a reference, ignoring case (NVIDIA's RULER, `string_match_part`; used by the paper)."""
    return _best(answer, references, lambda text, reference: float(reference.strip().lower() in text.lower()))


def f1(answer: str, references: Sequence[str]) -> float:
    """Returns the harmonic mean of precision and recall over the words of the normalised texts (as in SQuAD).

    A reference whose normalised text is empty is compared as in `exact_match`.
    """
    return _best(answer, references, _word_f1)


def _best(answer: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    return max((score(answer, reference) for reference in references if reference.strip()), default=math.nan)


def _same(answer: str, reference: str) -> float:
    wanted = _normalised(reference)
    return float(_normalised(answer) == wanted if wanted else answer.strip() == reference.strip())


def _word_f1(answer: str, reference: str) -> float:
    words, wanted = _normalised(answer).split(), _normalised(reference).split()
    if not words or not wanted:
        return _same(answer, reference)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def _normalised(text: str) -> str:
    """Applies SQuAD's normalisation: lower case, no punctuation, then no articles, single spaces."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
