"""Runs on real file systems: an ext4 image that is copied while it is mounted, and a disk that is full."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from refine_lab.config import TrainConfig
from refine_lab.runs.process import resume
from refine_lab.runs.run import Run
from tests.factories.durable_runs import assert_same, begun, go, tiny_config, tiny_model

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/loop-control").exists() or shutil.which("mkfs.ext4") is None,
        reason="needs root, loop devices and mkfs.ext4",
    ),
]
COPIES = 10


@contextmanager
def mounted(*words: str, at: Path) -> Iterator[Path]:
    at.mkdir()
    made = subprocess.run(["mount", *words, str(at)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mount is not allowed here: {made.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    model = tiny_model(tmp_path / "model")
    return lambda **changes: tiny_config(model, **changes)


def test_of_an_ext4_image_copied_while_mounted_every_copy_ends_with_the_same_bits(config, tmp_path: Path) -> None:
    long, image = config(steps=30), tmp_path / "image"
    (tmp_path / "whole").mkdir()
    whole = go(begun(long, tmp_path / "whole"))
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    copies, chance = [], random.Random(0)
    with mounted("-o", "loop", str(image), at=tmp_path / "disk") as disk:
        run = begun(long, disk)
        process = resume(run, detach=False)
        assert process.popen is not None
        while process.alive and len(copies) < COPIES:
            time.sleep(chance.uniform(0.02, 0.6))
            if len(run.metrics()):
                process.popen.send_signal(signal.SIGSTOP)  # the copy is of one moment
                copies.append(shutil.copyfile(image, tmp_path / f"copy-{len(copies)}"))
                process.popen.send_signal(signal.SIGCONT)
        process.popen.wait()
    assert len(copies) >= 5
    done = []
    for number, copy in enumerate(copies):
        with mounted("-o", "loop", str(copy), at=tmp_path / f"disk-{number}") as disk:
            left = begun(long, disk)
            done.append(left.done)
            assert_same(go(left), whole)
    assert len(set(done)) > 3, f"the copies are of different moments: {done}"


@pytest.mark.parametrize("size", [24, 60, 120, 200])
def test_a_full_disk_fails_the_run_which_ends_with_the_same_bits_once_there_is_room(config, tmp_path: Path, size: int):
    (tmp_path / "whole").mkdir()
    whole = go(begun(config(), tmp_path / "whole"))
    with mounted("-t", "tmpfs", "-o", f"size={size}k", "none", at=tmp_path / "disk") as disk:
        run = begun(config(), disk)
        process = resume(run, detach=False)
        assert process.popen is not None
        assert process.popen.wait(120) == 1
        status = Run(run.path).status
        assert status.state == "failed" and "No space left on device" in str(status.error)
        assert str(run.path) in str(status.error), "the error names the file"
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert_same(go(run), whole)
