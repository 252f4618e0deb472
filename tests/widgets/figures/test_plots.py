"""Static figures and tables: what they draw against what they were given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from tests.support.refusals import naming
from widgets.core.glossary import explain
from widgets.figures.method_tables import comparison_table
from widgets.figures.plots import (
    check_figures,
    entropy_profile,
    heldout_curves,
    reward_distribution,
    training_curves,
    use_offline_renderer,
)
from widgets.figures.series import decimate, method_styles, over_seeds
from widgets.figures.tables import rollout_table, visible


def train_line(method: str, seed: int, step: int) -> dict:
    line = {
        "method": method,
        "seed": seed,
        "step": step,
        "ntp_loss": 3.0 + seed - step / 10,
        "ntp_accuracy": 0.4 + seed / 10,
    }
    line |= {"grad_norm": 1.0 + seed}
    if method == "refine":
        cosine = 0.5 + seed / 10 + step / 100
        line |= {
            "reward_mean": cosine,
            "reward_std": 0.2,
            "cosine_mean": cosine,
            "cosine_std": 0.2,
            "clip_fraction": 0.01,
        }
        line |= {"binary_mean": 0.3, "binary_std": 0.1 + seed / 10}
    return line


@pytest.fixture
def metrics() -> pd.DataFrame:
    """Two methods, seeds 0 and 2, steps 1 to 4."""
    return pd.DataFrame(
        [train_line(method, seed, step) for method in ("sft", "refine") for seed in (0, 2) for step in (1, 2, 3, 4)]
    )


@pytest.fixture
def evaluations() -> pd.DataFrame:
    rows = []
    for method, gain in (("sft", 0.0), ("refine", 0.01)):
        for seed in (0, 1, 2):
            for step in (0, 10, 20):
                accuracy = 0.4 + gain * step / 10 + seed / 100
                rows.append(
                    {"method": method, "seed": seed, "step": step, "ntp_loss": 3 - accuracy, "ntp_accuracy": accuracy}
                    | {"sampled_accuracy": accuracy / 2}
                )
    return pd.DataFrame(rows)


def panel_titles(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def traces(figure: go.Figure, title: str, name: str) -> list[go.Scatter]:
    """Traces called `name` in the panel called `title`."""
    index = panel_titles(figure).index(title) + 1
    axis = "x" if index == 1 else f"x{index}"
    return [trace for trace in figure.data if (trace.xaxis or "x") == axis and trace.name == name]


def band_edges(trace: go.Scatter) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge, left to right."""
    half = len(trace.x) // 2
    assert list(trace.x[:half]) == list(trace.x[half:][::-1])
    return np.asarray(trace.y[half:][::-1]), np.asarray(trace.y[:half])


def test_training_curves_draw_mean_and_range_over_seeds(metrics: pd.DataFrame) -> None:
    figure = training_curves(metrics)
    assert panel_titles(figure) == [
        "NTP loss",
        "NTP accuracy",
        "Cosine reward",
        "Binary reward",
        "Gradient norm",
        "Clipped ratios",
    ]  # the reward trained on only repeats the cosine
    for method in ("SFT", "REFINE"):
        (line,) = traces(figure, "NTP loss", method)
        np.testing.assert_allclose(line.x, [1, 2, 3, 4])
        np.testing.assert_allclose(line.y, [3.9, 3.8, 3.7, 3.6])
        low, high = band_edges(traces(figure, "NTP loss", f"{method} band")[0])
        np.testing.assert_allclose(low, [2.9, 2.8, 2.7, 2.6])
        np.testing.assert_allclose(high, [4.9, 4.8, 4.7, 4.6])
    np.testing.assert_allclose(traces(figure, "NTP accuracy", "SFT")[0].y, 50)  # percent
    assert traces(figure, "Clipped ratios", "SFT") == []


def test_the_band_of_a_reward_is_its_spread_in_the_batch(metrics: pd.DataFrame) -> None:
    figure = training_curves(metrics)
    low, high = band_edges(traces(figure, "Binary reward", "REFINE band")[0])
    np.testing.assert_allclose(low, 0.3 - 0.2)  # 0.2: mean of the seeds' 0.1 and 0.3
    np.testing.assert_allclose(high, 0.3 + 0.2)


