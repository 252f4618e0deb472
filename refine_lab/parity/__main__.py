"""Command line of the parity gate: `python -m refine_lab.parity NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from refine_lab.models import load_model
from refine_lab.parity.gate import TOLERANCES, parity, quiet


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if parity holds, 1 if it does not, 2 for bad input or if it cannot be computed."""
    parser = argparse.ArgumentParser(
        prog="python -m refine_lab.parity",
        description="Compare a model's states with re-reading: exit status 0 if parity holds, 1 if not, 2 otherwise.",
    )
    parser.add_argument("name", help="a model's name, as for load_model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", default="float32", choices=[str(x).removeprefix("torch.") for x in TOLERANCES])
    parser.add_argument(
        "--prefixes",
        help="prefix lengths in tokens, such as 1,2,63,64; by default, lengths around chunk and window boundaries",
    )
    chosen = parser.parse_args(arguments)
    quiet()
    try:
        prefixes = None if chosen.prefixes is None else _lengths(chosen.prefixes)
        model, _ = load_model(chosen.name, device=chosen.device, dtype=getattr(torch, chosen.dtype))
        found = parity(model, prefixes=prefixes)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # torch's lack of memory is a RuntimeError
        prefix = "" if isinstance(error, (ValueError, OSError)) else "parity cannot be computed: "
        print(prefix + (str(error).partition("\n")[0] or type(error).__name__), file=sys.stderr)
        return 2
    print(found)
    return 0 if found.holds else 1


def _lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--prefixes must be comma-separated integers, got {text!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
