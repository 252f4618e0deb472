"""The doctor: passes for the shipped models, and names each planted fault and what to do about it."""

from __future__ import annotations

import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_lab.doctor import Finding, Request, examine
from refine_lab.doctor.__main__ import main
from refine_lab.doctor.examination import _training
from refine_lab.doctor.fault import Fault
from refine_lab.doctor.kernels import check_kernels, run_rule
from refine_lab.doctor.memory import GIB, MARGIN, Estimate, LiveMemory, Usage, free_memory, usage_of
from refine_lab.doctor.packages import check_packages
from refine_lab.doctor.steps import Training, check_memory, estimate_memory
from refine_lab.models import load_model
from refine_lab.models.hub import SHIPPED
from refine_lab.rng import Draws
from tests.factories.gated_deltanet import make_policy as make_gated_deltanet
from tests.factories.loading import change
from tests.support.refusals import naming, refused


@pytest.mark.slow
@pytest.mark.parametrize("model", ("tiny-deltanet", "tiny-lact"))
def test_it_passes_for_the_shipped_models(model, capsys):
    assert main(["--model", model, "--length", "512", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "ok"] for name in ("packages", "weights", "head", "kernels", "parity", "memory", "steps")
    ]


def first(count: int, model: str | Path = "tiny-deltanet") -> list[Finding]:
    """The first findings, without the slower checks that follow."""
    return list(islice(examine(Request(str(model), device="cpu")), count))


