"""Experiments as notebooks run them: parameters and their types, fair methods, run directories made or found again."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refine_lab.config import DataConfig, TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.recall import Words
from refine_lab.experiments.compare import joined_stages, last_rollouts, metrics
from refine_lab.experiments.configs import method_configs, setting_names, with_settings
from refine_lab.experiments.midtrain import final_results, pretrain_stages
from refine_lab.experiments.parameters import convert, in_jupyterlab, parameters
from refine_lab.experiments.runs import create_runs, runs_folder, stage_runs, text_runs
from refine_lab.models.hub import SHIPPED
from refine_lab.models.loading import load_model
from refine_lab.recipes import by_memory, midtrain, pretrain, pretrain_lact
from refine_lab.runs.files import read_parquet
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.evaluation import recall_documents
from refine_lab.training.loading import load_policy
from refine_lab.ttt_config import TTTRunConfig
from tests.support.refusals import naming, refused

INJECTED = "# Parameters\n"


def exactly_first(inputs):
    return (inputs.rollout_ids[:, 0] == inputs.target_ids[:, 0]).float()


# -- parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "arrivals", "value"),
    [
        ("Optional[float]", [1e-5, "1e-5", " 1e-05 "], 1e-5),
        (float, [3, "3", 3.0], 3.0),
        (int, [25, "25", 25.0, "2.5e1"], 25),
        ("Optional[int]", [None, "null", "None", "~", ""], None),
        ("Optional[bool]", [True, "true", "True", "yes", 1, "1"], True),
        (bool, [False, "false", "no", 0], False),
        (int, [2**53 + 1, str(2**53 + 1)], 2**53 + 1),
        (str, ["tiny-deltanet"], "tiny-deltanet"),
        ("Optional[str]", ["007"], "007"),
        (str, ["1e5"], "1e5"),
        (list[int], ["0,1,2", "0, 1, 2", "[0, 1, 2]", [0, 1, 2], ("0", 1, 2.0)], [0, 1, 2]),
        (list[int], [3, "3", [3]], [3]),
    ],
)
def test_a_value_is_the_same_however_it_arrives(hint: Any, arrivals: list[Any], value: Any) -> None:
    for arrival in arrivals:
        made = convert("name", hint, arrival)
        assert made == value, arrival
        assert type(made) is type(value), arrival


@pytest.mark.parametrize(
    ("hint", "value", "allowed"),
    [
        (int, "2.5", "a whole number"),
        ("Optional[int]", "many", "a whole number or none"),
        (int, True, "a whole number"),
        (int, None, "a whole number"),
        (float, "fast", "a number"),
        pytest.param(float, 10**400, "a number", id="too large"),
        (float, math.nan, "a number"),
        (float, "inf", "a number"),
        ("Optional[bool]", "perhaps", "true or false or none"),
        (str, ["a"], "a string"),
        (list[int], "0,x", "up to 1,000 whole numbers, as in 0,1,2"),
        (list[int], [], "up to 1,000 whole numbers, as in 0,1,2"),
        (list[int], "0,1.5", "up to 1,000 whole numbers, as in 0,1,2"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(hint: Any, value: Any, allowed: str) -> None:
    with refused("parameter seeds", value, allowed):
        convert("seeds", hint, value)


def namespace(**assigned: Any) -> dict[str, Any]:
    """A notebook's `globals()` after its parameters cell and papermill's, with what later cells may leave in it."""
    cells = ["", "steps: int = 25\nlr: float = 1e-4", INJECTED + "\n".join(f"{k} = {v!r}" for k, v in assigned.items())]
    later = {"In": [*cells, "configs = []\nstep = 3"], "configs": [], "step": 3}
    return {"__annotations__": {"steps": int, "lr": float}, "steps": 25, "lr": 1e-4, **assigned, **later}


def test_parameters_are_the_declared_ones_with_injected_values() -> None:
    assert parameters(namespace()) == {"steps": 25, "lr": 1e-4}
    assert parameters(namespace(lr="1e-5", PAPERMILL_INPUT_PATH="in.ipynb")) == {"steps": 25, "lr": 1e-5}


def test_an_unknown_parameter_is_refused_with_the_nearest() -> None:
    with refused("parameter", "stepz", "steps, lr") as error:
        parameters(namespace(stepz=3))
    assert "'steps'?" in str(error.value)


def test_lab_is_told_from_papermill_called_in_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not in_jupyterlab()
    monkeypatch.setenv("JPY_SESSION_NAME", "midtrain.ipynb")
    parent = Path("/proc/self/environ")
    if parent.is_file():
        monkeypatch.setattr("os.getppid", lambda: "self")  # our own environment began without the name
        assert in_jupyterlab() == (b"JPY_SESSION_NAME=" not in parent.read_bytes())
        monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: b"A=1\0JPY_SESSION_NAME=other.ipynb\0")
        assert not in_jupyterlab()


# -- configurations ----------------------------------------------------------------------------------------------------


def test_arms_of_a_seed_differ_in_the_method_alone() -> None:
    configs = method_configs(
        "midtrain", [0, 3], steps=7, lr=2e-5, data="/texts", sequence_length=512, nsp_coef=0.5, num_chunks=4
    )
    assert [(config.method, config.seed) for config in configs] == [
        ("sft", 0),
        ("refine", 0),
        ("sft", 3),
        ("refine", 3),
    ]
    for sft, refine in (configs[:2], configs[2:]):
        assert replace(refine, refine=None) == sft
        assert refine.refine is not None
        assert (refine.refine.nsp_coef, refine.refine.num_chunks, refine.refine.rollout_length) == (0.5, 4, 5)
    assert (configs[0].steps, configs[0].lr, configs[0].data.sources) == (7, 2e-5, {"/texts": 1.0})
    assert configs[0].data.recall == {"number-1": 0.5}


@pytest.mark.parametrize(
    ("settings", "rows", "min_tokens"),
    [
        ({}, "packed", 1),
        ({"rows": "packed", "sequence_length": 512}, "packed", 1),
        ({"rows": "document"}, "document", 1024),
        ({"rows": "document", "sequence_length": 512}, "document", 512),
        ({"rows": "document", "min_tokens": 300}, "document", 300),
    ],
)
def test_rows_of_one_document_leave_shorter_documents_out_unless_set(settings, rows, min_tokens):
    for config in method_configs("midtrain", [0], phase="midtrain", **settings):
        assert (config.data.rows, config.data.min_tokens) == (rows, min_tokens)


def test_the_settings_of_selection_and_groups_reach_refine_and_the_kernel_follows_k() -> None:
    settings = {"selection": "uniform", "group_size": 2, "group_by": "prefix", "tau": 0.5, "entropy_index": "equation"}
    for recipe, length in (("midtrain", {"sequence_length": 512}), ("posttrain", {})):
        *_, config = method_configs(recipe, [0], **settings, **length)
        assert {name: getattr(config.refine, name) for name in settings} == settings
        kernels = [{}, {"rollout_length": 5}, {"rollout_length": 9}, {"rollout_length": 9, "smoothing_kernel": 3}]
        made = [method_configs(recipe, [0], **each, **length)[-1].refine for each in kernels]
        assert [each.smoothing_kernel for each in made] == [5, 5, 9, 3] and made[0] == made[1]


def test_a_batch_of_another_size_makes_as_many_updates() -> None:
    for config in method_configs("paper_midtrain", [0], batch_size=8):
        assert (config.batch_size, config.mini_batch_size, config.micro_batch_size) == (8, 2, 1)
    assert [c.updates_per_batch for c in method_configs("paper_midtrain", [0], updates="release", batch_size=8)] == [
        1,
        4,
    ]


@pytest.mark.parametrize("recipe", ["paper_midtrain", "paper_posttrain", "per_prompt"])
def test_a_recipe_that_was_named_for_the_releases_updates_still_works_with_a_warning(recipe: str) -> None:
    with pytest.warns(FutureWarning, match=f"is now recipe '{recipe}' with updates 'release'"):
        old = method_configs(f"{recipe}_release_updates", [0])
    assert old == method_configs(recipe, [0], updates="release")


def test_a_setting_is_changed_in_the_part_that_has_it() -> None:
    (refine,) = method_configs("per_prompt", [0], methods=["refine"])
    changed = with_settings(refine, {"margin": 3, "lr": 0.5, "max_tokens": 9, "adapt_on": "document"})
    assert changed.ttt.refine == replace(refine.ttt.refine, margin=3) and changed.ttt.lr == 0.5
    assert (changed.data.max_tokens, changed.adapt_on, changed.task) == (9, "document", refine.task)
    assert with_settings(replace(refine, ttt=None), {"margin": 3}) == replace(refine, ttt=None)
    parts = {"data", "method", "task", "ttt"}
    assert not parts & (setting_names(TrainConfig) | setting_names(TTTRunConfig))
    assert {"sources", "margin", "source", "lr", "seed"} <= setting_names(TTTRunConfig)


@pytest.mark.parametrize(
    ("changes", "field", "value", "allowed"),
    [
        ({"seeds": [0, 1, 0]}, "seeds", [0, 1, 0], "distinct"),
        ({"steps": 0}, "steps", 0, "at least 1"),
        ({"seeds": [-1]}, "TrainConfig.seed", -1, "at least 0"),
        ({"recipe": "midtrian"}, "recipe", "midtrian", "midtrain"),
        ({"reward": "cosin"}, "reward", "cosin", "cosine"),
        ({"lr": -1.0}, "TrainConfig.lr", -1.0, "above 0"),
        ({"learning_rate": 1.0}, "setting", "learning_rate", "add_bos, answer_column, "),
        ({"updates": "unequal"}, "updates", "unequal", "'equal', 'release' or 'compute'"),
        ({"phase": "posttrain"}, "posttrain recipe", "midtrain", "posttrain, "),
        ({"dtype": "float16"}, "TrainConfig.dtype", "float16", "one of 'float32', 'bfloat16'"),
        ({"sequence_length": 64}, "TrainConfig.data.sequence_length", 64, "at least 161"),
        ({"recipe": "paper_midtrain", "batch_size": 6}, "batch_size", 6, "a multiple of 4"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(
    changes: dict[str, Any], field: str, value: Any, allowed: str
) -> None:
    with refused(field, value) as error:
        method_configs(**({"recipe": "midtrain", "seeds": [0]} | changes))
    assert allowed in error.value.allowed


def test_paths_hold_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "model").mkdir()
    for step in (2, 10):
        (tmp_path / "run" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"format_version": 1}')
    last = str(tmp_path / "run" / "checkpoints" / "step-10")
    for model, kept in {
        "model": str(tmp_path / "model"),
        "run": last,
        "tiny-deltanet": "tiny-deltanet",
        "a/b": "a/b",
        ".": str(tmp_path),
    }.items():
        (config, _) = method_configs("midtrain", [0], model=model, data="texts")
        assert (config.model, config.data.sources) == (kept, {str(tmp_path / "texts"): 1.0})
        assert pretrain_stages(f"new:{model}")[0].model == f"new:{kept}"
    assert method_configs("midtrain", [0], data="python")[0].data.sources == {"python": 1.0}
    assert pretrain_stages("model", "texts")[0].data.sources[str(tmp_path / "texts")] == 0.15


def test_stages_of_pretraining_are_as_many_and_as_long_as_asked() -> None:
    assert [stage.steps for stage in pretrain_stages("tiny-deltanet", steps=3, last_stage=2)] == [3, 3]
    assert pretrain_stages("tiny-deltanet") == pretrain("tiny-deltanet")
    assert pretrain_stages("tiny-lact", recipe="pretrain_lact") == pretrain_lact("tiny-lact")
    with refused("pretrain recipe", "midtrain", "pretrain, pretrain_lact"):
        pretrain_stages("tiny-lact", recipe="midtrain")
    for last in (0, -1, 9):
        with refused("last_stage", last, "from 1 to 8"):
            pretrain_stages("tiny-deltanet", last_stage=last)
    with refused("steps", 0, "at least 1"):
        pretrain_stages("tiny-deltanet", steps=0)


# -- run directories -----------------------------------------------------------------------------------------------------


def test_a_reward_of_ones_own_is_kept_in_the_refine_runs(tmp_path: Path) -> None:
    sft, refine = create_runs(method_configs("midtrain", [0], reward=exactly_first), tmp_path, exactly_first)
    assert refine.config.refine is not None
    assert refine.config.refine.reward == "custom"
    assert "def exactly_first(" in (refine.path / "reward.py").read_text()
    assert not (sft.path / "reward.py").exists()


def by_surprise(inputs):
    return -inputs.logprobs


def test_a_selection_of_ones_own_is_kept_beside_the_reward(tmp_path: Path) -> None:
    configs = method_configs("midtrain", [0], reward=exactly_first, selection=by_surprise)
    sft, refine = text_runs(configs, tmp_path, exactly_first, by_surprise)
    assert refine.config.refine is not None
    assert refine.config.refine.selection == "custom"
    assert (refine.config.refine.tau, refine.config.refine.margin) == (1.0, 20)
    assert "def by_surprise(" in (refine.path / "selection.py").read_text()
    assert "def exactly_first(" in (refine.path / "reward.py").read_text()
    assert not (sft.path / "selection.py").exists()
    assert [run.path for run in text_runs(configs, tmp_path, exactly_first, by_surprise)] == [sft.path, refine.path]
    other = text_runs(configs, tmp_path, exactly_first, exactly_first)
    assert [run.path == old.path for run, old in zip(other, (sft, refine), strict=True)] == [True, False]


@pytest.mark.parametrize("selection", ["memory", "copy"])
def test_memory_and_copies_bring_their_tau_and_margin_unless_these_are_set(selection: str) -> None:
    _, config = method_configs("midtrain", [0], selection=selection)
    assert config.refine == by_memory(midtrain().refine, selection)
    assert (config.refine.tau, config.refine.margin, config.refine.window) == (0.5, 5, 128)
    _, config = method_configs("midtrain", [0], selection=selection, tau=2.0, margin=7, window=64)
    assert (config.refine.tau, config.refine.margin, config.refine.window) == (2.0, 7, 64)
    _, config = method_configs("midtrain", [0])
    assert (config.refine.tau, config.refine.margin) == (1.0, 20)


def test_a_window_below_the_models_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    configs = method_configs("midtrain", [0], model="tiny-lact", selection="memory", window=127)
    with refused("RefineConfig.window", 127, "at least 128, the model's window"):
        create_runs(configs, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"model": "tiny-deltanett"}, "no model 'tiny-deltanett'"),
        ({"data": "/nowhere/texts"}, "no source '/nowhere/texts'"),
        ({"device": "cuda:99"}, "device must be"),
    ],
)
def test_what_is_not_there_is_refused_before_a_run_is_made(
    tmp_path: Path, changes: dict[str, Any], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with naming((ValueError, FileNotFoundError), fact, *changes.values()):
        create_runs(method_configs("midtrain", [0], **changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", ({"nope": 1}, {"conv_size": 0}))
def test_settings_that_no_model_takes_are_refused_before_a_run_is_made(tmp_path: Path, settings: dict) -> None:
    known, other = curriculum(3)
    for make in (create_runs, stage_runs):
        field, value = ("number of DeltaNetConfig", "nope") if "nope" in settings else ("DeltaNetConfig.conv_size", 0)
        with refused(field, value):
            make([known, replace(other, model_settings=settings)], tmp_path)
    with refused("number of DeltaNetConfig", "lact_chunk_size"):
        stage_runs(pretrain_stages("new:tiny-deltanet", recipe="pretrain_lact"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_measured_with_its_settings() -> None:
    config = TrainConfig(recipe="x", refine=None, device="cpu", model_settings={"norm_eps": 0.5})
    policy, _ = load_policy(config, "tiny-deltanet")
    assert policy.config.norm_eps == 0.5


def test_an_unknown_kind_of_recall_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    known, other = curriculum(3)
    wrong = replace(other, data=replace(other.data, recall={"words-1": 0.1}))
    for make in (create_runs, stage_runs):
        with refused("a kind of recall document", "words-1"):
            make([known, wrong], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_runs_is_absolute_or_the_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path))
    assert runs_folder(None) == tmp_path
    assert runs_folder("/other") == Path("/other")
    with refused("parameter output", "here"):
        runs_folder("here")
    (tmp_path / "file").touch()
    with refused("parameter output", str(tmp_path / "file")):
        runs_folder(str(tmp_path / "file"))


def curriculum(steps: int) -> list[TrainConfig]:
    rows = DataConfig(sequence_length=64)
    sizes = {"batch_size": 2, "mini_batch_size": 2, "micro_batch_size": 2}
    return [TrainConfig(recipe=f"stage-{n}", refine=None, data=rows, steps=steps, seed=n, **sizes) for n in (1, 2)]


def fill(run: Run, value: float) -> None:
    """A run's records as training would leave them."""
    with RunWriter.open(run.path) as writer:
        writer.evaluation(0, {"ntp_loss": value})
        for step in range(1, run.config.steps + 1):
            writer.train(step, {"ntp_loss": value, "updates": step})
        writer.evaluation(run.config.steps, {"ntp_loss": value})


