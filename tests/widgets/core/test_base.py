"""What all widgets share: scripts written into one, errors shown, a page that works alone; their JavaScript under node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import traitlets

from tests.support.paths import ROOT
from widgets.core.assets import STATIC, script, style
from widgets.core.base import Widget, guarded
from widgets.core.page import About, page, page_path, save_page


class Echo(Widget):
    """A widget of two traits."""

    _esm = script("live_curves")
    _css = style("live_curves")
    text = traitlets.Unicode().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    own = traitlets.Int()

    @guarded
    def divide(self, by: int) -> float:
        return 1 / by

    @guarded
    def refuse(self) -> None:
        raise ValueError("by must be at least 1, got 0")


def data_of(text: str) -> dict:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])


def test_a_script_holds_what_it_imports_once() -> None:
    text = script("live_curves")
    assert "import" not in re.sub("//.*", "", text)
    assert text.count("export const floats =") == 1
    assert text.rstrip().endswith("export default { render };")


def test_an_error_is_shown_and_goes() -> None:
    widget = Echo()
    assert widget.divide(0) is None
    assert widget.error == "ZeroDivisionError: division by zero"
    assert widget.divide(2) == 0.5
    assert widget.error == ""
    widget.refuse()
    assert widget.error == "by must be at least 1, got 0"
    assert widget.divide(4) == 0.25
    assert widget.error == "by must be at least 1, got 0"  # another's


def test_a_page_holds_own_traits_as_data() -> None:
    hostile = "</script><img src=x onerror=alert(1)> %DATA% \ud800 \x00"
    widget = Echo(text=hostile, values={"bytes": b"\x01\x02", "nan": float("nan"), "deep": [{"x": 1}]})
    text = page(widget, title="<b>%SCRIPT%", links=[(widget, "text", widget, "status")])
    (part,) = data_of(text)["widgets"]
    assert part["state"] == {
        "error": "",
        "status": "",
        "text": hostile,
        "values": {"bytes": {"base64": "AQI="}, "nan": None, "deep": [{"x": 1}]},
    }
    assert data_of(text)["links"] == [[0, "text", 0, "status"]]
    assert data_of(text)["head"]["title"] == "<b>%SCRIPT%" and data_of(text)["head"]["conclusion"] == ""
    assert "<img" not in text
    assert "<title>&lt;b&gt;%SCRIPT%</title>" in text


def test_a_page_begins_with_what_it_is_about() -> None:
    about = About(
        conclusion="REFINE is better.", facts={"model": "tiny", "compared with": None, "seed": 0, "bad": "\x1b"}
    )
    head = data_of(page(Echo(), title="Runs", about=about))["head"]
    assert (head["title"], head["conclusion"]) == ("Runs", "REFINE is better.")
    assert head["facts"][:-1] == [["model", "tiny"], ["seed", "0"], ["bad", "\\x1b"]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", head["facts"][-1][1])


def test_the_name_of_a_page_tells_the_model(tmp_path: Path) -> None:
    named = page_path(tmp_path / "explore-{model}.html", model="/runs/2026 a/checkpoint;1")
    assert named == tmp_path / "explore-checkpoint-1.html"
    assert page_path(tmp_path / "{other}.html", model="m") == tmp_path / "{other}.html"


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_page(tmp_path / "a.html", Echo())
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("refine_lab.runs.durable.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        Echo(text="other").save_html(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    other = tmp_path / "report.html"
    other.write_text("<html>results of a year</html>")
    for there in (other, tmp_path):
        with pytest.raises(ValueError, match="already exists and was not written by refine_lab; choose another"):
            save_page(there, Echo())
    assert other.read_text() == "<html>results of a year</html>"
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for the page a\.html"):
        save_page(tmp_path / "nowhere" / "a.html", Echo())
    assert "second" in save_page(save_page(tmp_path / "a.html", Echo()), Echo(text="second")).read_text()


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.*")), ids=lambda path: path.name)
def test_the_page_takes_text_as_text_and_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "http",
        "//cdn",
        "@import",
    ):
        assert forbidden not in text.replace("http-equiv", "")


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "static").glob("*.test.mjs")), ids=lambda path: path.name)
def test_javascript_parts(path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: the JavaScript is covered by the browser tier alone")
    done = subprocess.run([node, "--test", str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
