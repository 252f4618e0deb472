"""Seconds a token of cached decoding after 1,024 to 102,400 tokens of context: flat, where the state has a fixed size.

The context is read once, in pieces, and its states are kept as values; from each of them the same number of tokens is
decoded greedily, head included, one row, all contexts in turn. LaCT updates its fast weights where a chunk ends: every
context is a whole number of the shipped model's chunks, so that all decode as many updates. A hybrid's attention grows
with its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import REPEATS, arguments, interleaved, relative, summary, write
from refine_lab.models import FastWeightLM, State, load_model

CONTEXTS = (1024, 4096, 16_384, 32_768, 102_400)
TOKENS = ("--tokens", {"type": int, "default": 128, "help": "tokens decoded from each context"})


def states_after(policy: FastWeightLM, contexts: Sequence[int]) -> dict[int, State]:
    """The states after so many tokens of one random text, which is read once."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(policy.head.out_features, (1, max(contexts)), generator=generator).to(policy.device)
    states, state = {}, None
    for begin, end in zip((0, *contexts), contexts, strict=False):
        for piece in text[:, begin:end].split(1024, 1):
            state = policy.read(piece, state=state).final_state
        states[end] = state
    return states


def decode(policy: FastWeightLM, state: State, num_tokens: int) -> None:
    """Greedily, each token read from the state after the one before."""
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
    for _ in range(num_tokens):
        step = policy.read(token, state=state)
        state, token = step.final_state, policy.lm_head(step.hidden_states).argmax(-1)


@torch.no_grad()
def main() -> None:
    chosen = arguments(__doc__, REPEATS, TOKENS, model="tiny-lact")
    repeats = chosen.repeats or 15
    policy, _ = load_model(chosen.model, device="cpu")
    states = states_after(policy, CONTEXTS)
    actions = {str(length): partial(decode, policy, state, chosen.tokens) for length, state in states.items()}
    times = interleaved(actions, repeats, warmups=2)
    seconds = summary({name: [value / chosen.tokens for value in values] for name, values in times.items()})
    for name, found in seconds.items():
        print(
            f"{name:>6} tokens of context  " + "  ".join(f"{key} {value * 1e3:.3f} ms" for key, value in found.items())
        )
    shares = relative(times)
    ratio = max(shares.values()) / min(shares.values())
    print(f"slowest over fastest {ratio:.3f}")
    figures = {"slowest_over_fastest": ratio, "over_its_round": shares, "seconds_per_token": seconds}
    write(chosen.json, figures, model=Path(chosen.model).name, repeats=repeats, tokens=chosen.tokens)


if __name__ == "__main__":
    main()
