"""Our scores beside the paper's: its numbers as data, rows of runs, and means, signs, floors and gaps worked out by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from refine_lab.config import to_json
from refine_lab.experiments.paper_gaps import gaps
from refine_lab.experiments.paper_rows import (
    EVERY_SEED,
    FIELDS,
    RANDOM,
    Row,
    measured,
    of_scale,
    paper_runs,
    rows_of_runs,
)
from refine_lab.experiments.paper_runs import PaperPlan, chain_rows, evaluations, plan_of
from refine_lab.experiments.paper_tables import PAIRS, cells, differences, paper_model_of, summary, verdict
from refine_lab.recipes import midtrain, paper_midtrain, posttrain, ttt_per_prompt
from refine_lab.recipes.paper_results import MEAN, PAPER_MODELS, content, example_rows, paper_numbers, table_names
from refine_lab.runs.run import Run
from refine_lab.statistics import compare_methods
from refine_lab.training.inputs import new_run
from refine_lab.validation import ConfigError
from tests.support.paths import ROOT

DELTANET = "DeltaNet-1.3B"
LAUNCH = "papermill notebooks/paper.ipynb out.ipynb -p launch true"
SFT, REFINE = Row("sft"), Row("refine")

# -- the paper's numbers -------------------------------------------------------------------------------------------------


def printed(table: str, row: int, column: str, model: str = DELTANET) -> float:
    numbers = paper_numbers()
    found = numbers[(numbers["table"] == table) & (numbers["row"] == row) & (numbers["column"] == column)]
    (value,) = found.loc[found["model"] == model, "value"]
    return value


def test_numbers_are_those_of_the_paper() -> None:
    assert printed("table 3", 3, "MK-NIAH Avg") == 18.4 and printed("table 3", 1, "S-NIAH 16K", "LaCT-760M") == 95.8
    assert printed("table 4", 8, "HotpotQA Avg") == 13.2 and printed("table 4", 5, "SQuADQA 4K", "LaCT-760M") == 38.0
    assert printed("table 5", 5, "TC") == 31.5 and printed("table 7", 1, "Avg. Score") == 15.9
    assert printed("table E.1", 2, "LMB. ppl") == 15.3 and printed("table E.2", 3, "Avg. Score") == 17.6
    assert printed("figure 5", 2, "Avg. Score") == 16.3 and np.isnan(printed("figure 5", 7, "Avg. Score"))
    assert len(paper_numbers()) == 96 + 128 + 130 + 4 + 8 + 66 + 8 + 6 + 6 + 18 + 12
    examples = example_rows()
    assert len(examples) == 24 and examples["cosine"].max() == 0.961
    assert {"figure 4", "figure 5", "figure E.1", "figure E.2", "figure E.3"} == {
        name for name, entry in content().items() if entry.get("text")
    }


def test_printed_averages_are_those_of_their_columns() -> None:
    """Every row, which finds a digit that was copied wrong; one average of the paper is not that of its columns."""
    numbers, wrong = paper_numbers(), []
    for (table, model, row, task), group in numbers.groupby(["table", "model", "row", "task"]):
        if (group["length"] == MEAN).any():
            average = group.loc[group["length"] != MEAN, "value"].mean()
            if abs(average - group.loc[group["length"] == MEAN, "value"].iloc[0]) > 0.08:
                wrong.append((table, model, row, task))
    assert wrong == [("table 3", "LaCT-760M", 1, "niah_multikey_1")]  # 46.2 for 70.2, 44.8, 24.2
    whole = numbers[numbers["table"].isin(["table 5", "table E.1"])]
    for _, group in whole.groupby(["table", "model", "row"]):
        values = dict(zip(group["column"], group["value"], strict=True))
        average = values.pop("Avg")
        names = ("LMB. acc", "PIQA acc", "Hella. acc_n", "Wino. acc", "ARC-e acc", "ARC-c acc_n")
        kept = [values[name] for name in names] if "PIQA acc" in values else [*values.values()]
        assert np.mean(kept) == pytest.approx(average, abs=0.08)


def test_the_paper_s_own_setting_is_one_row_in_all_tables() -> None:
    """Tables 5, 6, 7, E.2 and figure 5 report the same model."""
    for model, score in zip(PAPER_MODELS, (16.9, 17.0), strict=True):
        rows = {"table 5": 3, "table 6": 2, "table 7": 4, "table E.2": 1, "figure 5": 4}
        columns = {table: "Avg" if table == "table 5" else "Avg. Score" for table in rows}
        assert {printed(table, row, columns[table], model) for table, row in rows.items()} == {score}


# -- rows of runs --------------------------------------------------------------------------------------------------------


def chain(folder: Path) -> dict[str, Run]:
    """Run directories of one chain, without any training: a run begins with the folder of the one before."""
    small = {"steps": 2, "batch_size": 2, "mini_batch_size": 2, "micro_batch_size": 2}
    runs = {"sft": new_run(replace(midtrain("sft"), **small), folder)}
    runs["refine"] = new_run(replace(midtrain("refine"), **small), folder)
    config = midtrain("refine", seed=1)
    assert config.refine is not None
    binary = replace(config, refine=replace(config.refine, reward="binary", num_chunks=2), **small)
    runs["binary"] = new_run(binary, folder)
    prompts = {"prompts": 40}
    checkpoint = str(runs["refine"].path / "checkpoints" / "step-2")
    runs["nested"] = new_run(replace(posttrain("nested_refine"), model=checkpoint), folder)
    runs["adapted"] = new_run(replace(ttt_per_prompt("sft"), model=str(runs["nested"].path)), folder, inputs=prompts)
    runs["random"] = new_run(replace(ttt_per_prompt("none"), model="new:tiny-deltanet"), folder, inputs=prompts)
    runs["other"] = new_run(replace(midtrain("sft"), model="tiny-lact", **small), folder)
    runs["partly"] = new_run(replace(posttrain("sft"), model=checkpoint.replace("step-2", "step-1")), folder)
    return runs


def test_a_run_s_row_is_that_of_the_runs_it_began_with(tmp_path: Path) -> None:
    runs = chain(tmp_path)
    rows = rows_of_runs([*runs.values()], "tiny-deltanet")
    found = {name: rows.get(run.path) for name, run in runs.items()}
    assert found == {
        "sft": SFT,
        "refine": REFINE,
        "binary": Row("refine", setting="reward=binary, num_chunks=2"),
        "nested": Row("refine", "nested_refine"),
        "adapted": Row("refine", "nested_refine", "sft"),
        "random": RANDOM,
        "other": None,
        "partly": None,
    }
    assert found["adapted"] and found["adapted"].label == "REFINE → nested REFINE → TTT SFT"
    assert found["binary"] and found["binary"].label == "REFINE (reward=binary, num_chunks=2)" and Row().label == "base"


def test_a_moved_chain_keeps_its_rows(tmp_path: Path) -> None:
    runs = chain(tmp_path / "before")
    shutil.move(tmp_path / "before", tmp_path / "after")
    moved = [Run(tmp_path / "after" / run.name) for run in runs.values()]
    rows = {path.name: row for path, row in rows_of_runs(moved, "tiny-deltanet").items()}
    assert rows[runs["adapted"].name] == Row("refine", "nested_refine", "sft")


def test_the_paper_s_recipes_have_the_paper_s_rows(tmp_path: Path) -> None:
    run = new_run(replace(paper_midtrain("refine"), model="tiny-deltanet"), tmp_path)
    assert rows_of_runs([run], "tiny-deltanet") == {run.path: REFINE}


def test_runs_of_several_scales_are_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    runs = [new_run(replace(midtrain("sft"), steps=steps), tmp_path) for steps in (5, 10)]
    with pytest.raises(ConfigError) as caught:
        of_scale(runs)
    assert caught.value.value == "5 steps of 8 x 1024; 10 steps of 8 x 1024"
    assert of_scale(runs, steps=10) == [runs[1]] and of_scale(runs, steps=10, batch_size=4) == []


# -- measurements from files ---------------------------------------------------------------------------------------------

FIXTURES = ROOT / "tests" / "fixtures" / "runs"


def evaluation(
    folder: Path, model: str, score: float, *, limit: int = 16, ttt: str = "none", gap: bool = False, **settings: object
) -> None:
    folder.mkdir(parents=True)
    metrics = {"score": {"value": score, "stderr": 0.1, "higher_is_better": True}}
    unit = {"task": "niah_single_1", "length": 512, "status": "done", "main": "score", "metrics": metrics}
    units = [{**unit, "samples": 16, "different_samples": 15}]
    if gap:
        units.append({"task": "longbench_trec", "length": None, "status": "missing", "reason": "no file trec.jsonl"})
    config = {"model": model, "limit": limit, "seed": 0, "ttt": ttt, "lengths": [512], **settings}
    (folder / "results.json").write_text(
        json.dumps({"config": config, "units": units, "figures": {}}), encoding="utf-8"
    )


def recorded(folder: Path) -> str:
    """A finished run of mid-training as it was recorded, with the name of its model as the base."""
    (name,) = (path.name for path in FIXTURES.glob("*recorded-refine*"))
    shutil.copytree(FIXTURES / name, folder / name)
    return name


def test_records_and_evaluations_of_a_run_are_found(tmp_path: Path) -> None:
    name = recorded(tmp_path)
    run = Run(tmp_path / name)
    base = run.config.model
    evaluation(tmp_path / "evaluations" / "r", str(run.path), 0.5, gap=True)
    evaluation(tmp_path / "evaluations" / "ttt", str(run.path), 0.75, ttt="sft")
    for reward, score in (("binary", 0.625), ("cosine", 0.875)):
        evaluation(tmp_path / "evaluations" / reward, str(run.path), score, ttt="refine", ttt_reward=reward)
    evaluation(tmp_path / "evaluations" / "random", f"new:{base}", 0.0)
    evaluation(tmp_path / "evaluations" / "base", base, 0.25)
    evaluation(tmp_path / "evaluations" / "other", "tiny-lact", 1.0)
    evaluation(tmp_path / "evaluations" / "longer", base, 1.0, limit=500)
    frame, missing = measured(tmp_path, base, samples=16)
    scores = frame[frame["task"] == "niah_single_1"].set_index([*Row._fields, "seed"])["value"].to_dict()
    (_, row), *rest = paper_runs(tmp_path, base).values()
    assert not rest and row.midtrain == "refine"
    seed = run.config.seed
    assert scores == {
        (*RANDOM, EVERY_SEED): 0.0,
        (*Row(), EVERY_SEED): 0.25,
        (*row, seed): 0.5,
        (*row._replace(ttt="sft"), seed): 0.75,
        (*row._replace(ttt="refine"), seed): 0.625,
        (*row._replace(ttt="refine", setting=", ".join(filter(None, [row.setting, "ttt.reward=cosine"]))), seed): 0.875,
    }
    held_out = frame[(frame["task"] == "held_out") & (frame["metric"] == "ntp_loss")]
    assert list(held_out["value"]) == [run.evaluations()["ntp_loss"].iloc[i] for i in (0, -1)]
    rewards = frame.loc[frame["metric"] == "cosine_mean", "value"]
    assert list(rewards) == [pytest.approx(run.metrics()["cosine_mean"].mean())]
    assert missing.to_dict("records") == [{"task": "longbench_trec", "length": "", "reason": "no file trec.jsonl"}]
    with pytest.raises(ConfigError) as caught:
        measured(tmp_path, base)
    assert caught.value.field == "the evaluations"


# -- tables by hand ------------------------------------------------------------------------------------------------------


def line(
    row: Row, seed: int, value: float, task: str = "niah_multikey_1", length: str = "512", **facts: object
) -> dict:
    unset = {"main": True, "metric": "score", "stderr": 0.02, "samples": 16, "different": 12}
    return {**row._asdict(), "seed": seed, "task": task, "length": length, "value": value, **unset, **facts}


def frame_of(*lines: dict) -> pd.DataFrame:
    return pd.DataFrame([*lines], columns=list(FIELDS))


def scores(floor: float = 0.0) -> pd.DataFrame:
    """Base 0.4; SFT 0.4 and 0.6 at 512 tokens and 0.2 and 0.2 at 1,024; REFINE 0.5 and 0.9, and 0.1 and 0.3."""
    found = []
    for length, base, sft, refine in (("512", 0.4, (0.4, 0.6), (0.5, 0.9)), ("1024", 0.2, (0.2, 0.2), (0.1, 0.3))):
        found += [line(RANDOM, EVERY_SEED, floor, length=length), line(Row(), EVERY_SEED, base, length=length)]
        for seed in (0, 1):
            found += [line(SFT, seed, sft[seed], length=length), line(REFINE, seed, refine[seed], length=length)]
    return frame_of(*found)


def cell(found: pd.DataFrame, row: int, length: str, measure: str = "MK-NIAH") -> pd.Series:
    found = found[(found["row"] == row) & (found["length"] == length) & (found["measure"] == measure)]
    assert len(found) == 1
    return found.iloc[0]


def test_means_and_spread_over_seeds_and_lengths() -> None:
    found = cells("table 3", scores(), DELTANET)
    at_512 = cell(found, 3, "512")
    assert at_512["mean"] == pytest.approx(70.0) and at_512["sd"] == pytest.approx(np.std([50, 90], ddof=1))
    assert np.isnan(at_512["paper"]) and at_512["samples"] == 16 and at_512["different"] == 12
    mean = cell(found, 3, MEAN)  # seed 0: (50 + 10) / 2, seed 1: (90 + 30) / 2
    assert mean["by_seed"] == pytest.approx({0: 30.0, 1: 60.0}) and mean["mean"] == pytest.approx(45.0)
    assert mean["paper"] == 18.4 and mean["stderr"] == pytest.approx(100 * 0.02 * 2**0.5 / 2) and mean["samples"] == 32
    base = cell(found, 1, MEAN)
    assert base["mean"] == pytest.approx(30.0) and np.isnan(base["sd"]) and base["paper"] == 14.9


def test_signs_beside_the_paper_s() -> None:
    found = differences(cells("table 3", scores(), DELTANET), DELTANET)
    found = found[(found["measure"] == "MK-NIAH") & (found["length"] == MEAN)].set_index(["row", "against"])
    refine_sft = found.loc[(3, 2)]  # seed 0: 30 - 30, seed 1: 60 - 40
    assert refine_sft["mean"] == pytest.approx(10.0) and refine_sft["sd"] == pytest.approx(np.std([0, 20], ddof=1))
    assert (refine_sft["sign"], refine_sft["paper_sign"], refine_sft["verdict"]) == ("+", "+", "same")
    assert refine_sft["paper"] == 1.5 and refine_sft["seeds"] == 2
    assert found.loc[(3, 1), "mean"] == pytest.approx(15.0) and found.loc[(2, 1), "mean"] == pytest.approx(5.0)
    assert verdict("−", "+") == "opposite" and verdict("0", "+") == "zero" and verdict("0", "0") == "same"
    assert verdict("floor", "+") == verdict("+", "mixed") == verdict("gap", "") == ""


@pytest.mark.parametrize(("random", "floor"), [(0.35, "floor"), (0.33, "above"), (0.45, "floor")])
def test_a_base_within_two_standard_errors_of_random_weights_is_at_the_floor(random: float, floor: str) -> None:
    """Both have a standard error of 0.02: two of their difference are 0.0566, from the base's 0.4."""
    found = cells("table 3", scores(random), DELTANET)
    assert cell(found, 1, "512")["floor"] == floor
    compared = differences(found, DELTANET)
    compared = compared[(compared["measure"] == "MK-NIAH") & (compared["length"] == "512")]
    assert set(compared["sign"]) == ({"floor"} if floor == "floor" else {"+"}) and set(compared["verdict"]) == {""}


