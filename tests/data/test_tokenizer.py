"""The tokenizer gives every text back, cuts numbers in pairs, and survives being saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from refine_lab.data.recall import TEMPLATES
from refine_lab.data.tokenizer import check_tokenizer, tokenizer_sample, train_tokenizer
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

AWKWARD = (
    "def f(x):\n\treturn {'a' :  x }  \n\n\n    # trailing   \n",
    "  leading, and a space before a comma , and a full stop .",
    "don't won't I 'm they ' re",
    "12345678 3.14 x12y 0x7f\r\n\r\nüñïcødé 漢字 🙂 \u00a0\u2003 \x00\x7f",
    "one\r\ntwo\rthree\n \n  \n   four",
    "a text with <|endoftext|> in it",
    " ",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((path.read_text() for path in sorted(TEXT.glob("*.txt"))), vocab_size=700)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return [str(tokenizer.decode([token])) for token in tokenizer.encode(text)]


@pytest.mark.parametrize("text", AWKWARD)
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_single_byte_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(map(chr, range(0x250)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_has_the_size_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 700
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0


def test_numbers_are_cut_in_pairs_from_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, "is: 1234567.") == [*pieces(tokenizer, "is:"), " ", "12", "34", "56", "7", "."]
    assert all(len(tokenizer.encode(f"{number:02d}")) == 1 for number in range(100))


def test_a_word_keeps_its_space_and_a_line_its_indentation(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, "\n        return") == ["\n       ", " return"]
    assert pieces(tokenizer, "\n    return\n    return") == ["\n   ", " return", "\n   ", " return"]
    assert pieces(tokenizer, " the the") == [" the", " the"]


def test_the_fixture_takes_fewer_tokens_than_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    text = (TEXT / "queue.txt").read_text()
    assert len(text.encode()) / len(tokenizer.encode(text)) > 1.9


def test_saved_and_loaded_it_writes_the_same_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*AWKWARD, (TEXT / "grid.txt").read_text()):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == 0


def test_training_is_reproducible(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer((path.read_text() for path in sorted(TEXT.glob("*.txt"))), vocab_size=700)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_without_room_is_refused() -> None:
    with refused("vocab_size", 300, "above 357 and at most 1,000,000"):
        train_tokenizer(["text"], vocab_size=300)


def test_a_model_with_too_few_embeddings_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, 704)
    with naming(ValueError, "700 tokens", 512):
        check_tokenizer(tokenizer, 512)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with naming(ValueError, "(eos_token)"):
        check_tokenizer(endless, 700)


def test_the_sample_takes_so_much_of_each_source_and_knows_the_recall_sentences() -> None:
    texts = list(tokenizer_sample({str(TEXT): 5000}))
    sentences = [text for text in texts if "secret word" in text or "magic number" in text]
    assert len(sentences) == 3000 * sum(map(len, TEMPLATES.values()))
    parts = texts[: len(texts) - len(sentences)]
    assert [len(part) for part in parts] == [100] * len(parts)
    assert len(parts) == 7  # of eight files one is held out
    tokenizer = train_tokenizer(texts, vocab_size=500)
    assert all(len(tokenizer.encode(word)) == 1 for word in (" secret", " magic", " mentioned", " provided"))
