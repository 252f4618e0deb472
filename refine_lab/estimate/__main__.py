"""Command line of the estimate: `python -m refine_lab.estimate MODEL LENGTH`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from refine_lab.estimate.step import estimate


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the estimate; returns the exit status, which is 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m refine_lab.estimate",
        description="Estimate the memory and the time of a training step on GPUs, without a GPU.",
    )
    parser.add_argument("model", help="DeltaNet-1.3B, LaCT-760M, or a name for load_model")
    parser.add_argument("length", type=int, help="tokens of a row")
    parser.add_argument("--world-size", type=int, default=1, help="number of GPUs")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of an update for each GPU")
    parser.add_argument("--method", default="refine", help="sft or refine")
    parser.add_argument("--activation-checkpointing", default="blocks", help="none, mlp or blocks")
    parser.add_argument("--sharding", default="full", help="full (FSDP2) or none")
    parser.add_argument("--optimizer", default="adamw", help="adamw or muon")
    chosen = vars(parser.parse_args(arguments))
    try:
        print(estimate(**chosen))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
