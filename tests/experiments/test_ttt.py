"""What the notebook of test-time training calls: the methods from its parameters, one prompt step by step, all prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from refine_lab.config import RefineConfig, from_json, to_json
from refine_lab.data.sample import sample_document
from refine_lab.data.tasks.examples import Example, Task
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tasks.splits import report
from refine_lab.experiments.configs import method_configs, model_of_seed, release_configs
from refine_lab.experiments.estimate import estimated_seconds
from refine_lab.experiments.runs import ttt_runs
from refine_lab.experiments.ttt import prompt_to_trace, trace_prompt
from refine_lab.recipes import METHODS, named, recipe, release_updates, ttt_paper, ttt_per_prompt
from refine_lab.runs.run import Run
from refine_lab.training.adaptation import TTTConfig, adapted, read_prompt
from refine_lab.training.answer_run import answer_run
from refine_lab.training.answers import answer
from refine_lab.training.loading import load_prompts
from refine_lab.ttt_config import TTTRunConfig
from tests.factories.ttt_runs import METHOD, RULE, config_of, examples, model
from tests.support.refusals import naming, refused

# -- recipes and configurations ----------------------------------------------------------------------------------------


def test_the_papers_recipe_has_the_papers_numbers():
    config = ttt_paper()
    assert (config.batch_size, config.mini_batch_size, config.reset) == (8, 4, "never")
    assert config.adapt_on == "prompt" and config.ttt is not None and config.ttt.refine is not None
    assert (config.ttt.steps, config.ttt.lr, config.ttt.weight_decay) == (1, 1e-6, 0.01)
    refine = config.ttt.refine
    numbers = (refine.ntp_coef, refine.nsp_coef, refine.reward, refine.num_chunks, refine.rollout_length)
    assert numbers == (1.0, 0.4, "binary", 8, 5)
    assert [release_updates(ttt_paper(method)).mini_batch_size for method in ("sft", "refine")] == [8, 4]
    assert ttt_per_prompt().reset == "prompt" and ttt_per_prompt().batch_size == 1


def test_the_ways_of_a_recipe_differ_in_the_method_alone():
    for name in named("ttt"):
        none, sft, refine = (recipe(name).make(method, 3) for method in METHODS["ttt"])
        assert none == replace(refine, ttt=None, mini_batch_size=none.mini_batch_size)
        assert refine.ttt is not None and sft.ttt is not None
        own = ["lr"] if name == "per_prompt_searched_lact" else []  # each its own
        assert replace(sft.ttt, **{field: getattr(refine.ttt, field) for field in own}) == replace(
            refine.ttt, refine=None
        )
        assert [config.method for config in (none, sft, refine)] == list(
            METHODS["ttt"]
        ) and refine.ttt.seed == refine.seed == 3
        assert all(from_json(to_json(config), "ttt.json", TTTRunConfig) == config for config in (none, sft, refine))
    with refused("ttt recipe", "papr"):
        recipe("papr", "ttt")
    with refused("method", "base"):
        ttt_per_prompt("base")


@pytest.mark.parametrize(
    ("changes", "field", "value", "allowed"),
    [
        ({"batch_size": 8}, "batch_size", 8, "1 if weights are reset after each prompt"),
        (
            {"batch_size": 8, "mini_batch_size": 3, "reset": "never"},
            "mini_batch_size",
            3,
            "a divisor of batch_size 8",
        ),
        ({"reset": "always"}, "reset", "always", "one of 'prompt', 'never'"),
        ({"adapt_on": "question"}, "adapt_on", "question", "one of 'prompt', 'document'"),
        ({"seed": 2}, "ttt.seed", 0, "the run's, 2"),
        ({"recipe": "a/b"}, "recipe", "a/b", "letters, digits, - and _"),
        ({"device": "tpu"}, "device", "tpu", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_runs_that_cannot_be_are_refused(changes, field, value, allowed):
    with refused(f"TTTRunConfig.{field}", value, allowed):
        TTTRunConfig(**{"recipe": "test", **changes})


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("{", ["ttt.json", "JSON"]),
        ("[]", ["ttt.json", "JSON object", "[]"]),
        ('{"format_version": 0}', ["format_version", "ttt.json", 0]),
        ('{"format_version": 1, "recipe": "x", "resett": "never"}', ["TTTRunConfig", "'resett'"]),
    ],
)
def test_damaged_configurations_are_refused(text, facts):
    with naming(ValueError, *facts):
        from_json(text, "ttt.json", TTTRunConfig)


# -- from a notebook's parameters ----------------------------------------------------------------------------------------


def test_every_parameter_reaches_its_place(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("")
    none, sft, refine, *others = method_configs(
        "per_prompt",
        [4, 5],
        prompts=str(file),
        count=16,
        prompt_tokens=99,
        over_limit="drop",
        answer_column="answers",
        steps=3,
        lr=0.5,
        reward="hybrid",
        num_chunks=2,
        rollout_length=3,
        nsp_coef=0.7,
        parameters="attn",
        stop_at_reward=0.9,
        stop_at_loss=0.1,
        adapt_on="document",
        device=None,
    )
    assert [c.method for c in others] == ["sft", "refine"] and [c.seed for c in (none, sft, refine, *others)] == [
        4,
        4,
        4,
        5,
        5,
    ]
    assert (refine.task.source, refine.task.test, refine.task.train) == (str(file), 16, 0)
    assert (refine.task.prompt_tokens, refine.task.over_limit, refine.task.answer_column) == (99, "drop", "answers")
    expected = {"reward": "hybrid", "num_chunks": 2, "rollout_length": 3, "smoothing_kernel": 3, "nsp_coef": 0.7}
    settings = replace(RefineConfig(), **expected)
    shared = {"steps": 3, "lr": 0.5, "parameters": "attn", "stop_at_loss": 0.1, "seed": 4}
    assert refine.ttt == TTTConfig(refine=settings, stop_at_reward=0.9, **shared)
    assert sft.ttt == TTTConfig(refine=None, **shared) and none.ttt is None
    assert {c.adapt_on for c in (none, sft, refine)} == {"document"} and none.device == "auto"
    with refused("seeds", [1, 1], "one or more distinct integers"):
        method_configs("per_prompt", [1, 1])
    with refused("reward", "cosin"):
        method_configs("per_prompt", [1], reward="cosin")
    with refused("TTTConfig.refine.reward", "custom"):
        method_configs("per_prompt", [1], reward="custom")


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([], ["the number of prompts", 0]),
        (["whole", "half \ud83d of it"], ["'prompt'", "row 2", "at character 5"]),
    ],
)
def test_a_file_without_prompts_or_with_what_is_no_text_is_one_sentence(tmp_path, rows, facts):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    with naming(ValueError, *facts):
        load_prompts(method_configs("per_prompt", [0], prompts=str(file))[0])


# -- with the model ------------------------------------------------------------------------------------------------------


def three(**changes) -> list[TTTRunConfig]:
    refine = config_of(**changes)
    assert refine.ttt is not None
    return [replace(refine, ttt=None), replace(refine, ttt=replace(refine.ttt, refine=None)), refine]


def made_task(chosen: list[Example]) -> Task:
    return Task(train=(), validation=(), test=tuple(chosen), report=report({"test": chosen}), rule=RULE)


def test_one_prompt_is_watched_step_by_step_and_undone(capsys):
    policy, tokenizer = model()
    before = [p.detach().clone() for p in policy.parameters()]
    chosen = examples()[0]
    watched = trace_prompt(policy, tokenizer, chosen, [*three(), *three()], RULE)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert list(zip(watched.steps["method"], watched.steps["step"], strict=True)) == [
        *(("sft", 1), ("sft", 2), ("refine", 1), ("refine", 2))
    ]
    refine = watched.steps[watched.steps["method"] == "refine"]
    assert refine["loss_after"].iloc[0] == refine["loss_before"].iloc[1]
    seen = []
    with adapted(policy, torch.tensor(chosen.prompt_ids), config_of().ttt, seen.append):
        said = answer(policy, tokenizer, [chosen], RULE)
    assert refine["loss_before"].tolist() == pytest.approx([update.metrics["ntp_loss"] for update in seen], rel=1e-5)
    assert refine["entropy_before"].tolist() == pytest.approx([u.metrics["entropy_mean"] for u in seen], rel=1e-5)
    assert refine["reward"].tolist() == [update.metrics["reward_mean"] for update in seen]
    assert (
        watched.answers["method"].tolist() == ["none", "sft", "refine"] and watched.answers["answer"].iloc[2] == said[0]
    )
    assert len(watched.tokens) == len(chosen.prompt_ids) == len(watched.readings["refine"].entropies) + 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[1].startswith("sft step 1: loss ") and "reward" in lines[4]


def test_the_rest_of_a_document_is_held_out(capsys):
    """The weights move as by adapting to the first part alone, and the rest is scored after it."""
    policy, tokenizer = model()
    chosen = replace(examples()[0], question_start=36)
    watched = trace_prompt(policy, tokenizer, chosen, three(), RULE, held_out=1 / 3)
    prompt, first, stop = torch.tensor(chosen.prompt_ids), 24, 36
    before, told = read_prompt(policy, prompt).losses, capsys.readouterr().out
    for method, config in (("sft", three()[1]), ("refine", three()[2])):
        with adapted(policy, prompt[:first], config.ttt):
            after = read_prompt(policy, prompt[:stop]).losses
        found, steps = watched.rests[method], watched.steps[watched.steps["method"] == method]
        assert found.before == pytest.approx(float(before[first - 1 : stop - 1].mean()), rel=1e-6)
        assert found.after == pytest.approx(float(after[first - 1 :].mean()), rel=1e-5)
        assert found.change.count == stop - first and f"{method}: {found.sentence}" in told
        assert steps["rest_before"].iloc[0] == pytest.approx(found.before)
        assert steps["rest_after"].iloc[-1] == pytest.approx(found.after)
        assert steps["loss_after"].iloc[-1] == pytest.approx(float(after[: first - 1].mean()), rel=1e-5)
    assert trace_prompt(policy, tokenizer, chosen, three()[:2], RULE).rests == {}
    with refused("a document's tokens", 36):
        trace_prompt(policy, tokenizer, chosen, three(), RULE, held_out=0.01)


def test_all_prompts_are_answered_once_and_it_is_told_what_is_left_out(tmp_path, capsys):
    policy, tokenizer = model()
    configs, chosen = three(reset="never"), examples()
    task = made_task(chosen)
    runs = ttt_runs(configs, policy, chosen, tmp_path)
    told = capsys.readouterr().out
    assert "1 of 5 prompts are skipped, since the last batch has fewer than 2 prompts." in told
    assert estimated_seconds(runs, task, policy, tokenizer) > 0
    for run in runs:
        answer_run(run, policy, tokenizer, task)
    answers = pd.concat([run.answers() for run in runs])
    assert answers.groupby("method")["name"].nunique().to_dict() == {"none": 4, "sft": 4, "refine": 4}
    assert "refine s0: 4 answers, contains_answer 0.000" in capsys.readouterr().out
    again = ttt_runs(configs, policy, chosen, tmp_path)
    assert [run.path for run in again] == [run.path for run in runs]
    assert "4 prompts already answered" in capsys.readouterr().out
    assert estimated_seconds(again, task, policy, tokenizer) == 0
    fresh = ttt_runs(configs, policy, chosen, tmp_path, fresh=True)
    assert not {run.path for run in fresh} & {run.path for run in runs}


def test_short_prompts_are_told_before_any_directory_is_made(tmp_path, capsys):
    policy, _ = model()
    chosen = [replace(e, prompt_ids=e.prompt_ids[:9], question_start=8) for e in examples(2)]
    ttt_runs(three(), policy, chosen, tmp_path)
    told = capsys.readouterr().out
    assert told.count("is too short for the method's settings, so c is 2 and not 4") == 2
    bad = [*chosen, replace(chosen[0], prompt_ids=(1,))]
    with naming(ValueError, chosen[0].name):
        ttt_runs(three(), policy, bad, tmp_path / "none")
    assert not (tmp_path / "none").exists() and METHOD.num_chunks == 4
    assert len([Run(path) for path in tmp_path.iterdir()]) == 3


def test_attention_over_all_positions_has_a_limit_and_a_recurrence_has_none():
    from tests.factories.hybrids import VOCABULARY, make

    assert model()[0].longest_context is None
    hybrid = make("qwen3_next", torch.float32, max_position_embeddings=64)
    assert hybrid.longest_context == 64
    assert make("olmo_hybrid", torch.float32, max_position_embeddings=64).longest_context is None, "no positions"
    prompt = torch.randint(VOCABULARY, (65,))
    with (
        refused("a prompt's tokens", 65),
        adapted(hybrid, prompt, TTTConfig()),
    ):
        pass


def test_another_model_for_each_seed(tmp_path):
    for name in ("1-run-s0", "2-run-s0", "1-run-s3"):
        (tmp_path / name).mkdir()
    assert model_of_seed(f"{tmp_path}/*-run-s{{seed}}", 0) == str(tmp_path / "2-run-s0"), "the newest"
    assert model_of_seed("org/name-{seed}", 7) == "org/name-7"
    with naming(FileNotFoundError, f"{tmp_path}/*-run-s1"):
        model_of_seed(f"{tmp_path}/*-run-s{{seed}}", 1)
    configs = method_configs("per_prompt", [0, 3], model="org/name-{seed}")
    assert [(c.method, c.seed, c.model) for c in configs] == [
        (method, seed, f"org/name-{seed}") for seed in (0, 3) for method in ("none", "sft", "refine")
    ]


def test_the_releases_sft_makes_half_of_the_updates():
    _, sft, refine = method_configs("per_prompt", [0], updates="release", steps=6)
    assert (sft.ttt.steps, refine.ttt.steps, sft.method, refine.method) == (3, 6, "sft_release", "refine")
    (beside,) = release_configs(method_configs("per_prompt", [0], steps=6))
    assert beside == sft and release_configs([sft, refine]) == []
    with refused("steps", 1, "at least 2, so that SFT can make half as many, as in the paper's released code"):
        method_configs("per_prompt_searched", [0], updates="release")


def test_the_releases_sft_makes_one_update_a_batch_whatever_its_size():
    for sizes in ({}, {"batch_size": 16}, {"mini_batch_size": 2}):
        _, sft, refine = method_configs("paper", [0], updates="release", **sizes)
        assert sft.batch_size == sft.mini_batch_size > refine.mini_batch_size


def test_a_prompt_to_watch_is_there_and_has_what_it_is_asked_about():
    there, (_, tokenizer) = made_task(examples(3)), model()
    config = method_configs("per_prompt", [0])[0].task
    assert prompt_to_trace(tokenizer, there, config, example=2) == (there.test[2], RULE)
    assert prompt_to_trace(tokenizer, there, config, example=None, prompts="mine.jsonl") == (there.test[0], RULE)
    sample, rule = prompt_to_trace(tokenizer, there, config, example=None, answer_tokens=3)
    document, question = sample.parts(tokenizer)
    assert (document.rstrip(), question) == (sample_document().document, sample_document().question.strip())
    assert sample.answers == ("width",) and rule == AnswerRule(max_tokens=3)
    own, rule = prompt_to_trace(tokenizer, there, config, text="one two", question="which?")
    assert own.question == "which?"
    assert rule == AnswerRule() and rule.strip_leading and rule.max_tokens == 32, "not the recipe's 4 tokens"
    asked = {"answer_tokens": 5, "lines": "all", "strip_leading": None, "model": None}
    _, rule = prompt_to_trace(tokenizer, there, config, text="one two", **asked)
    assert rule == AnswerRule(max_tokens=5, lines="all")
    for wrong in (dict(question="which?"), dict(example=3), dict(example=-1)):
        with refused(*wrong.keys(), *wrong.values()):
            prompt_to_trace(tokenizer, there, config, **wrong)
