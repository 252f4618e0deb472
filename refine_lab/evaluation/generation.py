"""Generates answers from the states after prompts, up to a stop string, the end-of-text token or a token limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_lab.evaluation.reading import Read
from refine_lab.models.base import FastWeightLM
from refine_lab.rng import Draws, inverse_cdf


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When an answer ends, apart from the end-of-text token."""

    max_tokens: int
    "Maximum number of generated tokens."
    until: tuple[str, ...] = ()
    "Strings that end an answer and are not part of it."
    skip_newlines: bool = False
    "Whether newlines before the answer are kept and do not end it."

    def ended(self, text: str) -> bool:
        """Returns whether `text` contains a stop string."""
        return any(stop in self._searched(text) for stop in self.until)

    def cut(self, text: str) -> str:
        """Returns `text` up to the first stop string."""
        searched = self._searched(text)
        ends = [place for stop in self.until if (place := searched.find(stop)) >= 0]
        return text[: len(text) - len(searched) + min(ends)] if ends else text

    def _searched(self, text: str) -> str:
        return text.lstrip("\n") if self.skip_newlines else text


Choose = Callable[[Float[Tensor, "R V"], Sequence[int]], Int[Tensor, "R"]]
"""Chooses the next token of each row from its logits; the second argument contains the rows' indices."""


def greedy(logits: Float[Tensor, "R V"], rows: Sequence[int]) -> Int[Tensor, "R"]:
    """Chooses the most probable token."""
    return logits.argmax(-1)


@dataclass
class Sampler:
    """Samples at a temperature; the draws of a row depend only on the seed, the row's key and the number of tokens."""

    seed: int
    keys: Sequence[str]
    temperature: float = 1.0
    generators: dict[int, torch.Generator] = field(default_factory=dict)

    def __call__(self, logits: Float[Tensor, "R V"], rows: Sequence[int]) -> Int[Tensor, "R"]:
        uniforms = torch.stack([torch.rand((), generator=self._generator(row), dtype=torch.float64) for row in rows])
        return inverse_cdf((logits.double() / self.temperature).softmax(-1), uniforms.to(logits.device))

    def _generator(self, row: int) -> torch.Generator:
        if row not in self.generators:
            self.generators[row] = Draws(seed=self.seed).generator(0, f"answer {self.keys[row]}")
        return self.generators[row]


@torch.no_grad()
def generate(
    policy: FastWeightLM, tokenizer: PreTrainedTokenizerBase, read: Read, rule: StopRule, choose: Choose = greedy
) -> list[str]:
    """Returns the text generated after each prompt of `read`; rows that have ended are not read further."""
    rows, written = list(range(read.state.rows)), [[] for _ in range(read.state.rows)]
    texts = [""] * len(rows)
    while rows:
        chosen = choose(policy.head(read.hidden)[:, 0], rows)
        going: list[int] = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token == tokenizer.eos_token_id:
                texts[row] = str(tokenizer.decode(written[row], skip_special_tokens=True))
                continue
            written[row].append(token)
            full = len(written[row]) >= rule.max_tokens
            if full or rule.until:
                texts[row] = str(tokenizer.decode(written[row], skip_special_tokens=True))
            if not full and not rule.ended(texts[row]):
                going.append(place)
        if going:
            if len(going) < len(rows):
                read, chosen = read.select(going), chosen[going]
            step = policy.read(chosen.unsqueeze(-1), state=read.state)
            read = Read(step.final_state, step.hidden_states)
        rows = [rows[place] for place in going]
    return [rule.cut(text) for text in texts]
