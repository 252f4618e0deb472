"""Runs after a power cut, damage and faults: each ends as an uninterrupted run does, or is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from refine_lab.config import TrainConfig
from refine_lab.models import load_model
from refine_lab.runs.checkpoints import (
    MANIFEST,
    check_checkpoint,
    checkpoints,
    drop_checkpoints,
    newest_whole,
    read_manifest,
    write_manifest,
)
from refine_lab.runs.child import StopSignal
from refine_lab.runs.process import resume
from refine_lab.runs.run import Run
from refine_lab.training.trainer import train
from tests.factories.durable_runs import (
    DAMAGE,
    STEPS,
    assert_same,
    begun,
    flip_bit,
    go,
    tiny_config,
    tiny_model,
)
from tests.factories.ttt_runs import config_of, made
from tests.support.power_cut import FAULTS, Disk, fault_at
from tests.support.refusals import naming
from tests.training import test_answering as answering

FILES = (
    *("checkpoint.json", "config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "trained_on.json"),
)
RECORDS = ("metrics.jsonl", "rollouts/1-2.parquet", "rollouts/3-4.parquet", "rollouts/5-6.parquet")


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run, its configuration, and the calls that wrote it."""

    run: Run
    config: TrainConfig
    disk: Disk

    def copy(self, folder: Path, *, until: int = STEPS) -> Run:
        """A copy, without the checkpoints after `until`."""
        shutil.copytree(self.run.path, folder / self.run.name)
        run = Run(folder / self.run.name)
        for step, path in run.checkpoints():
            if step > until:
                shutil.rmtree(path)
        return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = tiny_config(tiny_model(tmp_path_factory.mktemp("model")))
        disk = Disk(tmp_path_factory.mktemp("runs"))
        with disk.watched():
            run = go(begun(config, disk.root))
        disk.require_synced()
        yield Whole(run, config, disk)
        disk.close()


# -- power cuts ------------------------------------------------------------------------------------------------------


def cut_and_resume(whole: Whole, tmp_path: Path, seed: int, *, again: bool = False) -> None:
    """Cuts the power at a random moment, where half of the time parts of what was not synced are left, and resumes."""
    chance = random.Random(seed)
    disk, rest = whole.disk, chance if seed % 2 else None
    folder = chance.choice(disk.moments).restore(tmp_path / "cut", rest)
    if again:
        disk = Disk(folder)
        with disk.watched():
            go(begun(whole.config, folder))
        folder = chance.choice(disk.moments).restore(tmp_path / "again", rest)
        disk.close()
    assert_same(go(begun(whole.config, folder)), whole.run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_after_a_power_cut_a_run_ends_with_the_same_bits(whole: Whole, tmp_path: Path, seed: int) -> None:
    cut_and_resume(whole, tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 110))
def test_after_two_power_cuts_a_run_ends_with_the_same_bits(whole: Whole, tmp_path: Path, seed: int) -> None:
    cut_and_resume(whole, tmp_path, seed, again=seed % 4 > 1)


