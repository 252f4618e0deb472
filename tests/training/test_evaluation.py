"""What is held out is measured in the run's arithmetic, one trace at a time, and without states where none is asked for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tests.factories.fla_models as fla_double
import tests.factories.hybrids as hybrids
from refine_lab.config import DataConfig, RefineConfig, TrainConfig
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.experiments import midtrain, posttrain, ttt
from refine_lab.method.step import train_step
from refine_lab.models import FastWeightLM
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.families import family
from refine_lab.models.state import Trace, hidden_states_only
from refine_lab.ops.delta_rule import ChunkedStates
from refine_lab.ops.lact import ChunkStates
from refine_lab.rng import Draws
from refine_lab.runs.run import Run
from refine_lab.training.adaptation import TTTConfig, adapted, read_prompt
from refine_lab.training.answering import run_prompts
from refine_lab.training.evaluation import answer_measures, next_token, rewards_at_fixed_targets
from refine_lab.training.loading import load_training_task
from tests.factories.posttraining import checkpoint, config_of, prompts, trained
from tests.factories.step import make_batch, make_policy, train_state_for
from tests.factories.ttt_runs import RULE, examples, made, model
from tests.factories.ttt_runs import config_of as ttt_config_of
from tests.support.paths import TEXT

__all__ = ["checkpoint", "prompts"]  # fixtures

SIZES = dict(hidden_size=24, num_hidden_layers=3, intermediate_size=40, vocab_size=53)
FAMILIES = {
    "delta_net": dict(num_heads=2),
    "gated_deltanet": dict(num_heads=2, head_dim=8),
    "lact_swiglu": dict(num_attn_heads=3, num_lact_heads=2, lact_chunk_size=32, window_size=16),
}


def make(name: str) -> FastWeightLM:
    if name in FAMILIES:
        config_class, model_class = family(name)
        return model_class(config_class(**SIZES, **FAMILIES[name])).eval()
    return hybrids.make(name, torch.float32)


# -- the run's dtype -------------------------------------------------------------------------------------------------------


@pytest.fixture
def arithmetic(monkeypatch) -> Iterator[dict[str, set[torch.dtype]]]:
    """The dtypes that linear maps of DeltaNet gave, by who asked: training, or a function that was named to `spied`."""
    seen: dict[str, set[torch.dtype]] = {}
    where = SimpleNamespace(name="training")

    def linear(module, inputs, output) -> None:
        if isinstance(output, torch.Tensor):  # a head gives statistics, which are float32 at least
            seen.setdefault(where.name, set()).add(output.dtype)

    def spied(home: object, name: str) -> None:
        real: Callable = getattr(home, name)

        def inside(*arguments, **named):
            before, where.name = where.name, name
            try:
                return real(*arguments, **named)
            finally:
                where.name = before

        monkeypatch.setattr(home, name, inside)

    seen["spied"] = spied  # type: ignore[assignment]
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: linear(module, inputs, output) if isinstance(module, torch.nn.Linear) else None
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_on_text_is_evaluated_in_its_dtype(checkpoint, tmp_path, arithmetic, dtype):
    spied = arithmetic.pop("spied")
    spied(pytest.importorskip("refine_lab.training.trainer"), "next_token")
    data = DataConfig(sources={str(TEXT): 1.0}, sequence_length=96, validation_sequences=4)
    sizes = dict(batch_size=2, mini_batch_size=2, micro_batch_size=2, steps=1, device="cpu", threads=1)
    config = TrainConfig(recipe="test", model=str(checkpoint), refine=None, data=data, dtype=dtype, **sizes)
    run = trained(config, tmp_path)
    assert arithmetic == {name: {getattr(torch, dtype)} for name in ("training", "next_token")}
    assert run.evaluations()["ntp_loss"].notna().all() and len(run.evaluations()) == 2
    asked = {"measures": midtrain, "key_tokens": midtrain.key_tokens}
    for name, home in asked.items():
        spied(home, name)
    arithmetic.clear()
    midtrain.final_results([Run(run.path)], num_documents=1, num_tokens=64)
    assert arithmetic == {name: {getattr(torch, dtype)} for name in asked}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_on_prompts_is_evaluated_and_asked_in_its_dtype(checkpoint, prompts, tmp_path, arithmetic, dtype):
    spied = arithmetic.pop("spied")
    spied(pytest.importorskip("refine_lab.training.trainer"), "answer_measures")
    config = replace(config_of(checkpoint, prompts, "sft"), dtype=dtype, steps=1)
    run = trained(config, tmp_path)
    assert arithmetic == {name: {getattr(torch, dtype)} for name in ("training", "answer_measures")}
    arithmetic.clear()
    spied(posttrain, "answer")
    posttrain.answer_test_prompts([run], load_training_task([run.config]))
    assert arithmetic == {"answer": {getattr(torch, dtype)}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_of_test_time_training_reads_and_answers_in_its_dtype(tmp_path, arithmetic, dtype):
    spied, runs = arithmetic.pop("spied"), pytest.importorskip("refine_lab.training.answering")
    for name in ("measured", "answer"):
        spied(runs, name)
    config = ttt_config_of()
    config = replace(config, ttt=replace(config.ttt, dtype=dtype))
    assert run_prompts(made(tmp_path, config), *model(), examples(), RULE)
    assert arithmetic == {name: {getattr(torch, dtype)} for name in ("training", "measured", "answer")}
    for name in ("read_prompt", "answer"):
        spied(ttt, name)
    arithmetic.clear()
    ttt.trace_prompt(*model(), examples()[0], [config], RULE)
    assert arithmetic == {name: {getattr(torch, dtype)} for name in ("training", "read_prompt", "answer")}


def test_a_reading_in_an_autocast_leaves_the_updates_inside_it_their_gradients():
    """Casts of the weights that a reading without gradients made must not serve a step, which would learn nothing."""
    config = TTTConfig(refine=None, steps=1, lr=1e-2, dtype="bfloat16")
    prompt, norms = torch.randint(1, 53, (60,)), []
    for around in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        policy = make_policy(torch.float32)
        with around:
            read_prompt(policy, prompt)
            with adapted(policy, prompt, config, lambda update: norms.append(update.metrics["grad_norm"])):
                pass
    assert norms[0] == norms[1] > 0


# -- one trace at a time ---------------------------------------------------------------------------------------------------


def traces_of(policy: FastWeightLM) -> list[int]:
    """Count, at each reading of more than one token, the earlier traces of such readings that are still alive."""
    alive: list[weakref.ref[Trace]] = []
    counts: list[int] = []
    read = policy.read

    def counted(input_ids, *rest, **named) -> Trace:
        if input_ids.shape[1] == 1:
            return read(input_ids, *rest, **named)
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        trace = read(input_ids, *rest, **named)
        alive.append(weakref.ref(trace))
        return trace

    policy.read = counted  # type: ignore[method-assign]
    return counts


def test_a_held_out_measure_has_one_trace_at_a_time():
    policy, tokenizer = make_policy(torch.float32), model()[1]
    counts, batch = traces_of(policy), make_batch()
    next_token(policy, batch, micro_batch_size=1)
    assert counts == [0, 0, 0]
    counts.clear()
    rewards_at_fixed_targets(policy, batch, num_chunks=2, rollout_length=2, micro_batch_size=1)
    assert len(counts) == 6 and counts[::2] == [0, 0, 0]  # every other reading is that of the rollouts
    counts.clear()
    asked = [replace(example, answer_ids=(1, 2)) for example in examples()[:3]]
    answer_measures(policy, tokenizer, asked, AnswerRule(max_tokens=3), micro_batch_size=1)
    assert counts == [0] * 6


@pytest.mark.parametrize("method", ["sft", "refine"])
def test_a_batch_is_rolled_out_with_one_trace_at_a_time(method):
    policy = make_policy(torch.float32)
    refine = None if method == "sft" else RefineConfig(num_chunks=4, margin=5)
    counts = traces_of(policy)
    train_step(
        train_state_for(policy, refine, mini_batch_size=1, micro_batch_size=1), make_batch(), Draws(seed=0, step=1)
    )
    sequences = counts if method == "sft" else counts[::2]
    assert sequences == [0] * len(sequences) and len(sequences) == (3 if method == "sft" else 6)


# -- readings without states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_next", "olmo_hybrid"])
def test_without_states_hidden_states_and_gradients_are_the_same(name):
    policy, batch = make(name), make_batch()
    before = policy.read(batch.tokens[:, :20]).final_state.detach()
    found = []
    for context in (nullcontext(), hidden_states_only()):
        policy.zero_grad()
        with context:
            trace = policy.read(batch.tokens, batch.lengths, before)
        trace.hidden_states.square().sum().backward()
        found.append([trace.hidden_states, *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(RuntimeError, match="computed inside hidden_states_only"):
        trace.state_at(torch.tensor([[3]] * 3))
    assert policy.read(batch.tokens).final_state.rows == 3  # readings after it keep theirs


def test_without_states_flas_models_keep_one_border(monkeypatch):
    monkeypatch.setattr("refine_lab.models.fla_models.SEGMENT", 16)
    policy = fla_double.Double(fla_double.PreTrainedConfig()).double().eval()
    tokens = fla_double.tokens_of(2, 70)
    whole = policy.read(tokens)
    with hidden_states_only():
        trace = policy.read(tokens)
    assert torch.equal(trace.hidden_states, whole.hidden_states)
    assert [len(each.read_again.args[1]) for each in (whole, trace)] == [6, 1]
    with pytest.raises(RuntimeError, match="hidden_states_only"):
        trace.state_at(torch.tensor([[3]] * 2))


def states() -> int:
    """How many objects there are that states are made of."""
    return sum(type(x) in (ChunkedStates, ChunkStates) for x in gc.get_objects())


@pytest.mark.parametrize("part", ["none", "blocks"])
@pytest.mark.parametrize("name", [*FAMILIES, "olmo_hybrid"])
def test_without_states_no_layer_keeps_what_they_are_made_of(name, part):
    """Counted while each layer's feed-forward part runs: the layers before it, and its own, would have left theirs."""
    policy, batch, counts = make(name), make_batch(), []
    checkpoint_activations(policy, part)

    for layer in policy.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: counts.append(states() - before))
    gc.collect()
    before = states()  # of other tests' fixtures
    policy.read(batch.tokens, batch.lengths).hidden_states.sum().backward()
    assert max(counts) > 0  # what is counted is there otherwise
    counts.clear()
    gc.collect()
    with torch.no_grad():
        next_token(policy, batch)
    assert counts == [0] * len(policy.model.layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_run_again_in_the_backward_keep_no_states_either(name):
    """The backward runs outside `hidden_states_only`: what the forward was asked must hold there too."""
    policy, batch, counts = make(name), make_batch(), []
    checkpoint_activations(policy, "blocks")
    for layer in policy.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: counts.append(states() - before))
    gc.collect()
    before = states()
    with hidden_states_only():
        hidden_states = policy.read(batch.tokens, batch.lengths).hidden_states
    hidden_states.sum().backward()
    assert len(counts) == 2 * len(policy.model.layers)
    assert max(counts) <= 1, counts  # that of the layer which runs
