"""Nested data as one buffer, in Python and in the page; and that no widget of ours sends a buffer inside a dict or a list."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import traitlets
from ipywidgets.widgets.widget import _remove_buffers

import widgets
from refine_lab.explore.client import Worker
from tests.factories.live_curves import new_run, train
from tests.factories.state_view import summary
from tests.support.paths import ROOT
from tests.support.rollout_frames import decode, random_frame
from widgets.core.base import Widget
from widgets.core.packing import pack, unpack
from widgets.parts.live_curves import LiveCurves
from widgets.parts.reward_summary import RewardSummary
from widgets.reward_explorer import RewardExplorer
from widgets.rollout_inspector import RolloutInspector
from widgets.run_monitor import RunMonitor
from widgets.state_view import StateView
from widgets.token_map import Alternatives, Metric, TokenMap, TokenText
from widgets.ttt_panel import TTTPanel

VALUES: list[Any] = [
    {},
    {"a": b"", "b": [b"\x00\x01\x02", {"c": b"\xff" * 5, "text": "ü \ud800 </script>"}], "n": [1, 2.5, None, True]},
    [{"numbers": {"x": np.arange(3, dtype="<f4").tobytes()}}, "x"],
]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_packed_is_unpacked(value: Any) -> None:
    assert unpack(pack(value)) == value
    assert unpack(memoryview(pack(value))) == value


def test_what_json_has_not_is_null_or_refused() -> None:
    assert unpack(pack({"x": (float("nan"), float("inf"), 1.0)})) == {"x": [None, None, 1.0]}
    with pytest.raises(ValueError, match=r"must not have the key '\$bytes'"):
        pack({"$bytes": [0, 1]})
    with pytest.raises(TypeError):
        pack({"x": object()})


def test_the_page_unpacks_the_same() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: the JavaScript is covered by the browser tier alone")
    source = f"""
        import {{ load }} from {json.dumps((ROOT / "tests" / "static" / "load.mjs").as_uri())};
        import {{ readFileSync }} from "node:fs";
        const js = await load("rollout_inspector");
        const bytes = (name, value) => value instanceof DataView
          ? [...new Uint8Array(value.buffer, value.byteOffset, value.byteLength)] : value;
        const read = (packed) => {{
          const whole = Uint8Array.from([9, 9, 9, ...packed]); // a view that begins inside its buffer
          return js.unpacked(new DataView(whole.buffer, 3));
        }};
        console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(read), bytes));"""
    given = json.dumps([list(pack(value)) for value in VALUES])
    done = subprocess.run(
        [node, "--input-type=module", "-e", source],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    def listed(value: Any) -> Any:
        if isinstance(value, bytes):
            return list(value)
        if isinstance(value, dict):
            return {name: listed(item) for name, item in value.items()}
        return [listed(item) for item in value] if isinstance(value, list) else value

    assert json.loads(done.stdout) == listed(VALUES)


# -- every widget --------------------------------------------------------------------------------------------------------


def buffer_paths(widget: ipywidgets.Widget) -> list[list[str]]:
    """Where in the state of a widget its binary buffers stand, as ipywidgets tells the page."""
    return _remove_buffers(widget.get_state())[1]


def parts_of(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """The widget and all that it shows."""
    inside = [part for child in getattr(widget, "children", ()) for part in parts_of(child)]
    return [widget, *inside]


def token_map(**_: Any) -> TokenMap:
    text = TokenText("one two", [0, 3, 7])
    alternatives = Alternatives([[1, 0], [0, 1]], [[0.5, 0.25]] * 2, ["a", "b"])
    return TokenMap(text, [Metric("loss", "Loss", "nats", [1.0, 2.0])], alternatives=alternatives)


def live_curves(folder: Path, **_: Any) -> LiveCurves:
    with new_run(folder) as writer:
        for step in (1, 2):
            train(writer, step)
        writer.status("finished")
    return LiveCurves(writer.path)


def monitor(folder: Path, **_: Any) -> RunMonitor:
    live_curves(folder).close()
    return RunMonitor(folder)


def reward_summary(**_: Any) -> RewardSummary:
    numbers = pd.DataFrame({name: [0.0, 1.0, 2.0] for name in ("reward", "entropy", "binary", "target_logprob")})
    made = RewardSummary(numbers)
    made.passing = b"\x01\x00\x01"
    return made


def explorer(worker: Worker, **_: Any) -> RewardExplorer:
    made = RewardExplorer(text="x = 1\n" * 40, worker=worker, settings={"group_size": 2, "num_chunks": 2})
    made.shown.result(120)
    (upload,) = (part for part in parts_of(made) if isinstance(part, ipywidgets.FileUpload))  # as a page opens a file
    file = {"name": "a.txt", "type": "text/plain", "size": 240, "content": memoryview(b"y = 2\n" * 40)}
    upload.value = (file | {"last_modified": datetime.now(UTC)},)
    made.read().result(120)
    assert made.token_map.text.text == "y = 2\n" * 40
    (shown,) = upload.get_state()["value"]
    assert (shown["name"], "content" in shown) == ("a.txt", False)
    return made


def ttt_panel(worker: Worker, **_: Any) -> TTTPanel:
    made = TTTPanel(text="x = 1\n" * 40, question="x", worker=worker)
    made.fields["steps"].value = 1
    made.start().result(120)
    made.reset().result(120)
    return made


MADE: dict[str, Callable[..., ipywidgets.Widget]] = {
    "token map": token_map,
    "state view": lambda **_: StateView(summary(), str),
    "rollout inspector": lambda **_: RolloutInspector(random_frame(24, 4), decode=decode),
    "reward summary": reward_summary,
    "live curves": live_curves,
    "run monitor": monitor,
    "reward explorer": explorer,
    "ttt panel": ttt_panel,
}


def with_buffers(made: ipywidgets.Widget) -> set[str]:
    """The names of the classes of its parts that send buffers, after all paths were looked at."""
    found = set()
    for part in parts_of(made):
        paths = buffer_paths(part)
        assert [path for path in paths if len(path) != 1] == [], type(part)
        found |= {type(part).__name__} if paths else set()
    return found


@pytest.mark.parametrize("name", [name for name in MADE if name not in ("reward explorer", "ttt panel")])
def test_no_buffer_stands_inside_a_dict_or_a_list(name: str, tmp_path: Path) -> None:
    made = MADE[name](folder=tmp_path)
    assert with_buffers(made), "it was given data"
    made.close()


@pytest.mark.process
@pytest.mark.parametrize("name", ["reward explorer", "ttt panel"])
def test_no_buffer_of_a_panel_stands_inside_a_dict_or_a_list(name: str) -> None:
    worker = Worker("cpu")
    try:
        made = MADE[name](worker=worker)
        assert with_buffers(made) >= {"TokenMap"}
        made.close()
    finally:
        worker.close()


def test_every_trait_that_may_hold_bytes_is_looked_at() -> None:
    """Every class of widget with a synced dict is either given data above, or its dicts hold plain settings."""
    for path in Path(widgets.__file__).parent.glob("*.py"):
        __import__(f"widgets.{path.stem}")
    plain = {"RolloutInspector": {"filters"}}
    for kind in _subclasses(Widget):
        if not kind.__module__.startswith("widgets."):
            continue
        dicts = {name for name, trait in kind.class_traits(sync=True).items() if isinstance(trait, traitlets.Dict)}
        unpacked = {name for name in dicts if kind.class_traits()[name].metadata.get("to_json") is None}
        assert unpacked <= plain.get(kind.__name__, set()), kind


def _subclasses(kind: type) -> set[type]:
    return {kind, *(each for child in kind.__subclasses__() for each in _subclasses(child))}