def test_a_reward_of_its_own_has_a_panel(metrics: pd.DataFrame) -> None:
    metrics["reward_mean"] += 0.1
    assert "Training reward" in panel_titles(training_curves(metrics))


def test_heldout_curves_have_a_panel_for_each_quantity(evaluations: pd.DataFrame) -> None:
    """Accuracies of argmax and of sampled tokens lie far apart: one axis for both would hide how the methods differ."""
    figure = heldout_curves(evaluations)
    accuracy, sampled, loss = panel_titles(figure)
    (argmax,) = traces(figure, accuracy, "REFINE")
    np.testing.assert_allclose(argmax.y, [41, 42, 43])
    np.testing.assert_allclose(traces(figure, sampled, "REFINE")[0].y, [20.5, 21, 21.5])
    low, high = band_edges(traces(figure, accuracy, "REFINE band")[0])
    np.testing.assert_allclose([low, high], [[40, 41, 42], [42, 43, 44]])
    np.testing.assert_allclose(traces(figure, loss, "SFT")[0].y, 3 - 0.41)
    units = [axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3)]
    assert units == ["%", "%", "nats per token"]
    assert len(panel_titles(heldout_curves(evaluations.drop(columns="sampled_accuracy")))) == 2


def test_sft_is_wide_and_drawn_below_the_others(evaluations: pd.DataFrame) -> None:
    lines = [trace for trace in heldout_curves(evaluations[::-1]).data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["SFT"] * 3 + ["REFINE"] * 3
    assert lines[0].line.width > 2 * lines[-1].line.width


def test_titles_explain_their_terms_and_the_tools_leave_room_for_them(evaluations: pd.DataFrame) -> None:
    figure = heldout_curves(evaluations)
    explained = figure.layout.annotations[2].hovertext
    assert explain("Held-out NTP loss (fig. E.1)").split()[0] in explained and "nats" in explained.replace("<br>", " ")
    assert "zoom" in figure.layout.modebar.remove and "toImage" not in figure.layout.modebar.remove


def test_an_evaluation_made_twice_counts_once(evaluations: pd.DataFrame) -> None:
    again = evaluations.iloc[[-1]].assign(ntp_accuracy=0.9)
    figure = heldout_curves(pd.concat([evaluations, again]))
    (line,) = traces(figure, panel_titles(figure)[0], "REFINE")
    assert line.y[-1] == pytest.approx(100 * (0.42 + 0.43 + 0.9) / 3)


def test_arms_differ_by_colour_and_by_mark() -> None:
    styles = method_styles(["refine", "sft", "base", "mine", "yours"])
    assert [style.label for style in styles.values()] == ["REFINE", "SFT", "base", "mine", "yours"]
    assert len({style.colour for style in styles.values()}) == len({style.symbol for style in styles.values()}) == 5


def test_the_methods_of_the_demo_differ_in_their_marks() -> None:
    styles = method_styles(["sft", "refine", "refine_memory", "expected"])
    assert len({style.symbol for style in styles.values()}) == 4


def test_every_line_has_one_legend_entry(evaluations: pd.DataFrame) -> None:
    shown = [trace.name for trace in heldout_curves(evaluations).data if trace.showlegend is not False]
    assert sorted(shown) == ["REFINE", "SFT"]


def test_entropy_profile_marks_the_positions_drawn() -> None:
    entropies, smoothed = np.arange(6.0), np.arange(6.0) / 2
    figure = entropy_profile(entropies, smoothed, [1, 4], [0, 3, 6], ["a", "\n", "</script>", "<b>", " x", "é"])
    raw, smooth, drawn = figure.data
    np.testing.assert_allclose(raw.y, entropies)
    np.testing.assert_allclose(smooth.y, smoothed)
    assert list(drawn.x) == [1, 4]
    np.testing.assert_allclose(drawn.y, [0.5, 2.0])
    assert list(drawn.text) == ["⏎", "·x"]
    assert list(raw.text)[2:4] == ["&lt;/script&gt;", "&lt;b&gt;"]  # plotly reads tags in hover texts
    assert [shape.x0 for shape in figure.layout.shapes] == [-0.5, 2.5, 5.5]


def test_entropy_profile_refuses_what_does_not_fit() -> None:
    with naming(ValueError, "3, 2, 3"):
        entropy_profile([1, 2, 3], [1, 2], [0], [0])
    with naming(ValueError, "positions", "from 0 to 2", 3):
        entropy_profile([1, 2, 3], [1, 2, 3], [3], [0])


def test_reward_distribution_draws_means_and_deviations(metrics: pd.DataFrame) -> None:
    figure = reward_distribution(metrics)
    mean, std = panel_titles(figure)
    np.testing.assert_allclose(traces(figure, mean, "cosine reward")[0].y, [0.61, 0.62, 0.63, 0.64])
    np.testing.assert_allclose(traces(figure, std, "binary reward")[0].y, 0.2)
    low, high = band_edges(traces(figure, std, "binary reward band")[0])
    np.testing.assert_allclose([low[0], high[0]], [0.1, 0.3])


def test_no_data_is_an_error_that_names_the_figure(metrics: pd.DataFrame) -> None:
    nothing = pd.DataFrame()
    sft = metrics[metrics["method"] == "sft"]
    for name, draw in {
        "training_curves": lambda: training_curves(nothing, nothing),
        "heldout_curves": lambda: heldout_curves(nothing),
        "entropy_profile": lambda: entropy_profile([], [], [], []),
        "reward_distribution": lambda: reward_distribution(sft),
        "rollout_table": lambda: rollout_table(nothing, str),
        "comparison_table": lambda: comparison_table([]),
    }.items():
        with naming(ValueError, f"figure {name} "):
            draw()


def test_check_figures_fails_where_a_panel_is_empty(metrics: pd.DataFrame, evaluations: pd.DataFrame) -> None:
    full = training_curves(metrics, evaluations)
    assert "Held-out NTP loss" in panel_titles(full)
    check_figures(full, heldout_curves(evaluations), comparison_table([{"method": "base", "ntp_loss": 1.0}]))
    with naming(ValueError, "figure 2 "):
        check_figures(full, go.Figure())
    hollow = go.Figure(full)
    for trace in hollow.data:
        if trace.xaxis == "x2":
            trace.y = [float("nan")] * len(trace.x)
    with naming(ValueError, "figure 1 "):
        check_figures(hollow)


def test_figures_are_shown_without_network(monkeypatch: pytest.MonkeyPatch, metrics: pd.DataFrame) -> None:
    monkeypatch.setattr(pio.renderers, "default", pio.renderers.default)
    use_offline_renderer()
    assert pio.renderers.default == "plotly_mimetype"
    assert "http" not in training_curves(metrics).to_json()


# -- tables --------------------------------------------------------------------------------------------------------------

VOCABULARY = ["a", "\n", "</script><img onerror=x>", "  ", "b", "\u202e"]


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)


