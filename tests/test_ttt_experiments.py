"""What the notebook of test-time training calls: the ways from its parameters, one prompt step by step, all prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_ttt_runs import METHOD, RULE, config_of, examples, model

from refine_lab.config import RefineConfig, from_json, to_json
from refine_lab.recipes import TTT_RECIPES, TTT_WAYS, ttt_paper, ttt_paper_release_updates, ttt_per_prompt, ttt_recipe
from refine_lab.tasks.answers import answer
from refine_lab.tasks.examples import Example, Task
from refine_lab.tasks.rules import AnswerRule
from refine_lab.tasks.splits import report
from refine_lab.ttt.adaptation import TTTConfig, adapted, token_limit
from refine_lab.ttt.config import TTTRunConfig
from refine_lab.ttt.experiments import (
    answer_run,
    estimated_seconds,
    loaded,
    of_seed,
    prompt_to_watch,
    release_way,
    runs_of,
    three_ways,
    watch,
)
from refine_lab.ttt.records import TTTRun
from refine_lab.ttt.results import results

# -- recipes and configurations ----------------------------------------------------------------------------------------


def test_the_papers_recipe_has_the_papers_numbers():
    config = ttt_paper()
    assert (config.batch_size, config.mini_batch_size, config.reset) == (8, 4, "never")
    assert config.adapt_on == "prompt" and config.ttt is not None and config.ttt.method is not None
    assert (config.ttt.steps, config.ttt.lr, config.ttt.weight_decay) == (1, 1e-6, 0.01)
    method = config.ttt.method
    numbers = (method.ntp_coef, method.nsp_coef, method.reward, method.num_chunks, method.rollout_length)
    assert numbers == (1.0, 0.4, "binary", 8, 5)
    assert [ttt_paper_release_updates(way).mini_batch_size for way in ("sft", "refine")] == [8, 4]
    assert ttt_per_prompt().reset == "prompt" and ttt_per_prompt().batch_size == 1


def test_the_ways_of_a_recipe_differ_in_the_method_alone():
    for name in TTT_RECIPES:
        none, sft, refine = (ttt_recipe(name)(way, 3) for way in TTT_WAYS)
        assert none == replace(refine, ttt=None, mini_batch_size=none.mini_batch_size)
        assert refine.ttt is not None and sft.ttt is not None
        own = {"per_prompt_searched_lact": ["lr"], "per_prompt_release_updates": ["steps"]}.get(
            name, []
        )  # each its own
        assert replace(sft.ttt, **{field: getattr(refine.ttt, field) for field in own}) == replace(
            refine.ttt, method=None
        )
        assert [config.arm for config in (none, sft, refine)] == list(TTT_WAYS) and refine.ttt.seed == refine.seed == 3
        assert all(from_json(to_json(config), "ttt.json", TTTRunConfig) == config for config in (none, sft, refine))
    with pytest.raises(ValueError, match="unknown recipe 'papr'; did you mean 'paper'"):
        ttt_recipe("papr")
    with pytest.raises(ValueError, match="arm must be one of 'none', 'sft', 'refine', got 'base'"):
        ttt_per_prompt("base")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 8}, "TTTRunConfig.batch_size must be 1 where weights are reset after each prompt, got 8"),
        (
            {"batch_size": 8, "mini_batch_size": 3, "reset": "never"},
            "mini_batch_size must be a divisor of batch_size 8, got 3",
        ),
        ({"reset": "always"}, "TTTRunConfig.reset must be one of 'prompt', 'never', got 'always'"),
        ({"adapt_on": "question"}, "TTTRunConfig.adapt_on must be one of 'prompt', 'document', got 'question'"),
        ({"seed": 2}, "TTTRunConfig.ttt.seed must be the run's, 2, got 0"),
        ({"recipe": "a/b"}, "TTTRunConfig.recipe must be letters, digits"),
        ({"device": "tpu"}, "TTTRunConfig.device must be 'auto', 'cpu'"),
    ],
)
def test_runs_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TTTRunConfig(**{"recipe": "test", **changes})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "ttt.json is not JSON"),
        ("[]", "ttt.json must be a JSON object"),
        ('{"format_version": 0}', "format_version of ttt.json must be 1"),
        ('{"format_version": 1, "recipe": "x", "resett": "never"}', "unknown field of TTTRunConfig 'resett'"),
    ],
)
def test_damaged_configurations_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_json(text, "ttt.json", TTTRunConfig)


# -- from a notebook's parameters ----------------------------------------------------------------------------------------


def test_every_parameter_reaches_its_place(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("")
    none, sft, refine, *others = three_ways(
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
    assert [c.arm for c in others] == ["sft", "refine"] and [c.seed for c in (none, sft, refine, *others)] == [
        4,
        4,
        4,
        5,
        5,
    ]
    assert (refine.task.source, refine.task.test, refine.task.train) == (str(file), 16, 0)
    assert (refine.task.prompt_tokens, refine.task.over_limit, refine.task.answer_column) == (99, "drop", "answers")
    expected = {"reward": "hybrid", "num_chunks": 2, "rollout_length": 3, "nsp_coef": 0.7}
    method = replace(RefineConfig(), **expected)
    shared = {"steps": 3, "lr": 0.5, "parameters": "attn", "stop_at_loss": 0.1, "seed": 4}
    assert refine.ttt == TTTConfig(method=method, stop_at_reward=0.9, **shared)
    assert sft.ttt == TTTConfig(method=None, **shared) and none.ttt is None
    assert {c.adapt_on for c in (none, sft, refine)} == {"document"} and none.device == "auto"
    with pytest.raises(ValueError, match="seeds must be at least one whole number, none twice"):
        three_ways("per_prompt", [1, 1])
    with pytest.raises(ValueError, match="unknown reward 'cosin'; did you mean 'cosine'"):
        three_ways("per_prompt", [1], reward="cosin")
    with pytest.raises(
        ValueError, match=r"reward must be one of 'cosine', 'binary', 'hybrid': a function of your own .*, got 'custom'"
    ):
        three_ways("per_prompt", [1], reward="custom")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "the number of prompts must be at least 1, got 0"),
        (["whole", "half \ud83d of it"], "column 'prompt' of 'mine-1' holds half of a surrogate pair, .*, at 5"),
    ],
)
def test_a_file_without_prompts_or_with_what_is_no_text_is_one_sentence(tmp_path, rows, sentence):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=sentence):
        loaded(three_ways("per_prompt", [0], prompts=str(file))[0])


# -- with the model ------------------------------------------------------------------------------------------------------


def three(**changes) -> list[TTTRunConfig]:
    refine = config_of(**changes)
    assert refine.ttt is not None
    return [replace(refine, ttt=None), replace(refine, ttt=replace(refine.ttt, method=None)), refine]


def made_task(chosen: list[Example]) -> Task:
    return Task(train=(), validation=(), test=tuple(chosen), report=report({"test": chosen}), rule=RULE)


def test_one_prompt_is_watched_step_by_step_and_undone(capsys):
    policy, tokenizer = model()
    before = [p.detach().clone() for p in policy.parameters()]
    chosen = examples()[0]
    watched = watch(policy, tokenizer, chosen, [*three(), *three()], RULE)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert list(zip(watched.steps["way"], watched.steps["step"], strict=True)) == [
        *(("sft", 1), ("sft", 2), ("refine", 1), ("refine", 2))
    ]
    refine = watched.steps[watched.steps["way"] == "refine"]
    assert refine["loss_after"].iloc[0] == refine["loss_before"].iloc[1]
    seen = []
    with adapted(policy, torch.tensor(chosen.prompt_ids), config_of().ttt, seen.append):
        said = answer(policy, tokenizer, [chosen], RULE)
    assert refine["loss_before"].tolist() == pytest.approx([update.metrics["ntp_loss"] for update in seen], rel=1e-5)
    assert refine["entropy_before"].tolist() == pytest.approx([u.metrics["entropy_mean"] for u in seen], rel=1e-5)
    assert refine["reward"].tolist() == [update.metrics["reward_mean"] for update in seen]
    assert watched.answers["way"].tolist() == ["none", "sft", "refine"] and watched.answers["answer"].iloc[2] == said[0]
    assert len(watched.tokens) == len(chosen.prompt_ids) == len(watched.readings["refine"].entropies) + 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[1].startswith("sft step 1: loss ") and "reward" in lines[4]


def test_all_prompts_are_answered_once_and_it_is_told_what_is_left_out(tmp_path, capsys):
    policy, tokenizer = model()
    configs, chosen = three(reset="never"), examples()
    task = made_task(chosen)
    runs = runs_of(configs, policy, chosen, tmp_path)
    told = capsys.readouterr().out
    assert "1 of 5 prompts are left out, since the last batch has fewer than 2 prompts." in told
    assert estimated_seconds(runs, policy, tokenizer, task) > 0
    for run in runs:
        answer_run(run, policy, tokenizer, task)
    answers = results(runs)
    assert answers.groupby("way")["name"].nunique().to_dict() == {"none": 4, "sft": 4, "refine": 4}
    assert "refine s0: 4 answers, recall 0.000" in capsys.readouterr().out
    again = runs_of(configs, policy, chosen, tmp_path)
    assert [run.path for run in again] == [run.path for run in runs]
    assert "4 prompts already answered" in capsys.readouterr().out
    assert estimated_seconds(again, policy, tokenizer, task) == 0
    fresh = runs_of(configs, policy, chosen, tmp_path, fresh=True)
    assert not {run.path for run in fresh} & {run.path for run in runs}


def test_short_prompts_are_told_before_any_directory_is_made(tmp_path, capsys):
    policy, _ = model()
    chosen = [replace(e, prompt_ids=e.prompt_ids[:9], question_start=8) for e in examples(2)]
    runs_of(three(), policy, chosen, tmp_path)
    told = capsys.readouterr().out
    assert told.count("is short for the method, so that c is 2 and not 4") == 2
    bad = [*chosen, replace(chosen[0], prompt_ids=(1,))]
    with pytest.raises(ValueError, match="cannot be used"):
        runs_of(three(), policy, bad, tmp_path / "none")
    assert not (tmp_path / "none").exists() and METHOD.num_chunks == 4
    assert len([TTTRun(path) for path in tmp_path.iterdir()]) == 3


def test_attention_over_all_positions_has_a_limit_and_a_recurrence_has_none():
    from test_hybrids import VOCABULARY, make

    assert token_limit(model()[0]) is None
    hybrid = make("qwen3_next", torch.float32, max_position_embeddings=64)
    assert token_limit(hybrid) == 64
    prompt = torch.randint(VOCABULARY, (65,))
    with (
        pytest.raises(
            ValueError, match="a prompt's tokens must be at most 64, the positions that this model knows, got 65"
        ),
        adapted(hybrid, prompt, TTTConfig()),
    ):
        pass


def test_another_model_for_each_seed(tmp_path):
    for name in ("1-run-s0", "2-run-s0", "1-run-s3"):
        (tmp_path / name).mkdir()
    assert of_seed(f"{tmp_path}/*-run-s{{seed}}", 0) == str(tmp_path / "2-run-s0"), "the newest"
    assert of_seed("org/name-{seed}", 7) == "org/name-7"
    with pytest.raises(FileNotFoundError, match=r"no folder fits the model '.*-run-s1'"):
        of_seed(f"{tmp_path}/*-run-s{{seed}}", 1)
    configs = three_ways("per_prompt", [0, 3], model="org/name-{seed}")
    assert [(c.arm, c.seed, c.model) for c in configs] == [
        (way, seed, f"org/name-{seed}") for seed in (0, 3) for way in ("none", "sft", "refine")
    ]


def test_the_releases_sft_makes_half_of_the_updates():
    _, sft, refine = three_ways("per_prompt_release_updates", [0], steps=6)
    assert (sft.ttt.steps, refine.ttt.steps, sft.way, refine.way) == (3, 6, "sft_release", "refine")
    (beside,) = release_way("per_prompt", [0], steps=6)
    assert beside == sft and release_way("per_prompt_release_updates", [0]) == []
    with pytest.raises(ValueError, match="steps must be at least 2, of which SFT makes half as in the release, got 1"):
        release_way("per_prompt_searched", [0])


def test_the_releases_sft_makes_one_update_a_batch_whatever_its_size():
    for sizes in ({}, {"batch_size": 16}, {"mini_batch_size": 2}):
        _, sft, refine = three_ways("paper_release_updates", [0], **sizes)
        assert sft.batch_size == sft.mini_batch_size > refine.mini_batch_size


def test_a_prompt_to_watch_is_there_and_has_what_it_is_asked_about():
    there, (_, tokenizer) = made_task(examples(3)), model()
    config = three_ways("per_prompt", [0])[0].task
    assert prompt_to_watch(tokenizer, there, config, example=2) == (there.test[2], RULE)
    own, rule = prompt_to_watch(tokenizer, there, config, text="one two", question="which?")
    assert own.question == "which?"
    assert rule == AnswerRule() and rule.strip_leading and rule.max_tokens == 32, "not the recipe's 4 tokens"
    asked = {"answer_tokens": 5, "lines": "all", "strip_leading": None, "model": None}
    _, rule = prompt_to_watch(tokenizer, there, config, text="one two", **asked)
    assert rule == AnswerRule(max_tokens=5, lines="all")
    for wrong, sentence in (
        (dict(question="which?"), r"question must be none without a text that it asks about, got 'which\?'"),
        (dict(example=3), "example must be from 0 to 2, got 3"),
        (dict(example=-1), "example must be from 0 to 2, got -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prompt_to_watch(tokenizer, there, config, **wrong)
