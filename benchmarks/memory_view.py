"""Cost of write attribution against a forward pass over the same tokens.

CPU, float32, one row: a forward pass without gradients, as a document is read, and an attribution (one forward and one
backward pass for all tokens, layers and heads), interleaved in one process.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import REPEATS, arguments, interleaved, spread, summary, write
from refine_lab.explore.attribution import write_attribution
from refine_lab.explore.targets import Target
from refine_lab.models import FastWeightLM, load_model

LENGTHS = (1024, 8192)


def measure(policy: FastWeightLM, length: int, repeats: int) -> dict[str, Any]:
    """Returns the seconds of both, and the median of their ratios over rounds."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.head.out_features, (length,), generator=generator)
    target = Target(position=length - 1, token_ids=(int(tokens[0]),))

    @torch.no_grad()
    def forward() -> None:
        policy.head(policy.read(tokens.unsqueeze(0)).hidden_states[:, -1:])

    times = interleaved({"forward": forward, "attribution": lambda: write_attribution(policy, tokens, target)}, repeats)
    for name, values in times.items():
        print(f"{length:6d} tokens  {name:12s}{spread(values)}")
    ratios = [one / other for one, other in zip(times["attribution"], times["forward"], strict=True)]
    print(f"{length:6d} tokens  attribution_over_forward {statistics.median(ratios):.2f}")
    return {"attribution_over_forward": statistics.median(ratios), "seconds": summary(times)}


def main() -> None:
    chosen = arguments(__doc__, REPEATS)
    policy, _ = load_model(chosen.model, device="cpu")
    repeats = chosen.repeats or 7
    figures = {str(length): measure(policy, length, repeats) for length in LENGTHS}
    write(chosen.json, figures, model=Path(chosen.model).name, repeats=repeats)


if __name__ == "__main__":
    main()
