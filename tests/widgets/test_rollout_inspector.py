"""The rollout inspector's Python side: columns, order, table F.1; and that the page's JavaScript finds the same rows."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from refine_lab.config import TrainConfig
from refine_lab.models import load_model
from refine_lab.runs.schema import ROLLOUT_TYPES
from refine_lab.runs.writer import RunWriter
from tests.support.hostile import HOSTILE
from tests.support.paths import ROOT
from tests.support.refusals import naming, refused
from tests.support.rollout_frames import (
    CASES,
    FIND_CASES,
    WORDS,
    case_inspector,
    check_page_cases,
    decode,
    given_cases,
    page_columns,
    random_frame,
    rows,
)
from widgets.parts.rollout_columns import SORTS, fold, rollout_columns
from widgets.parts.token_text import texts_of, token_decoder
from widgets.rollout_inspector import RolloutInspector


@pytest.fixture
def inspector() -> RolloutInspector:
    return RolloutInspector(rows([0, 1, 2], [0, 4], [5, 5, 5]), decode=decode)


def run_node(code: str, given: object) -> object:
    """What a function of the page's modules `js` makes of JSON."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: the JavaScript is covered by the browser tier alone")
    source = f"""
        import {{ load }} from {json.dumps((ROOT / "tests" / "static" / "load.mjs").as_uri())};
        import {{ readFileSync }} from "node:fs";
        const js = await load("rollout_inspector");
        const revive = (name, value) => typeof value?.base64 === "string"
          ? new DataView(Uint8Array.from(Buffer.from(value.base64, "base64")).buffer) : value;
        const given = JSON.parse(readFileSync(0, "utf8"), revive);
        console.log(JSON.stringify(({code})(js, given)));"""
    command = [node, "--input-type=module", "-e", source]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FILTERS: list[dict] = [
    {},
    {"reward": [0.1, None]},
    {"reward": [None, 0.7], "entropy": [0, None]},
    {"reward": [0.7, 0.7]},
    {"entropy": [-1, 1e39]},
    {"reward": [2, 1]},
    {"step": [1, 2.5], "position": [3, None]},
    {"text": " VERY"},
    {"text": "a\n"},
    {"text": "İ"},
    {"text": "\x00", "reward": [-1, None]},
    {"target": "</SCRIPT>"},
    {"target": " a", "text": " p"},
]


@pytest.mark.parametrize("case", CASES["shown"], ids=lambda case: case["case"])
def test_python_shows_the_rows_of_the_shared_cases(case: dict) -> None:
    widget = case_inspector()
    widget.filters, widget.sort = case["filters"], case["sort"]
    assert widget.filtered().index.tolist() == case["rows"]


@pytest.mark.parametrize("case", CASES["tables"], ids=lambda case: case["case"])
def test_python_makes_the_tables_of_the_shared_cases(case: dict) -> None:
    widget = case_inspector()
    widget.filters, widget.sort = case["filters"], case["sort"]
    assert widget.table_f1(case["examples"], case["samples"]).markdown().splitlines()[2:] == case["lines"]


def test_the_page_finds_the_shared_cases() -> None:
    check_page_cases(run_node(FIND_CASES, given_cases()))


def test_python_and_the_page_show_the_same_rows() -> None:
    widget = RolloutInspector(random_frame(240, 6), decode=decode)
    cases = [(filters, (name, high), False) for filters in FILTERS for name in SORTS for high in (False, True)]
    cases += [({}, (name, high), True) for name in SORTS for high in (False, True)]
    found = run_node(
        "(js, { columns, cases }) => { const data = js.unpackRollouts(js.unpacked(columns));"
        " return cases.map(([filters, sort, flat]) => [...js.shownRows(data, filters, sort, flat)]); }",
        {"columns": page_columns(widget), "cases": cases},
    )
    assert isinstance(found, list)
    lengths = set()
    for (filters, sort, flat), its in zip(cases, found, strict=True):
        widget.filters, widget.sort, widget.flat = filters, sort, flat
        assert widget.filtered().index.tolist() == its, (filters, sort, flat)
        lengths.add(len(its))
    assert len(lengths) >= 8  # the cases tell