def test_without_random_weights_the_floor_is_unknown_and_without_runs_a_cell_is_a_gap() -> None:
    without = scores()[scores()["midtrain"] != "random"]
    found = differences(cells("table 3", without, DELTANET), DELTANET)
    assert set(found.loc[found["measure"] == "MK-NIAH", "sign"]) == {"floor unknown"}
    others = cells("table 3", scores(), DELTANET)
    empty = others[others["measure"] == "S-NIAH"]
    assert (
        empty["mean"].isna().all()
        and set(empty["length"]) == {MEAN}
        and cell(others, 2, MEAN, "S-NIAH")["paper"] == 100
    )
    compared = differences(others, DELTANET)
    assert set(compared.loc[compared["measure"] == "S-NIAH", "sign"]) == {"gap"}
    missing = pd.DataFrame([{"task": "niah_multivalue", "length": "512", "reason": "essays are missing"}])
    found_gaps = gaps(others, missing, PaperPlan(chain=(1,), tasks=("recall",))).set_index("measures")[["rows", "how"]]
    needles, values = found_gaps.loc["S-NIAH, MQ-NIAH"], found_gaps.loc["MV-NIAH"]
    assert needles["rows"] == values["rows"] == "all"
    assert needles["how"] == f"`{LAUNCH} -p chain 1,2,3 -p tasks recall,niah`"
    assert values["how"] == f"The task could not run: essays are missing. {needles['how']}"
    assert not any("MK-NIAH" in measures for measures in found_gaps.index)


