"""Sources as arrays of tokens: what is in them, and that they are made once."""

from __future__ import annotations

import random
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from refine_lab.data import tokens
from refine_lab.data.tokenizer import train_tokenizer
from refine_lab.data.tokens import token_array
from tests.factories.durable_runs import DAMAGE
from tests.support.paths import TEXT
from tests.support.power_cut import Disk
from tests.support.refusals import naming, refused


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((path.read_text() for path in sorted(TEXT.glob("*.txt"))), vocab_size=600)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder(path: Path, *texts: str) -> str:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_text(text)
    return str(path)


def test_documents_are_joined_by_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    array = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6)
    assert array.dtype == np.int32
    found = tokenizer.decode(array.tolist()).split("<|endoftext|>")
    assert found.pop() == ""
    held_out = tokenizer.decode(token_array(str(TEXT), "validation", tokenizer, max_tokens=10**6).tolist())
    texts = [path.read_text() for path in sorted(TEXT.glob("*.txt"))]
    assert [text for text in texts if text + "<|endoftext|>" != held_out] == found


def test_short_documents_are_left_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{"x " * count}"}}\n' for count in (1, 3, 40, 2, 50)))
    array = token_array(str(path), "train", tokenizer, max_tokens=10**6, min_tokens=40)
    assert tokenizer.decode(array.tolist()) == "x " * 40 + "<|endoftext|>" + "x " * 50 + "<|endoftext|>"
    with naming(ValueError, path, "min_tokens", "1000"):
        token_array(str(path), "train", tokenizer, max_tokens=10**6, min_tokens=1000)


def test_it_stops_at_so_many_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6)
    part = token_array(str(TEXT), "train", tokenizer, max_tokens=1000)
    assert part.tolist() == whole[:1000].tolist()


def test_the_array_is_made_once(
    tokenizer: PreTrainedTokenizerFast, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6)
    monkeypatch.setattr(tokens, "documents", lambda *_: pytest.fail("the source is read again"))
    again = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6)
    assert again.tolist() == first.tolist()
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".digest", ".npy"]


def test_it_is_made_anew_when_anything_about_it_changes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = folder(tmp_path / "texts", "first text", "second text")
    both = {
        split: tokenizer.decode(token_array(source, split, tokenizer, max_tokens=99))
        for split in ("train", "validation")
    }
    assert sorted(both.values()) == ["first text<|endoftext|>", "second text<|endoftext|>"]
    for path in Path(source).glob("*.txt"):
        path.write_text(path.read_text() + " and more")
    assert tokenizer.decode(token_array(source, "train", tokenizer, max_tokens=99)).count("and more") == 1
    other = train_tokenizer(["another text"], vocab_size=400)
    array = token_array(source, "train", other, max_tokens=99)
    assert other.decode(array.tolist()).count("and more") == 1


def test_a_failure_leaves_nothing_half_written(
    tokenizer: PreTrainedTokenizerFast, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokens.np, "save", fail)
    with naming(OSError, "disk full"):
        token_array(str(TEXT), "train", tokenizer, max_tokens=10**6)
    assert list(cache_folder.iterdir()) == []


def test_long_documents_are_cut_where_no_token_stands(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LONGEST_PIECE", 300)
    text = (TEXT / "lighthouse.txt").read_text() + (TEXT / "grid.txt").read_text()
    assert len(tokens._pieces(text)) > 5
    array = token_array(folder(tmp_path / "one", text, "x"), "train", tokenizer, max_tokens=10**6)
    other = token_array(str(tmp_path / "one"), "validation", tokenizer, max_tokens=10**6)
    longest = max(array.tolist(), other.tolist(), key=len)
    assert longest == [*tokenizer.encode(text), tokenizer.eos_token_id]


def test_padding_left_on_by_an_earlier_call_does_no_harm(tokenizer: PreTrainedTokenizerFast) -> None:
    before = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    after = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6, min_tokens=2)
    assert after.tolist() == before.tolist()


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with naming(ValueError, "(eos_token)"):
        token_array(str(TEXT), "train", endless, max_tokens=10)


def test_the_cache_lies_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tokens.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("REFINE_CACHE")
    monkeypatch.setattr(tokens.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokens.cache_folder() == tmp_path / "refine_lab"
    monkeypatch.setattr(tokens.sys, "platform", "darwin")
    assert tokens.cache_folder() == Path.home() / "Library" / "Caches" / "refine_lab"


def test_a_relative_cache_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_CACHE", "cache")
    with refused("REFINE_CACHE", "cache", "an absolute path"):
        tokens.cache_folder()


@pytest.mark.parametrize("suffix", (".npy", ".digest"))
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_array_is_named_and_made_anew(tokenizer: PreTrainedTokenizerFast, kind: str, suffix: str) -> None:
    whole = token_array(str(TEXT), "train", tokenizer, max_tokens=10**6).tolist()
    (path,) = tokens.cache_folder().glob("*.npy")
    DAMAGE[kind](path.with_suffix(suffix))
    named = nullcontext() if kind == "removed" else pytest.warns(UserWarning, match=f"{path.name} is damaged")
    with named:
        assert token_array(str(TEXT), "train", tokenizer, max_tokens=10**6).tolist() == whole
    assert token_array(str(TEXT), "train", tokenizer, max_tokens=10**6).tolist() == whole


def test_after_a_power_cut_the_array_is_whole_or_made_anew(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def made() -> list[int]:
        return token_array(str(TEXT), "train", tokenizer, max_tokens=10**4).tolist()

    tokens.cache_folder().mkdir(exist_ok=True)
    disk = Disk(tokens.cache_folder())
    with disk.watched():
        whole = made()
    disk.require_synced()
    for number, moment in enumerate(disk.moments):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setenv("REFINE_CACHE", str(moment.restore(tmp_path / f"{number}", random.Random(number))))
            assert made() == whole
    disk.close()
