"""Reading a document token by token, rollouts anywhere in it, rewards on what is cached, and a session that reads once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.evaluation.reading import text_logprobs
from refine_lab.explore import document_cache
from refine_lab.explore.document_cache import DOCUMENTS
from refine_lab.explore.reading import read_document
from refine_lab.explore.rollouts import PrefixRollouts, correlations, rollout_frame, rollouts_at
from refine_lab.explore.session import Session
from refine_lab.method.advantages import advantages
from refine_lab.method.rewards import REWARDS
from refine_lab.models import load_model
from refine_lab.models.base import FastWeightLM
from refine_lab.training.held_out_rest import HeldOutRest
from refine_lab.ttt_config import TTTConfig
from tests.support.refusals import naming, refused

MODEL = "tiny-deltanet"


@pytest.fixture(scope="module")
def policy() -> FastWeightLM:
    return load_model(MODEL)[0]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 2000, (150,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def rolled(policy: FastWeightLM, tokens: torch.Tensor) -> list[PrefixRollouts]:
    return [each.first(3) for each in rollouts_at(policy, *read_document(policy, tokens), [0, 63, 144], n=3, k=5)]


@torch.no_grad()
def test_a_reading_is_what_the_logits_say(policy: FastWeightLM, tokens: torch.Tensor) -> None:
    reading, _ = read_document(policy, tokens, alternatives=4)
    logprobs = policy(tokens[None]).logits[0].log_softmax(-1)
    for i in (1, 2, 77, 149):
        there = logprobs[i - 1]
        own = there[tokens[i]]
        assert reading.logprobs[i] == pytest.approx(float(own), abs=1e-5)
        assert reading.entropies[i] == pytest.approx(float(-(there.exp() * there).sum()), abs=1e-5)
        assert reading.ranks[i] == 1 + int((there > own).sum())
        best = there.topk(4)
        assert reading.alternatives[i].tolist() == best.indices.tolist()
        assert reading.probabilities[i].tolist() == pytest.approx(best.values.exp().tolist(), abs=1e-5)
    assert np.isnan([reading.entropies[0], reading.logprobs[0], reading.probabilities[0, 0]]).all()
    assert reading.ranks[0] == 0
    assert (reading.losses[1:] == -reading.logprobs[1:]).all()
    assert reading.token_ids.tolist() == tokens.tolist()


@torch.no_grad()
def test_rollouts_are_what_reading_the_prefix_again_gives(
    policy: FastWeightLM, tokens: torch.Tensor, rolled: list[PrefixRollouts]
) -> None:
    for each in rolled:
        prefix, truth = tokens[: each.position + 1], tokens[each.position + 1 : each.position + 6]
        assert each.target_ids.tolist() == truth.tolist()
        assert each.prefix_ids.tolist() == prefix[-24:].tolist()
        for row in range(3):
            whole = torch.cat([prefix, each.rollout_ids[row]])
            trace = policy.read(whole[None])
            torch.testing.assert_close(each.hidden_states[row], trace.hidden_states[0, -5:], rtol=1e-4, atol=1e-5)
            logprobs = policy.lm_head(trace.hidden_states[0, -6:-1]).log_softmax(-1)
            expected = logprobs.gather(-1, each.rollout_ids[row][:, None])[:, 0]
            torch.testing.assert_close(each.logprobs[row], expected, rtol=1e-4, atol=1e-5)
        trace = policy.read(tokens[None])
        expected = trace.hidden_states[0, each.position + 1 : each.position + 6]
        torch.testing.assert_close(each.target_hidden_states, expected, rtol=1e-4, atol=1e-5)
        logits = policy.lm_head(trace.hidden_states[0, each.position]).log_softmax(-1)
        assert each.entropy == pytest.approx(float(-(logits.exp() * logits).sum()), abs=1e-4)
        assert each.target_logprobs[0] == pytest.approx(float(logits[truth[0]]), abs=1e-4)


def same_bits(one: PrefixRollouts, other: PrefixRollouts, n: int, k: int) -> None:
    """The first k tokens of the first n rollouts, all that is known of them, and the truth, are the same bit for bit."""
    for name in ("rollout_ids", "logprobs", "hidden_states"):
        assert torch.equal(getattr(one, name)[:n, :k], getattr(other, name)[:n, :k]), name
    for name in ("target_ids", "target_logprobs", "target_hidden_states"):
        assert torch.equal(getattr(one, name)[:k], getattr(other, name)[:k]), name
    assert (one.position, one.entropy) == (other.position, other.entropy)


@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-lact"])
def test_a_rollout_depends_on_seed_position_and_its_number_alone(tokens: torch.Tensor, name: str) -> None:
    """Not on k, n, or the positions beside it: neither its tokens nor one bit of what they are worth."""
    policy = load_model(name)[0]
    known = read_document(policy, tokens)
    first, middle = rollouts_at(policy, *known, [0, 63], n=16, k=12)
    for positions, n, k in (([63], 16, 12), ([63], 3, 5), ([40, 63, 0], 8, 12), ([63], 9, 1), ([0, 63], 24, 7)):
        again = {each.position: each for each in rollouts_at(policy, *known, positions, n=n, k=k)}
        same_bits(again[63], middle, min(n, 16), k)
        if 0 in again:
            same_bits(again[0], first, min(n, 16), k)
    (other,) = rollouts_at(policy, *known, [63], n=16, k=12, seed=1)
    assert not torch.equal(other.rollout_ids, middle.rollout_ids)
    assert len({tuple(ids) for ids in middle.rollout_ids.tolist()}) > 8, "the rollouts of a position differ"
    (cold,) = rollouts_at(policy, *known, [63], n=16, k=12, temperature=0.01)
    assert not torch.equal(cold.rollout_ids, middle.rollout_ids)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"positions": [145]}, "a position"),
        ({"positions": [-1]}, "a position"),
        ({"n": 0}, "n"),
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(
    policy: FastWeightLM, tokens: torch.Tensor, settings: dict, field: str
) -> None:
    arguments = {"positions": [3], "n": 2, "k": 5, "temperature": 1.0} | settings
    with refused(field, *settings.values()):
        rollouts_at(policy, *read_document(policy, tokens), **arguments)


def by_hand(each: PrefixRollouts, row: int, k: int) -> tuple[float, float]:
    h, truth = each.hidden_states[row, :k].numpy(), each.target_hidden_states[:k].numpy()
    norms = np.linalg.norm(h, axis=1) * np.linalg.norm(truth, axis=1)
    same = each.rollout_ids[row, :k].numpy() == each.target_ids[:k].numpy()
    return float(((h * truth).sum(1) / norms).mean()), float(same.mean())


@pytest.mark.parametrize("k", [5, 2])
def test_rewards_on_what_is_cached(rolled: list[PrefixRollouts], k: int) -> None:
    frame = rollout_frame(rolled, REWARDS["hybrid"], k=k)
    assert frame["position"].tolist() == [0] * 3 + [63] * 3 + [144] * 3
    for i, row in frame.iterrows():
        cosine, binary = by_hand(rolled[i // 3], i % 3, k)
        assert (row["cosine"], row["binary"]) == pytest.approx((cosine, binary), abs=1e-5)
        assert row["reward"] == pytest.approx(cosine + binary, abs=1e-5)
        assert len(row["rollout_ids"]) == len(row["cosines"]) == k
        assert np.mean(row["cosines"]) == pytest.approx(cosine, abs=1e-5)
    for _, group in frame.groupby("position"):
        expected = advantages(torch.tensor(group["reward"].to_numpy()), 1, 3, "prefix")
        assert group["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    together = rollout_frame(rolled, REWARDS["hybrid"], k=k, group_by="sequence")
    expected = advantages(torch.tensor(together["reward"].to_numpy()), 3, 3, "sequence")
    assert together["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_the_mean_of_exact_estimates_the_probability_of_the_reference(policy: FastWeightLM, k: int) -> None:
    """Within four standard errors, at the three positions whose probability is nearest to one half."""
    text = "def area(width, height):\n    return width * height\n\n\nfor number in range(10):\n    print(number)\n" * 2
    ids = torch.tensor(load_model(MODEL)[1](text)["input_ids"])
    reading, trace = read_document(policy, ids)
    chances = np.exp([reading.logprobs[t + 1 : t + 1 + k].sum() for t in range(len(ids) - k)])
    positions = np.abs(chances - 0.5).argsort()[:3].tolist()
    frame = rollout_frame(rollouts_at(policy, reading, trace, positions, n=256, k=k), REWARDS["exact"])
    for position, group in frame.groupby("position"):
        probability = float(group["target_probability"].iloc[0])
        assert probability == pytest.approx(chances[position], rel=1e-5) and 0.1 < probability < 0.9
        assert abs(group["exact"].mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / 256)
        assert group["reward"].tolist() == group["exact"].tolist()


def test_a_reward_of_ones_own_and_refusals(rolled: list[PrefixRollouts]) -> None:
    def shortest(inputs):
        return inputs.logprobs.sum(-1)

    frame = rollout_frame(rolled, shortest)
    assert frame["reward"].tolist() == pytest.approx([sum(row) for row in frame["logprobs"]], abs=1e-4)
    with refused("k", 6):
        rollout_frame(rolled, shortest, k=6)
    with refused("rollouts", "none"):
        rollout_frame([], shortest)
    with pytest.raises(ValueError, match="must return one floating-point number per rollout"):
        rollout_frame(rolled, lambda inputs: 1.0)  # type: ignore[arg-type, return-value]


def test_correlations() -> None:
    frame = pd.DataFrame(
        {
            "reward": [0.0, 1.0, 2.0, 1.0],
            "entropy": [3.0, 2.0, 1.0, 2.0],
            "binary": [0.0] * 4,
            "target_logprob": [-1.0, -5.0, -2.0, -3.0],
        }
    )
    found = correlations(frame).set_index("with")["r"]
    assert found["entropy"] == pytest.approx(-1)
    assert np.isnan(found["exact-match rate"])
    assert found["logprob of the reference"] == pytest.approx(
        np.corrcoef(frame["reward"], frame["target_logprob"])[0, 1]
    )
    last_bits = np.float32(1) - np.float32([0, 1, 2, 1]) * np.finfo(np.float32).eps
    assert correlations(frame.assign(reward=last_bits))["r"].isna().all()


def counting(session: Session) -> list[int]:
    """The number of tokens of every call of the policy's `read`."""
    policy, counted = session._held(MODEL).policy, []
    read = policy.read

    def counted_read(input_ids: torch.Tensor, *rest: object, **named: object) -> object:
        counted.append(input_ids.shape[1])
        return read(input_ids, *rest, **named)  # type: ignore[arg-type]

    policy.read = counted_read  # type: ignore[method-assign]
    return counted


