"""Cost of a rollout after a long and after a short prefix: `state_at` and sampling after 32,768 and 1,024 tokens."""

from __future__ import annotations

import statistics

import torch

from benchmarks.common import REPEATS, arguments, interleaved, spread, summary, write
from refine_lab.method.rollout import Branches, sample
from refine_lab.models import load_model

LENGTHS = (1024, 32_768)
ROLLOUTS, ROLLOUT_LENGTH = 8, 5


@torch.no_grad()
def main() -> None:
    chosen = arguments(__doc__, REPEATS)
    repeats = chosen.repeats or 30
    policy, _ = load_model(chosen.model, device="cpu")
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(ROLLOUTS, ROLLOUT_LENGTH, generator=generator, dtype=torch.float64)
    actions = {}
    for length in LENGTHS:
        trace = policy.read(torch.randint(policy.config.vocab_size, (1, length), generator=generator))
        positions = torch.linspace(length - 64, length - 1, ROLLOUTS).long().unsqueeze(0)
        actions[str(length)] = lambda t=trace, p=positions: sample(policy, Branches.of(t, p, 1), uniforms, 1.0)
    times = interleaved(actions, repeats, warmups=3)
    for name, values in times.items():
        print(f"{name:>6} tokens  {spread(values)}")
    ratio = statistics.median(times[str(LENGTHS[1])]) / statistics.median(times[str(LENGTHS[0])])
    print(f"ratio {ratio:.3f}")
    write(
        chosen.json, {"ratio": ratio, "seconds": summary(times)}, model=chosen.model, repeats=repeats, rollouts=ROLLOUTS
    )


if __name__ == "__main__":
    main()