def sampled(row: Row, seed: int, values: list[float], length: str = "512", items: str = "abcdef") -> dict:
    scores = pd.DataFrame({"item": [*items], "score": values})
    return line(row, seed, float(np.mean(values)), length=length, scores=scores)


def test_a_difference_has_the_interval_over_seeds_and_items_where_samples_are_recorded() -> None:
    sft = {0: [0.0, 0, 1, 0, 1, 0], 1: [1.0, 0, 0, 0, 1, 1]}
    refine = {0: [1.0, 0, 1, 1, 1, 0], 1: [1.0, 1, 1, 0, 1, 1]}
    base = [0.0, 0, 0, 0, 1, 0]
    lines = [sampled(SFT, seed, values) for seed, values in sft.items()]
    lines += [sampled(REFINE, seed, values) for seed, values in refine.items()] + [sampled(Row(), EVERY_SEED, base)]
    found = differences(cells("table 3", frame_of(*lines), DELTANET), DELTANET)
    found = found[(found["measure"] == "MK-NIAH") & (found["length"] == MEAN)].set_index(["row", "against"])
    for pair, one, other in (((3, 2), refine, sft), ((3, 1), refine, dict.fromkeys((0, 1), base))):
        table = pd.DataFrame(
            [
                {"method": method, "seed": seed, "item": item, "score": score}
                for method, scores in (("one", one), ("other", other))
                for seed, values in scores.items()
                for item, score in zip("abcdef", values, strict=True)
            ]
        )
        (expected,) = compare_methods(table, [("one", "other")]).to_dict("records")
        assert found.loc[pair, "mean"] == pytest.approx(100 * expected["difference"])
        interval = found.loc[pair, ["low", "high"]].to_numpy(float)
        assert interval == pytest.approx([100 * expected[end] for end in ("low", "high")])
        assert found.loc[pair, "items"] == 6 and interval[0] < found.loc[pair, "mean"] < interval[1]