def test_a_session_reads_a_document_once(tokens: torch.Tensor) -> None:
    session, ids = Session("cpu"), tokens.numpy().astype(np.int32)
    assert session.open(MODEL)["parameters"] == 1_122_688
    calls = counting(session)
    first = session.read(MODEL, ids)
    rollouts = session.rollouts(MODEL, ids.copy(), [3, 90], n=2, k=4)
    assert session.read(MODEL, ids) is first
    assert calls == [150] + [1] * 8  # the document, and four tokens of the rollouts from either position
    assert [each.position for each in rollouts] == [3, 90]
    for i in range(DOCUMENTS):
        session.read(MODEL, ids[: 20 + i])
    session.read(MODEL, ids)
    assert calls[-1] == 150  # the one unused for longest had gone


@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-lact"])
def test_documents_are_dropped_by_the_memory_of_their_traces(
    name: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = load_model(name, device="cpu")
    with torch.no_grad():
        sizes = [document_cache.nbytes(policy.read(tokens[:length].unsqueeze(0))) for length in (64, 128)]
        hidden = policy.read(tokens[:128].unsqueeze(0)).hidden_states.nbytes
    assert sizes[1] > 4 * hidden and sizes[1] > sizes[0]
    assert document_cache.nbytes([policy, tokens, tokens[:3]]) == tokens.nbytes, "shared memory counts once"
    session, ids = Session("cpu"), tokens.numpy().astype(np.int32)
    monkeypatch.setattr(document_cache, "BYTES", 2.5 * sizes[1])
    first, second = session.read(name, ids[:128]), session.read(name, ids[1:129])
    assert session.read(name, ids[:128]) is first
    session.read(name, ids[2:130])
    assert session.read(name, ids[:128]) is first and session.read(name, ids[1:129]) is not second


@pytest.mark.parametrize("method", ["refine", "sft"])
def test_a_session_adapts_and_puts_back(tokens: torch.Tensor, method: str) -> None:
    session, ids = Session("cpu"), tokens.numpy().astype(np.int32)
    before, reading = session.fingerprint(MODEL), session.read(MODEL, ids)
    config = TTTConfig(steps=3, lr=1e-3, **({} if method == "refine" else {"refine": None}))
    steps = session.adapt(MODEL, ids, config)
    first = next(steps)
    assert session.fingerprint(MODEL) != before
    assert first.loss == pytest.approx(float(np.nanmean(session.read(MODEL, ids).losses)))
    assert first.loss < float(np.nanmean(reading.losses))
    second = next(steps)
    steps.close()  # stopped: what it has stays
    assert session.open(MODEL)["updates"] == second.number == 2
    assert session.reset(MODEL) == 2
    assert session.fingerprint(MODEL) == before
    assert np.array_equal(session.read(MODEL, ids).logprobs[1:], reading.logprobs[1:])
    assert session.reset(MODEL) == 0


@pytest.mark.parametrize("method", ["refine", "sft"])
@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-lact"])
def test_a_session_reports_the_loss_of_a_rest_that_it_never_adapts_to(
    tokens: torch.Tensor, name: str, method: str
) -> None:
    """The same weights as without the rest; its loss as the evaluation measures it; one reading after each step."""
    session, ids = Session("cpu"), tokens.numpy().astype(np.int32)
    config = TTTConfig(steps=2, lr=1e-3, **({} if method == "refine" else {"refine": None}))
    plain = [step.metrics["ntp_loss"] for step in session.adapt(name, ids[:100], config)]
    weights = session.fingerprint(name)
    session.reset(name)
    steps = []
    for step in session.adapt(name, ids[:100], config, rest=ids[100:140]):
        steps.append(step)
        policy = session._held(name).policy
        (logprobs,) = text_logprobs(policy, [ids[:140].tolist()])
        held = HeldOutRest(first=100, stop=140)
        assert step.rest_loss == pytest.approx(-float(held.rest(logprobs).mean()), abs=1e-5)
        assert step.loss == pytest.approx(-float(held.adapted(logprobs).mean()), abs=1e-5)
        assert step.rest_loss == pytest.approx(float(-session.read(name, ids).logprobs[100:140].mean()), abs=1e-5)
    assert [step.metrics["ntp_loss"] for step in steps] == plain
    assert session.fingerprint(name) == weights, "the rest moves no weight"
    session.reset(name)
    with refused("a prompt's tokens", [1, 9999]):
        next(session.adapt(name, ids, config, rest=np.array([9999, 1], dtype=np.int32)))
    assert session.open(name)["updates"] == 0


def test_a_cancelled_call_writes_no_state(tokens: torch.Tensor, tmp_path: Path) -> None:
    session, path = Session("cpu"), tmp_path / "state.safetensors"
    request = {"token_ids": tokens.numpy(), "position": 20, "path": str(path)}
    session.read("tiny-deltanet", tokens.numpy())

    def cancelled() -> None:
        raise InterruptedError

    session.between = cancelled
    with pytest.raises(InterruptedError):
        session.save_state("tiny-deltanet", **request)
    assert not path.exists()
    session.between = lambda: None
    assert session.save_state("tiny-deltanet", **request) == str(path) and path.exists()


def test_a_session_answers_and_refuses(tokens: torch.Tensor) -> None:
    session = Session("cpu")
    assert isinstance(session.answer(MODEL, tokens.numpy(), AnswerRule(max_tokens=4)), str)
    for ids, value in (([5], 1), ([5, 9999], [5, 9999])):
        with refused("a prompt's tokens", value):
            session.read(MODEL, np.array(ids, dtype=np.int32))
    with naming(FileNotFoundError, "'nope'"):
        session.open("nope")
    before = session.fingerprint(MODEL)
    with naming(ValueError, "a prompt of 3 tokens"):
        next(session.adapt(MODEL, np.array([1, 2, 3], dtype=np.int32), TTTConfig()))
    assert session.fingerprint(MODEL) == before
    assert session.reset(MODEL) == 0


@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-lact"])
@torch.no_grad()
def test_states_are_summarised_from_one_reading(tokens: torch.Tensor, name: str) -> None:
    session, positions = Session("cpu"), [0, 63, 64, 149]
    summary = session.states(name, tokens.numpy().astype(np.int32), positions)
    policy = session._held(name).policy
    own, shared = policy.read(tokens[None, :65]).final_state.layer(1)
    before, before_shared = policy.read(tokens[None, :64]).final_state.layer(1)
    for matrix in ("recurrent_state",) if name == "tiny-deltanet" else ("w0", "w1", "w2"):
        here, there = ({**a, **b}[matrix][0, 1] for a, b in ((own, shared), (before, before_shared)))
        row = next(i for i in range(len(summary.names)) if (summary.layers[i], summary.names[i]) == (1, matrix))
        assert summary.norms[row, 1, 2] == pytest.approx(float(here.norm()), rel=1e-4)
        assert summary.changes[row, 1, 2] == pytest.approx(float((here - there).norm() / there.norm()), abs=1e-4)
        shares = np.linalg.svd(here.numpy(), compute_uv=False)
        shares = shares[shares > 0] / shares.sum()
        assert summary.effective_ranks[row, 1, 2] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert np.isnan(summary.changes[..., 0]).all()
    assert summary.write_strengths.shape == (4, 2, 150)
    assert (summary.write_strengths > 0).all()
    if name == "tiny-deltanet":  # one write of strength beta of a key of norm 1: S = beta v k^T
        assert summary.effective_ranks[0, 0, 0] == pytest.approx(1, abs=1e-3)
        assert (summary.write_strengths < 1).all()
    with refused("positions", [64, 63]):
        session.states(name, tokens.numpy().astype(np.int32), [64, 63])


# -- the long-short difference --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_long_short_difference_is_what_reading_the_last_tokens_alone_gives(policy: FastWeightLM) -> None:
    tokens = torch.randint(1, 2000, (420,), generator=torch.Generator().manual_seed(2))
    tokens[300:420] = tokens[20:140]  # what stands only far above
    session = Session()
    before = session._read(MODEL, tokens.numpy()).reading
    reading = session.read(MODEL, tokens.numpy())
    assert before.long_short is None and reading.long_short is not None and reading.long_short.shape == (420,)
    assert np.isnan(reading.long_short[:256]).all() and np.isfinite(reading.long_short[256:]).all()
    for i, start in ((256, 128), (383, 128), (384, 256), (419, 256)):
        alone = policy(tokens[None, start:i]).logits[0, -1].log_softmax(-1)[tokens[i]]
        expected = min(max(float(reading.logprobs[i] - float(alone)), 0.0), 5.0)
        assert reading.long_short[i] == pytest.approx(expected, abs=1e-4)
    assert reading.long_short[310:].mean() > 1 > reading.long_short[256:300].mean()
    assert (session.states(MODEL, tokens.numpy(), [0, 419]).long_short[256:] == reading.long_short[256:]).all()
    assert session.read(MODEL, tokens.numpy()) is reading, "it is read once"


def test_a_document_within_the_short_contexts_has_no_long_short_difference(tokens: torch.Tensor) -> None:
    session = Session()
    assert session.read(MODEL, tokens.numpy()).long_short is None
    assert session.states(MODEL, tokens.numpy(), [3]).long_short is None
