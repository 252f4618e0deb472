"""Answering in a process of its own: `python -m refine_lab.ttt.answering LOCK RUN_DIR [LOCK RUN_DIR ...]`.

It reads nothing but the run directories, whose locks it inherits, and answers what is unanswered, run after run. What it
says goes to whoever waits for it or, detached, to the `log.txt` of the last run; why a run failed stands in its `error.txt`,
and a file `stop` ends it after the step it is at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.environment import project_root
from refine_lab.inputs import inputs_of, refuse_changes
from refine_lab.launch import SAVE_SECONDS, StopSignal, raised_sigterm, watch_parent
from refine_lab.models.base import FastWeightLM
from refine_lab.run_files import replace_text, take_lock
from refine_lab.tasks.examples import Task
from refine_lab.ttt.config import TTTRunConfig
from refine_lab.ttt.experiments import answer_run, loaded
from refine_lab.ttt.records import TTTRun
from refine_lab.ttt.results import results

# -- whoever wants answers ---------------------------------------------------------------------------------------------


def answer_in_turn(runs: Sequence[TTTRun], *, detach: bool, log: Callable[[str], object] = print) -> None:
    """Answer all prompts of every run, one run after the other, going on where answers are there.

    Detached, this returns at once, answering goes on whatever becomes of this process, and runs that are being answered
    already are left to that. Otherwise it waits, and tells what the process tells; when waiting ends early, the process
    keeps what is answered and ends. Raises RuntimeError with the error where it fails, or where another process is at a run.
    """
    left = [run for run in runs if run.state != "finished"]
    if detach:
        left = [run for run in left if run.state != "running"]
    if not left:
        return
    torch.cuda.empty_cache()  # what this process holds and does not use, the other one may need
    locks: list[int] = []
    try:
        for run in left:
            locks.append(_held(run))
        process = _start(left, locks, detach)
    finally:
        for lock in locks:
            os.close(lock)
    if detach:
        threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()  # leave no zombie
        log("Answering in the background (it survives closing this notebook):")
        for run in left:
            log(f"  {run.name}")
    else:
        _follow(process, left, log)


def stop_answering(runs: Sequence[TTTRun]) -> None:
    """Ask whoever answers these runs to keep what is answered and to end; this does not wait."""
    for run in runs:
        if run.alive:
            (run.path / "stop").touch()


def answers_of(runs: Sequence[TTTRun]) -> pd.DataFrame:
    """A row an answer, of all runs. Raises RuntimeError where some are answered still, have been stopped, or have failed."""
    states = {run: run.state for run in runs}
    for run, state in states.items():
        if state in ("failed", "stopped"):
            what = (
                f"failed: {run.error}"
                if state == "failed"
                else "was stopped; execute the previous cell to answer the rest"
            )
            raise RuntimeError(f"{run.name}, {run.log.rows} of {run.prompts} prompts answered, {what}")
    if waiting := [run for run, state in states.items() if state == "running"]:
        told = ", ".join(f"{run.name}: {run.log.rows} of {run.prompts}" for run in waiting)
        raise RuntimeError(
            f"{len(waiting)} of {len(runs)} runs are being answered ({told}); execute this cell and the cells below again later"
        )
    return results(runs)


def _held(run: TTTRun) -> int:
    """The run's lock; what an earlier process was asked and has said is dropped."""
    try:
        lock = take_lock(run.path)
    except BlockingIOError:
        raise RuntimeError(f"{run.name} is being answered by another process; stop that one first") from None
    for name in ("stop", "error.txt"):
        (run.path / name).unlink(missing_ok=True)
    return lock


def _start(runs: Sequence[TTTRun], locks: Sequence[int], detach: bool) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if root := project_root():
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environ.get("PYTHONPATH"))))
    pairs = [word for run, lock in zip(runs, locks, strict=True) for word in (str(lock), str(run.path))]
    with (runs[-1].path / "log.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "refine_lab.ttt.answering", *pairs],
            stdin=subprocess.DEVNULL if detach else subprocess.PIPE,  # a pipe that ends when this process does
            stdout=output if detach else subprocess.PIPE,
            stderr=output,
            env=environ,
            encoding="utf-8",
            pass_fds=locks,
            start_new_session=True,  # neither Ctrl-C nor the end of a kernel's process group reaches it
        )


def _follow(process: subprocess.Popen[str], runs: Sequence[TTTRun], log: Callable[[str], object]) -> None:
    assert process.stdout is not None
    with raised_sigterm(), process:
        try:
            for line in process.stdout:
                log(line.rstrip("\n"))
            process.wait()
        except BaseException:
            process.terminate()  # it keeps what is answered
            try:
                process.wait(SAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    failed = next((run for run in runs if run.error), None)
    if failed is not None:
        raise RuntimeError(f"{failed.name} failed: {failed.error}")
    if process.returncode:
        raise RuntimeError(f"answering ended with status {process.returncode}; see {runs[-1].path / 'log.txt'}")
    if any(run.state != "finished" for run in runs):
        raise RuntimeError("answering was stopped; started again, it goes on")


# -- the process -------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """The exit status: 0 where all is answered or a stop was asked for, 1 for a failure."""
    queue = [(int(lock), TTTRun(path, held=True)) for lock, path in zip(arguments[::2], arguments[1::2], strict=True)]
    stops = {run.path: StopSignal(run.path) for _, run in queue}

    def stop_all(reason: str) -> None:
        for stop in stops.values():
            stop.set(reason)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop_all(signal.Signals(number).name))
    for lock, _ in queue:
        os.set_inheritable(lock, False)
    if not os.path.samestat(os.fstat(0), os.stat(os.devnull)):
        watch_parent(0, lambda: stop_all("the process that started it ended"))
    named, parts = None, None
    for lock, run in queue:
        if stops[run.path].requested():
            os.close(lock)
            continue
        try:
            if parts is None or named != _loads(run.config):
                parts = None  # their memory is the next one's
                named, parts = _loads(run.config), loaded(run.config)
            _answer(run, *parts, stops[run.path])
        except BrokenPipeError:  # whoever waited is no more; what is answered is kept
            return 0
        except Exception as error:  # told where the user looks, in full in log.txt
            traceback.print_exc()
            replace_text(run.path / "error.txt", f"{type(error).__name__}: {error}")
            return 1
        os.close(lock)  # whoever asks is told that this one has ended
    return 0


def _loads(config: TTTRunConfig) -> tuple[Any, ...]:
    """What a model and a task are loaded by."""
    drawn = config.seed if config.model.startswith("new:") else None
    return config.model, config.model_settings, config.device, config.task, config.count, config.data, drawn


def _answer(run: TTTRun, model: FastWeightLM, tokenizer: PreTrainedTokenizerBase, task: Task, stop: StopSignal) -> None:
    refuse_changes(run, inputs_of(run.config.model, task.test))
    answer_run(run, model, tokenizer, task, stop.requested)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
