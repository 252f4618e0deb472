"""Command line: `python -m benchmarks.fake_gpu --model DeltaNet-1.3B --length 16384 --phase midtrain --json FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.fake_gpu.device import Unavailable, prepare

MODELS = ("DeltaNet-1.3B", "LaCT-760M")
PHASES = ("midtrain", "posttrain", "ttt", "evaluation", "explore")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--length", type=int, default=16_384, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of the step, all in one micro-batch")
    parser.add_argument("--phase", choices=PHASES, default="midtrain")
    parser.add_argument("--method", default="refine", help="a method of the phase, such as refine or sft")
    parser.add_argument("--activation-checkpointing", choices=("none", "mlp", "blocks"), default="blocks")
    parser.add_argument("--workers", type=int, default=1, help="GPUs that share a step of mid-training (FSDP2)")
    parser.add_argument("--no-search", action="store_true", help="without the best micro-batch, in half the time")
    parser.add_argument("--json", type=Path, required=True, help="file that the figures are written to")
    chosen = parser.parse_args()
    if chosen.workers < 1 or (chosen.workers > 1 and chosen.phase != "midtrain"):
        parser.error(f"--workers must be at least 1, and 1 unless the phase is midtrain, got {chosen.workers}")
    return chosen


def main() -> None:
    arguments = parsed()
    try:
        prepare()
    except Unavailable as error:
        sys.exit(str(error))
    from benchmarks.fake_gpu.command import run  # imports torch, which must not be there before the device is

    run(arguments)


if __name__ == "__main__":
    main()
