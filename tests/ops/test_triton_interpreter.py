"""fla's kernels under Triton's interpreter: each part in a process of its own (see tests/support/triton_interpreter.py).

`pytest -m triton_interpreter` runs all of it, in a few minutes of one core. The slow tier runs one small part.
"""

from __future__ import annotations

import pytest

from tests.support.comparisons import under_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed here")
pytest.importorskip("fla", reason="flash-linear-attention is not installed here")

LAYERS = ("gla", "kda", "comba", "gated_deltaproduct", "gsa", "rwkv7", "mesa_net")


def passes(file: str, words: str, count: int) -> None:
    """Every selected comparison passes, and as many as expected are selected."""
    done = under_the_interpreter(file, "-k", words)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert f"{count} passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.slow
def test_a_small_part_of_the_delta_rule_with_its_states():
    """The gated kernel in float32, the ungated one in bfloat16, and states inside segments."""
    passes(
        "interpreted_fla_kernels.py", "odd-float32 or odd-bfloat16-ungated or states_inside or nearest_even", count=4
    )


@pytest.mark.triton_interpreter
def test_the_delta_rule_in_every_dtype():
    passes("interpreted_fla_kernels.py", "test", count=12)


@pytest.mark.triton_interpreter
def test_fused_norms_swiglu_and_short_convolutions():
    passes("interpreted_fused.py", "test", count=8)


@pytest.mark.triton_interpreter
def test_our_own_kernels():
    done = under_the_interpreter("interpreted_kernels.py")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]


@pytest.mark.triton_interpreter
@pytest.mark.parametrize("model_type", LAYERS)
def test_the_kernels_of_flas_own_layers(model_type):
    passes("interpreted_fla_layers.py", f"[{model_type}]", count=1)


@pytest.mark.triton_interpreter
def test_whole_training_steps():
    passes("interpreted_steps.py", "test", count=17)
