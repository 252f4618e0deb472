"""Runs and models from elsewhere: opening them executes nothing, asks the hub nothing, and their pages load nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from refine_lab.experiments.compare import tokenizer_of
from refine_lab.models.hub import SHIPPED
from refine_lab.models.loading import load_model
from refine_lab.runs.run import Run, list_runs
from tests.factories.run_monitor import write_run
from tests.support.paths import ROOT
from widgets.run_monitor import RunMonitor


def edit_config(run: Run, **values: object) -> None:
    path = run.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_from_elsewhere_executes_nothing(tmp_path: Path) -> None:
    run, marker = write_run(tmp_path / "runs", 0), tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\n"
    shutil.copytree(SHIPPED / "tiny-deltanet", run.path / "checkpoints" / "step-4")
    for name in (
        "reward.py",
        "conftest.py",
        "sitecustomize.py",
        "refine_lab.py",
        "torch.py",
        "checkpoints/step-4/modeling.py",
    ):
        (run.path / name).write_text(code + "def reward(inputs):\n    return inputs.logprobs.sum(1)\n")
    refine = json.loads((run.path / "config.json").read_text())["refine"]
    edit_config(run, refine=refine | {"reward": "custom"})
    assert [each.name for each in list_runs(tmp_path / "runs")] == [run.name]
    monitor = RunMonitor(tmp_path / "runs")
    try:
        assert monitor.inspector.rollouts["reward"].tolist() == [0.5]
        monitor.save_html(tmp_path / "page.html")
    finally:
        monitor.close()
    load_model(str(run.path))
    assert not marker.exists()


def test_a_page_forbids_all_requests(tmp_path: Path) -> None:
    write_run(tmp_path, 0)
    monitor = RunMonitor(tmp_path)
    try:
        page = monitor.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    finally:
        monitor.close()
    policy = re.search('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules.pop("default-src") == "'none'"
    assert {source for rule in rules.values() for source in rule.split()} <= {"'unsafe-inline'", "blob:", "data:"}
    assert not re.search(r"""<(script|link|img|iframe)\b[^>]*\b(src|href)=["']?https?:""", page)


def test_the_monitor_asks_the_hub_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fast tier a connection fails the test; here the name is not even looked up."""
    run = write_run(tmp_path, 0)
    edit_config(run, model="org/from-elsewhere")
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address) or [])
    with pytest.raises(FileNotFoundError, match="org/from-elsewhere"):
        tokenizer_of(Run(run.path))
    monitor = RunMonitor(tmp_path)
    try:
        assert "org/from-elsewhere" in monitor.error
        assert len(monitor.inspector.rollouts) == 1
    finally:
        monitor.close()
    assert not asked


def _wait_for(ready: Callable[[], list[Path]], seconds: float = 120) -> Path:
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"nothing after {seconds:g} s"
        time.sleep(0.2)
    return found[0]


@pytest.mark.process
def test_the_lab_listens_on_loopback_and_requires_its_token(tmp_path: Path) -> None:
    (line,) = re.findall(
        r"^\t(\$\(BIN\)/jupyter lab .*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    command = line.replace("$(BIN)/", f"{Path(sys.executable).parent}/").replace("$$", "$")
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("RUNTIME", "CONFIG", "DATA")}
    with (tmp_path / "log").open("wb") as log:
        command = f"exec {command} --no-browser --port=0"
        options = {"cwd": ROOT, "env": {**os.environ, **places}, "stdout": log, "stderr": log}
        lab = subprocess.Popen(["bash", "-c", command], **options)
    try:
        file = _wait_for(lambda: [*(tmp_path / "RUNTIME").glob("jpserver-*.json")])
        info = json.loads(file.read_text(encoding="utf-8"))
        assert len(info["token"]) >= 32
        address = f"http://127.0.0.1:{info['port']}/api/kernels"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, timeout=30)
        assert refused.value.code == 403
        refused.value.close()
        with urllib.request.urlopen(f"{address}?token={info['token']}", timeout=30) as answer:
            assert json.load(answer) == []
        listening = [each.laddr.ip for each in psutil.Process(lab.pid).net_connections() if each.status == "LISTEN"]
        assert listening and set(listening) <= {"127.0.0.1", "::1"}
    finally:
        lab.terminate()
        lab.wait(30)
