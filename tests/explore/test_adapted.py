"""A session's original weights beside adapted ones: prompts measured with either, new beginnings, and saved copies."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.explore.adapted import RECORD, free_folder, original_weights
from refine_lab.explore.session import Session
from refine_lab.models import load_model
from refine_lab.training.adaptation import preserve_weights
from refine_lab.training.history import history_of
from refine_lab.ttt_config import TTTConfig
from tests.support.refusals import naming, refused

MODEL = "tiny-deltanet"
RULE = AnswerRule(max_tokens=4)
SFT = TTTConfig(refine=None, steps=2, lr=1e-3)


@pytest.fixture
def ids() -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 2000, (120,), generator=generator, dtype=torch.int32).numpy()


@pytest.fixture
def session() -> Session:
    return Session("cpu")


def test_a_prompt_is_measured_with_the_original_weights_while_they_are_adapted(
    session: Session, ids: np.ndarray
) -> None:
    reference = [7, 8, 9]
    policy = load_model(MODEL, device="cpu")[0]
    before = session.measure(MODEL, ids, RULE, reference)
    with torch.no_grad():
        logprobs = policy(torch.tensor([[*ids.tolist(), *reference]])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(reference))
    assert before.reference_logprob == pytest.approx(expected, abs=1e-4)
    assert session.measure(MODEL, ids, RULE).reference_logprob is None
    list(session.adapt(MODEL, ids, SFT))
    adapted = session.fingerprint(MODEL)
    again = session.measure(MODEL, ids, RULE, reference, "original")
    after = session.measure(MODEL, ids, RULE, reference)
    assert (again.reading.losses[1:] == before.reading.losses[1:]).all()
    assert (again.answer, again.reference_logprob) == (before.answer, before.reference_logprob)
    assert after.reading.losses[1:].mean() < before.reading.losses[1:].mean()
    assert session.fingerprint(MODEL) == adapted != session._held(MODEL).loaded
    session.reset(MODEL)
    assert session.as_loaded(MODEL)


def test_an_interrupt_leaves_the_adapted_weights_until_they_are_reset(session: Session, ids: np.ndarray) -> None:
    adapted = [session.fingerprint(MODEL) for _ in session.adapt(MODEL, ids, SFT)][-1]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert session.fingerprint(MODEL) == adapted
    session.reset(MODEL)
    assert session.as_loaded(MODEL)


def test_an_error_while_weights_are_exchanged_leaves_the_adapted_ones() -> None:
    policy = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))
    original = [value.detach().clone() for value in policy.parameters()]
    preserved = preserve_weights(policy)
    with preserved:
        for value in policy.parameters():
            value.data += 1
        adapted = [value.detach().clone() for value in policy.parameters()]
        with original_weights(preserved):
            assert all(map(torch.equal, policy.parameters(), original))
        whole, preserved.copies = preserved.copies, [*preserved.copies[:3], None]
        with pytest.raises(TypeError), original_weights(preserved):
            pytest.fail("the block is not entered")
        preserved.copies = whole
        assert all(map(torch.equal, policy.parameters(), adapted))
    assert all(map(torch.equal, policy.parameters(), original))


def test_an_adaptation_from_the_original_weights_forgets_the_one_before(session: Session, ids: np.ndarray) -> None:
    alone = [step.loss for step in session.adapt(MODEL, ids, SFT)]
    session.reset(MODEL)
    list(session.adapt(MODEL, ids, TTTConfig(steps=2, lr=1e-3)))
    assert session.open(MODEL)["methods"] == ["refine"]
    assert [step.loss for step in session.adapt(MODEL, ids, SFT, weights="original")] == alone
    assert (session.open(MODEL)["updates"], session.open(MODEL)["methods"]) == (2, ["sft"])
    assert [step.loss for step in session.adapt(MODEL, ids, SFT)][-1] < alone[-1]
    assert (session.open(MODEL)["updates"], session.open(MODEL)["methods"]) == (4, ["sft", "sft"])


def test_saved_weights_are_loaded_bit_for_bit(session: Session, ids: np.ndarray, tmp_path: Path) -> None:
    with naming(ValueError, "the weights are the original ones"):
        session.save(MODEL, str(tmp_path / "new"))
    list(session.adapt(MODEL, ids, SFT))
    path = session.save(MODEL, str(tmp_path / "new"))
    policy, tokenizer = load_model(path, device="cpu")
    weights = dict(session._held(MODEL).policy.named_parameters())
    for name, value in policy.named_parameters():
        assert torch.equal(value, weights[name]), name
    assert tokenizer.get_vocab() == load_model(MODEL)[1].get_vocab()
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    (done,) = record["adaptations"]
    assert (record["model"], done["method"], done["updates"], done["tokens"]) == (MODEL, "sft", 2, 120)
    assert done["settings"]["lr"] == 1e-3
    assert history_of(str(path)).unknown == ("it was adapted to the documents listed in adaptation.json",)
    content = {file.name: file.read_bytes() for file in path.iterdir()}
    with refused("the folder", str(path), "one that does not exist yet"):
        session.save(MODEL, str(path))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == content


def test_kept_weights_are_saved_after_others_have_replaced_them(
    session: Session, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with naming(ValueError, "the weights are the original ones"):
        session.keep(MODEL, "SFT")
    list(session.adapt(MODEL, ids, TTTConfig(refine=None, steps=1, lr=1e-2)))
    session.keep(MODEL, "older")
    digests = {}
    for name, parameters in (("whole", None), ("half", r"layers\.0\.")):
        list(session.adapt(MODEL, ids, replace(SFT, parameters=parameters or SFT.parameters), weights="original"))
        digests[name] = session.fingerprint(MODEL)
        assert session.keep(MODEL, name, first=name == "whole")
    list(session.adapt(MODEL, ids, SFT))
    now = session.fingerprint(MODEL)
    held = session._held(MODEL)
    assert session.open(MODEL)["kept"] == ["whole", "half"]
    assert 0 < len(held.kept["half"].values) < len(held.kept["whole"].values)  # only what differs is copied
    for name, digest in digests.items():
        path = session.save(MODEL, str(tmp_path / name), name)
        assert session.fingerprint(str(path)) == digest != now == session.fingerprint(MODEL)
        (done,) = json.loads((path / RECORD).read_text(encoding="utf-8"))["adaptations"]
        assert done["updates"] == 2
    with refused("the method whose weights are saved", "older", "one of whole, half"):
        session.save(MODEL, str(tmp_path / "older"), "older")
    monkeypatch.setattr("refine_lab.explore.adapted.MOST_KEPT", 1000)
    assert not session.keep(MODEL, "large") and session.open(MODEL)["kept"] == ["whole", "half"]
    session.reset(MODEL)
    assert session.as_loaded(MODEL) and session.open(MODEL)["kept"] == []


def test_a_name_is_a_folder_under_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path))
    assert free_folder("mine") == free_folder(" runs/mine ") == tmp_path / "mine"
    assert free_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    for wrong in ("", "  ", "a/b", "../a", "runs", "runs/..", ".."):
        with refused("the folder", wrong, "a name under runs/, or an absolute path"):
            free_folder(wrong)
