"""Two models side by side without a page, through a real worker: every number against the models themselves."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from refine_lab.data.sample import sample_document
from refine_lab.explore.client import Worker
from refine_lab.explore.reading import read_document
from refine_lab.explore.rollouts import rollouts_at
from refine_lab.models import load_model
from refine_lab.models.base import FastWeightLM
from refine_lab.training.adaptation import padded_batch
from refine_lab.training.key_tokens import key_tokens
from tests.factories.run_monitor import write_run
from tests.support.paths import TESTS
from tests.support.refusals import naming, refused
from tests.support.small_document import SECONDS, TEXT, wait_for, worker  # noqa: F401
from widgets.side_by_side import SideBySide

pytestmark = pytest.mark.process
RUN = TESTS / "fixtures" / "runs" / "20261129-202148-recorded-refine-s0"


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FastWeightLM]:
    """The folder of a model with nine tenths of the embedding of `tiny-deltanet`, which is also its head, and the model."""
    folder = tmp_path_factory.mktemp("scaled")
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.9)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, policy


def test_a_model_beside_itself(worker: Worker) -> None:
    side = SideBySide("tiny-deltanet", "tiny-deltanet", TEXT, worker=worker)
    side.shown.result(SECONDS)
    for name in ("logprob_change", "entropy_change"):
        assert set(side.token_map.metrics[name].values[1:].tolist()) == {0.0}
    assert side.measures["difference"].tolist() == [0.0, 1.0]
    side.roll_out(40).result(SECONDS)
    assert len(side.pairs) == 4
    assert not side.pairs["changed"].map(any).any()
    assert "4 of 4 pairs are equal" in repr(side)
    assert "A and B predict every token of this document identically" in repr(side)


def test_two_models(worker: Worker, scaled: tuple[Path, FastWeightLM], tmp_path: Path) -> None:
    folder, other = scaled
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    sample = sample_document()
    side = SideBySide("tiny-deltanet", str(folder), sample.document + sample.question, worker=worker)
    side.shown.result(SECONDS)
    ids = torch.tensor(tokenizer(sample.document + sample.question, add_special_tokens=False)["input_ids"])
    assert side.pair is not None and side.pair.token_ids.tolist() == ids.tolist()
    batch = padded_batch(policy, [ids])
    with torch.no_grad():
        hidden = [model.read(batch.tokens, batch.lengths).hidden_states[0, :-1] for model in (policy, other)]
        rows = [(x @ model.lm_head.weight.T).log_softmax(-1) for x, model in zip(hidden, (policy, other), strict=True)]
    logprobs = [row.gather(-1, ids[1:, None])[:, 0].double() for row in rows]
    shown = side.token_map.metrics["logprob_change"]
    np.testing.assert_allclose(shown.values[1:], (logprobs[1] - logprobs[0]).numpy(), atol=1e-4)
    assert shown.scale() == side.token_map.metrics["entropy_change"].scale() == (-1.0, 1.0)
    chosen = key_tokens(policy, batch)[0]
    losses = [-row.mean() for row in logprobs] + [-row[chosen].mean() for row in logprobs]
    table = side.measures.set_index("measure")
    assert table.loc["loss", ["A", "B"]].tolist() == pytest.approx([float(x) for x in losses[:2]], abs=1e-4)
    assert table.loc["LongPPL", ["A", "B"]].tolist() == pytest.approx([math.exp(x) for x in losses[2:]], rel=1e-3)
    assert table.loc["LongPPL", "tokens"] == int(chosen.sum()) > 20

    token = side.likely.selected
    assert token == side.token_map.selected == 1 + int((logprobs[1] - logprobs[0]).abs()[:-7].argmax())
    expected = rows[1][token - 1].topk(5).indices.tolist()
    assert side.pair.b.alternatives[token].tolist() == expected
    for found, model in (("rollout_ids_a", policy), ("rollout_ids_b", other)):
        reading, trace = read_document(model, ids)
        made = rollouts_at(model, reading, trace, [token - 1], n=4, k=8, seed=0)[0]
        assert [list(row) for row in side.pairs[found]] == made.rollout_ids.tolist()
    before = side.pairs["rollout_ids_a"].map(list)
    side.change("k", 5).result(SECONDS)
    assert [list(row) for row in side.pairs["rollout_ids_a"]] == [row[:5] for row in before]
    side.change("scale", 2.5).result(SECONDS)
    assert side.token_map.metrics["logprob_change"].scale() == (-2.5, 2.5)

    told = repr(side)
    assert f"A = tiny-deltanet and B = {folder}" in told and f"token {token}, reference" in told
    page = side.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])
    assert len(data["widgets"]) == 4
    assert data["head"]["conclusion"].startswith(f"{side.pair.loss.verdict}. The loss of B minus that of A is ")
    facts = dict(data["head"]["facts"])
    expected_facts = {"model A": "tiny-deltanet", "tokens (k)": "5", "colours to ± nats": "2.5", "seed": "0"}
    assert expected_facts.items() <= facts.items() and "Saved" in facts
    side.compare(key_model=str(folder)).result(SECONDS)
    assert side.pair.key_model == "B" and int(side.pair.key_tokens.sum()) == int(key_tokens(other, batch).sum())


def test_what_cannot_be_compared_is_refused_in_one_sentence(worker: Worker, tmp_path: Path) -> None:
    side = SideBySide(text=TEXT, worker=worker)
    assert "press Compare" in side.notice.status
    assert set(side.fields["b"].options) >= {"tiny-deltanet", "tiny-lact"}  # a list to choose from
    side.controls["n"]._on_message(None, {"typed": "100"}, [])  # as the page sends it
    assert (side.controls["n"].value, side.error) == (4, "pairs (n) must be a whole number from 1 to 64, got 100")
    with refused("model B", ""):
        side.compare().result(SECONDS)
    with naming(FileNotFoundError, "no-such-model"):
        side.compare(b="no-such-model").result(SECONDS)
    assert "no-such-model" in side.error and side.error in repr(side)
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = vocabulary["model"]["merges"]
    vocabulary["model"]["merges"] = merges[:-200]
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    words = " ".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 150, len(tokenizer)))).replace(
        "\u0120", " "
    )
    allowed = "one that tokenises this document identically"
    with naming(ValueError, allowed, tmp_path):
        side.compare(b=str(tmp_path), text=words).result(SECONDS)
    ids = vocabulary["model"]["vocab"]
    first, second = list(ids)[300:302]
    ids[first], ids[second] = ids[second], ids[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    with refused("a model to compare with", str(tmp_path), "one with the tokenizer of 'tiny-deltanet'"):
        side.compare(b=str(tmp_path), text=TEXT).result(SECONDS)
    assert side.pair is None and side.pairs.empty
    side.compare(b="tiny-deltanet").result(SECONDS)
    assert side.error == ""
    with refused("a token to roll out from", len(side.pair.token_ids) - 1):
        side.roll_out(len(side.pair.token_ids) - 1).result(SECONDS)
    assert side.pairs.empty
    for name, value in (("k", 65), ("n", 0), ("n", 2.5), ("seed", True), ("scale", -1), ("height", 3)):
        with pytest.raises(ValueError, match=name):
            side.change(name, value)


def test_recorded_rollouts(worker: Worker) -> None:
    side = SideBySide(worker=worker)
    with naming(ValueError, RUN.name, "different prefixes"):
        side.compare_steps(RUN, 1, 2).result(SECONDS)
    assert "different prefixes" in side.error
    side.compare_steps(RUN, 3, 3).result(SECONDS)
    assert len(side.pairs) == 4 and "4 of 4 pairs are equal" in repr(side)


def test_runs_are_chosen_from_the_list(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    side = SideBySide(worker=worker)
    assert side.steps["run"].options == []
    run, other = (write_run(tmp_path / "runs", seed) for seed in (0, 1))
    with naming(FileNotFoundError, "runs/nowhere"):
        side.compare_steps("runs/nowhere").result(SECONDS)
    for name in ("run", "other_run"):
        assert side.steps[name].options == [f"runs/{other.name}", f"runs/{run.name}"]
    side.steps["run"].set_state({"value": f"runs/{run.name}"})  # as the page sends a choice
    side.steps["other_run"].set_state({"value": f"runs/{other.name}"})
    side.compare_steps(step=2, other_step=2).result(SECONDS)
    assert side.pairs["position"].tolist() == [22]
    assert f"step 2 of {run.name} (A) and step 2 of {other.name} (B)" in repr(side)


def test_a_later_request_cancels_the_earlier_ones_and_edited_fields_dim_the_view(worker: Worker) -> None:
    side = SideBySide("tiny-deltanet", "tiny-deltanet", TEXT, settings={"n": 64, "k": 48}, worker=worker)
    wait_for(lambda: not side.cancel_button.disabled and side.pair is not None)
    earlier = [side.roll_out(token) for token in range(10, 22)]
    began = time.monotonic()
    side.cancel()
    assert [each.result(SECONDS) for each in [side.shown, *earlier]] == [None] * 13
    assert time.monotonic() - began < 10, "each of the thirteen takes longer than a second"
    assert (side.token_map.selected, side.pairs.empty, side.notice.status) == (-1, True, "Cancelled.")
    many = [side.roll_out(token) for token in (10, 11, 12)]
    requests = [*side._requests]
    side.change("n", 2)
    last = side.roll_out(13)
    last.result(SECONDS)
    assert [each.result(0) for each in many] == [None] * 3
    assert len(requests) >= 2 and {each.result(0) for each in requests} == {None}
    assert len(side.pairs) == 2 and side.token_map.selected == 13 and not side.notice.stale
    side.fields["b"].value = "no-such-model"
    assert side.notice.stale
    with naming(FileNotFoundError, "no-such-model"):
        side.compare().result(SECONDS)
    assert side.notice.stale and side.pair is not None and len(side.pairs) == 2
    side.fields["b"].value = "tiny-deltanet"
    assert not side.notice.stale
    side._source.value += " more"
    assert side.notice.stale
    side.compare().result(SECONDS)
    assert not side.notice.stale
