"""`benchmarks.gpu` as far as a CPU goes: what it says without a GPU, what it counts, and that a file is gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cases
from tests.factories.step import make_policy


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_without_a_gpu_it_exits_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu measures on a CUDA device, and torch finds none here$"):
        gpu.main()
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_a_training_case_and_the_papers_procedure_on_a_small_model():
    policy = make_policy(torch.float32)
    shape = gpu_cases.Shape(rows=2, length=256, at_once=1, activation_checkpointing="blocks")
    found = gpu_cases.train(policy, shape, repeats=1, dtype="bfloat16")
    assert found["mfu"] is None and found["tokens_of_a_step"] == 512
    median = found["seconds"]["refine"]["median"]
    assert found["tokens_per_second"]["refine"] == pytest.approx(512 / median)
    assert found["refine_over_sft"] == pytest.approx(median / found["seconds"]["sft"]["median"])
    found = gpu_cases.paper(policy, gpu_cases.Shape(rows=1, length=256, at_once=1), dtype="float32")
    assert found["paper_over_refine"] > 1


def test_kernel_cases_compare_and_name_the_quickest(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("REFINE_KERNELS", "")
    for found in (
        gpu_cases.head_kernel(rows=8, width=4, vocabulary=9, repeats=2),
        gpu_cases.chunk_kernel(length=512, heads=1, width=4, repeats=1),
        gpu_cases.short_reads(5, rows=2, heads=1, width=4, repeats=1),
    ):
        seconds = {name: values["median"] for name, values in found["seconds"].items()}
        assert found["quickest"] == min(seconds, key=seconds.__getitem__)


def test_cases_are_chosen_by_words_of_their_names():
    assert gpu.chosen_cases("") == list(gpu_cases.CASES)
    assert gpu.chosen_cases("kernels/head, 16384/paper") == [
        "kernels/head",
        "deltanet-1.3b/16384/paper",
        "lact-760m/16384/paper",
    ]
    with pytest.raises(ValueError, match="no case has 'llama' in its name; there are kernels/head, "):
        gpu.chosen_cases("llama")


def test_a_file_is_gone_on_with_and_a_failure_is_kept(tmp_path, monkeypatch):
    path, asked = tmp_path / "gpu.json", []
    answers = {"a": {"x": 1}, "b": {"error": "torch.OutOfMemoryError: CUDA out of memory."}, "c": None}

    def answer(name: str, path: Path, seconds: float) -> dict | None:
        asked.append(name)
        return answers[name]

    monkeypatch.setattr(gpu, "in_its_own_process", answer)
    assert gpu.run_all(path, ["a", "b"], 100, False) == []
    record = json.loads(path.read_text())
    assert record["cases"] == {"a": {"x": 1}, "b": answers["b"]} and "device" in record["environment"]
    assert gpu.run_all(path, ["a", "b"], 100, False) == [] and asked == ["a", "b"]
    gpu.run_all(path, ["a", "b"], 100, True)
    assert asked == ["a", "b", "b"]
    assert gpu.run_all(path, ["a", "c"], 0, False) == ["c"]  # no time: it is not even begun
    assert asked == ["a", "b", "b"]
    assert gpu.run_all(path, ["c"], 100, False) == []  # it had all the time there is
    assert json.loads(path.read_text())["cases"]["c"] == {"error": "takes more than 100 s"}


def test_a_case_that_dies_is_its_last_line(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "Traceback ...\ntorch.OutOfMemoryError: no room\n\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **b: done)
    assert gpu.in_its_own_process("a", tmp_path, 5) == {"error": "torch.OutOfMemoryError: no room"}
    monkeypatch.setattr(done, "returncode", 0)
    monkeypatch.setattr(done, "stdout", 'a word\n{"x": 2}\n')
    assert gpu.in_its_own_process("a", tmp_path, 5) == {"x": 2}
