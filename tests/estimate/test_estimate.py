"""`refine_lab.estimate`: the recorded peaks of the fake GPU, sizes by hand, several workers, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import refine_lab
from benchmarks import estimate as benchmark
from refine_lab.estimate.__main__ import main
from refine_lab.estimate.models import PUBLISHED
from refine_lab.refine_config import RefineConfig
from refine_lab.validation import ConfigError
from tests.support.paths import ROOT

GIB = 2**30
RECORD = json.loads((ROOT / "benchmarks" / "results" / "estimate.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pair", RECORD["pairs"], ids=lambda pair: "-".join(str(pair[x]) for x in KEYS))
def test_the_estimate_is_within_five_percent_of_the_recorded_peaks(pair):
    found = refine_lab.estimate(
        pair["model"], pair["length"], activation_checkpointing=pair["activation_checkpointing"]
    )
    counted = pair["counted_gib"]
    assert found.peak == pytest.approx(counted["total"], rel=0.05)
    assert {part: found.memory[part] for part in ("weights", "moments")} == {
        part: pytest.approx(counted[part], rel=0.001) for part in ("weights", "moments")
    }
    assert found.seconds == pytest.approx(pair["counted_seconds"], rel=0.15)


KEYS = ("model", "length", "activation_checkpointing")


def test_the_record_has_every_case_once():
    assert [tuple(pair[key] for key in KEYS) for pair in RECORD["pairs"]] == list(benchmark.cases())


@pytest.mark.long
@pytest.mark.parametrize("case", list(benchmark.cases()), ids=lambda case: "-".join(map(str, case)))
def test_the_estimate_is_within_five_percent_of_peaks_counted_anew(case, tmp_path: Path):
    assert abs(benchmark.compared(*case, tmp_path)["error"]) < 0.05


def test_weights_and_moments_by_hand():
    """DeltaNet-1.3B: 24 blocks of 4 D^2 + 3 D I and small parts, embedding and head; AdamW has two moments, Muon one."""
    width, inner, vocabulary = 2048, 5632, 32_000
    small = 16 * width + 3 * 4 * width + 2 * width + 128  # write strengths, convolutions, norms
    matrices = 4 * width**2 + 3 * width * inner + 16 * width
    weights = 24 * (4 * width**2 + 3 * width * inner + small) + 2 * vocabulary * width + width
    found = refine_lab.estimate("DeltaNet-1.3B", 16_384)
    assert found.memory["weights"] == pytest.approx(4 * weights / GIB, rel=1e-12)
    assert found.memory["moments"] == pytest.approx(8 * weights / GIB, rel=1e-12)
    muon = refine_lab.estimate("DeltaNet-1.3B", 16_384, optimizer="muon")
    assert found.memory["moments"] - muon.memory["moments"] == pytest.approx(4 * 24 * matrices / GIB, rel=1e-12)


def test_workers_share_the_model_but_not_the_activations():
    one, eight = (refine_lab.estimate("DeltaNet-1.3B", 16_384, count) for count in (1, 8))
    for part in ("weights", "moments"):
        assert eight.memory[part] == pytest.approx(one.memory[part] / 8)
    assert eight.memory["activations"] == one.memory["activations"] and eight.moment == one.moment
    assert one.memory["gathered"] == 0 < eight.memory["gathered"] < 1
    copied = refine_lab.estimate("DeltaNet-1.3B", 16_384, 8, sharding="none")
    assert copied.memory == one.memory
    exchanged = 2 * 7 / 8 * one.memory["weights"] * GIB / 450e9  # gradients are summed once
    assert copied.seconds - one.seconds == pytest.approx(exchanged)
    assert copied.tokens == 8 * one.tokens


def test_micro_batches_add_the_gradients_of_the_earlier_ones():
    one, four = (refine_lab.estimate("DeltaNet-1.3B", 16_384, micro_batches=n) for n in (1, 4))
    assert one.moment == four.moment == "rollouts" and one.memory["gradients"] == 0
    assert four.memory == {**one.memory, "gradients": one.memory["weights"]}
    assert four.tokens == 4 * one.tokens
    assert four.seconds == pytest.approx(4 * one.seconds - 3 * one.phases["update"])


def test_recomputing_more_needs_less_memory_and_more_time():
    for model in PUBLISHED:
        found = [
            refine_lab.estimate(model, 16_384, activation_checkpointing=part) for part in ("none", "mlp", "blocks")
        ]
        assert found[0].peak > found[1].peak > found[2].peak
        assert found[0].seconds <= found[1].seconds < found[2].seconds  # a step of LaCT waits for Python


def test_rollouts_need_memory_and_time():
    sft = refine_lab.estimate("DeltaNet-1.3B", 16_384, method="sft")
    one, four = (refine_lab.estimate("DeltaNet-1.3B", 16_384, method=RefineConfig(group_size=n)) for n in (1, 4))
    assert sft.peak < one.peak < four.peak and "rollouts" not in sft.phases
    assert sft.seconds < one.seconds
    short, long = (refine_lab.estimate("LaCT-760M", 65_536, open_chunk=n) for n in (1, 2048))
    assert long.peak > short.peak


def test_a_model_is_named_or_given(tmp_path):
    named, given = refine_lab.estimate("tiny-lact", 1024), refine_lab.load_model("tiny-lact", device="cpu")[0]
    assert refine_lab.estimate(given, 1024).memory == refine_lab.estimate(given.config, 1024).memory == named.memory
    assert named.memory["weights"] == pytest.approx(4 * sum(x.numel() for x in given.parameters()) / GIB)


def test_the_table_has_the_parts_and_their_sum(capsys):
    found = refine_lab.estimate("LaCT-760M", 16_384)
    lines = repr(found).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["weights", "gradients", "moments", "activations", "peak"]
    assert f"{found.peak:.1f} GiB" in lines[5] and f"{found.tokens_per_second:,.0f} tokens/s" in lines[6]
    assert main(["LaCT-760M", "16384"]) == 0
    assert capsys.readouterr().out == f"{found!r}\n"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"length": 0}, "length"),
        ({"length": 100}, "length"),
        ({"world_size": 0}, "world_size"),
        ({"rows": True}, "rows"),
        ({"dtype": "float32"}, "dtype"),
        ({"method": "longce"}, "method"),
        ({"method": RefineConfig(prefix_gradient="detached")}, "method"),
        ({"method": "grpo"}, "method"),
        ({"activation_checkpointing": "all"}, "activation_checkpointing"),
        ({"sharding": "half"}, "sharding"),
        ({"world_size": 2, "optimizer": "muon"}, "optimizer"),
        ({"open_chunk": 64}, "open_chunk"),
        ({"model": 7}, "model"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(settings, field):
    arguments = {"model": "DeltaNet-1.3B", "length": 4096, **settings}
    with pytest.raises(ConfigError) as error:
        refine_lab.estimate(arguments.pop("model"), arguments.pop("length"), **arguments)
    assert error.value.field == field and "\n" not in str(error.value)


def test_bad_input_of_the_command_is_one_sentence(capsys):
    assert main(["no-such-model", "4096"]) == 2
    assert main(["DeltaNet-1.3B", "4096", "--method", "longce"]) == 2
    assert "method must be" in capsys.readouterr().err