# -- packages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_triton(tmp_path, monkeypatch) -> None:
    """The metadata of another version of Triton, found before the installed one."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    folder = tmp_path / "triton-3.6.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_bad_pair_of_fla_and_triton_is_named(old_triton):
    (finding,) = first(1)
    assert finding.status == "failed"
    assert all(word in finding.detail for word in ("Triton 3.6.0", "Hopper", "install Triton 3.7.1"))


def test_a_bad_pair_counts_only_where_it_does_harm(old_triton):
    for model_type, capability in (("gated_deltanet", (9, 0)), ("qwen3_next", (9, 0)), ("delta_net", None)):
        with naming(Fault, "plain torch"):
            check_packages(model_type, capability)
    with naming(Fault, "stop with an error"):
        check_packages("comba", (9, 0))
    for model_type, capability in (("delta_net", (9, 0)), ("lact_swiglu", (9, 0)), ("gated_deltanet", (8, 0))):
        assert "triton 3.6.0" in check_packages(model_type, capability)


def test_a_missing_package_is_named(monkeypatch):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed here")
    monkeypatch.setitem(sys.modules, "fla", None)
    (finding,) = first(1)
    assert finding.status == "failed"
    assert "flash-linear-attention is not installed" in finding.detail and "pip install -r" in finding.detail


# -- weights and head ----------------------------------------------------------------------------------------------------


def damaged(folder: Path, edit) -> Path:
    """A copy of tiny-deltanet whose tensors `edit` has changed."""
    shutil.copytree(SHIPPED / "tiny-deltanet", folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_weights_are_named_and_what_needs_them_is_skipped(tmp_path):
    def edit(tensors):
        tensors["model.layers.2.attn.k_proj.weight"][3, 5] = torch.nan

    findings = first(5, damaged(tmp_path / "model", edit))
    assert [finding.status for finding in findings] == ["ok", "failed", "skipped", "skipped", "skipped"]
    assert "1 weights of 'model.layers.2.attn.k_proj.weight'" in findings[1].detail


def test_a_head_that_config_json_does_not_expect_is_named(tmp_path):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"].flip(0).contiguous()

    findings = first(3, damaged(tmp_path / "model", edit))
    assert [finding.status for finding in findings] == ["ok", "ok", "failed"]
    assert "tie_word_embeddings to True" in findings[2].detail and "two different tensors" in findings[2].detail


def test_a_head_of_another_model_is_named(tmp_path):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"].flip(0).contiguous()

    folder = damaged(tmp_path / "model", edit)
    change(folder, tie_word_embeddings=False)
    findings = first(3, folder)
    assert findings[2].status == "failed" and "head or the tokenizer belongs to another model" in findings[2].detail


def test_a_head_of_another_width_is_named(tmp_path):
    def edit(tensors):
        tensors["lm_head.weight"] = torch.zeros(2048, 96)

    folder = damaged(tmp_path / "model", edit)
    change(folder, tie_word_embeddings=False)
    finding = first(2, folder)[1]
    assert finding.status == "failed" and "lm_head.weight is [2048, 96], not [2048, 128]" in finding.detail


# -- kernels -------------------------------------------------------------------------------------------------------------


def test_a_rule_with_a_wrong_state_or_gradient_is_named():
    model = make_gated_deltanet(dtype=torch.float32)

    def wrong_state(*inputs):
        outputs, state = run_rule(*inputs)
        return outputs, state * 1.001

    def wrong_gradient(*inputs):
        q, *rest = inputs
        return run_rule(q.detach() * 0.999 + 0.001 * q, *rest)

    assert "delta rule in torch differs" in check_kernels(model)
    with naming(Fault, "values of the delta rule", "1.0e-03", "requirements.lock"):
        check_kernels(model, wrong_state)
    with naming(Fault, "gradients of the delta rule"):
        check_kernels(model, wrong_gradient)


# -- memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def training() -> Training:
    return Training.of(load_model("new:tiny-deltanet", device="cpu")[0], "none")


def test_live_memory_counts_what_is_alive_once():
    before = torch.zeros(1000)
    with LiveMemory() as memory:
        x = before + 1
        view, same = x[:500], x.mul_(2)
        assert memory.live == 4000
        y = x.double()
        del x, view, same
        assert memory.live == 8000 and memory.peak == 12_000
        del y
    assert memory.live == 0


def test_two_short_steps_tell_the_memory_of_a_long_one(training):
    estimate = estimate_memory(training, 1536)
    assert (estimate.short.length, estimate.long.length) == (256, 512)
    usage, _ = usage_of(training.state, training.batch(1536), Draws(seed=0, step=5))
    assert usage.peak == pytest.approx(estimate.bytes(1536), rel=0.05)


def test_too_little_memory_is_named_with_settings_that_fit(training):
    with pytest.raises(Fault) as raised:
        check_memory(training, 1536, free=int(0.1 * GIB))
    words = str(raised.value)
    assert "1,536 tokens" in words and "set activation_checkpointing to 'blocks'" in words
    length = int(words.rpartition("at most ")[2].removesuffix(" tokens").replace(",", ""))
    estimate = estimate_memory(Training.of(training.policy, "none"), length)
    assert 0.9 < estimate.bytes(length) * MARGIN / (0.1 * GIB) <= 1.01


def test_the_steps_are_skipped_where_memory_is_too_small():
    request = Request("tiny-deltanet", length=512, device="cpu", memory=0.01)
    memory, steps = _training(request, torch.device("cpu"))
    assert (memory.status, steps.status) == ("failed", "skipped")
    assert "a device with more memory" in memory.detail


def test_the_longest_row_is_where_the_line_meets_the_memory():
    estimate = Estimate(Usage(100, 1000, 500), Usage(200, 2000, 500))
    assert estimate.bytes(1000) == 10_000
    assert estimate.longest(10_000 * MARGIN) == 1000
    assert estimate.longest(400) == 0


def test_free_memory_is_that_of_this_machine():
    assert 0 < free_memory(torch.device("cpu")) < 2**50


# -- bad input -----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_a_failed_check_and_a_bad_length_is_refused(capsys):
    assert main(["--model", "no such model", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["ok", "failed", "skipped", "skipped", "skipped", "failed", "skipped"]
    assert main(["--model", "tiny-deltanet", "--length", "100"]) == 2
    with refused("length", 100, "at least 256"):
        Request("tiny-deltanet", length=100)