def test_python_and_the_page_make_the_same_table_f1() -> None:
    widget = RolloutInspector(random_frame(60, 6), decode=decode)
    widget.sort = ("cosine", True)
    code = """(js, { columns, sort }) => {
        const data = js.unpackRollouts(js.unpacked(columns));
        return js.markdownF1(js.tableF1(data, js.shownRows(data, {}, sort))); }"""
    table = widget.table_f1()
    assert run_node(code, {"columns": page_columns(widget), "sort": widget.sort}) == table.markdown()
    assert "&lt;/script&gt;" in table._repr_html_()
    assert "</script>" not in table._repr_html_()


def test_python_and_the_page_show_hostile_text_alike() -> None:
    texts = [text for _, text in HOSTILE]
    frame = pd.concat([rows([i], target=[i]).assign(step=i) for i in range(len(texts))], ignore_index=True)
    widget = RolloutInspector(frame, decode=lambda ids: "".join(texts[i] for i in ids) or "empty")
    code = """(js, columns) => {
        const data = js.unpackRollouts(js.unpacked(columns));
        return js.markdownF1(js.tableF1(data, js.shownRows(data, {}, ["row", false]), 40)); }"""
    assert run_node(code, page_columns(widget)) == widget.table_f1(examples=40).markdown()
    assert "\u202e" not in repr(widget)


def test_table_f1_by_hand(inspector: RolloutInspector) -> None:
    assert inspector.table_f1().markdown().splitlines()[2:] == [
        "| Ex. 1 | GT | ·very laid back | – |",
        "|  | P1 | ·very laid back | 0.000 |",
        "|  | P2 | ·very perfect | 0.250 |",
        "|  | P3 | ·hill hill hill | **0.500** ★ |",
    ]
    short = inspector.table_f1(samples=2).data  # the best of all, which stands behind the first two, is there too
    assert short["type"].tolist() == ["GT", "P1", "P2", "P3"]
    assert short["best"].tolist() == ["", "", "", "★"]
    assert inspector.table_f1(samples=1).data["type"].tolist() == ["GT", "P1", "P3"]
    assert "P3" in repr(inspector.table_f1())
    with refused("examples", 0):
        inspector.table_f1(examples=0)
    inspector.filters = {"text": "nowhere"}
    with pytest.raises(ValueError, match="no rollout is shown"):
        inspector.table_f1()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("samples", [1, 4, 9])
def test_the_star_of_table_f1_is_the_highest_of_all_rollouts(seed: int, samples: int) -> None:
    """In Python and in the page alike, whatever the list filters, for positions of eight rollouts of which some are shown."""
    frame = random_frame(96, 8, seed)
    widget = RolloutInspector(frame, decode=decode)
    widget.sort, widget.filters = ("entropy", True), {"reward": [-1, 0.5]}
    table = widget.table_f1(samples=samples)
    code = """(js, { columns, filters, sort, samples }) => {
        const data = js.unpackRollouts(js.unpacked(columns));
        return js.markdownF1(js.tableF1(data, js.shownRows(data, filters, sort), 6, samples)); }"""
    given = {"columns": page_columns(widget), "filters": widget.filters, "sort": widget.sort, "samples": samples}
    assert run_node(code, given) == table.markdown()
    assert "★ marks the rollout with the highest cosine reward in each example" in table.caption
    examples = table.data.groupby((table.data["type"] == "GT").cumsum())
    groups = list(dict.fromkeys(widget.filtered()["sequence_id"]))[: len(examples)]
    stars = 0
    for sequence, (_, lines) in zip(groups, examples, strict=True):
        own = frame[frame["sequence_id"] == sequence].sort_values("sample_index", kind="stable")["cosine"].to_numpy()
        finite = np.isfinite(own)
        starred = lines[lines["best"] == "★"]
        assert len(starred) == (finite.sum() > 1)
        if len(starred):
            stars += 1
            assert starred["type"].item() == f"P{1 + int(np.argmax(np.where(finite, own, -np.inf)))}"
            assert starred["cosine reward"].item() == pytest.approx(own[finite].max())
    assert stars


