"""The page of the registered experiments: that of the committed tables, and its parts on made-up tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evidence import RESULTS, frontiers
from benchmarks.evidence_page import FIGURE, PAGE, README, frontier_rows, page, with_result, with_tables
from refine_lab.experiments.evidence import EvidenceRun, record
from widgets.figures.trade_off import frontier_figure


@pytest.mark.slow
def test_the_committed_page_is_that_of_the_committed_tables() -> None:
    assert (RESULTS / PAGE).read_text(encoding="utf-8") == page(RESULTS)
    assert (RESULTS / FIGURE).read_bytes().startswith(b"\x89PNG")
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert with_tables(readme, RESULTS) == readme


def test_the_result_in_the_readme_is_that_of_the_tables() -> None:
    readme, results = README.read_text(encoding="utf-8"), (RESULTS / "README.md").read_text(encoding="utf-8")
    assert with_result(readme, results) == readme
    row = next(line for line in results.splitlines() if line.startswith("| expected match by memory (1) – SFT |"))
    assert row.split("|")[2].split()[0] + " points (" in readme


def fill(folder: Path) -> None:
    for seed in (0, 1):
        for method, coefficient, right, loss in (
            ("sft", None, 300, 2.26),
            ("expected_memory", 0.3, 400, 2.265),
            ("expected_memory", 1.0, 500 + 10 * seed, 2.27),
        ):
            run = EvidenceRun(experiment="1", method=method, coefficient=coefficient, seed=seed)
            items = {"exact_recall": [1.0] * right + [0.0] * (600 - right), "ntp_loss": [loss, loss + 0.01 * seed]}
            items["key_loss"] = items["ntp_loss"]
            means = {"exact_recall": right / 600, "ntp_loss": loss, "longppl": 18.0, "key_tokens": 9}
            record(folder, run, means, items, commit="abc", seconds=1)


def test_the_page_has_means_over_seeds_and_the_registered_contrasts(tmp_path: Path) -> None:
    fill(tmp_path)
    text = page(tmp_path)
    assert "\n6 of 73 registered runs have finished." in text
    assert "| expected match by memory | 1 | 2 | 84.2 ± 1.2 | 18.00 ± 0.00 | 2.2700 ± 0.0000 |" in text
    assert "| SFT | – | 2 | 50.0 ± 0.0 | 18.00 ± 0.00 | 2.2600 ± 0.0000 |" in text
    (contrast,) = [
        line for line in text.splitlines() if line.startswith("| expected match by memory (1) – SFT | +34.2 (")
    ]
    assert "| 2 | 67 |" in contrast  # two seeds, 67 distinct keys


def test_other_measures_have_a_row_for_each_coefficient(tmp_path: Path) -> None:
    for coefficient, recalled in ((0.1, [1.0, 0.0, 0.0, 0.0]), (0.2, [1.0, 1.0, 1.0, 0.0])):
        run = EvidenceRun(experiment="4", method="weighted", coefficient=coefficient, planted=False)
        means = {"exact_recall": 0.5, "ntp_loss": 2.2, "longppl": 18.0, "key_tokens": 9}
        items = {"exact_recall": [0.5], "key_loss": [1.0], "ntp_loss": [2.2], "rare_names": recalled}
        record(tmp_path, run, means, items, commit="abc", seconds=1)
    lines = page(tmp_path).splitlines()
    start = lines.index("| method | coefficient | seeds | rare names (%) |")
    name = "weighted NTP by memory"
    assert lines[start + 2 : start + 5] == [f"| {name} | 0.1 | 1 | 25.0 |", f"| {name} | 0.2 | 1 | 75.0 |", ""]


def test_the_figure_joins_the_coefficients_of_a_method(tmp_path: Path) -> None:
    fill(tmp_path)
    figure = frontier_figure(frontier_rows(tmp_path))
    sft, expected = figure.data
    assert (sft.name, sft.mode, list(sft.y)) == ("SFT", "markers", [50])
    assert (expected.name, list(expected.text)) == ("expected match by memory", ["0.3", "1"])
    assert list(expected.x) == pytest.approx([2.265, 2.27])
    assert list(expected.y) == pytest.approx([400 / 6, 505 / 6])
    assert list(expected.error_y.array) == pytest.approx([0, 5 / 6], rel=1e-4)


def test_a_frontier_needs_two_coefficients_with_all_seeds(tmp_path: Path) -> None:
    def add(method: str, coefficient: float, seed: int) -> None:
        run = EvidenceRun(experiment="2", method=method, coefficient=coefficient, seed=seed)
        right, loss = (60 + 10 * seed + 20 * coefficient) / 200, 2.26 + 0.01 * coefficient + 0.001 * seed
        means = {"exact_recall": right, "ntp_loss": loss, "longppl": 18.0, "key_tokens": 9}
        record(tmp_path, run, means, {"exact_recall": [right]}, commit="abc", seconds=1)

    for method in ("weighted", "expected_memory"):
        for seed in (0, 1, 2):
            add(method, 1.0, seed)
        add(method, 0.3, 0)
    assert len(frontiers(tmp_path)) == 0
    for method in ("weighted", "expected_memory"):
        for seed in (1, 2):
            add(method, 0.3, seed)
    (row,) = frontiers(tmp_path).to_dict("records")
    assert row["difference"] == pytest.approx(0, abs=1e-9) and row["seeds"] == 3
