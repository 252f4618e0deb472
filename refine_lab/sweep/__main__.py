"""Command line of a sweep: `python -m refine_lab.sweep NOTEBOOK -p NAME VALUES --out DIR`, with one `-p` per parameter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from refine_lab.sweep.grid import split_values
from refine_lab.sweep.runner import check_places, plan, sweep
from refine_lab.sweep.tables import text_table
from refine_lab.validation import require

EPILOG = """Each cell of the grid is one execution of the notebook by papermill, in its own folder inside DIR with the
executed notebook and its runs. Run the same command again to continue: finished cells are not executed again. The exit
status is 0 if every cell has finished, 1 if one has not, and 2 for bad input."""

PAIRS = {"-p": "parameter", "--parameter": "parameter", "-r": "raw", "--raw": "raw"}
"""Options that two arguments follow, the second of them any text."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m refine_lab.sweep", description="Executes a notebook over a grid of parameters.", epilog=EPILOG
    )
    made.add_argument("notebook", help="A notebook with a parameters cell, or the name of one, such as midtrain.")
    named: dict[str, Any] = {"nargs": 2, "action": "append", "default": []}
    text = "A parameter and its values, separated by commas; a:b stands for the integers from a to b - 1."
    made.add_argument("-p", "--parameter", metavar=("NAME", "VALUES"), help=text, **named)
    text = "A parameter and one value, which may contain any characters; a list is written as in 0,1."
    made.add_argument("-r", "--raw", metavar=("NAME", "VALUE"), help=text, **named)
    made.add_argument("--out", required=True, metavar="DIR", help="Folder of the cells and of the table of results.")
    text = "Number of cells executed at a time (1; on a Ray cluster, as many as it has room for)."
    made.add_argument("--processes", type=int, metavar="N", help=text)
    text = "Execute the cells on a Ray cluster, such as auto or host:6379, whose nodes share DIR (docs/remote.md)."
    made.add_argument("--ray", metavar="ADDRESS", help=text)
    made.add_argument("--cpus", type=int, default=1, metavar="N", help="CPU cores of each cell on a Ray cluster (1).")
    made.add_argument("--gpus", type=float, default=0, metavar="N", help="GPUs of each cell on a Ray cluster (0).")
    made.add_argument("--dry-run", action="store_true", help="Print the grid and an estimate of time and disk space.")
    return made


def without_pairs(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Returns the arguments without `-p` and `-r` and what follows them, and the pairs that follow each.

    argparse takes a value such as -1:3, -1e-4 or --x for an option; here it is one. An option with fewer than two
    arguments after it is left for argparse to reject.
    """
    rest, pairs, place = [], {name: [] for name in set(PAIRS.values())}, 0
    while place < len(arguments):
        name = PAIRS.get(arguments[place])
        if name is None or place + 2 >= len(arguments):
            rest.append(arguments[place])
            place += 1
        else:
            pairs[name].append(list(arguments[place + 1 : place + 3]))
            place += 3
    return rest, pairs


def grid_of(parameters: Sequence[Sequence[str]], raw: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Returns the values of each parameter as strings. Raises ConfigError for a parameter that is named twice."""
    grid: dict[str, list[str]] = {}
    for name, text in [*parameters, *raw]:
        require(name not in grid, "the parameters", name, "named once each")
        grid[name] = [text]
    return grid | {name: split_values(name, text) for name, text in parameters}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every cell has finished, 1 if one has not, 2 for bad input, 130 for Ctrl-C."""
    rest, pairs = without_pairs(sys.argv[1:] if arguments is None else arguments)
    chosen = parser().parse_args(rest)
    try:
        places = {name: getattr(chosen, name) for name in ("processes", "ray", "cpus", "gpus")}
        check_places(**places)
        grid = grid_of(pairs["parameter"], pairs["raw"])
        if chosen.dry_run:
            planned = plan(chosen.notebook, grid, chosen.out)
            print(text_table(planned.frame().drop(columns=["measures", "error", "seconds"])), flush=True)
            print(planned.estimate().sentence(chosen.processes or 1))
            return 0
        result = sweep(chosen.notebook, grid, chosen.out, **places)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    left = result.unfinished
    finished = len(result.cells) - len(left)
    print(f"{finished} of {len(result.cells)} cells have finished; the table is in {result.out / 'sweep.txt'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
