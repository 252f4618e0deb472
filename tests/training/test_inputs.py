"""What a run is begun with: recorded by content for every kind of run, and a change is refused with the file's name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from refine_lab import fork
from refine_lab.config import DataConfig, RefineConfig, TrainConfig, to_json
from refine_lab.data import corpus
from refine_lab.data.corpus import File, Manifest
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.experiments.runs import create_runs, stage_runs
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.hub import HubName, Place
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.runs.started import INPUTS, accept, check_unchanged
from refine_lab.runs.writer import RunWriter
from refine_lab.training import inputs
from refine_lab.training.inputs import changes, inputs_of, model_digests, settle, text_digests, text_inputs
from refine_lab.training.trainer import train
from tests.factories.durable_runs import After
from tests.support.paths import TEXT
from tests.support.refusals import naming

DIGESTS = r" \(from [0-9a-f]{24} to [0-9a-f]{24}\)"
EXAMPLE = Example(
    name="one", prompt_ids=(1, 2, 3), question_start=3, answer_ids=(), answers=(), question="", documents=("a",)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), 600).save_pretrained(folder)
    sizes = dict(hidden_size=16, num_heads=2, num_hidden_layers=1, intermediate_size=24, vocab_size=600)
    torch.manual_seed(0)
    DeltaNetForCausalLM(DeltaNetConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return shutil.copytree(TEXT, tmp_path / "text")


def config_of(model: Path, *sources: Path | str) -> TrainConfig:
    data = DataConfig(sources={str(source): 1.0 for source in sources}, sequence_length=64, validation_sequences=1)
    sizes = dict(batch_size=2, mini_batch_size=2, micro_batch_size=2, steps=4, eval_every=2, checkpoint_every=1)
    return TrainConfig(recipe="test", model=str(model), refine=None, data=data, **sizes, device="cpu", threads=1)


def begun(config: TrainConfig, folder: Path, batches: int = 2) -> Run:
    """A run that has stopped after so many batches."""
    run = RunWriter.create(config, folder).run
    train(run.path, After(run.path, batches))
    return run


def goes_on(run: Run) -> bool:
    train(run.path, StopSignal(run.path))
    return run.status.state == "finished"


def refused(run: Run, what: str) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    sentence = (
        rf"^{run.path} was started with different inputs: {what}\. Restore them, start a new run, or accept the change"
    )
    with pytest.raises(ValueError, match=sentence):
        train(run.path, StopSignal(run.path))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before, "nothing is touched"


def changed_unnoticed(path: Path, data: bytes) -> None:
    """Other content of the same size, with the time of change that the file had."""
    facts = path.stat()
    assert len(data) == facts.st_size and data != path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


# -- text ----------------------------------------------------------------------------------------------------------------


def test_a_file_that_changed_is_refused_and_put_back_it_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    run = begun(config_of(model, text), tmp_path / "runs")
    whole = (text / "queue.txt").read_bytes()
    (text / "queue.txt").write_bytes(whole + b"and more\n")
    refused(run, f"'{text}/queue.txt' has changed{DIGESTS}")
    (text / "queue.txt").write_bytes(whole)  # with another time of change
    assert goes_on(run)


def test_a_file_of_the_same_size_and_time_is_refused_too(model: Path, text: Path, tmp_path: Path) -> None:
    run = begun(config_of(model, text), tmp_path / "runs")
    changed_unnoticed(text / "queue.txt", (text / "queue.txt").read_bytes().swapcase())
    refused(run, f"'{text}/queue.txt' has changed{DIGESTS}")


def test_files_that_are_new_or_gone_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    run = begun(config_of(model, text), tmp_path / "runs")
    (text / "zebra.txt").write_text("a new one", encoding="utf-8")
    refused(run, f"'{text}/zebra.txt' is new")
    (text / "grid.txt").rename(tmp_path / "grid.txt")
    refused(run, f"'{text}/grid.txt' is gone; '{text}/zebra.txt' is new")


def test_rows_of_a_table_and_a_single_file(model: Path, text: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": (text / "queue.txt").read_text(encoding="utf-8")})] * 25
    table, single = tmp_path / "rows.jsonl", text / "grid.txt"
    table.write_text("\n".join(rows), encoding="utf-8")
    single.write_text(single.read_text(encoding="utf-8") * 9, encoding="utf-8")
    run = begun(config_of(model, table, single), tmp_path / "runs")
    table.write_text("\n".join(rows[:24]), encoding="utf-8")
    refused(run, f"'{table}' has changed{DIGESTS}")


def test_a_run_recorded_when_it_was_made_begins_with_that_text_alone(model: Path, text: Path, tmp_path: Path) -> None:
    """Both methods of an experiment are made together, and the second may begin hours later."""
    config = config_of(model, text)
    first, second = create_runs([config, replace(config, seed=1)], tmp_path / "runs")
    assert first.inputs == second.inputs == text_inputs(str(model), config.data, None)
    assert goes_on(first)
    (text / "queue.txt").write_text("other text", encoding="utf-8")
    refused(second, f"'{text}/queue.txt' has changed{DIGESTS}")


def test_a_curriculum_is_not_gone_on_with_over_other_text(model: Path, text: Path, tmp_path: Path) -> None:
    stages = [config_of(model, text), replace(config_of(model, text), seed=1)]
    runs = stage_runs(stages, tmp_path / "runs")
    assert goes_on(runs[0])
    assert [run.path for run in stage_runs(stages, tmp_path / "runs")] == [run.path for run in runs]
    (text / "queue.txt").write_text("other text", encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"^{runs[0].path} was started with different inputs: '.*queue\.txt' has changed"
    ):
        stage_runs(stages, tmp_path / "runs")


def test_a_run_without_a_record_goes_on_with_a_notice(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(config_of(model, text), tmp_path / "runs")
    (run.path / "inputs.json").unlink()
    (text / "queue.txt").write_text("other text", encoding="utf-8")
    assert goes_on(run)
    assert (
        f"{run.path} has no record of its inputs, so it is not known whether they have changed"
        in capsys.readouterr().out
    )
    assert run.inputs is None


def test_the_python_corpus_counts_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("one = 1\n", encoding="utf-8")
    monkeypatch.setattr(corpus, "_root", lambda package: tmp_path)
    digest = corpus._digest((tmp_path / "a.py").read_bytes())
    manifest = Manifest(
        versions={"some": "1.0"}, files=(File(package="some", path="a.py", digest=digest, split="train"),)
    )
    config = config_of(tmp_path, "python")
    before = {"texts": text_digests(config.data, manifest)}
    assert changes(before, {"texts": text_digests(config.data, manifest)}, config) == []
    (tmp_path / "a.py").write_text("one = 2\n", encoding="utf-8")  # as an upgrade of the package does
    now = {"texts": text_digests(config.data, manifest)}
    assert [*map(str, changes(before, now, config))] == ["'some/a.py' of the Python corpus is gone"]


def test_a_data_set_by_name_counts_by_its_tokens(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ["a document of some words " * 40] * 40
    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: iter({"text": text} for text in served), raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    config = config_of(model, "datasets:some/text")
    (run,) = create_runs([config], tmp_path / "runs")
    assert run.inputs is not None and run.inputs["texts"] == {}  # nothing is downloaded before it trains
    train(run.path, After(run.path, 2))
    assert set(run.inputs["texts"]) == {"datasets:some/text"}
    served[:] = ["another document of other words " * 40] * 40
    assert goes_on(begun(config, tmp_path / "others"))  # of the tokens kept here
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "anew"))
    refused(run, f"the text of 'datasets:some/text' has changed{DIGESTS}")


# -- damaged records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "empty"])
@pytest.mark.parametrize("name", ["texts", "model", "begins_with"])
def test_inputs_that_compare_less_than_the_run_recorded_are_named(
    model: Path, text: Path, tmp_path: Path, name: str, how: str
) -> None:
    run = begun(config_of(model, text), tmp_path / "runs")
    path, recorded = run.path / "inputs.json", dict(run.inputs or {})
    values = {key: value for key, value in recorded.items() if key != name}
    if how == "empty":
        values[name] = None if name == "begins_with" else {}  # an empty list is recorded if no tokens precede a text
    path.write_text(json.dumps(values), encoding="utf-8")
    for reads in (goes_on, lambda run: fork(run, 2), lambda run: train(run.path, After(run.path, 1), INPUTS)):
        with naming(ValueError, path, "is damaged", f"it has no {name}"):
            reads(run)
    path.write_text(json.dumps(recorded), encoding="utf-8")
    assert goes_on(run)


@pytest.mark.parametrize("begins", [True, False])
def test_one_text_of_two_that_is_not_recorded_is_named(model: Path, text: Path, tmp_path: Path, begins: bool) -> None:
    other = shutil.copytree(text, tmp_path / "other")
    (run,) = create_runs([config_of(model, text, other)], tmp_path / "runs")
    if begins:
        train(run.path, After(run.path, 2))
    recorded = dict(run.inputs or {})
    recorded["texts"] = {str(text): recorded["texts"][str(text)]}
    (run.path / "inputs.json").write_text(json.dumps(recorded), encoding="utf-8")
    with naming(ValueError, run.path / "inputs.json", "is damaged", f"it has no texts of '{other}'"):
        goes_on(run)


def test_a_text_accepted_in_place_of_another_is_compared_from_then_on(model: Path, text: Path, tmp_path: Path) -> None:
    run, other = begun(config_of(model, text), tmp_path / "runs"), shutil.copytree(text, tmp_path / "other")
    edited = replace(run.config, data=replace(run.config.data, sources={str(other): 1.0}))
    (run.path / "config.json").write_text(to_json(edited), encoding="utf-8")
    run = Run(run.path)
    accept(run, check_unchanged(run, ["data.sources"]))
    train(run.path, After(run.path, 1))
    (other / "queue.txt").write_text("other text", encoding="utf-8")
    refused(run, f"'{other}/queue.txt' has changed{DIGESTS}")


# -- models --------------------------------------------------------------------------------------------------------------


def test_a_copied_model_is_the_same_and_changed_weights_are_not(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)  # with new times of change
    assert (copy / "model.safetensors").stat().st_mtime_ns != (model / "model.safetensors").stat().st_mtime_ns
    assert inputs_of(str(copy), [EXAMPLE]) == inputs_of(str(model), [EXAMPLE])
    before = inputs_of(str(copy), [EXAMPLE])
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    changed_unnoticed(copy / "model.safetensors", bytes(data))
    found = changes(before, inputs_of(str(copy), [EXAMPLE]), config_of(copy, "python"))
    (change,) = found
    assert str(change).startswith(f"'model.safetensors' of the model '{copy}' has changed (from {change.before} to ")
    assert change.name == "model"


def test_fresh_weights_do_not_count(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    before = model_digests(f"new:{copy}")
    (copy / "model.safetensors").unlink()
    assert model_digests(f"new:{copy}") == before
    assert {"config.json", "tokenizer.json"} <= set(before)


def test_a_model_of_the_hub_counts_by_its_commit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights may not be here yet when a run is made."""
    place = Place(model, HubName("some/model", revision="0123abc"))
    monkeypatch.setattr(inputs, "locate", lambda name: place)
    assert model_digests("some/model") == {"some/model": "0123abc"}


def test_a_record_of_an_earlier_version_is_still_compared(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    config, now = config_of(copy, "python"), inputs_of(str(copy), [EXAMPLE])
    former = {"prompts": 1, "prompts_digest": now["prompts_digest"], "weights_digest": inputs._by_time(Place(copy))}
    assert changes(former, now, config) == []
    (copy / "model.safetensors").touch()
    (change,) = changes(former, now, config)
    assert str(change).startswith(f"a file of the model '{copy}' has changed (from {former['weights_digest']} to ")


def test_what_was_recorded_at_the_beginning_is_not_written_over(model: Path, text: Path, tmp_path: Path) -> None:
    run = begun(config_of(model, text), tmp_path / "runs")
    before = (run.path / "inputs.json").read_bytes()
    settle(run, text_inputs(run.config.model, run.config.data, None))
    assert (run.path / "inputs.json").read_bytes() == before


def test_the_method_changes_nothing_of_the_record(model: Path, text: Path, tmp_path: Path) -> None:
    settings = RefineConfig(num_chunks=2, margin=4)
    sft, refine = create_runs([config_of(model, text), replace(config_of(model, text), refine=settings)], tmp_path)
    assert sft.inputs == refine.inputs