def test_stages_go_on_from_one_another_and_are_found_again(tmp_path: Path) -> None:
    first, second = stage_runs(curriculum(3), tmp_path)
    assert first.config.model == "tiny-deltanet"
    assert second.config.model == str(first.path)
    assert [run.path for run in stage_runs(curriculum(3), tmp_path)] == [first.path, second.path]
    other = stage_runs(curriculum(4), tmp_path)
    assert not {run.path for run in other} & {first.path, second.path}


def test_a_curriculum_is_drawn_as_one_run(tmp_path: Path) -> None:
    runs = stage_runs(curriculum(2), tmp_path)
    for run, value in zip(runs, (3.0, 2.0), strict=True):
        fill(run, value)
    train, held_out = joined_stages(runs)
    assert train["step"].tolist() == [1, 2, 3, 4]
    assert train["ntp_loss"].tolist() == [3.0, 3.0, 2.0, 2.0]
    assert held_out["step"].tolist() == [0, 2, 2, 4]
    assert set(train["method"]) == {"sft"}
    assert set(train["seed"]) == {0}


def test_metrics_carry_arm_and_seed(tmp_path: Path) -> None:
    runs = create_runs(method_configs("midtrain", [4], steps=2), tmp_path)
    for run in runs:
        fill(run, 1.5)
    frame = metrics(runs)
    assert frame[["method", "seed", "step"]].values.tolist() == [
        ["sft", 4, 1],
        ["sft", 4, 2],
        ["refine", 4, 1],
        ["refine", 4, 2],
    ]
    assert last_rollouts(runs).empty