@pytest.fixture
def rollouts() -> pd.DataFrame:
    targets, told = [[0, 1], [0, 1], [4, 4], [2, 4], [0, 3]], [[0, 1], [0, 1], [4, 0], [4, 4], [5, 1]]
    rewards = [1.0, 1.0, 0.7, -0.1, 0.2]
    columns = {"step": [1, 2, 3, 4, 5], "position": [7] * 5, "prefix_ids": [[4, 0]] * 5, "target_ids": targets}
    numbers = {"rollout_ids": told, "cosine": rewards, "binary": [1.0, 1.0, 0.5, 0.0, 0.0], "reward": rewards}
    return pd.DataFrame(columns | numbers)


def test_rollout_table_ranks_and_leaves_repeats_out(rollouts: pd.DataFrame) -> None:
    table = rollout_table(rollouts, decode, count=1)
    assert table.data["rollouts"].tolist() == ["best", "best without exact match", "worst"]
    assert table.data["step"].tolist() == [1, 3, 4]
    assert table.data["reward"].tolist() == [1.0, 0.7, -0.1]
    assert table.data["reference"].tolist() == ["a⏎", "bb", "</script><img onerror=x>b"]
    everything = rollout_table(rollouts, decode, count=4).data
    assert sorted(everything["step"]) == [1, 3, 4, 5]