@pytest.mark.parametrize("fault", ["another item", "not recorded", "one seed", "unequal lengths"])
def test_a_difference_without_the_same_samples_has_no_interval(fault: str) -> None:
    values = {(SFT, 0): [0.0, 1], (SFT, 1): [1.0, 0], (REFINE, 0): [1.0, 1], (REFINE, 1): [1.0, 0]}
    lines = [sampled(row, seed, scores, items="ab") for (row, seed), scores in values.items()]
    if fault == "another item":
        lines[3] = sampled(REFINE, 1, [1.0, 0], items="ac")
    elif fault == "not recorded":
        lines[3] = line(REFINE, 1, 0.5)
    elif fault == "one seed":
        lines = [each for each in lines if each["seed"] == 0]
    else:
        lines += [sampled(row, seed, [*scores, 1.0], "1024", items="cde") for (row, seed), scores in values.items()]
    found = differences(cells("table 3", frame_of(*lines), DELTANET), DELTANET)
    found = found[(found["measure"] == "MK-NIAH") & (found["length"] == MEAN)].set_index(["row", "against"])
    assert np.isfinite(found.loc[(3, 2), "mean"]) and np.isnan(found.loc[(3, 2), ["low", "high"]].to_numpy(float)).all()


def test_a_row_that_one_seed_lacks_is_compared_over_the_others() -> None:
    lines = scores()
    lines = lines[~((lines["midtrain"] == "refine") & (lines["seed"] == 1))]
    found = differences(cells("table 3", lines, DELTANET), DELTANET)
    found = found[(found["measure"] == "MK-NIAH") & (found["length"] == "512")].set_index(["row", "against"])
    assert found.loc[(3, 2), "mean"] == pytest.approx(10.0) and found.loc[(3, 2), "seeds"] == 1
    assert np.isnan(found.loc[(3, 2), "sd"]) and found.loc[(2, 1), "seeds"] == 2