# -- recall --------------------------------------------------------------------------------------------------------------


def test_recall_documents_are_the_same_every_time_and_differ_from_one_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("A sentence of some words. " * 4000)
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    _, tokenizer = load_model("tiny-deltanet", device="cpu")
    config = DataConfig(sources={str(tmp_path / "a.txt"): 1.0}, sequence_length=128, validation_sequences=1)
    held_out = SequenceData(config, tokenizer, 0, "validation")
    documents = recall_documents("word-1", 3, 128, held_out)
    assert [len(d.questions) for d in documents] == [1, 1, 1]
    assert len({tuple(document.tokens) for document in documents}) == 3
    assert recall_documents("word-1", 3, 128, held_out) == documents


@pytest.mark.parametrize(("length", "rewards"), [(160, False), (161, True)])
def test_what_cannot_be_measured_is_left_out_and_told_of(
    length: int, rewards: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("A sentence of some words. " * 4000)
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    data = DataConfig(
        sources={str(tmp_path / "a.txt"): 1.0}, sequence_length=length, validation_sequences=1, recall={"word-1": 0.1}
    )
    config = TrainConfig(recipe="short", refine=None, data=data, steps=1, device="cpu")
    (run,) = create_runs([config], tmp_path / "runs")
    fill(run, 1.0)
    with RunWriter.open(run.path, 1) as writer, writer.checkpoint(1) as folder:
        shutil.copytree(SHIPPED / "tiny-deltanet", folder, dirs_exist_ok=True)
    if not rewards:
        nothing = Words(texts={}, keys={"train": (), "validation": ()})
        monkeypatch.setattr("refine_lab.data.recall.recall_words", lambda tokenizer: nothing)
    results = final_results([run], ["word-1", "number-1"], num_documents=2, num_tokens=128)
    base, trained = results.rows
    told = capsys.readouterr().out
    measured = {"ntp_loss", "ntp_accuracy", "sampled_accuracy"}
    asked = {"cosine", "binary", "documents", "exact recall word-1 at 128", "exact recall number-1 at 128"}
    assert not rewards or base["documents"] == trained["documents"] == 2
    assert set(base) == set(trained) == {"method", "seed", "updates"} | measured | (asked if rewards else set())
    assert {name: base[name] for name in measured} == {name: trained[name] for name in measured}
    assert len(results.answers) == (2 * 2 * 2 if rewards else 0)  # models, kinds, documents
    for row, seed in ((base, -1), (trained, 0)) if rewards else ():
        own = results.answers[(results.answers["method"] == row["method"]) & (results.answers["seed"] == seed)]
        assert own["exact_recall"].groupby(own["name"].str.split().str[0]).mean().to_dict() == {
            kind: row[f"exact recall {kind} at 128"] for kind in ("word-1", "number-1")
        }
        assert own["question"].str.startswith(("word-1 ", "number-1 ")).all()
    stored = run.path / "evaluations" / "recall.parquet"
    assert stored.is_file() is rewards
    if rewards:
        table = read_parquet(stored).to_pandas()
        assert set(table["step"]) == {0, 1}
        for step, seed in ((0, -1), (1, 0)):  # the model before training, and the run's
            kept = results.answers[results.answers["seed"] == seed]["exact_recall"].tolist()
            assert table[table["step"] == step]["exact_recall"].tolist() == kept
        assert table["tokens"].between(100, 128).all() and table["documents"].nunique() == 2, "one digest for each kind"
    assert ("Rewards are skipped: rows of 160 tokens" in told) is not rewards
    assert ("Recall of word-1 is skipped: a recall document with 1 facts needs" in told) is not rewards
