"""RULER's needles at any length: what a prompt holds, the same samples in any order, and the two ends of the scale."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation import niah
from refine_lab.evaluation.benchmark import Missing, Setting
from refine_lab.evaluation.model import RefineLM
from refine_lab.models.loading import manifest_of
from tests.factories.evaluation import Oracle, loaded
from tests.support.refusals import naming, refused

pytestmark = pytest.mark.slow  # the harness lists six million words when its generator is imported

LENGTHS = (512, 1024)
NEEDLES = {"niah_single_1": 1, "niah_multikey_1": 4, "niah_multiquery": 4, "niah_multivalue": 4}


def setting(**fields) -> Setting:
    return Setting(tokenizer=loaded()[1], **{"limit": 6, "manifest": manifest_of("tiny-deltanet"), **fields})


def prompt(sample: dict) -> str:
    return f"{sample['input']} {sample['gen_prefix']}"


@pytest.mark.parametrize("name", niah.VARIANTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_holds_its_values_within_the_length(name, length):
    found, facts = niah.samples(setting(length=length), name)
    tokenizer = loaded()[1]
    several = name in ("niah_multiquery", "niah_multivalue")
    assert len(found) == 6 and len({sample["input"] for sample in found}) == 6
    for sample in found:
        assert len(sample["outputs"]) == (4 if several else 1)
        assert all(value in sample["input"] for value in sample["outputs"])
        assert sample["gen_prefix"].endswith("are" if several else "is")
        tokens = len(tokenizer(sample["input"]).input_ids) + niah.ANSWER_TOKENS
        assert tokens <= length
        least = 0.85 if niah.own_sizes(niah.VARIANTS[name], length) else 0.6  # the harness's steps are five sentences
        assert tokens > least * length, "the haystack fills the prompt"
    assert facts["benchmark"] == ("RULER" if "sentence splitting" not in facts else "RULER's questions in other text")


@pytest.mark.parametrize(("name", "count"), NEEDLES.items())
def test_the_papers_variants_have_their_needles(name, count):
    found, _ = niah.samples(setting(length=1024), name)
    for sample in found:
        needles = re.findall(r"One of the special magic numbers for (.+?) is: (\d+)\.", sample["input"])
        assert len(needles) == count
        keys = {key for key, _ in needles}
        assert len(keys) == (1 if name in ("niah_single_1", "niah_multivalue") else 4)


def test_the_same_seed_gives_the_same_samples_whatever_was_drawn_before():
    first = niah.samples(setting(length=512), "niah_multikey_1")[0]
    niah.samples(setting(length=1024), "niah_single_1")
    random.random()
    assert niah.samples(setting(length=512), "niah_multikey_1")[0] == first
    assert niah.samples(setting(length=512, limit=3), "niah_multikey_1")[0] == first[:3]
    assert niah.samples(setting(length=512, seed=1), "niah_multikey_1")[0] != first


def test_the_harness_sizes_long_haystacks_itself():
    found, _ = niah.samples(setting(length=4096, limit=2), "niah_multivalue")
    for sample in found:
        tokens = len(loaded()[1](sample["input"]).input_ids) + niah.ANSWER_TOKENS
        assert 2048 < tokens <= 4096 and sample["max_length"] == 4096


def test_essays_are_used_where_a_file_of_them_is_set(tmp_path: Path):
    text = " ".join(f"Essay sentence number {i} says nothing." for i in range(2000))
    (tmp_path / "essays.txt").write_text(text, encoding="utf-8")
    (tmp_path / "essays.jsonl").write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
    for name in ("essays.txt", "essays.jsonl", "."):
        found, facts = niah.samples(setting(length=512, limit=2, essays=tmp_path / name), "niah_single_2")
        assert facts["haystack"] == "Paul Graham's essays" and facts["benchmark"] == "RULER"
        assert "Essay sentence number 0 says nothing." in found[0]["input"]
    plain, facts = niah.samples(setting(length=512, limit=2), "niah_single_2")
    assert facts["haystack"] == "held-out text of the Python corpus" and "Essay" not in plain[0]["input"]
    with refused("essays", str(tmp_path / "none.txt")):
        niah.samples(setting(length=512, essays=tmp_path / "none.txt"), "niah_single_2")


def test_text_is_cut_into_sentences_without_nltk_data():
    words = " ".join(map(str, range(45)))
    assert niah.sentences_of(f"One two. Three!  Four? {words}")[:3] == ["One two.", "Three!", "Four?"]
    assert [len(part.split()) for part in niah.sentences_of(words)] == [20, 20, 5]


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multiquery"])
def test_a_length_without_room_is_a_gap(name):
    with naming(Missing, name, "128 tokens"):
        niah.samples(setting(length=128), name)


@pytest.mark.parametrize("name", niah.VARIANTS)
def test_the_oracle_scores_100_and_random_weights_nearly_0(name):
    for length in LENGTHS:
        right = niah.measure(Oracle(*loaded()), setting(length=length), name)
        assert right.metrics["score"].value == 1 and right.count == right.items == 6
    chance = niah.measure(RefineLM(*loaded("new:tiny-deltanet")), setting(length=512), name)
    assert chance.metrics["score"].value <= 0.05


def test_the_shipped_model_finds_a_single_needle():
    found = niah.measure(RefineLM(*loaded()), setting(length=512, limit=16), "niah_single_1")
    assert found.metrics["score"].value > 0.5
    assert found.rows[0]["prompt"].endswith("mentioned in the provided text is")
