"""Answering prompts: transformers' `generate` on the same model over the evaluation's own decoding, in one process.

Both read a batch of prompts of different lengths and generate the same number of tokens greedily; `generate` needs the
prompts padded on the left. `generate_over_ours` is the median over rounds, above 1 where ours is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import REPEATS, arguments, interleaved, spread, summary, write
from refine_lab.evaluation.generation import StopRule, generate
from refine_lab.evaluation.reading import read_prompts
from refine_lab.models import FastWeightLM, load_model

PROMPT_TOKENS, ANSWER_TOKENS, ROWS = (512, 1024, 2048), 32, 4
"""Longest prompts of the batches, tokens of an answer, and prompts in a batch, whose shortest has three quarters."""


def main() -> None:
    chosen = arguments(__doc__, REPEATS)
    repeats = chosen.repeats or 7
    policy, tokenizer = load_model(chosen.model, device="cpu")
    figures: dict[str, object] = {}
    ratios = []
    for length in PROMPT_TOKENS:
        actions = both(policy, tokenizer, prompts_of(policy, length))
        answers = {name: action() for name, action in actions.items()}
        assert answers["ours"] == answers["generate"], "both must write the same answers"
        times = interleaved(actions, repeats)
        pairs = zip(times["generate"], times["ours"], strict=True)
        ratios += (here := [theirs / ours for theirs, ours in pairs])
        figures[str(length)] = {"generate_over_ours": statistics.median(here), "seconds": summary(times)}
        for name, values in times.items():
            print(f"{length:6d} tokens  {name:>8}: {spread(values)}")
    figures["generate_over_ours"] = statistics.median(ratios)
    print(f"generate / ours: {figures['generate_over_ours']:.2f}")
    settings = {"model": chosen.model, "repeats": repeats, "rows": ROWS, "answer_tokens": ANSWER_TOKENS}
    write(chosen.json, figures, **settings)


def prompts_of(policy: FastWeightLM, length: int) -> list[list[int]]:
    """Returns `ROWS` random prompts, the longest of `length` tokens and the shortest of three quarters of it."""
    generator = torch.Generator().manual_seed(length)
    sizes = [length - row * length // (4 * (ROWS - 1)) for row in range(ROWS)]
    return [torch.randint(1, policy.config.vocab_size, (size,), generator=generator).tolist() for size in sizes]


def both(
    policy: FastWeightLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> dict[str, Callable[[], list[str]]]:
    """Returns both actions; neither stops at the end of the text, so that both generate as many tokens."""
    rule, width = StopRule(max_tokens=ANSWER_TOKENS), max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    settings = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def ours() -> list[str]:
        return generate(policy, tokenizer, read_prompts(policy, prompts), rule)

    @torch.no_grad()
    def theirs() -> list[str]:
        written = policy.generate(tokens, attention_mask=mask, **settings)[:, width:]
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    return {"generate": theirs, "ours": ours}


if __name__ == "__main__":
    main()
