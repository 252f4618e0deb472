"""The benchmarks run, write what they say, and stay below the bars, with slack for a machine that others use too.

The bars themselves (in parentheses) are for a quiet machine; `benchmarks/results/` has figures measured on one. A test that
fails measures again, at most twice, since other programs may have slowed it down; a slower program fails each time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families import FAMILIES
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=2)]


def run(name: str, folder: Path, *arguments: str, model: str | None = "tiny-deltanet") -> dict[str, Any]:
    file = folder / f"{name}.json"
    named = [] if model is None else ["--model", model]
    command = [sys.executable, "-m", f"benchmarks.{name}", *named, "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(file.read_text())
    assert figures["settings"].get("model") == model
    assert {"torch", "platform", "device", "cpus", "commit"} <= figures["environment"].keys()
    return figures


def test_step_cost(tmp_path):
    figures = run("step_cost", tmp_path, "--repeats", "5")
    for length in ("1024", "2048"):
        assert {"refine_over_sft", "paper_over_refine", "sft_tokens_per_second"} <= figures[length].keys()
    assert figures["1024"]["refine_over_sft"] <= 1.5  # (1.3)
    assert figures["2048"]["refine_over_sft"] <= 1.4  # (1.2)
    assert all(figures[length]["refine_memory_over_sft"] <= 2 for length in ("1024", "2048"))  # (1.7)
    assert figures["1024"]["paper_over_refine"] >= 7  # (8)
    assert figures["four_updates"]["refine_over_sft"] <= 1.9  # (1.65)
    assert figures["1024"]["sft_tokens_per_second"] >= 2500  # (5,000)


def test_step_cost_of_lact(tmp_path):
    figures = run("step_cost", tmp_path, "--repeats", "3", model="tiny-lact")
    assert figures["1024"]["refine_over_sft"] <= 1.5  # (1.3)
    assert figures["1024"]["paper_over_refine"] >= 13  # (15)


def test_step_cost_of_every_family(tmp_path):
    figures = run("families", tmp_path, "--repeats", "3", model=None)
    for name in FAMILIES:
        hybrid = name in ("qwen3-next", "qwen3.5", "olmo-hybrid")
        assert figures[name]["refine_over_sft"] <= (2.2 if hybrid else 1.8), name  # (1.7 and 1.3)


def test_decoding_costs_the_same_after_any_context(tmp_path):
    figures = run("decode", tmp_path, "--repeats", "21", "--tokens", "64", model="tiny-lact")
    assert {"1024", "32768"} <= figures["seconds_per_token"].keys()
    assert figures["slowest_over_fastest"] <= 1.25  # (1.1)


def test_write_attribution_costs_a_few_forward_passes(tmp_path):
    figures = run("memory_view", tmp_path, "--repeats", "3")
    assert all(figures[length]["attribution_over_forward"] <= 3.5 for length in ("1024", "8192"))  # (2.5)


def test_rollout_cost(tmp_path):
    assert 0.7 < run("rollout_cost", tmp_path)["ratio"] <= 1.25  # (1.1)


def test_memory(tmp_path):
    figures = run("memory", tmp_path)
    assert figures["8192"] > figures["4096"] > 2**20
    assert figures["ratio"] <= 2.3  # (2.2)


def test_answers_cost_no_more_than_by_generate(tmp_path):
    figures = run("evaluation", tmp_path, "--repeats", "5")
    assert {"512", "1024", "2048"} <= figures.keys()
    assert figures["generate_over_ours"] >= 0.9  # (1)


@pytest.mark.browser
def test_the_workbench_in_chromium(tmp_path, chromium, monkeypatch):
    monkeypatch.setenv("CHROMIUM", chromium)
    figures = run("widgets", tmp_path, "--repeats", "10", model=None)
    assert len(figures["milliseconds"]) == 8
    slow = {name: found for name, found in figures["milliseconds"].items() if found["median"] > 2 * found["bar"]}
    assert not slow


def test_durable_records_cost_little_of_a_step(tmp_path):
    figures = run("durability", tmp_path, "--repeats", "5")
    assert figures["cost"]["share"] <= 0.05
    assert figures["opening"]["cpu_seconds"] <= 1.5  # (1, by the clock)
    assert figures["opening"]["MB"] <= 300
