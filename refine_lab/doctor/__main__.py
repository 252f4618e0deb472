"""Command line of the doctor: `python -m refine_lab.doctor --model NAME [--length L]`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from refine_lab.doctor.examination import Request, examine


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if no check fails, 1 if one does, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m refine_lab.doctor",
        description="Check that a model can be trained here: packages, weights, head, kernels, parity, memory, and two "
        "training steps. Prints one line per check; the exit status is 1 if a check fails.",
    )
    parser.add_argument("--model", required=True, help="a model's name, as for load_model")
    parser.add_argument("--length", type=int, default=Request.length, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--activation-checkpointing",
        choices=("none", "mlp", "blocks"),
        help="what a step recomputes to save memory (default: as much as the model allows)",
    )
    parser.add_argument("--memory", type=float, help="GiB that a step can use (default: what is free on the device)")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # a finding says what matters
    status = 0
    try:
        for finding in examine(Request(**vars(chosen))):
            print(finding, flush=True)
            status |= finding.status == "failed"
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
