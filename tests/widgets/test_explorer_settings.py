"""The reward explorer's settings: refusals, presets, undo, cancel, copies; and rollouts that are saved and read back."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_lab.config import RefineConfig, TrainConfig
from refine_lab.explore.client import Worker
from refine_lab.explore.saved import load_rollouts
from refine_lab.models.hub import SHIPPED
from refine_lab.runs.schema import COLUMNS
from refine_lab.runs.writer import RunWriter
from tests.support.page_facts import page_head
from tests.support.refusals import naming, refused
from tests.support.small_document import SECONDS, TEXT, wait_for, worker  # noqa: F401
from widgets.parts.explorer_settings import ONLY_READ
from widgets.parts.number_field import NumberField
from widgets.parts.settings_bar import RUN, presets
from widgets.reward_explorer import RewardExplorer
from widgets.rollout_inspector import RolloutInspector

pytestmark = pytest.mark.process
FEW = {"group_size": 2, "num_chunks": 2}


@pytest.fixture
def explorer(worker: Worker) -> Iterator[RewardExplorer]:
    made = RewardExplorer(text=TEXT, worker=worker, settings=FEW)
    made.shown.result(SECONDS)
    yield made
    made.close()


def typed(explorer: RewardExplorer, name: str, text: str) -> None:
    """Types into a field, as a hand on the page does."""
    explorer.controls[name]._on_message(None, {"typed": text}, [])


@pytest.mark.parametrize(
    ("name", "text", "got", "allowed"),
    [
        ("rollout_length", "1000", "1000", "a whole number from 1 to 64"),
        ("rollout_length", "2.5", "2.5", "a whole number from 1 to 64"),
        ("temperature", "0", "0", "from 0.01 to 10"),
        ("temperature", "nan", "nan", "from 0.01 to 10"),
        ("seed", "", "nothing", "a whole number from 0 to"),
    ],
)
def test_a_number_out_of_range_is_refused(
    explorer: RewardExplorer, name: str, text: str, got: str, allowed: str
) -> None:
    before = explorer.exploration.settings
    for _ in range(2):  # the second time, the same error is shown again
        explorer.error = ""
        typed(explorer, name, text)
        assert allowed in explorer.error and got in explorer.error
    assert explorer.exploration.settings == before
    assert explorer.controls[name].value == before[name]


def test_a_number_field_changes_nothing_in_silence() -> None:
    field = NumberField(label="k", value=5, min=1, max=64)
    for value in (0, 65, 2.5, True, "5"):
        with naming(ValueError, "k"):
            field.value = value
    assert field.value == 5
    field.value = 7.0
    assert field.value == 7 and isinstance(field.value, int)
    assert repr(field) == "NumberField: k 7, a whole number from 1 to 64"


def test_a_typed_number_requests_its_rollouts_and_is_undone(explorer: RewardExplorer) -> None:
    before = explorer.inspector.rollouts
    assert not explorer.bar.can_undo
    with naming(ValueError, "no change"):
        explorer.undo()
    typed(explorer, "group_size", "3")
    wait_for(lambda: set(explorer.inspector.rollouts.groupby("position").size()) == {3})
    wait_for(lambda: not explorer.notice.busy)
    explorer.change("temperature", 0.5).result(SECONDS)
    assert explorer.bar.can_undo and explorer.controls["temperature"].value == 0.5
    explorer.undo().result(SECONDS)
    assert (explorer.controls["temperature"].value, explorer.controls["group_size"].value) == (1.0, 3)
    explorer.undo().result(SECONDS)
    assert explorer.inspector.rollouts["rollout_ids"].tolist() == before["rollout_ids"].tolist()
    assert not explorer.bar.can_undo and not explorer.notice.stale


def test_presets(explorer: RewardExplorer, tmp_path: Path) -> None:
    assert explorer.bar.presets == ["paper", "demo"] and explorer.bar.preset == ""
    assert "rollouts per position (n) 2 (paper: 1)" in explorer.bar.note
    explorer._on_bar("preset", "paper")
    wait_for(lambda: len(explorer.inspector.rollouts) == 8)
    settings = explorer.exploration.settings
    assert (settings["group_size"], settings["group_by"], settings["num_chunks"]) == (1, "sequence", 8)
    assert explorer.bar.preset == "paper" and explorer.bar.note == "The paper's settings."
    with refused("a preset", "none", "one of paper, demo"):
        explorer.preset("none")
    refine = RefineConfig(rollout_length=3, reward="hybrid", group_size=4)
    RunWriter.create(TrainConfig(recipe="midtrain", steps=1, refine=refine), tmp_path).close()
    (folder,) = (path.parent for path in tmp_path.rglob("config.json"))
    recipe = presets(str(folder))[RUN]
    assert (recipe["reward"], recipe["rollout_length"], recipe["group_size"]) == ("hybrid", 3, 4)


def test_a_run_has_its_preset_from_any_folder_and_weights_have_none(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    with RunWriter.create(TrainConfig(recipe="midtrain", steps=1, refine=RefineConfig(group_size=4)), runs) as writer:
        name = f"runs/{writer.run.name}"
    checkpoint = runs.parent / name / "checkpoints" / "step-1"
    for folder in (checkpoint, runs / "weights"):
        shutil.copytree(SHIPPED / "tiny-lact", folder)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("REFINE_RUNS", str(runs))
    monkeypatch.chdir(tmp_path / "notebooks")
    assert presets(name)[RUN]["group_size"] == 4
    for model in (f"{name}/checkpoints/step-1", str(checkpoint), "runs/weights", "../runs/weights", "nowhere"):
        assert [*presets(model)] == ["paper", "demo"], model
    explorer = RewardExplorer(str(runs / "weights"), text=TEXT, worker=worker, settings=FEW)
    explorer.shown.result(SECONDS)
    assert len(explorer.inspector.rollouts) == 4 and explorer.error == ""
    explorer.close()
    (runs.parent / name / "config.json").write_text("{", encoding="utf-8")
    assert RUN not in presets(name)


def test_copied_settings_are_the_settings(explorer: RewardExplorer) -> None:
    explorer.change("selection", "argmax").result(SECONDS)
    settings = explorer.exploration.settings
    copies = explorer.copies
    assert json.loads(copies["JSON"]) == {"model": "tiny-deltanet", **settings}
    call = ast.parse(copies["Python"], mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.keywords[0].value) == settings
    words = shlex.split(copies["papermill"])
    pairs = {
        name: value for flag, name, value in zip(words[3::3], words[4::3], words[5::3], strict=True) if flag == "-p"
    }
    assert pairs == {"model": "tiny-deltanet", **{name: str(value) for name, value in settings.items()}}
    cells = json.loads(Path("notebooks/explore.ipynb").read_text(encoding="utf-8"))["cells"]
    parameters = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    assert pairs.keys() <= {line.partition(":")[0] for line in parameters.splitlines()}


def test_cancelled_rollouts_leave_the_settings_of_those_shown(explorer: RewardExplorer) -> None:
    before, settings = explorer.inspector.rollouts, explorer.exploration.settings
    asked = explorer.apply({"rollout_length": 64, "group_size": 64})
    assert explorer.notice.busy and explorer.bar.can_cancel
    explorer._on_bar("cancel", "")
    asked.result(SECONDS)
    assert explorer.exploration.settings == settings
    assert explorer.controls["rollout_length"].value == settings["rollout_length"]
    assert explorer.inspector.rollouts is before
    assert explorer.notice.status == "Cancelled. The settings are those of the rollouts shown."
    assert not explorer.notice.busy and not explorer.notice.stale and not explorer.bar.can_undo


def test_a_cancelled_reading_leaves_the_document_that_is_shown(explorer: RewardExplorer, worker: Worker) -> None:
    before, document, text = explorer.inspector.rollouts, explorer.exploration.document, explorer.token_map.text
    asked = explorer.read(TEXT * 2)
    explorer.cancel()
    asked.result(SECONDS)
    assert explorer.exploration.document is document and explorer.token_map.text is text
    assert explorer.inspector.rollouts is before and not explorer.notice.busy
    assert explorer.notice.status == "Cancelled. The document that was read before is still shown."
    assert explorer.notice.stale, "another document than that in the field is shown"
    explorer.explore(50).result(SECONDS)
    assert explorer.error == "" and 50 in explorer.inspector.rollouts["position"].tolist()
    busy = explorer.read(TEXT * 40)  # the worker reads one document at a time
    other = RewardExplorer(text=TEXT, worker=worker, settings=FEW)
    other.cancel()
    explorer.cancel()
    other.shown.result(SECONDS)
    busy.result(SECONDS)
    assert (other.exploration.document, other.notice.status) == (None, "Cancelled.")
    other.read().result(SECONDS)
    assert len(other.inspector.rollouts) == 4
    other.close()


def test_a_cancellation_after_the_reading_leaves_the_document_without_rollouts_and_says_so(
    explorer: RewardExplorer,
) -> None:
    """The reading may end before `cancel` is called: then the document is there, and what follows it is not requested."""
    keep, before = explorer.token_map.show, explorer.exploration.document

    def cancelling(*shown: Any, **marks: Any) -> None:
        keep(*shown, **marks)
        explorer.cancel()  # in the reading's own thread, between the document and its rollouts

    explorer.token_map.show = cancelling
    explorer.read(TEXT * 2).result(SECONDS)
    explorer.token_map.show = keep
    assert explorer.exploration.document is not before and len(explorer.inspector.rollouts) == 0
    assert explorer.notice.status == ONLY_READ and not explorer.notice.busy
    explorer.cancel()
    assert explorer.notice.status == ONLY_READ, "nothing is shown whose settings it could name"
    explorer.read().result(SECONDS)
    assert len(explorer.inspector.rollouts) == 4


def test_a_cancelled_undo_can_be_made_again(explorer: RewardExplorer) -> None:
    explorer.change("seed", 1).result(SECONDS)
    explorer.read(TEXT * 2).result(SECONDS)  # whose rollouts with seed 0 are not cached
    asked = explorer.undo()
    explorer.cancel()
    asked.result(SECONDS)
    assert explorer.controls["seed"].value == 1 and explorer.bar.can_undo
    explorer.undo().result(SECONDS)
    assert explorer.controls["seed"].value == 0 and not explorer.bar.can_undo


def test_a_slow_reward_tells_its_progress_and_is_cancelled(worker: Worker) -> None:
    go_on, calls = threading.Semaphore(0), []

    def slow(inputs):
        assert go_on.acquire(timeout=SECONDS)
        calls.append(len(inputs.rollout_ids))
        return inputs.logprobs.sum(-1)

    explorer = RewardExplorer(text=TEXT, rewards=[slow], worker=worker, settings={"group_size": 2, "num_chunks": 3})
    explorer.shown.result(SECONDS)
    before = explorer.inspector.rollouts
    asked = explorer.change("reward", "slow")
    wait_for(lambda: explorer.notice.status == "Reward 'slow': 0 of 3 positions…")
    go_on.release()
    wait_for(lambda: explorer.notice.status == "Reward 'slow': 1 of 3 positions…")
    explorer.cancel()
    assert asked.result(SECONDS) is None
    go_on.release()
    assert explorer.exploration.reward == explorer.controls["reward"].value == "cosine"
    assert explorer.inspector.rollouts is before and not explorer.notice.stale
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "custom-reward"])
    assert calls == [2, 2], "the third position is not rewarded"
    go_on.release(3)
    explorer.change("reward", "slow").result(SECONDS)
    shown = explorer.inspector.rollouts
    assert shown["reward"].tolist() == pytest.approx([sum(row) for row in shown["logprobs"]])
    explorer.close()


def test_after_an_error_the_numbers_are_marked_as_old_and_keep_their_reward_s_name(
    worker: Worker, tmp_path: Path
) -> None:
    def wrong(inputs):
        raise KeyError("mine")

    explorer = RewardExplorer(text=TEXT, rewards=[wrong], worker=worker, settings=FEW)
    explorer.shown.result(SECONDS)
    with naming(RuntimeError, "wrong"):
        explorer.change("reward", "wrong").result(SECONDS)
    assert explorer.notice.stale and not explorer.notice.busy
    explorer.token_map.selected = int(explorer.inspector.rollouts["position"].iloc[0]) + 1
    assert "mean cosine reward" in explorer.click_result.sentence
    before = explorer.exploration.settings
    with naming(FileNotFoundError, "nonsense"):
        explorer.compare("nonsense").result(SECONDS)
    assert explorer._compare_field.value == "nonsense" and explorer.exploration.settings == before
    assert "cosine" in explorer.token_map.metrics["reward"].title
    said, facts = page_head(explorer.save_html(tmp_path / "page.html"))
    assert "have a mean cosine reward of" in said and "wrong" not in said
    assert facts["reward"] == "cosine" and "compare with" not in facts
    explorer.compare("tiny-deltanet").result(SECONDS)
    assert page_head(explorer.save_html(tmp_path / "page.html"))[1]["compare with"] == "tiny-deltanet"
    explorer.undo().result(SECONDS)
    assert not explorer.notice.stale
    explorer.close()


def test_a_click_on_the_same_token_after_a_cancellation_or_an_invalid_click(explorer: RewardExplorer) -> None:
    last = len(explorer.token_map.text) - 1
    explorer.token_map.selected = 61
    explorer.cancel()
    wait_for(lambda: not explorer.notice.busy)
    assert 60 not in explorer.inspector.rollouts["position"].to_numpy()
    explorer.token_map._handle_custom_msg({"again": True}, [])  # as the page sends it
    wait_for(lambda: 60 in explorer.inspector.rollouts["position"].to_numpy())
    asked = explorer.explore(50)
    with naming(ValueError, f"position {last}"):
        explorer.explore(last).result(SECONDS)
    asked.result(SECONDS)
    assert explorer.inspector.filters == {"position": [50, 50]}


def test_the_result_of_a_click(explorer: RewardExplorer) -> None:
    explorer.explore(50).result(SECONDS)
    result, rollouts = explorer.click_result, explorer.inspector.rollouts
    own = rollouts[rollouts["position"] == 50]
    assert (result.token, explorer.token_map.selected) == (51, 51)
    assert result.rollouts_at(51)["reward"].tolist() == own["reward"].tolist() and len(own) == 2
    mean, best = own["reward"].mean(), own["reward"].max()
    assert result.sentence.startswith(f"2 rollouts: mean cosine reward {mean:.3f}, best {best:.3f}, ")
    result.chosen = 1
    selected = rollouts.iloc[explorer.inspector.selected]
    assert (selected["position"], selected["sample_index"]) == (50, 1)
    other = int(rollouts["position"].iloc[0])
    explorer.inspector.selected = 0
    assert result.token == other + 1


def test_explored_rollouts_are_saved_and_read_back(explorer: RewardExplorer, tmp_path: Path) -> None:
    explorer.inspector.filters = {"position": [0, int(explorer.inspector.rollouts["position"].min())]}
    shown = explorer.inspector.filtered()
    frame, origin = load_rollouts(explorer.save_rollouts(tmp_path / "rollouts.parquet"))
    assert origin == {"model": "tiny-deltanet", "settings": explorer.exploration.settings}
    assert [*frame][:13] == [column.name for column in COLUMNS if column.dtype is not None]
    assert len(frame) == len(shown) == 2
    for name in ("position", "sample_index", "reward", "clicked"):
        assert frame[name].tolist() == shown[name].tolist()
    for name in ("rollout_ids", "target_ids", "cosines"):
        assert [[*values] for values in frame[name]] == shown[name].tolist()
    again = RolloutInspector(frame, decode=explorer.exploration.tokenizer)
    np.testing.assert_array_equal(again._table.numbers["reward"], shown["reward"].to_numpy("f4"))
    with naming(FileNotFoundError, "nothing.parquet"):
        load_rollouts(tmp_path / "nothing.parquet")


def test_a_failed_construction_is_closed_without_another_error() -> None:
    made = RewardExplorer.__new__(RewardExplorer)
    with naming(FileNotFoundError, "no-such-model"):
        made.__init__("no-such-model")
    made.close()
