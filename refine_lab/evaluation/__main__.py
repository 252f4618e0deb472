"""Command line of an evaluation: `python -m refine_lab.evaluation --model NAME --tasks a,b --lengths 512,1024 --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from refine_lab.config import BUILT_IN_REWARDS
from refine_lab.evaluation.config import EvaluationConfig, ReadingConfig
from refine_lab.evaluation.packages import missing_packages

WORDS = ("model", "data", "essays", "books", "key_model", "device")
COUNTS = ("limit", "seed", "batch_size", "max_length", "ttt_steps")
CHOICES = {
    "over_limit": ("cut_middle", "drop"),
    "ttt": ("none", "sft", "refine"),
    "ttt_per": ("prompt", "batch"),
    "dtype": ("float32", "bfloat16"),
}
FLAGS = ("sampled", "paper_rows")


def parser() -> argparse.ArgumentParser:
    """Returns the parser; the help of an option is the sentence below its field in `EvaluationConfig`."""
    from refine_lab.evaluation.catalogue import BENCHMARKS, GROUPS

    kinds: list[Any] = [EvaluationConfig, ReadingConfig]  # the latter's fields have no description in the former
    about = {name: field.description for kind in kinds for name, field in kind.__pydantic_fields__.items()}
    made = argparse.ArgumentParser(
        prog="python -m refine_lab.evaluation",
        description="Evaluates a model on benchmarks and writes the results as JSON and Parquet. "
        f"Groups of tasks: {', '.join(GROUPS)}. Tasks: {', '.join(BENCHMARKS)}.",
    )
    made.add_argument(
        "--out", type=Path, required=True, help="Output folder; rerunning with the same one resumes the evaluation."
    )
    for name in ("tasks", "lengths"):
        made.add_argument(f"--{name}", help=f"{about[name]} Separated by commas.")
    for name in (*WORDS, *COUNTS, *CHOICES):
        kind: dict[str, Any] = (
            {"type": int} if name in COUNTS else {"choices": CHOICES[name]} if name in CHOICES else {}
        )
        made.add_argument(f"--{name.replace('_', '-')}", help=about[name], **kind)
    made.add_argument("--ttt-lr", type=float, help=about["ttt_lr"])
    made.add_argument("--ttt-reward", choices=BUILT_IN_REWARDS, help=about["ttt_reward"])
    made.add_argument("--add-bos", choices=("true", "false"), help=about["add_bos"])
    for name in FLAGS:
        made.add_argument(f"--{name.replace('_', '-')}", action="store_const", const=True, help=about[name])
    return made


def configuration_of(chosen: dict[str, Any]) -> EvaluationConfig:
    """Returns the configuration that the options describe; options that are not set have the defaults.

    Raises ConfigError for a value that is not allowed.
    """
    values = {name: value for name, value in chosen.items() if value is not None and name != "out"}
    if "tasks" in values:
        values["tasks"] = tuple(name.strip() for name in values["tasks"].split(",") if name.strip())
    if "lengths" in values:
        values["lengths"] = lengths_of(values["lengths"])
    if "add_bos" in values:
        values["add_bos"] = values["add_bos"] == "true"
    return EvaluationConfig(**values)


def lengths_of(text: str) -> tuple[int, ...]:
    """Returns comma-separated integers as a tuple. Raises ValueError for any other string."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"lengths must be comma-separated integers, got {text!r}")
    return tuple(int(part) for part in parts)


def quiet() -> None:
    """Hides the progress bars of transformers and datasets, whose work takes a second or two."""
    logging.disable_progress_bar()
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def _refused(error: Exception) -> int:
    print(error, file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every task was evaluated, 1 if some could not run, 2 for bad input, 130 if interrupted."""
    if sentence := missing_packages("lm_eval"):
        print(sentence, file=sys.stderr)
        return 2
    from refine_lab.evaluation.run import evaluate
    from refine_lab.workers import ALONE, SharedError, launched, of_exchange

    chosen, workers = vars(parser().parse_args(arguments)), ALONE
    quiet()
    try:
        config = configuration_of(chosen)
        with launched(config.device) as workers:
            result = evaluate(config, chosen["out"], workers=workers)
    except SharedError as error:
        return _refused(error) if workers.first else 0  # `torchrun` would end the first worker before it says so
    except (ValueError, OSError) as error:
        return _refused(error)
    except RuntimeError as error:
        if workers.count == 1 or not of_exchange(error):
            raise
        print(f"Worker {workers.rank} ends, since another worker has ended.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        found = f"the results of finished tasks are in {chosen['out']}"
        print(f"Stopped. Run the same command again to continue; {found}.", file=sys.stderr)
        return 130
    if not workers.first:
        return 0
    print(f"written to {chosen['out'] / 'results.json'}")
    return 0 if all(unit["status"] == "done" for unit in result["units"]) else 1


if __name__ == "__main__":
    sys.exit(main())