def test_own_measures_have_the_sign_that_the_paper_s_share() -> None:
    lines = [line(row, 0, 0.5, "questions", metric="contains_answer") for row in chain_rows()]
    found = differences(cells("table 4", frame_of(*lines), "LaCT-760M"), "LaCT-760M")
    signs = found[found["measure"] == "recall questions"].set_index(["row", "against"])["paper_sign"]
    assert signs[(3, 2)] == "+" and signs[(7, 6)] == "mixed"  # 24.5 - 25.5 and 21.2 - 19.8
    reported = differences(cells("figure E.3", frame_of(), DELTANET), DELTANET)
    assert set(reported["paper_sign"]) == {"−"} and set(reported["sign"]) == {"gap"}


def test_every_table_can_be_laid_out_without_a_measurement() -> None:
    frames = []
    for table in table_names():
        found = cells(table, frame_of(), DELTANET)
        assert found["mean"].isna().all()
        frames.append(differences(found, DELTANET))
    counted = summary(frames)
    assert set(counted["table"]) == set(PAIRS) and (counted["gap"] == counted["differences"]).all()
    with pytest.raises(ConfigError) as caught:
        cells("table 8", frame_of(), DELTANET)
    assert (caught.value.field, caught.value.value) == ("table", "table 8")
    with pytest.raises(ConfigError) as caught:
        cells("table 3", frame_of(), "Mamba")
    assert (caught.value.field, caught.value.value) == ("paper_model", "Mamba")