def test_positions_of_table_f1_differ_in_truth() -> None:
    same = rows([0], [1]).assign(sequence_id=6)
    other = rows([2], [3], target=[9]).assign(sequence_id=7)
    widget = RolloutInspector(pd.concat([rows([0], [1]), same, other], ignore_index=True), decode=decode)
    data = widget.table_f1(examples=2).data
    assert data["text"].tolist() == ["·very laid back", "·very", "·laid", "</script>", "·back", "·lodge"]
    assert data["example"].tolist() == ["Ex. 1", "", "", "Ex. 2", "", ""]


def test_columns_hold_what_the_frame_holds() -> None:
    frame = pd.concat(
        [rows([0, 1, 2], [0, 4], cosines=[[1, 1, 1], [1, 0.5]]), rows([], target=[8], cosines=[[]]).assign(step=4)]
    )
    table = rollout_columns(frame, decode)
    assert table.strings == ["", " very", " laid", " back", " lodge", " perfect", "\n"]
    assert table.tokens.tolist() == [[1, 2, 3], [1, 5, 0], [0, 0, 0]]
    assert table.targets.tolist() == [[1, 2, 3], [6, 0, 0]]
    assert table.prefixes.tolist() == [[4, 5], [4, 5]]
    assert (table.group.tolist(), table.step.tolist()) == ([0, 0, 1], [3, 4])
    assert table.numbers["logprob"].tolist() == [-1.5, -1.0, 0.0]
    assert table.cosines is not None
    np.testing.assert_array_equal(table.cosines, np.array([[1, 1, 1], [1, 0.5, np.nan], [np.nan] * 3], np.float32))
    assert rollout_columns(frame.drop(columns="cosines"), decode).cosines is None


def test_prefixes_end_at_the_position() -> None:
    frame = pd.concat([rows([0], prefix_ids=[[*range(9)] * 5]), rows([0], prefix_ids=[[7]]).assign(step=4)])
    table = rollout_columns(frame, decode)
    assert table.prefixes.shape == (2, 32)
    assert [table.strings[i] for i in table.prefixes[0, -3:]] == [WORDS[6], WORDS[7], WORDS[8]]
    assert [table.strings[i] for i in table.prefixes[1, -2:]] == ["", WORDS[7]]


