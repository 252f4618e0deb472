"""A document to begin with: this package's own source with facts planted in it, and a question about one of them."""

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
    """A text, a question about it, and the answer that the text gives."""

    document: str
    question: str
    answer: str


def sample_document(tokenizer: PreTrainedTokenizerBase, tokens: int = 2000, seed: int = 0) -> Sample:
    """A document of `tokens` tokens, its question included, that holds eight secret words.

    Raises ValueError for fewer tokens than the facts take and for more than the source has.
    """
    folder = Path(__file__).parent.parent / "method"
    text = "\n\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)
    filler = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    generator = Draws(seed=seed).generator(0, "sample")
    document = make_document(FACTS, tokens, filler, generator, tokenizer, "validation")
    asked = document.questions[0]
    parts = document.tokens[: asked.start], document.tokens[asked.start : asked.prompt_end], asked.answer_ids
    return Sample(*(str(tokenizer.decode(part)) for part in parts))
