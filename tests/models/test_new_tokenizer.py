"""A tokenizer trained for a new model: what is written, what fresh weights make of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refine_lab.models import load_model
from refine_lab.models.new_tokenizer import with_new_tokenizer
from tests.support.paths import TESTS
from tests.support.refusals import refused

TEXT = str(TESTS / "fixtures" / "text")
CHARACTERS = {TEXT: 5000}


@pytest.mark.parametrize("model", ["tiny-deltanet", "tiny-lact"])
def test_fresh_weights_fit_the_new_tokenizer(model: str, tmp_path: Path) -> None:
    name = with_new_tokenizer(f"new:{model}", 500, CHARACTERS, tmp_path / "runs" / "tokenizer-500")
    assert name == f"new:{tmp_path}/runs/tokenizer-500"
    policy, tokenizer = load_model(name, device="cpu")
    assert len(tokenizer) == policy.head.out_features == 500
    assert policy.config.eos_token_id == policy.config.bos_token_id == tokenizer.eos_token_id == 0
    shipped, _ = load_model(model, device="cpu")
    assert policy.config.hidden_size == shipped.config.hidden_size
    text = "the secret word is here, 1234"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == text
    assert torch.isfinite(policy(tokens, labels=tokens).loss)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tokenizer-500"], "nothing half-written"


def test_a_folder_that_was_written_is_used_again_and_another_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    made = with_new_tokenizer("new:tiny-deltanet", 500, CHARACTERS, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert with_new_tokenizer("new:tiny-deltanet", 500, CHARACTERS, folder) == made
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for changed in (("new:tiny-lact", 500, CHARACTERS), ("new:tiny-deltanet", 501, CHARACTERS)):
        with refused("the folder of the new tokenizer", str(folder)):
            with_new_tokenizer(*changed, folder)


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    with refused("model", "tiny-deltanet"):
        with_new_tokenizer("tiny-deltanet", 500, CHARACTERS, tmp_path / "tokenizer")
    with refused("vocab_size", 300, "above 357 and at most 1,000,000"):
        with_new_tokenizer("new:tiny-deltanet", 300, CHARACTERS, tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError):
        with_new_tokenizer("new:tiny-deltanet", 500, {str(tmp_path / "no-text"): 10}, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())