# -- the plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_methods_that_its_rows_need() -> None:
    assert len(chain_rows()) == 8 and chain_rows()[7] == Row("refine", "nested_refine", "refine")
    plan = PaperPlan(chain=(1, 5))
    assert (plan.midtrain_methods, plan.posttrain_methods, plan.ttt_methods) == (["refine"], ["nested_sft"], [])
    assert PaperPlan(chain=(1, 2)).midtrain_methods == ["sft"] and PaperPlan().ttt_methods == ["sft", "refine"]
    made = plan_of(tasks="niah, recall", lengths=[256], seeds=[3])
    assert made == PaperPlan(tasks=("niah", "recall"), lengths=(256,), seeds=(3,)) and '"chain"' in to_json(made)
    assert paper_model_of("tiny-lact") == "LaCT-760M" and paper_model_of("tiny-deltanet") == DELTANET


def test_every_row_of_tables_5_and_e2_is_evaluated() -> None:
    plan = PaperPlan(chain=(3,), tasks=("longbench",), seeds=(0,), samples=2)
    planned = {out.name: config for config, out in evaluations(plan, Path("runs"), {("refine", 0): "tiny-lact"}, {})}
    adapted = {name: (config.ttt, config.ttt_reward) for name, config in planned.items() if config.ttt != "none"}
    assert adapted == {
        "refine-ttt_sft-s0": ("sft", None),
        "refine-ttt_refine-s0": ("refine", None),
        "refine-ttt_refine_cosine-s0": ("refine", "cosine"),
    }
    assert set(planned) - set(adapted) == {"random", "base", "refine-s0"}
    assert all(len(config.tasks) == 12 and config.limit == 2 for config in planned.values())


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"chain": [9]}, "PaperPlan.chain", (9,)),
        ({"seeds": [1, 1]}, "PaperPlan.seeds", (1, 1)),
        ({"tasks": "niahs"}, "task", "niahs"),
        ({"ablations": "reward,rewards"}, "ablation of mid-training", "rewards"),
        ({"ablations": "ttt_reward"}, "ablation of mid-training", "ttt_reward"),
    ],
)
def test_a_bad_plan_is_refused(settings: dict, field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(**{"tasks": "niah", **settings})
    assert (caught.value.field, caught.value.value) == (field, value)
