"""Durable writes on a simulated disk that keeps only what was synced, and the simulated disk itself."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_lab.runs.durable import (
    drop_leftovers,
    make_folder,
    overwrite_text,
    publishing,
    remove_folder,
    replace_bytes,
    replace_text,
    replacing,
    sync,
)
from tests.support.power_cut import FAULTS, Disk, Moment, NotSynced, fault_at
from tests.support.refusals import naming


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "old.txt").write_text("old")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_bytes().decode(errors="replace")
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def after(disk: Disk, tmp_path: Path) -> list[dict[str, str]]:
    """What is left of each moment, and of parts of what was not synced."""
    found = []
    for number, moment in enumerate(disk.moments):
        chances = [None, *map(random.Random, range(20))]
        found += [contents(moment.restore(tmp_path / f"{number}-{i}", each)) for i, each in enumerate(chances)]
    return found


def now(disk: Disk) -> Moment:
    """The disk after the last call."""
    with disk.watched():
        os.fsync(os.open(disk.root, os.O_RDONLY))
    return disk.moments[-1]


# -- the simulated disk ----------------------------------------------------------------------------------------------


def test_what_is_not_synced_is_lost(root: Path, tmp_path: Path) -> None:
    disk = Disk(root)
    with disk.watched():
        (root / "run" / "new.txt").write_text("new")
        sync(root / "run" / "new.txt")  # its content, but not its name
        (root / "run" / "old.txt").write_text("other")
    assert contents(now(disk).restore(tmp_path / "a")) == {"run/old.txt": "old"}
    with naming(NotSynced, "new.txt"):
        disk.require_synced()
    with disk.watched():
        sync(root / "run")
    assert contents(now(disk).restore(tmp_path / "b")) == {"run/new.txt": "new", "run/old.txt": "old"}
    with naming(NotSynced, "old.txt was written and not synced"):
        disk.require_synced()


def test_a_name_that_is_synced_without_its_content_is_an_empty_file(root: Path, tmp_path: Path) -> None:
    disk = Disk(root)
    with disk.watched():
        (root / "run" / "new.txt").write_text("new")
        sync(root / "run")
    assert contents(now(disk).restore(tmp_path / "a")) == {"run/new.txt": "", "run/old.txt": "old"}


def test_a_file_of_native_code_that_is_renamed_without_a_sync_is_refused(root: Path) -> None:
    disk = Disk(root)
    with disk.watched():
        pq.write_table(pa.table({"a": [1]}), root / "run" / "half")
        with naming(NotSynced, "half"):
            os.replace(root / "run" / "half", root / "run" / "old.txt")


def test_a_deleted_file_gives_its_inode_to_no_other(root: Path, tmp_path: Path) -> None:
    disk = Disk(root)
    with disk.watched():
        (root / "run" / "old.txt").unlink()
        for number in range(50):
            (root / "run" / f"{number}").write_text("new")
    assert contents(now(disk).restore(tmp_path / "a")) == {"run/old.txt": "old"}


# -- the helper ------------------------------------------------------------------------------------------------------


def test_a_replaced_file_is_the_old_or_the_new_one_at_every_moment(root: Path, tmp_path: Path) -> None:
    disk = Disk(root)
    with disk.watched():
        replace_text(root / "run" / "old.txt", "new")
    left = after(disk, tmp_path)
    assert {each["run/old.txt"] for each in left} == {"old", "new"}
    assert contents(now(disk).restore(tmp_path / "now")) == {"run/old.txt": "new"}
    disk.require_synced()


def test_a_published_folder_is_whole_or_absent_at_every_moment(root: Path, tmp_path: Path) -> None:
    disk = Disk(root)
    with disk.watched(), publishing(root / "run" / "deep" / "folder") as folder:
        pq.write_table(pa.table({"a": [1]}), folder / "native")
        (folder / "text").write_text("text")
    whole = contents(root / "run" / "deep" / "folder")
    found = []
    for number, moment in enumerate(disk.moments):
        for i, chance in enumerate((None, *map(random.Random, range(20)))):
            left = moment.restore(tmp_path / f"{number}-{i}", chance) / "run" / "deep" / "folder"
            found += [contents(left)] if left.exists() else []
    assert found and all(each == whole for each in found)
    disk.require_synced()


def test_a_folder_published_twice_keeps_no_file_of_the_first(root: Path) -> None:
    for name in ("first", "second"):
        with publishing(root / "run" / "step-1") as folder:
            (folder / name).write_text(name)
    assert contents(root / "run") == {"old.txt": "old", "step-1/second": "second"}


def test_a_removed_folder_is_whole_or_absent(root: Path, tmp_path: Path) -> None:
    disk = Disk(root)
    with disk.watched():
        make_folder(root / "run" / "step-1")
        for name in "abc":
            replace_text(root / "run" / "step-1" / name, name)
        first = len(disk.moments)
        remove_folder(root / "run" / "step-1")
    for number, moment in enumerate(disk.moments[first:]):
        for i, chance in enumerate((None, *map(random.Random, range(20)))):
            left = contents(moment.restore(tmp_path / f"{number}-{i}", chance))
            assert sum(name.startswith("run/step-1/") for name in left) in (0, 3)


def test_an_interrupted_replacement_is_put_back_and_other_leftovers_go(root: Path) -> None:
    for name in (".a.old.tmp", ".b.old.tmp", ".c.removed.tmp", ".d.1-2.tmp", "b"):
        (root / "run" / name).mkdir()
        (root / "run" / name / "file").write_text(name)
    (root / "run" / ".status.json.1-2.tmp").write_text("half")
    drop_leftovers(root / "run")
    assert contents(root / "run") == {"a/file": ".a.old.tmp", "b/file": "b", "old.txt": "old"}


@pytest.mark.parametrize("kind", [*FAULTS, "short write"])
def test_a_fault_at_any_call_names_the_file_and_leaves_the_old_one(root: Path, kind: str) -> None:
    path, number = root / "run" / "old.txt", 0
    while True:
        disk = Disk(root)
        disk.fault = fault_at(number, kind)
        try:
            with disk.watched(moments=False):
                replace_bytes(path, b"new" * 100)
        except OSError as error:
            message = str(error)
            assert str(path.parent) in message
            assert path.read_text() in ("old", "new" * 100)
            assert [each.name for each in (root / "run").iterdir()] == ["old.txt"]
            number += 1
        else:
            break
    assert path.read_text() == "new" * 100
    assert number >= (1 if kind == "short write" else 5)


def test_an_error_inside_leaves_nothing(root: Path) -> None:
    for writing, half in ((replacing, ""), (publishing, "file")):
        with naming(KeyboardInterrupt, "half"), writing(root / "run" / "a") as temporary:
            (temporary / half).write_text("half")
            raise KeyboardInterrupt("half")
    assert contents(root) == {"run/old.txt": "old"}


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_file_is(root: Path) -> None:
    disk = Disk(root)

    def unsupported(number: int, call: str, path: Path) -> None:
        raise OSError(errno.EINVAL, "not supported")

    disk.fault = unsupported
    with disk.watched(moments=False):
        sync(root / "run")
        with naming(OSError, "old.txt"):
            sync(root / "run" / "old.txt")


def test_a_shorter_text_in_place_leaves_nothing_of_the_longer(root: Path) -> None:
    replace_text(root / "run" / "old.txt", "a longer text")
    overwrite_text(root / "run" / "old.txt", "short")
    assert contents(root) == {"run/old.txt": "short"}
