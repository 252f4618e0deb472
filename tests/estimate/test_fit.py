"""What a run says before it starts if its step will not fit on the GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

import refine_lab
from refine_lab.config import DataConfig, RefineConfig, TrainConfig
from refine_lab.estimate.fit import MARGIN, shortage

MODEL = "DeltaNet-1.3B"


def config(length: int = 16_384, rows: int = 1, part: str = "none", **fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"batch_size": 8, "mini_batch_size": 8, "micro_batch_size": rows, "dtype": "bfloat16"}
    data = DataConfig(sources={"python": 1.0}, sequence_length=length, max_tokens=10_000_000)
    settings = {"refine": RefineConfig(), "activation_checkpointing": part, **sizes, **fields}
    return TrainConfig(recipe="test", data=data, **settings)


def needed(length: int, rows: int, part: str) -> float:
    """GiB of one of several micro-batches, with the margin."""
    settings: dict[str, Any] = {"rows": rows, "micro_batches": 8 // rows, "activation_checkpointing": part}
    return MARGIN * refine_lab.estimate(MODEL, length, method=RefineConfig(), **settings).peak


def test_a_step_that_fits_says_nothing():
    assert shortage(config(), MODEL, 1, needed(16_384, 1, "none") + 0.01) == ""
    assert shortage(config(), MODEL, 1, needed(16_384, 1, "none") - 0.01) != ""


def test_each_setting_that_is_enough_by_itself_is_named_with_what_it_needs():
    said = shortage(config(rows=2), MODEL, 1, 90.0)
    assert said.startswith(f"This run will probably not fit: a step needs about {needed(16_384, 2, 'none'):.1f} GiB")
    assert "and 90.0 GiB can be used" in said
    assert f"set activation_checkpointing to 'blocks' ({needed(16_384, 2, 'blocks'):.1f} GiB)" in said
    assert f" or set micro_batch_size to 1 ({needed(16_384, 1, 'none'):.1f} GiB)" in said
    assert needed(16_384, 2, "mlp") > 90 and "sequence_length" not in said


def test_settings_that_are_enough_together():
    available = needed(16_384, 1, "blocks") + 0.5
    said = shortage(config(16_384, rows=8), MODEL, 1, available)
    both = (
        f"set activation_checkpointing to 'blocks' and micro_batch_size to 1 ({needed(16_384, 1, 'blocks'):.1f} GiB)."
    )
    assert said.endswith(both)


def test_a_row_is_shortened_last_and_to_the_longest_that_fits():
    said = shortage(config(65_536, part="blocks"), MODEL, 1, 60.0)
    found = re.search(r"set data.sequence_length to ([0-9,]+) ", said)
    assert found is not None and "micro_batch_size to" not in said
    longest = int(found[1].replace(",", ""))
    assert needed(longest, 1, "blocks") <= 60 < needed(longest + 256, 1, "blocks")


def test_a_model_that_is_too_large_needs_another_gpu():
    assert shortage(config(part="blocks"), MODEL, 1, 12.0).endswith("with sharding 'full', more GPUs.")
    assert shortage(config(part="blocks", sharding="full"), MODEL, 8, 40.0) == ""


@pytest.mark.parametrize("fields", [{"dtype": "float32"}, {"refine": RefineConfig(prefix_gradient="detached")}])
def test_nothing_is_said_of_what_cannot_be_estimated(fields):
    assert shortage(config(**fields), MODEL, 1, 1.0) == ""
