"""Figures and values in the documents: those of the benchmarks' files, of the configurations' defaults and of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from refine_lab import recipes
from refine_lab.config import DataConfig, RefineConfig, TaskConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.tasks.prompts import TextPrompt, encode
from refine_lab.method.rollout import Branches, sample
from refine_lab.models import load_model
from refine_lab.runs.answers import COLUMNS
from refine_lab.runs.schema import ROLLOUT_TYPES
from refine_lab.training.adaptation import fit_to_length
from tests.support.paths import ROOT

WORDS = {5: "five", 7: "seven", 11: "eleven"}


def text_of(name: str) -> str:
    """A document with its lines joined, since sentences go over several."""
    return re.sub(r"\s+", " ", (ROOT / name).read_text(encoding="utf-8"))


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


# -- figures of the benchmarks -----------------------------------------------------------------------------------------


def test_the_readme_has_the_cost_of_a_step_as_it_was_measured() -> None:
    cost, readme = measured("step_cost"), text_of("README.md")
    ratios = {length: cost[length]["refine_over_sft"] for length in ("1024", "2048")}
    short, long = (f"{ratio:.2f} times as much" for ratio in ratios.values())
    assert f"costs {short} as an SFT step at 1,024 tokens and {long} at 2,048" in readme
    assert (
        f"medians of {WORDS[cost['settings']['repeats']]} interleaved rounds, `benchmarks/results/step_cost" in readme
    )
    least, most = sorted(ratio * cost[length]["paper_over_refine"] for length, ratio in ratios.items())
    assert f"a training step costs {least:.1f} to {most:.1f} times as much as an SFT step" in readme


def test_method_md_has_the_costs_of_selections_and_estimators_as_they_were_measured() -> None:
    cost, method = measured("step_cost"), text_of("docs/method.md")
    names = ("refine_memory", "expected_memory", "expected_copy")
    memory, expected, copies = ([f"{cost[n][f'{name}_over_sft']:.2f}" for n in ("1024", "2048")] for name in names)
    assert (
        f"A step of REFINE with selection by memory costs {memory[0]} SFT steps at 1,024 tokens and {memory[1]} at 2,048"
        in method
    )
    assert expected[0] == expected[1] and f"with this selection {expected[0]} at both lengths" in method
    assert f"`expected` with selection by copies {copies[0]} and {copies[1]}" in method


def test_selections_and_estimators_cost_no_more_than_they_may() -> None:
    most = {"refine_memory_over_sft": 1.7, "expected_memory_over_sft": 1.45, "expected_copy_over_sft": 1.05}
    cost = measured("step_cost")
    for length in ("1024", "2048"):
        assert all(cost[length][name] <= bound for name, bound in most.items()), length


def test_models_md_has_the_costs_as_they_were_measured() -> None:
    models, families = text_of("docs/models.md"), measured("families")
    told = dict(
        re.findall(
            r"\| ([a-z][\w., -]*?)(?:, a little above the bar of 1\.3| \(fla's default\).*?)? \| ([\d.]+) \|", models
        )
    )
    found = {name: f"{case['refine_over_sft']:.2f}" for name, case in families.items() if "refine_over_sft" in case}
    assert found.items() <= told.items()
    assert f"medians of {WORDS[families['settings']['repeats']]} interleaved rounds" in models
    for name, file in (("tiny-deltanet", "step_cost"), ("tiny-lact", "step_cost_lact")):
        cost = [measured(file)[length] for length in ("1024", "2048")]
        sft, paper = (
            ", ".join(f"{case[key]:{form}}" for case in cost)
            for key, form in (("refine_over_sft", ".2f"), ("paper_over_refine", ".1f"))
        )
        assert f"| `{name}` | {sft} | {paper} |" in models
    tokens = [case["median"] * 1e3 for case in measured("decode")["seconds_per_token"].values()]
    assert f"Decoding one token with `tiny-lact` takes {min(tokens):.1f} to {max(tokens):.1f} ms" in models
    refine = measured("ttt")["refine"]
    (step,) = {f"{refine['seconds'][part]['median']:.1f}" for part in ("first", "later")}
    assert f"takes {step} s per REFINE step (median)" in models
    assert f"in a new process, where it took {refine['first_step']:.1f} s (`benchmarks.ttt`)" in models


def test_the_searches_in_the_results_have_as_many_trials_as_is_said() -> None:
    text = text_of("docs/results/README.md")
    assert "uses the best of eight settings for each method (ten for nested REFINE). They were selected on val" in text
    assert (
        "uses the best of eight settings for SFT and ten for REFINE. They were selected on validation prompts" in text
    )
    for model in ("tiny-deltanet", "tiny-lact"):
        for search, methods in (
            (f"search_{model}", {"sft": 8, "nested_sft": 8, "nested_refine": 10}),
            (f"search_ttt_{model}", {"none": 1, "sft": 8, "refine": 10}),
        ):
            counted = [trial["method"] for trial in measured(search)["trials"]]
            assert {method: counted.count(method) for method in set(counted)} == methods, search


def test_the_tables_of_the_results_are_those_of_the_notebooks() -> None:
    """Each mean with its deviation, and each difference with its interval, stands in an executed notebook."""
    shown = ""
    for path in sorted((ROOT / "docs" / "results").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            shown += "".join(str(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", []))
    text = re.sub(r"<!-- tables .*? begin -->.*<!-- tables .*? end -->", "", text_of("docs/results/README.md"))
    told = re.findall(r"\d+\.\d ± \d+\.\d|[-+]\d+\.\d \([-+]\d+\.\d to [-+]\d+\.\d\)", text)
    assert len(told) > 50
    assert not [figure for figure in told if figure not in shown]


# -- values of the configurations and of the code ----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_default_that_is_told_is_the_default(path: Path) -> None:
    kinds = {kind.__name__: kind for kind in (RefineConfig, DataConfig, TaskConfig)}
    text = text_of(f"docs/{path.name}")
    told = re.findall(r"`(RefineConfig|DataConfig|TaskConfig)\.(\w+)` is (\d[\d.]*\d|\d) by default", text)
    assert told or path.name != "method.md"
    for kind, name, value in told:
        assert getattr(kinds[kind](), name) == float(value), name


def test_what_method_md_says_of_smoothing_and_margin_on_a_short_row() -> None:
    text, refine = text_of("docs/method.md"), RefineConfig(num_chunks=8)
    assert "stays 5 when `RefineConfig.rollout_length` changes" in text
    assert [RefineConfig(rollout_length=k).smoothing_kernel for k in (1, 3, 8)] == [5, 5, 5]
    first, gap = refine.ends
    size = 512 // 8
    excluded = [sum(not first <= t <= 511 - gap for t in range(i * size, (i + 1) * size)) for i in range(8)]
    assert excluded == [19, 0, 0, 0, 0, 0, 0, 20]
    assert (
        "in a row of 512 tokens with 8 chunks of 64 positions it excludes 19 positions of the first chunk and 20 of the last"
        in text
    )
    shorter = fit_to_length(refine, 100)
    assert "the margin shrinks first" in text and shorter.margin < refine.margin and shorter.num_chunks == 8
    assert fit_to_length(refine, 30).num_chunks == 5 and fit_to_length(refine, 30).rollout_length == 5


def test_a_rollout_may_hold_the_end_of_the_text_as_method_md_says() -> None:
    """Of each model's first token the one whose interval of the inverse CDF is the end of the text's."""
    assert "may be drawn like any other token, since packed rows contain it" in text_of("docs/method.md")
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    end = tokenizer.eos_token_id
    tokens = tokenizer("def f(x):\n    return x\n", return_tensors="pt").input_ids
    trace = policy.read(tokens)
    branches = Branches.of(trace, torch.tensor([[tokens.shape[1] - 1]]), 1, detach=True)
    sums = policy(tokens).logits[0, -1].double().softmax(-1).cumsum(-1)
    inside = (sums[end] + (sums[end - 1] if end else 0)) / 2
    assert sample(policy, branches, inside.detach().float().view(1, 1), 1.0).tolist() == [[end]]


def test_rows_of_text_begin_inside_documents_and_cross_their_borders_as_method_md_says(tmp_path: Path) -> None:
    assert "a row can begin inside a document and cross from one into the next" in text_of("docs/method.md")
    _, tokenizer = load_model("tiny-deltanet", device="cpu")
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(f"{name} = {name}\n" * 20)
    config = DataConfig(sources={str(tmp_path): 1.0}, sequence_length=32, validation_sequences=1)
    rows = SequenceData(config, tokenizer, seed=0).batch(0, 8).tokens.numpy()
    end = tokenizer.eos_token_id
    assert any(end in row[:-1] for row in rows)  # crosses a border
    starts = [np.array(tokenizer(f"{name} = {name}\n").input_ids[:2]) for name in "abcd"]
    assert any(not any((row[:2] == start).all() for start in starts) for row in rows)  # begins inside


def test_targets_of_answers_have_a_space_and_an_end_as_method_md_says() -> None:
    assert "a space, the first reference, and the end-of-text token" in text_of("docs/method.md")
    _, tokenizer = load_model("tiny-deltanet", device="cpu")
    given = TextPrompt(
        name="a", text="Who?\nAnswer:", question_start=0, answers=("width", "b"), question="Who?", documents=()
    )
    ids = encode(given, tokenizer).answer_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == " width"


def test_the_shares_and_counts_of_the_recipes_that_method_md_names() -> None:
    text = text_of("docs/method.md")
    assert "half of the rows of `refine_lab.recipes.midtrain`, none in the paper's recipe" in text
    assert sum(recipes.midtrain().data.recall.values()) == 0.5
    assert not recipes.paper_midtrain().data.recall
    assert "a batch of 128 in mini-batches of 32" in text
    paper = recipes.paper_midtrain()
    assert (paper.batch_size, paper.mini_batch_size, paper.data.sequence_length) == (128, 32, 16_384)
    assert (
        "each batch of 64 prompts is used for four updates on mini-batches of 16 prompts and one update on all" in text
    )
    nested = recipes.paper_posttrain()
    assert (nested.batch_size, nested.mini_batch_size, nested.updates_per_batch) == (64, 16, 5)
    assert "batches of 8 prompts, with two updates per batch (one for SFT)" in text
    ttt = [recipes.ttt_paper("refine"), recipes.release_updates(recipes.ttt_paper("sft"))]
    assert [config.batch_size // config.mini_batch_size for config in ttt] == [2, 1]


def test_architecture_md_has_the_columns_of_the_files() -> None:
    text = text_of("docs/architecture.md")
    rollouts = re.search(
        r"Columns of `rollouts/\*\.parquet`: (.*?)\. Columns of `answers/`: (.*?), then the columns specific", text
    )
    assert rollouts
    names = [re.findall(r"`(\w+)`", part) for part in rollouts.groups()]
    assert set(names[0]) == {"step", *ROLLOUT_TYPES}
    assert names[1] == list(COLUMNS)