def test_rollout_table_says_whose_each_rollout_is_where_there_are_several(rollouts: pd.DataFrame) -> None:
    seeds = rollouts.assign(method="refine", seed=[0, 1] * (len(rollouts) // 2) + [0] * (len(rollouts) % 2))
    table = rollout_table(seeds, decode, count=1)
    assert "method" not in table.data
    by_step = seeds.set_index("step")["seed"]
    assert table.data["seed"].tolist() == [by_step[step] for step in table.data["step"]]
    assert f"of {len(rollouts)} " in table.caption
    assert "seed" not in rollout_table(seeds.assign(seed=0), decode).data


def test_rollout_table_shows_tokens_as_text_only(rollouts: pd.DataFrame) -> None:
    table = rollout_table(rollouts, decode)
    page = table._repr_html_()
    assert "<img" not in page
    assert "</script" not in page
    assert "&lt;/script&gt;&lt;img onerror=x&gt;b" in page
    assert "\u202e" not in page
    assert "\\u202e⏎" in page
    assert ">0.700<" in page
    assert "0.700" in repr(table)
    assert "a··" in repr(table)


def test_visible_shows_what_cannot_be_seen() -> None:
    assert visible(" def f(x):\n\t  return x ") == "·def f(x):⏎⇥··return x·"
    assert visible("a b") == "a b"
    assert visible("\x00") == "\\u0000"


def test_means_are_of_the_steps_that_all_seeds_have() -> None:
    """Where one seed has ended, the mean over the others would jump."""
    lines = [train_line("sft", seed, step) for seed, last in ((0, 4), (2, 2)) for step in range(1, last + 1)]
    lines += [train_line("refine", 0, step) for step in (1, 2, 3)]
    table = over_seeds(pd.DataFrame(lines), "ntp_loss")
    assert table.groupby("method")["step"].apply(list).to_dict() == {"refine": [1, 2, 3], "sft": [1, 2]}
    assert table[table["method"] == "sft"]["mean"].tolist() == pytest.approx([3.9, 3.8])


def test_experiments_of_one_arm_have_labels_and_dashes_of_their_own() -> None:
    lines = [train_line("refine", 0, step) for step in (1, 2)]
    other = [line | {"method": "refine: lr 0.001", "ntp_loss": 1.0} for line in lines]
    names = ["refine: lr 0.0001", "refine: lr 0.001", "sft"]
    styles = method_styles(reversed(names))
    assert [styles[name].label for name in names] == ["REFINE, lr 0.0001", "REFINE, lr 0.001", "SFT"]
    assert {styles[name].dash for name in names[:2]} == {"solid", "dash"}
    assert styles[names[0]].colour == styles[names[1]].colour
    first = [line | {"method": "refine: lr 0.0001"} for line in lines]
    drawn = {trace.name: trace for trace in training_curves(pd.DataFrame(first + other)).data if trace.showlegend}
    assert list(drawn["REFINE, lr 0.001"].y) == [1.0, 1.0]
    assert list(drawn["REFINE, lr 0.0001"].y) == pytest.approx([2.9, 2.8])
    assert drawn["REFINE, lr 0.001"].line.dash == "dash"


# -- thinning ------------------------------------------------------------------------------------------------------------


def test_decimate_keeps_ends_and_extremes() -> None:
    y = np.sin(np.arange(20_000) / 50)
    y[7_777], y[12_345], y[5_000:5_200] = 50.0, -50.0, np.nan
    kept = decimate(y, 1000)
    assert len(kept) <= 1000
    assert (np.diff(kept) > 0).all()
    assert {0, 7_777, 12_345, 19_999} <= set(kept.tolist())
    assert np.isnan(y[kept]).any()  # the gap stays a gap


def test_decimate_leaves_short_series_alone() -> None:
    assert decimate(np.arange(1000.0), 1000).tolist() == list(range(1000))
    with naming(ValueError, "limit", 3):
        decimate(np.arange(10.0), 3)
