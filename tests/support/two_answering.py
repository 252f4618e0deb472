"""Answers prompts with two workers and with one: `python -m tests.support.two_answering FOLDER`.

It forks after the slow imports. The output is one JSON object. For each case of a run it has whether the run is finished,
whether it has the same answers and the same lines of updates as that of one worker, in the same order and the same files,
and the largest difference of their numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from refine_lab.runs.files import take_lock
from refine_lab.runs.run import Run
from refine_lab.training.answering import run_prompts
from refine_lab.training.answers import answer
from refine_lab.training.evaluation import answer_measures, next_token
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.workers import ALONE, Workers
from tests.factories.step import make_batch
from tests.factories.ttt_runs import RULE, TTT, config_of, examples, made, model
from tests.support.two_workers import forked

CASES: dict[str, TTTRunConfig] = {
    "prompt": config_of(),
    "never": config_of("never", mini_batch_size=2),
    "never, SFT": config_of("never", mini_batch_size=2, ttt=replace(TTT, refine=None, steps=2)),
    "none": config_of(ttt=None),
}
TIMES = ["seconds", "time", "tokens_per_second"]
COUNT = 7  # is odd, so that the last round has one prompt


def go(run: Run, workers: Workers, stop_after: int = 0, asked: int = 0, *, updates: bool = False) -> bool:
    """Continues a run; worker `asked` requests a stop when it has heard of `stop_after` answered batches, or of `updates`."""
    policy, tokenizer = model()
    heard = 0

    def report(names: tuple[str, ...], update: object) -> str:
        nonlocal heard
        heard += (update is None) != updates
        return f"worker {asked} has had enough" if heard >= stop_after > 0 and workers.rank == asked else ""

    with take_lock(run.path) if workers.first else nullcontext():
        return run_prompts(run, policy, tokenizer, examples(COUNT), RULE, report, workers)


def begun(folder: Path, config: TTTRunConfig, workers: Workers) -> Run:
    """Returns a new run, which the first worker creates."""
    with workers.first_alone():
        return made(folder, config, examples(COUNT))


def largest(one: pd.DataFrame, other: pd.DataFrame) -> float:
    numbers = [frame.select_dtypes("number").drop(columns=TIMES, errors="ignore") for frame in (one, other)]
    return float((numbers[0] - numbers[1]).abs().max().max())


def difference(run: Run, alone: Run) -> dict[str, Any]:
    answers, updates = (run.answers(), alone.answers()), (run.updates(), alone.updates())
    texts = [frame.select_dtypes(exclude="number").astype(str).to_dict("list") for frame in (*answers, *updates)]
    files = [sorted(path.name for path in (each.path / "answers").iterdir()) for each in (run, alone)]
    return {
        "state": run.status.state,
        "step": run.status.step,
        "same_texts": texts[0] == texts[1] and texts[2] == texts[3],
        "same_files": files[0] == files[1],
        "answers": len(answers[0]),
        "updates": len(updates[0]),
        "difference": max(largest(*answers), largest(*updates) if len(updates[0]) else 0.0),
    }


def compared(folder: Path, workers: Workers) -> dict[str, Any]:
    """Answers each case with both workers; the first one also answers it alone."""
    found: dict[str, Any] = {}
    for name, config in CASES.items():
        run = begun(folder / "two" / name, config, workers)
        assert go(run, workers)
        if workers.first:
            alone = made(folder / "one" / name, config, examples(COUNT))
            assert go(alone, ALONE)
            found[name] = difference(run, alone)
        workers.wait()
    return found


def resumed(folder: Path, workers: Workers) -> dict[str, Any]:
    """Stops a run of two workers, continues it with one and stops it, and finishes it with two."""
    found: dict[str, Any] = {}
    for name in ("prompt", "never"):
        run, stops = begun(folder / "changed" / name, CASES[name], workers), []
        stops.append(go(run, workers, stop_after=1, asked=1))
        first = run.status.step
        if workers.first:
            stops.append(go(run, ALONE, stop_after=1))
        workers.wait()
        assert go(run, workers)
        if workers.first:
            steps = {"stopped": not any(stops), "first": first}
            found[name] = difference(run, Run(next((folder / "one" / name).iterdir()))) | steps
        workers.wait()
    return found


def interrupted(folder: Path, workers: Workers) -> dict[str, Any]:
    """Stops each worker in turn in the middle of a batch, and finishes the run: nothing may change its place."""
    found: dict[str, Any] = {}
    for name in ("prompt", "never"):
        for asked in (0, 1):
            run = begun(folder / f"interrupted by {asked}" / name, CASES[name], workers)
            stopped = not go(run, workers, 3, asked, updates=True)
            reason = run.status.error
            workers.wait()
            assert go(run, workers)
            if workers.first:
                alone = Run(next((folder / "one" / name).iterdir()))
                found[f"{name} {asked}"] = difference(run, alone) | {"stopped": stopped, "reason": reason}
            workers.wait()
    return found


def evaluated(folder: Path, workers: Workers) -> dict[str, Any]:
    """Evaluates rows and answers with both workers and with one; counts the readings of each worker."""
    policy, tokenizer = model()
    rows, prompts = make_batch((40, 31, 36, 29, 38)), [replace(each, answer_ids=(3, 4)) for each in examples(5)]
    keys = torch.rand(5, 39, generator=torch.Generator().manual_seed(0)) < 0.2
    read, counts, found = policy.read, [0], []

    def counted(*arguments: Any, **named: Any) -> Any:
        counts[0] += 1
        return read(*arguments, **named)

    policy.read = counted
    for each in (workers, ALONE):
        counts[0] = 0
        measures = next_token(policy, rows, 1, keys, each)
        number = counts[0]
        answers = answer_measures(policy, tokenizer, prompts, RULE, 2, each)
        texts = answer(policy, tokenizer, prompts, RULE, 2, each)
        found.append((measures | answers, texts, number))
    policy.read = read
    both, alone = found
    readings = workers.gather_json([both[2], alone[2]])
    return {"same": both[:2] == alone[:2], "measures": alone[0], "readings": readings}


def broken(folder: Path, workers: Workers) -> dict[str, Any]:
    """Shares the updates of weights that drift without summing the gradients; the differences must show it."""
    run, summed = begun(folder / "broken", CASES["never"], workers), Workers.sum_gradients
    Workers.sum_gradients = lambda self, parameters: None  # type: ignore[method-assign]
    go(run, workers)
    Workers.sum_gradients = summed  # type: ignore[method-assign]
    return difference(run, Run(next((folder / "one" / "never").iterdir()))) if workers.first else {}


def main() -> None:
    cases: tuple[Callable[[Path, Workers], dict[str, Any]], ...] = (compared, resumed, interrupted, evaluated, broken)
    with forked() as workers:
        found = {case.__name__: case(Path(sys.argv[1]), workers) for case in cases}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
