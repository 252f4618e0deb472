"""`benchmarks.fake_gpu`: every phase of a small model runs, what is planted is found, and the figures are those by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

import refine_lab
from benchmarks.fake_gpu import device, roofline, sources, workers
from refine_lab.estimate.models import PUBLISHED, described
from tests.support.paths import ROOT

KEYS = {
    *("launches", "launches_eager", "triton_launches", "synchronisations", "synchronisation_lines"),
    *("device_mismatches", "peak_gib", "bytes"),
}
HERE = "tests/support/fake_gpu.py:"
GIB = 2**30


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process with the fake device prints."""
    if shutil.which("g++") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no g++, and CI is true")
        pytest.skip("no g++, with which the device guard is compiled")
    command = [sys.executable, "-m", "tests.support.fake_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_compiler_the_command_says_so_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fake_gpu", "--json", str(tmp_path / "x.json")]
    settings = {**os.environ, "PATH": "", "REFINE_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, encoding="utf-8")
    sentence = "benchmarks.fake_gpu compiles a CUDA device guard with g++, which is not on the path\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)
    assert not list(tmp_path.iterdir())


def test_the_device_must_be_made_before_torch_is_imported():
    with pytest.raises(device.Unavailable):
        device.prepare()


def test_an_operation_is_placed_in_the_innermost_line_and_phase():
    def places() -> sources.Place:  # named as the function whose phase is `select`
        return sources.place()

    def sample() -> sources.Place:
        return places()

    names = {places.__qualname__: "select", sample.__qualname__: "sample"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PHASES", names)
        sources._known.cache_clear()
        phase, line = sample()
    sources._known.cache_clear()
    assert phase == "select" and line.startswith("tests/benchmarks/test_fake_gpu.py:")


@pytest.mark.slow
def test_every_phase_of_a_small_model_runs_on_the_device_alone(found):
    for name, figures in {**found["phases"], "lact": found["lact"], "sft": found["sft"]}.items():
        assert figures.keys() >= KEYS, name
        assert figures["device_mismatches"] == 0, name
        assert figures["launches_eager"] > 100, name
        assert figures["synchronisations"] == sum(figures["synchronisation_lines"].values()), name
        assert sum(phase["launches"] for phase in figures["phases"].values()) == figures["launches_eager"], name
    phases = found["phases"]["midtrain"]["phases"]
    assert {"read", "head", "select", "states", "sample", "follow", "rewards", "backward", "update"} <= phases.keys()
    assert not {"sample", "follow"} & found["sft"]["phases"].keys()
    # two layers of one segment of 512 tokens: fla's kernels run in them, forward and backward, and in no sampling
    assert phases["read"]["triton_launches"] > 0 and phases["backward"]["triton_launches"] > 0
    assert phases["sample"]["triton_launches"] == phases["decode"]["triton_launches"] == 0
    sampled = found["lact"]["phases"]
    assert sampled["read"]["triton_launches"] > 0 == sampled["sample"]["triton_launches"]


@pytest.mark.slow
def test_the_decode_step_counts_as_one_launch_per_token(found):
    """Four of five tokens are read; LaCT's step is not compiled."""
    figures = found["phases"]["midtrain"]
    decode = figures["phases"]["decode"]
    assert decode["launches"] > 100 and decode["host_ms"] == pytest.approx(4 * roofline.HOST * 1e3)
    assert figures["launches"] == figures["launches_eager"] - decode["launches"] + 4
    assert found["lact"]["launches"] == found["lact"]["launches_eager"] and "decode" not in found["lact"]["phases"]


@pytest.mark.slow
def test_memory_holds_the_weights_their_gradients_and_two_moments(found):
    one = 4 * found["parameters"] / GIB
    for phase in ("midtrain", "posttrain", "ttt"):
        peak = found["phases"][phase]["peak_gib"]
        assert peak["weights"] == pytest.approx(one, rel=0.02)  # in blocks of 512 bytes
        assert peak["moments"] == pytest.approx(2 * one, rel=0.02)
        assert peak["gradients"] <= 1.02 * one
        parts = ("weights", "gradients", "moments", "activations")
        assert peak["total"] == pytest.approx(sum(peak[part] for part in parts))
    assert found["phases"]["evaluation"]["peak_gib"]["moments"] == 0
    assert found["memory"] == {"mib": 2, "made": 3}
    activations = {name: found[name]["peak_gib"]["activations"] for name in ("blocks", "two rows")}
    once = found["phases"]["midtrain"]["peak_gib"]["activations"]
    assert activations["blocks"] < once < activations["two rows"] < 2.1 * once


@pytest.mark.slow
def test_planted_faults_are_found_in_their_line(found):
    clean, faults = found["phases"]["midtrain"], found["faults"]

    def planted(fault: str, key: str) -> float:
        """The figures of the planted line."""
        assert not any(line.startswith(HERE) for line in clean[key])
        return sum(value for line, value in faults[fault][key].items() if line.startswith(HERE))

    # the layer reads the sequence, four tokens of the rollouts one by one, and the rollouts once more
    assert planted("from_the_cpu", "device_mismatch_lines") == faults["from_the_cpu"]["device_mismatches"] == 6
    assert planted("waiting", "synchronisation_lines") == 6
    assert faults["waiting"]["synchronisations"] == clean["synchronisations"] + 6
    assert planted("promoted", "promotion_lines") == 1  # rollouts are too short to count as a stream
    assert planted("promoted", "fp32_stream_lines") > 0
    assert faults["promoted"]["fp32_stream_gib"] > clean["fp32_stream_gib"]
    assert found["phases"]["explore"]["promotion_lines"] == {}  # which reads in float32


@pytest.mark.slow
def test_an_operation_waits_for_the_device_if_python_or_a_shape_needs_its_result(found):
    assert found["waits"] == {
        "a copy to the device": 1,
        "an asynchronous copy to the device": 0,
        "a copy to the CPU": 1,
        "arithmetic on the device": 0,
        "a number": 1,
        "a number of the CPU": 0,
        "a list": 1,
        "a truth value": 1,
        "places that are not zero": 1,
        "a choice by a mask": 1,
        "a choice by places": 0,
        "distinct values": 1,
    }


@pytest.mark.slow
def test_small_integers_have_values_and_a_step_goes_the_way_of_a_finite_loss(found):
    assert found["values"] == {
        "shape of a choice": [1],
        "maximum": 8,
        "halves": [4, 3],
        "an unknown number": 1.0,
        "a finite loss": True,
        "all of unknown": True,
        "any of unknown": False,
    }


@pytest.mark.slow
def test_the_best_micro_batch_is_the_largest_that_fits(found):
    one, search = found["phases"]["midtrain"], found["search"]
    assert search["micro_batch_size"] > 1
    assert search["micro_batch_peak_gib"]["total"] < 3 * one["peak_gib"]["total"]
    seconds = sum(max(each["device_ms"], each["host_ms"]) / 1e3 for each in search["micro_batch_phases"].values())
    tokens = search["micro_batch_size"] * 512
    assert search["tokens_per_second_estimate"] == pytest.approx(tokens / seconds)
    assert search["tokens_per_second_estimate"] > one["tokens_per_second"]
    assert found["no room"] == {"micro_batch_size": None, "tokens_per_second_estimate": None}


def config_of(name: str) -> Any:
    config = PUBLISHED[name]()
    config.num_hidden_layers = 2
    return config


@pytest.mark.slow
def test_estimates_are_within_five_percent_of_the_peaks(found):
    deltanet, lact = config_of("DeltaNet-1.3B"), config_of("LaCT-760M")
    estimates = {
        "deltanet": refine_lab.estimate(deltanet, 4096, activation_checkpointing="none"),
        "lact": refine_lab.estimate(lact, 4096),
        "sft": refine_lab.estimate(lact, 4096, method="sft", rows=2),
        "shared": refine_lab.estimate(deltanet, 4096, 8),
    }
    for name, estimated in estimates.items():
        counted = found["peaks"][name]
        assert estimated.peak == pytest.approx(counted["total"], rel=0.05), name
        assert estimated.memory["weights"] == pytest.approx(counted["weights"], rel=0.01), name
        assert estimated.memory["moments"] == pytest.approx(counted["moments"], rel=0.01), name
    assert estimates["lact"].moment == "rollouts" and found["peaks"]["lact"]["gradients"] == 0


@pytest.mark.slow
def test_a_worker_receives_the_weights_of_the_others_whenever_they_are_used(found):
    """Weights are gathered in the read, for four tokens of the rollouts, for the second read, and in two backward passes."""
    shared, (_, weights) = found["peaks"]["exchanges"], described(config_of("DeltaNet-1.3B"))
    once = 4 * weights.all * 7 / 8 / GIB
    assert shared["received_gib"]["scatter"] == pytest.approx(once, rel=0.01)
    assert shared["received_gib_by_phase"]["read"] == pytest.approx(once - 4 * weights.head * 7 / 8 / GIB, rel=0.01)
    assert 7.5 * once < shared["received_gib"]["gather"] < 8.5 * once
    slow, fast = shared["links"]["InfiniBand"], shared["links"]["NVLink"]
    assert slow["exchange_seconds"] == pytest.approx(9 * fast["exchange_seconds"])
    assert 0 <= slow["overlap"] < fast["overlap"] <= 1


def test_exchanges_overlap_with_the_work_of_the_block_before():
    """Three blocks of 2 s, whose gathers take 1 s: only the first is waited for, and the last scatter has no work beside it."""
    second = workers.LINKS["NVLink"]
    steps = [
        ("gather", 0.0),
        ("use", 0.0),
        ("gather", 2.0),
        ("use", 0.0),
        ("gather", 2.0),
        ("use", 0.0),
        ("scatter", 2.0),
    ]
    exchanges = workers.Exchanges(8)
    exchanges += [workers.Exchange(kind, "read", second * (kind != "use"), work) for kind, work in steps]
    exchanges._seconds = 6.0
    assert exchanges.finished(6.0, second) == pytest.approx(1 + 6 + 1)
    assert exchanges.finished(6.0, second / 4) == pytest.approx(3 * 4 + 2 + 4)  # every block waits for its weights
    figures = exchanges.figures(6.0)["links"]["NVLink"]
    assert figures == {
        "exchange_seconds": pytest.approx(4),
        "exposed_seconds": pytest.approx(2),
        "overlap": pytest.approx(0.5),
    }