@pytest.mark.slow
@pytest.mark.parametrize("reset", ["prompt", "never"])
def test_after_a_power_cut_answers_are_the_same_bits(tmp_path: Path, reset: str) -> None:
    uncut = made(tmp_path / "whole", config_of(reset))
    (tmp_path / "runs").mkdir()
    disk = Disk(tmp_path / "runs")
    with disk.watched():
        assert answering.go(made(disk.root, config_of(reset)))
    disk.require_synced()
    assert answering.go(uncut)
    chance = random.Random(0)
    for number, moment in enumerate(chance.sample(disk.moments, 4)):
        folder = moment.restore(tmp_path / f"{number}", chance if number % 2 else None)
        run = made(folder, config_of(reset))
        assert answering.go(run)
        answering.assert_same(run, uncut)
    disk.close()


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of ten times as many batches."""
    return go(begun(replace(whole.config, steps=10 * STEPS), tmp_path_factory.mktemp("long")))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_killed_five_times_a_run_ends_with_the_same_bits(long: Run, tmp_path: Path, seed: int) -> None:
    run, chance = begun(long.config, tmp_path), random.Random(seed)
    for _ in range(5):
        process, before = resume(run, detach=False), run.status.time
        assert process.popen is not None
        while process.alive and run.status.state == "starting" and chance.random() < 0.99:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.3))
        assert process.alive, "the run has not finished before it is killed"
        process.popen.kill()
        process.popen.wait()
        assert run.state in ("killed", "waiting") and run.status.time >= before
    assert_same(go(run), long)


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_files_that_are_damaged_below(whole: Whole) -> None:
    _, folder = whole.run.latest_checkpoint() or (0, Path())
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert set((read_manifest(folder) or {})["files"]) == set(FILES) - {MANIFEST}
    assert set((read_manifest(folder) or {})["records"]) == set(RECORDS)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole: Whole, tmp_path: Path, name: str, kind: str
) -> None:
    run = whole.copy(tmp_path)
    DAMAGE[kind](run.path / "checkpoints" / f"step-{STEPS}" / name)
    found, damaged = newest_whole(run.path)
    assert found == (STEPS - 2, run.path / "checkpoints" / f"step-{STEPS - 2}")
    assert [(folder.name, name in sentence) for folder, sentence in damaged] == [(f"step-{STEPS}", True)]


@pytest.mark.parametrize("name", [MANIFEST, "config.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_of_a_checkpoint_is_not_waited_for(whole: Whole, tmp_path: Path, name: str, make) -> None:
    run = whole.copy(tmp_path)
    path = run.path / "checkpoints" / f"step-{STEPS}" / name
    path.unlink()
    make(path)
    with pytest.warns(UserWarning, match=rf"{re.escape(str(path))} .*step-{STEPS - 2} is used"):
        load_model(run.path, device="cpu")
    for _, folder in run.checkpoints()[:-1]:
        shutil.rmtree(folder)
    (path.parent / MANIFEST).unlink(missing_ok=True) if name != MANIFEST else None
    with naming(ValueError, run.path, "no undamaged checkpoint", name):
        load_model(run.path, device="cpu")


def test_a_manifest_that_describes_no_files_is_damaged(whole: Whole, tmp_path: Path) -> None:
    folder = whole.copy(tmp_path).path / "checkpoints" / f"step-{STEPS}"
    for values in (
        {},
        {"files": {"a": 1}},
        {"files": {}, "records": {"metrics.jsonl": {}}},
        {"files": {}, "records": {}},
    ):
        text = json.dumps(values | {"digest": hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]})
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        with naming(ValueError, folder / MANIFEST, "not a checkpoint manifest"):
            read_manifest(folder)


def resume_with_damaged_checkpoint(whole: Whole, tmp_path: Path, name: str, kind: str, printed: object) -> None:
    run = whole.copy(tmp_path)
    DAMAGE[kind](run.path / "checkpoints" / f"step-{STEPS}" / name)
    assert_same(go(run), whole.run)
    assert (run.path / "checkpoints" / f"damaged-step-{STEPS}").is_dir()
    log = printed.readouterr().out  # type: ignore[attr-defined]
    assert name in log and f"damaged-step-{STEPS}" in log and f"from step {STEPS - 2}" in log


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, [*DAMAGE][i % 4]) for i, name in enumerate(FILES)])
def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_bits(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    resume_with_damaged_checkpoint(whole, tmp_path, name, kind, capsys)


@pytest.mark.soak
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_run_with_any_damage_of_a_checkpoint_ends_with_the_same_bits(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    resume_with_damaged_checkpoint(whole, tmp_path, name, kind, capsys)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_begins_anew(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path)
    for _, folder in run.checkpoints():
        flip_bit(folder / "model.safetensors", 12345)
    with naming(ValueError, run.path, "model.safetensors is damaged"):
        load_model(run.path)
    assert_same(go(run), whole.run)


@pytest.mark.slow
@pytest.mark.parametrize("until", [STEPS, STEPS - 2], ids=["before the checkpoint", "after the checkpoint"])
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", RECORDS)
def test_damaged_records_are_written_again_or_the_run_is_refused(
    whole: Whole, tmp_path: Path, name: str, kind: str, until: int
) -> None:
    run = whole.copy(tmp_path, until=until)
    facts = (read_manifest(run.path / "checkpoints" / f"step-{until}") or {})["records"].get(name)
    before = (run.path / name).read_bytes()
    DAMAGE[kind](run.path / name)
    damaged = (run.path / name).read_bytes() if (run.path / name).exists() else b""
    if facts is None or damaged[: facts["bytes"]] == before[: facts["bytes"]]:
        assert_same(go(run), whole.run)
        return
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with naming(ValueError, run.path / name, f"step {until}", "restore the file"):
        go(run)
    assert {path: path.read_bytes() for path in files} == files, "nothing is changed"


@pytest.mark.slow
def test_the_advice_of_a_refusal_helps(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path)
    (run.path / "rollouts" / "5-6.parquet").unlink()
    with naming(ValueError, "5-6.parquet", "delete the checkpoints after step 4"):
        go(run)
    shutil.rmtree(run.path / "checkpoints" / "step-6")
    assert_same(go(run), whole.run)


def test_load_model_names_a_damaged_checkpoint_and_reads_the_one_before(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path)
    path = run.path / "checkpoints" / f"step-{STEPS}" / "model.safetensors"
    files = sorted(path.parent.parent.rglob("*"))
    flip_bit(path, 123456)
    with pytest.warns(UserWarning, match=rf"{re.escape(str(path))} is damaged.*step-{STEPS - 2} is used"):
        ours, _ = load_model(run.path, device="cpu")
    theirs, _ = load_model(run.path / "checkpoints" / f"step-{STEPS - 2}", device="cpu")
    assert all((a == b).all() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert sorted(path.parent.parent.rglob("*")) == files, "a reader writes nothing"
    with naming(ValueError, path, MANIFEST):
        load_model(path.parent, device="cpu")


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_read_by_its_form(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole.copy(tmp_path, until=STEPS - 2)
    for _, folder in run.checkpoints():
        (folder / MANIFEST).unlink()
        check_checkpoint(folder)
    shutil.copytree(run.path, tmp_path / "copy")
    for name in ("model.safetensors", "tokenizer.json"):
        DAMAGE["truncated"](tmp_path / "copy" / "checkpoints" / "step-4" / name)
        assert newest_whole(tmp_path / "copy")[0] == (2, tmp_path / "copy" / "checkpoints" / "step-2")
    assert_same(go(run), whole.run)
    assert capsys.readouterr().out.count(f"has no {MANIFEST}") == 1


# -- faults under the writer -----------------------------------------------------------------------------------------


def kinds_of(call: str) -> tuple[str, ...]:
    return (*FAULTS, "short write") if call == "write" else tuple(FAULTS)


def fail_and_resume(whole: Whole, tmp_path: Path, number: int, kind: str) -> None:
    """Makes the call `number` of a run fail, and resumes the run."""
    disk = Disk(tmp_path)
    disk.fault = fault_at(number, kind)
    begin, failed = Path(), ""
    try:
        with disk.watched(moments=False):
            begin = begun(whole.config, tmp_path).path
            go(Run(begin))
    except OSError as error:
        failed = str(error)
        assert str(tmp_path) in failed, "the error names the file"
    disk.close()
    run = begun(whole.config, tmp_path)
    if failed:
        steps = run.metrics()["step"].tolist()
        assert steps == list(range(1, len(steps) + 1)), "every completed step is recorded"
        assert not newest_whole(run.path)[1], "no checkpoint is half written"
    assert_same(go(run), whole.run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_after_a_fault_nothing_is_lost_but_the_step_in_flight(whole: Whole, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    number = chance.randrange(len(whole.disk.calls))
    fail_and_resume(whole, tmp_path, number, chance.choice(kinds_of(whole.disk.calls[number][0])))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(20))
def test_after_a_fault_at_every_call_nothing_is_lost_but_the_step_in_flight(
    whole: Whole, tmp_path: Path, part: int
) -> None:
    for number in range(part, len(whole.disk.calls), 20):
        for kind in kinds_of(whole.disk.calls[number][0]):
            folder = tmp_path / f"{number}-{kind.replace('/', ' ')}"
            folder.mkdir()
            fail_and_resume(whole, folder, number, kind)


# -- which checkpoints are kept --------------------------------------------------------------------------------------


def saved(run: Run) -> list[int]:
    return [step for step, _ in run.checkpoints()]


@pytest.mark.parametrize(
    ("newest", "every", "losses", "kept"),
    [
        (3, 0, {}, [6, 7, 8]),
        (1, 0, {}, [8]),
        (2, 0, {2: 1.0, 4: 0.5, 6: 2.0}, [4, 7, 8]),
        (2, 3, {2: 1.0, 4: 1.0}, [2, 3, 6, 7, 8]),
        (2, 0, {8: 0.1, 2: 0.2, 4: None}, [7, 8]),
    ],
)
def test_the_newest_the_best_and_every_so_manieth_are_kept(tmp_path: Path, newest, every, losses, kept) -> None:
    for step in range(1, 9):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        write_manifest(folder, step, {}, losses.get(step))
        drop_checkpoints(tmp_path, newest, every)
    assert [step for step, _ in checkpoints(tmp_path)] == kept


@pytest.mark.slow
def test_after_a_resumption_older_checkpoints_count(whole: Whole, tmp_path: Path) -> None:
    config = replace(whole.config, checkpoint_every=1, keep_checkpoints=2, eval_every=5)
    run = begun(config, tmp_path)
    stop = StopSignal(run.path)
    for name, step in (("first", 3), ("second", STEPS)):
        stops = iter([None] * (3 if name == "first" else STEPS) + ["enough"])
        stop.requested = lambda stops=stops: next(stops)  # type: ignore[method-assign]
        train(run.path, stop)
        best = [5] if step == STEPS else []
        assert saved(run) == sorted({step - 1, step, *best})
    assert run.status.state == "finished"


@pytest.mark.slow
def test_a_checkpoint_is_also_written_after_so_many_minutes(whole: Whole, tmp_path: Path) -> None:
    config = replace(whole.config, checkpoint_every=100, checkpoint_minutes=1e-9, keep_checkpoints=100)
    run = go(begun(config, tmp_path))
    assert saved(run) == [*range(1, STEPS + 1)]
    assert_same(run, whole.run)
