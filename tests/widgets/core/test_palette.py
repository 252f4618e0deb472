"""The palette: its colours stand out from the page, and readers with a colour vision deficiency can tell them apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from widgets.core.assets import style
from widgets.core.palette import DARK, FIGURES, LIGHT
from widgets.figures.series import COLOURS, KNOWN_METHODS, OTHER_STYLES

SEEN = {
    "by all cones": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""Linear RGB as seen with each kind of colour vision (Machado et al., 2009, severity 1)."""
CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
OKLAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [FIGURES, LIGHT, DARK], ids=["figures", "light", "dark"])
def test_no_two_colours_look_alike_to_any_reader(colours: tuple[str, ...]) -> None:
    for sight, matrix in SEEN.items():
        places = {each: OKLAB @ np.cbrt(CONES @ np.clip(matrix @ linear(each), 0, 1)) for each in colours}
        for one, other in combinations(colours, 2):
            assert np.linalg.norm(places[one] - places[other]) > 0.065, (sight, one, other)


def test_colours_stand_out_from_their_pages() -> None:
    assert min(contrast(colour, page) for colour in FIGURES for page in ("#ffffff", "#111111")) >= 3
    assert min(contrast(colour, page) for colour in LIGHT for page in ("#ffffff", "#f7f7f7")) >= 4.5
    assert min(contrast(colour, page) for colour in DARK for page in ("#111111", "#1c1c1c")) >= 4.5


def test_figures_and_widgets_take_the_colours_of_methods_from_the_palette() -> None:
    assert COLOURS is FIGURES and len(LIGHT) == len(DARK) == len(FIGURES)
    assert {method.colour for method in KNOWN_METHODS.values()} | {colour for colour, _ in OTHER_STYLES} <= {*FIGURES}
    sheet = style("live_curves")
    assert (
        sheet.count("--series-1:") == 3 and f"--series-1: {LIGHT[1]};" in sheet and f"--series-5: {DARK[5]};" in sheet
    )
