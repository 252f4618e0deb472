"""An evaluation from start to end: its files, what a second call repeats, gaps, samples, and the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation import longbench, ruler_qa, run, short, tables
from refine_lab.evaluation.__main__ import main, parser
from refine_lab.evaluation.benchmark import Missing, Setting, seeded
from refine_lab.evaluation.catalogue import BENCHMARKS, GROUPS, Unit, chosen, units
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.model import RefineLM
from tests.factories.evaluation import Oracle, loaded, write_longbench, write_piqa, write_ruler
from tests.support.paths import ROOT
from tests.support.refusals import naming, refused

TASKS = ("ruler_squadqa", "longbench_hotpotqa", "longbench_trec", "piqa")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets come from local files, and are cached in the test's own folder."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_ruler(folder / "ruler")
    write_longbench(folder / "longbench")
    write_piqa(folder / "hub")
    return folder


@pytest.fixture
def config(data: Path) -> EvaluationConfig:
    return EvaluationConfig(tasks=TASKS, lengths=(512, 2048), limit=4, data=str(data), device="cpu")


def setting(data: Path | None, **fields) -> Setting:
    return Setting(tokenizer=loaded()[1], data=data, **fields)


# -- files ---------------------------------------------------------------------------------------------------------------


def test_results_have_figures_errors_counts_and_versions(config, tmp_path):
    said: list[str] = []
    out = tmp_path / "out"
    result = run.evaluate(config, out, said.append)
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    states = {(unit["task"], unit["length"]): unit["status"] for unit in result["units"]}
    assert states == {
        ("ruler_squadqa", 512): "done",
        ("ruler_squadqa", 2048): "missing",
        ("longbench_hotpotqa", None): "done",
        ("longbench_trec", None): "missing",
        ("piqa", None): "done",
    }
    assert result["answers"] == "greedy" and result["versions"]["lm_eval"] == "0.4.13"
    assert result["model_files"]["model.safetensors"] and result["config"]["seed"] == 0
    done = [unit for unit in result["units"] if unit["status"] == "done"]
    assert all(unit["samples"] == unit["different_samples"] == 4 for unit in done)
    assert all({"value", "stderr"} <= metric.keys() for unit in done for metric in unit["metrics"].values())
    assert result["figures"]["effective_length"] == {"ruler_squadqa": None}
    assert len(said) == 5 and "about" in said[0] and "left" in said[0] and "about" not in said[-1]
    assert "(4 samples, 4 distinct, fewer than 100, " in said[0]
    sentence = tables.few_samples(tables.score_frame(result))
    assert sentence.endswith("noise: ruler_squadqa (512 tokens, 4), longbench_hotpotqa (4), piqa (4).")
    assert tables.few_samples(tables.score_frame(result).assign(few=False)) == ""


def test_parquet_files_have_the_same_figures_and_the_samples(config, tmp_path):
    result = run.evaluate(config, tmp_path / "out", lambda line: None)
    table = pd.read_parquet(tmp_path / "out" / "results.parquet")
    unit = next(unit for unit in result["units"] if unit["task"] == "longbench_hotpotqa")
    rows = table[table["task"] == "longbench_hotpotqa"].set_index("metric")
    assert {name: each["value"] for name, each in unit["metrics"].items()} == rows["value"].to_dict()
    assert rows["main"].sum() == 1 and rows.loc["score", "main"]
    gaps = table[table["status"] == "missing"]
    assert len(gaps) == 2 and gaps["value"].isna().all() and gaps["reason"].str.len().gt(20).all()
    samples = pd.read_parquet(tmp_path / "out" / "samples" / "longbench_hotpotqa.parquet")
    assert len(samples) == 4 and samples["prompt"][0].endswith("Answer:")
    assert samples["score"].mean() == pytest.approx(unit["metrics"]["score"]["value"])
    assert samples["item"].nunique() == unit["different_samples"]


# -- gaps ----------------------------------------------------------------------------------------------------------------


def test_a_gap_names_what_is_missing_and_where_to_get_it(config, tmp_path):
    gaps = [u for u in run.evaluate(config, tmp_path / "out", lambda line: None)["units"] if u["status"] == "missing"]
    by_task = {gap["task"]: gap for gap in gaps}
    assert all("metrics" not in gap for gap in gaps), "a gap is never a zero"
    assert "trec_*.parquet or trec.jsonl" in by_task["longbench_trec"]["reason"]
    assert "https://huggingface.co/datasets/THUDM/LongBench" in by_task["longbench_trec"]["reason"]
    assert "ruler_squadqa_*_2048_*_test.parquet" in by_task["ruler_squadqa"]["reason"]


def test_without_a_data_folder_every_file_is_missing():
    with naming(Missing, "--data", "trec_*.parquet"):
        longbench.docs_of(setting(None), "trec")
    with naming(Missing, "baber/piqa", "--data", "https://huggingface.co/datasets/baber/piqa"):
        short.load_task(setting(None), "piqa")
    lm = RefineLM(*loaded(), ttt="sft")
    with naming(Missing, "'wikitext'", "test-time training"):
        short.measure(lm, setting(None), "wikitext")


def test_a_damaged_data_set_is_a_gap(data):
    (data / "hub" / "baber" / "piqa" / "validation.jsonl").write_text("no json\n", encoding="utf-8")
    with naming(Missing, "'piqa' needs the data set baber/piqa"):
        short.load_task(setting(data), "piqa")


def test_a_changed_data_set_is_read_anew(data):
    task, _ = short.load_task(setting(data), "piqa")
    assert [doc["goal"] for doc in task.eval_docs] == [f"count to {i}" for i in range(6)]
    path = data / "hub" / "baber" / "piqa" / "validation.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("count", "climb"), encoding="utf-8")
    task, _ = short.load_task(setting(data), "piqa")
    assert [doc["goal"] for doc in task.eval_docs] == [f"climb to {i}" for i in range(6)]


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    from refine_lab.evaluation import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ("rouge", "lm_eval") else True)
    sentence = packages.missing_packages("lm_eval", "rouge", "jieba")
    assert sentence is not None and "pip install 'lm_eval==0.4.13' rouge" in sentence
    with naming(ValueError, "lm_eval, rouge"):
        packages.harness("api.task", "rouge")


WITHOUT = """
import sys
sys.modules["lm_eval"] = None
import refine_lab, refine_lab.evaluation, refine_lab.evaluation.config, refine_lab.evaluation.cutting
from refine_lab.evaluation.__main__ import main
sys.exit(main(["--out", "nowhere"]))
"""


def test_without_lm_eval_the_command_line_says_what_to_install():
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "evaluation needs these packages: lm_eval; pip install 'lm_eval==0.4.13' (the extra `eval` of refine_lab)"
    ]


# -- a second call -------------------------------------------------------------------------------------------------------


def test_a_second_call_measures_only_what_is_missing(config, data, tmp_path, monkeypatch):
    first = run.evaluate(config, tmp_path / "out", lambda line: None)
    measured = []
    monkeypatch.setattr(run, "measured", lambda lm, unit, *rest: measured.append(unit) or original(lm, unit, *rest))
    write_longbench(data / "longbench", "trec")
    again = run.evaluate(config, tmp_path / "out", lambda line: None)
    assert measured == [Unit("ruler_squadqa", 2048), Unit("longbench_trec", None)]
    same = ("ruler_squadqa", 512), ("longbench_hotpotqa", None), ("piqa", None)
    for one, other in zip(first["units"], again["units"], strict=True):
        assert (one == other) == ((one["task"], one["length"]) in (*same, ("ruler_squadqa", 2048)))


original = run.measured


def test_a_complete_evaluation_is_read_without_loading_the_model(config, tmp_path, monkeypatch):
    config = replace(config, tasks=("piqa",))
    first = run.evaluate(config, tmp_path / "out", lambda line: None)
    monkeypatch.setattr(run, "RefineLM", lambda *_, **settings: pytest.fail("the model is loaded"))
    assert run.evaluate(config, tmp_path / "out", lambda line: None)["units"] == first["units"]


@pytest.mark.parametrize(("field", "value"), [("limit", 2), ("seed", 1), ("ttt", "sft"), ("sampled", True)])
def test_results_of_other_settings_are_never_mixed(config, tmp_path, field, value):
    config = replace(config, tasks=("piqa",))
    run.evaluate(config, tmp_path / "out", lambda line: None)
    with refused(field, value):
        run.evaluate(replace(config, **{field: value}), tmp_path / "out", lambda line: None)


def test_the_batch_size_matters_only_to_batches_that_are_adapted_to(config):
    sizes = [replace(config, batch_size=size) for size in (2, 4)]
    assert run.settings_of(sizes[0]) == run.settings_of(sizes[1])
    adapted = [replace(each, ttt="sft", ttt_per="batch") for each in sizes]
    assert run.settings_of(adapted[0]) != run.settings_of(adapted[1])


# -- samples -------------------------------------------------------------------------------------------------------------


def test_the_oracle_scores_100_and_random_weights_nearly_0(data):
    oracle, chance = Oracle(*loaded()), RefineLM(*loaded("new:tiny-deltanet"))
    for measure in (
        lambda lm: ruler_qa.measure(lm, setting(data, length=512), "ruler_squadqa").metrics["any_match"],
        lambda lm: longbench.measure(lm, setting(data), "longbench_hotpotqa").metrics["score"],
    ):
        assert measure(oracle).value == 1 and measure(oracle).stderr == 0
        assert measure(chance).value <= 0.05


def test_prompts_of_files_reach_the_model_unchanged(data):
    measured = longbench.measure(RefineLM(*loaded()), setting(data), "longbench_hotpotqa")
    docs, tokens, facts = longbench.docs_of(setting(data), "hotpotqa")
    assert [row["prompt"] for row in measured.rows] == [doc["input"] for doc in docs]
    assert tokens == 8 and facts["file"] == "hotpotqa_16384.parquet"


def test_longbenchs_own_files_are_put_into_the_harnesss_prompts(tmp_path):
    row = {"context": "Type {question} here.", "input": "Where?", "answers": ["here"], "all_classes": None, "length": 4}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    docs, tokens, facts = longbench.docs_of(setting(tmp_path), "hotpotqa")
    assert tokens == 32 and facts["longer than 16384 tokens"] == 0
    assert docs[0]["input"].startswith("Answer the question based on the given passages.")
    assert "Type Where? here." not in docs[0]["input"] and docs[0]["input"].endswith("Question: Where?\nAnswer:")


def test_all_rows_are_scored_or_the_papers(data):
    lm = RefineLM(*loaded())
    assert longbench.measure(lm, setting(data), "longbench_hotpotqa").count == 10
    assert longbench.measure(lm, setting(data, paper_rows=True), "longbench_hotpotqa").count == 8


def test_long_samples_are_cut_or_left_out_and_counted(tmp_path):
    path = write_longbench(tmp_path, rows=3)
    longer = write_longbench(tmp_path / "more", rows=1, words=200)
    table = pd.concat([pd.read_parquet(path), pd.read_parquet(longer)])
    table.to_parquet(path)
    longer.unlink()
    lm = RefineLM(*loaded(), max_length=300)
    cut = longbench.measure(lm, setting(tmp_path), "longbench_hotpotqa")
    assert cut.count == 4 and cut.facts["prompts cut"] == 1
    left = longbench.measure(lm, setting(tmp_path, over_limit="drop"), "longbench_hotpotqa")
    assert left.count == 3 and left.facts["prompts left out"] == 1 and "prompts cut" not in left.facts
    with naming(Missing, "at most 20 tokens"):
        tiny = RefineLM(*loaded(), max_length=20)
        longbench.measure(tiny, setting(tmp_path, over_limit="drop"), "longbench_hotpotqa")


def test_seeded_draws_do_not_disturb_other_draws():
    random.seed(5)
    before = random.getstate()
    with seeded(0, "niah", 512):
        first = random.random()
    with seeded(0, "niah", 512):
        assert random.random() == first
    with seeded(0, "niah", 513):
        assert random.random() != first
    assert random.getstate() == before


def test_samples_do_not_depend_on_the_order_of_tasks(config, tmp_path):
    results = {}
    for name, tasks in (("one", TASKS), ("other", TASKS[::-1])):
        found = run.evaluate(replace(config, tasks=tasks, lengths=(512,)), tmp_path / name, lambda line: None)
        results[name] = {unit["task"]: unit.get("metrics") for unit in found["units"]}
    assert results["one"] == results["other"]
    samples = [pd.read_parquet(tmp_path / name / "samples" / "ruler_squadqa-512.parquet") for name in results]
    assert samples[0].equals(samples[1])


# -- names and the command line ------------------------------------------------------------------------------------------


def test_groups_name_their_tasks_and_unknown_names_are_refused():
    assert chosen(["niah", "niah_single_1", "piqa"]) == [*GROUPS["niah"], "piqa"]
    assert units(["ruler_squadqa", "piqa"], (512, 512, 64)) == [
        Unit("ruler_squadqa", 512),
        Unit("ruler_squadqa", 64),
        Unit("piqa", None),
    ]
    assert len(GROUPS["all"]) == len(BENCHMARKS) >= 31
    with refused("task", "niah_multikeys"):
        chosen(["niah_multikeys"])


def test_every_option_of_the_command_line_has_a_sentence():
    options = [action for action in parser()._actions if action.dest != "help"]
    assert {field.name for field in fields(EvaluationConfig)} <= {action.dest for action in options}
    assert not [action.dest for action in options if not action.help]


def test_the_command_line_writes_results_and_says_what_is_missing(data, tmp_path, capsys):
    given = ["--tasks", "piqa,longbench_trec", "--limit", "3", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*given, "--lengths", "512", "--batch-size", "2", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "[1/2] piqa: acc" in said and "[2/2] longbench_trec: skipped" in said
    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [unit["status"] for unit in result["units"]] == ["done", "missing"]


@pytest.mark.slow
def test_the_harnesss_own_command_line_knows_the_model(tmp_path):
    write_piqa(tmp_path)
    environ = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "refine_lab.evaluation.harness", "--model", "refine_lab", "--tasks", "piqa"]
    more = ["--model_args", "pretrained=tiny-deltanet", "--batch_size", "2", "--device", "cpu", "--limit", "4"]
    done = subprocess.run([*command, *more], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|piqa" in done.stdout and "|acc" in done.stdout


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--tasks", "niahs"], "did you mean 'niah'"),
        (["--lengths", "512,1k"], "'512,1k'"),
        (["--limit", "0"], "EvaluationConfig.limit must be at least 1"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_arguments_get_one_sentence(words, fact, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), "--tasks", "piqa", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert fact in said and "\n" not in said
