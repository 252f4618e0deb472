"""A sample document: this package's own source with planted facts, and a question about one of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_lab.data.recall import make_document
from refine_lab.rng import Draws

FILES = ("selection.py", "rollout.py", "rewards.py", "advantages.py", "losses.py", "step.py")
FACTS = "word-8"


class Sample(NamedTuple):
    """A text, a question about it, and the answer in the text."""

    document: str
    question: str
    answer: str


def sample_document(tokenizer: PreTrainedTokenizerBase, tokens: int = 2000, seed: int = 0) -> Sample:
    """Makes a document of `tokens` tokens, including its question, that contains eight secret words.

    Raises ValueError if `tokens` is too small for the facts or exceeds the source.
    """
    folder = Path(__file__).parent.parent / "method"
    text = "\n\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)
    filler = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    generator = Draws(seed=seed).generator(0, "sample")
    document = make_document(FACTS, tokens, filler, generator, tokenizer, "validation")
    first = document.questions[0]
    parts = document.tokens[: first.start], document.tokens[first.start : first.prompt_end], first.answer_ids
    return Sample(*(str(tokenizer.decode(part)) for part in parts))