def test_each_distinct_token_is_decoded_once() -> None:
    asked: list[int] = []

    def count(ids: Sequence[int]) -> str:
        asked.extend(ids)
        return decode(ids)

    widget = RolloutInspector(rows([0, 1, 2], [0, 4]), decode=count)
    widget.show(rows([0, 5]))
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (rows([0]).drop(columns=["reward", "step"]), "rollouts lack the columns step, reward"),
        (rows([-1]), "rollout_ids must be from 0 to 16,777,215, got -1"),
        (rows([0], rollout_ids=[["a"]]), "column rollout_ids must contain a list of whole numbers in every row"),
        (rows([0], rollout_ids=[[0.5]]), "column rollout_ids must contain a list of whole numbers"),
        (rows([0], target_ids=[None]), "column target_ids must contain a list of whole numbers"),
        (rows([0], prefix_ids=[3]), "column prefix_ids must contain a list of whole numbers"),
        (rows([0, 1], logprobs=[[-1.0]]), "row 0 must have 2 values in logprobs, one per token, got 1"),
        (rows([0], cosines=[[]]), "row 0 must have 1 values in cosines, one per token, got 0"),
        (rows([0], step=[1.5]), "column step must contain whole numbers, got 1.5"),
        (
            rows([0], [1], target_ids=[[0], [1]]),
            "rollouts of step 3, sequence_id 5, position 20 have different references",
        ),
    ],
)
def test_a_frame_that_cannot_be_shown_is_refused_and_what_was_shown_stays(
    inspector: RolloutInspector, frame: pd.DataFrame, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutInspector(frame, decode=decode)
    before = inspector.columns
    with pytest.raises(ValueError, match=message):
        inspector.show(frame)
    assert inspector.columns == before
    assert len(inspector.rollouts) == 3


def test_traits_are_checked(inspector: RolloutInspector) -> None:
    for name, value, message in (
        ("selected", 3, "selected must be from -1 to 2, got 3"),
        ("compared", [0, 7], "a compared row must be from 0 to 2, got 7"),
        ("sort", ("colour", True), "sort must be one of row, step, .*, got 'colour'"),
        (
            "filters",
            {"colour": "red"},
            "filter names must be among step, position, entropy, reward, text, target, got colour",
        ),
        ("filters", {"text": 3}, "filter text must be a string, got 3"),
        ("filters", {"reward": [0]}, "filter reward must be .lowest, highest., numbers or None, got .0."),
        ("filters", {"reward": [math.nan, 1]}, "filter reward must be"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(inspector, name, value)
    inspector.compared = [2, 0, 2]
    assert inspector.compared == [2, 0]
    inspector.filters = {"text": "", "reward": (None, None), "entropy": None, "step": (1, None)}
    assert inspector.filters == {"step": [1, None]}
    with naming(ValueError, "decode", None):
        RolloutInspector(decode=None)
    many = RolloutInspector(rows(*[[0]] * 9), decode=decode)
    with refused("the number of rows compared", 9):
        many.compared = [*range(9)]


def test_another_frame_comes_whole_and_keeps_the_choice_where_asked(inspector: RolloutInspector) -> None:
    inspector.selected, inspector.compared, inspector.filters = 2, [0, 2], {"text": "a"}
    inspector.sort = ("reward", True)
    inspector.show(rows([0], [1], reward=[1.0, 2.0]), keep=True)
    assert (inspector.selected, inspector.compared, inspector.filters) == (-1, [0], {"text": "a"})
    inspector.selected = 1
    inspector.show(rows([0], [1], reward=[4.0, 3.0]), keep=True)
    assert inspector.selected == 1
    inspector.show(rows([0], [1]))
    assert (inspector.selected, inspector.compared, inspector.filters) == (-1, [], {})
    assert inspector.sort == ("reward", True)


def test_text_says_what_is_shown(inspector: RolloutInspector) -> None:
    inspector.sort = ("reward", True)
    inspector.filters = {"reward": [0.2, None]}
    assert repr(inspector).splitlines() == [
        "RolloutInspector: 2 of 3 rollouts at 1 of 1 positions, by reward, highest first",
        "step 3, sequence 5, position 20",
        "  reference            ·very|·laid|·back",
        "    0.500 (+0.50)     2  ·hill|·hill|·hill",
        "    0.250 (+0.25)     1  ·very|·perfect",
    ]
    assert repr(RolloutInspector(decode=decode)) == "RolloutInspector: no rollouts"
    large = RolloutInspector(random_frame(300, 5), decode=decode)
    assert len(repr(large).splitlines()) <= 25
    assert large._repr_mimebundle_()[0]["text/plain"] == repr(large)


def test_a_run_is_read_with_its_tokenizer(tmp_path: Path) -> None:
    config = TrainConfig(recipe="tiny", steps=8, batch_size=2, mini_batch_size=2)
    _, tokenizer = load_model("tiny-deltanet")
    ids = tokenizer(" for i in", add_special_tokens=False)["input_ids"]
    with RunWriter.create(config, tmp_path) as writer:
        frame = rows(ids, ids[::-1], target=ids, prefix_ids=[ids, ids])
        for step in (1, 2):
            writer.rollouts(step, {name: frame[name].tolist() for name in ROLLOUT_TYPES})
    widget = RolloutInspector.of_run(writer.path, tokenizer)
    assert widget.filtered()["step"].tolist() == [1, 1, 2, 2]
    assert widget.table_f1().data["text"].tolist()[:2] == ["·for i in", "·for i in"]
    widget.filters = {"text": "for I", "step": [2, None]}
    assert widget.filtered().index.tolist() == [2]
    assert len(RolloutInspector.of_run(writer.run, tokenizer, steps=[2]).rollouts) == 2
    with RunWriter.create(config, tmp_path) as empty:
        pass
    assert repr(RolloutInspector.of_run(empty.path, tokenizer)) == "RolloutInspector: no rollouts"


def test_parts_of_a_character_show_their_bytes() -> None:
    _, tokenizer = load_model("tiny-deltanet")
    string = token_decoder(tokenizer)
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    whole = "".join(string([token]) for token in ids)
    assert whole == ("日" if len(ids) == 1 else "\\xe6\\x97\\xa5")
    assert [string([token]) for token in tokenizer(" for", add_special_tokens=False)["input_ids"]] == [" for"]


def test_characters_of_several_tokens_are_whole_where_they_are_completed() -> None:
    _, tokenizer = load_model("tiny-deltanet")
    string = token_decoder(tokenizer)
    ids = tokenizer("中文🙂 hi", add_special_tokens=False)["input_ids"]
    assert len(ids) == 11
    assert texts_of(string, ids) == ["", "", "中", "", "", "文", "", "", "🙂", " h", "i"]
    assert texts_of(string, ids[1:5]) == ["\\xb8", "\\xad", "", "\\xe6\\x96"]  # no whole character
    assert texts_of(string, [*ids[:2], ids[-1]]) == ["", "\\xe4\\xb8", "i"]
    assert texts_of(decode, [0, 7]) == [" very", "a"]

    frame = rows(ids[2:5], [ids[-1], *ids[3:6]], target=ids[2:6]).assign(prefix_ids=[ids[:2]] * 2)
    table = rollout_columns(frame, string)
    assert [[table.strings[index] for index in row if index] for row in table.tokens] == [
        ["中", "", "\\xe6\\x96"],
        ["i", "", "", "文"],
    ]
    assert [table.strings[index] for index in table.targets[0]] == ["中", "", "", "文"]
    assert table.text(table.prefixes[0]) == "\\xe4\\xb8"
    bases = [[table.base(index) for index in row] for row in (table.tokens[0, :3], table.targets[0, :3])]
    assert bases[0] == bases[1]  # the same tokens, whatever they complete
    inspector = RolloutInspector(frame, decode=tokenizer)
    inspector.filters = {"text": "文"}
    assert inspector.filtered().index.tolist() == [1]
    assert "中|…|…|文" in repr(inspector) and "i|…|…|文" in repr(inspector)


def test_characters_are_joined_as_in_the_text_of_the_whole_row() -> None:
    _, tokenizer = load_model("tiny-deltanet")
    string = token_decoder(tokenizer)
    alphabet = tokenizer("中文🙂é hi", add_special_tokens=False)["input_ids"]
    draw = np.random.default_rng(0)
    rolled, target, before = (draw.choice(alphabet, (200, 6)) for _ in range(3))
    frame = rows(*rolled).assign(target_ids=[*target], prefix_ids=[*before], position=np.arange(200))
    table = rollout_columns(frame, string)
    for row in range(200):
        prefix = before[row].tolist()
        expected = texts_of(string, [*prefix, *rolled[row].tolist()])[6:]
        assert [table.strings[index] for index in table.tokens[row]] == expected
        assert [table.strings[index] for index in table.targets[row]] == texts_of(string, [*prefix, *target[row]])[6:]
        assert [table.strings[index] for index in table.prefixes[row]] == texts_of(string, prefix)


def test_what_no_message_can_carry_is_spelled_out() -> None:
    table = rollout_columns(rows([0, 1]), lambda ids: ["\ud800", "", "c", "d", "e"][ids[0]])
    assert table.strings[1:3] == ["\\ud800", "<1>"]
    assert fold("ÀB İ") == "Àb İ"


def test_a_hundred_thousand_rollouts() -> None:
    count, groups = 100_000, 12_500
    draw = np.random.default_rng(0)
    targets = [*draw.integers(0, len(WORDS), (groups, 5))]
    rolled = [*draw.integers(0, len(WORDS), (count, 5))]
    frame = rows(*rolled).assign(
        sequence_id=np.arange(count) // 8,
        target_ids=[target for target in targets for _ in range(8)],
        reward=draw.normal(size=count),
    )
    began = time.monotonic()
    widget = RolloutInspector(frame, decode=decode)
    widget.sort, widget.filters = ("reward", True), {"reward": [0, None], "text": " a"}
    found = widget.filtered()
    assert time.monotonic() - began < 20  # about 0.5 s on a quiet machine
    assert len(found) > 5000
    assert found["reward"].min() >= 0
    assert found["reward"].iloc[0] == found["reward"].max()
    size = sum(len(value) for value in widget.columns.values() if isinstance(value, bytes))
    assert size < 6_000_000


def test_a_kept_choice_is_the_same_rollout_in_another_frame() -> None:
    """Fewer rollouts of each position: the rows move, the choice stays with its rollout or goes with it."""
    many = pd.concat([rows([0], [1], [2], reward=[1.0, 2.0, 3.0]), rows([0], [1], [2], reward=[1.0, 2.0, 3.0])])
    many = many.assign(position=[10] * 3 + [20] * 3, sample_index=[0, 1, 2] * 2).reset_index(drop=True)
    inspector = RolloutInspector(many, decode=str)
    inspector.selected, inspector.compared = 4, [1, 2, 3]  # position 20, member 1
    fewer = many[many["sample_index"] < 2].reset_index(drop=True)
    inspector.show(fewer, keep=True)
    assert (fewer["position"][inspector.selected], fewer["sample_index"][inspector.selected]) == (20, 1)
    assert inspector.compared == [1, 2]  # (10, 1) and (20, 0)
    inspector.show(fewer[fewer["position"] == 10].reset_index(drop=True), keep=True)
    assert inspector.selected == -1


def test_the_best_and_the_worst_of_all_positions(inspector: RolloutInspector) -> None:
    frame = pd.concat([rows([0], [1], [2]), rows([3], [4]).assign(position=9)], ignore_index=True)
    frame["reward"] = [0.1, 0.9, 0.2, 0.5, 0.0]
    inspector.show(frame)
    inspector.flat, inspector.sort = True, ("reward", True)
    assert inspector.filtered().index.tolist() == [1, 3, 2, 0, 4]
    assert "all positions together" in repr(inspector)
    inspector.sort = ("reward", False)
    assert inspector.filtered().index.tolist() == [4, 0, 2, 3, 1]
    inspector.flat = False
    assert inspector.filtered().index.tolist() == [4, 3, 0, 2, 1]


def test_downloads_hold_the_filtered_rollouts_in_their_order(inspector: RolloutInspector) -> None:
    inspector.sort, inspector.filters = ("reward", True), {"reward": [0.2, None]}
    inspector.origin = {"model": "m"}
    csv = pd.read_csv(io.BytesIO(inspector.download("csv")))
    assert csv["sample_index"].tolist() == [2, 1]
    assert csv["rollout"].tolist() == [" hill hill hill", " very perfect"]
    assert [json.loads(ids) for ids in csv["rollout_ids"]] == [[5, 5, 5], [0, 4]]
    assert csv["reference"].tolist() == [" very laid back"] * 2
    table = pq.read_table(io.BytesIO(inspector.download("parquet")))
    assert table.column("rollout_ids").to_pylist() == [[5, 5, 5], [0, 4]]
    assert table.column_names == ["step", *ROLLOUT_TYPES]
    assert table.schema.field("reward").type == ROLLOUT_TYPES["reward"]
    assert json.loads(table.schema.metadata[b"explored"]) == {"model": "m"}
    with refused("kind", "xlsx", "'csv' or 'parquet'"):
        inspector.download("xlsx")
