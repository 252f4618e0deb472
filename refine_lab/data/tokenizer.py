"""The byte-level BPE tokenizer of the models trained here; it encodes code, prose and numbers compactly and losslessly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, product, takewhile

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from refine_lab.data.corpus import Manifest
from refine_lab.data.recall import TEMPLATES
from refine_lab.data.sources import documents
from refine_lab.validation import ConfigError, require

END_OF_TEXT = "<|endoftext|>"
LARGEST_VOCABULARY = 1_000_000
SMALLEST_VOCABULARY = 1 + 256 + 100
"""The special token, every byte, and every pair of digits."""
LARGEST_PART = 50
"""One document contributes at most a 50th of its source's part of the sample."""
TEMPLATE_REPEATS = 3000
"""How often each sentence of the recall documents is repeated in the sample, so that its words become tokens."""

_SPLIT = (
    r" ?\p{L}+"  # a word with the space before it, and one token for it after any sign: `.word`, `_word`
    r"|\p{N}{1,%d}"  # digits
    r"| ?[^\s\p{L}\p{N}]+"  # signs
    r"|\s*[\r\n]+(?:[ \t]+(?!\S))?"  # line ends with the indentation after them, but for the last space: it is ` word`'s
    r"|\s+(?!\S)|\s+"  # other space, likewise
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on `texts`.

    Digits are split into pairs from the left, and each of the 100 pairs is a token, whatever the texts; `<|endoftext|>`
    (id 0) is the BOS, EOS and padding token.

    Raises ValueError if `vocab_size` leaves no room for a merge.
    """
    allowed = f"above {SMALLEST_VOCABULARY} and at most {LARGEST_VOCABULARY:,}"
    require(SMALLEST_VOCABULARY < vocab_size <= LARGEST_VOCABULARY, "vocab_size", vocab_size, allowed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(digits=1)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 100,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(_with_digit_pairs(tokenizer))


def tokenizer_sample(characters: Mapping[str, int], manifest: Manifest | None = None) -> Iterator[str]:
    """Yields texts to train a tokenizer on: the given number of characters from each source, and recall sentences.

    The characters come from the source's training documents.
    """
    for source, wanted in characters.items():
        left = wanted
        for document in documents(source, "train", manifest):
            part = document[: min(left, max(1, wanted // LARGEST_PART))]
            left -= len(part)
            yield part
            if left == 0:
                break
    for template in chain.from_iterable(TEMPLATES.values()):
        yield from [f"\n{template.format(key='key', value=' value')}\n"] * TEMPLATE_REPEATS


def _pre_tokenizer(digits: int) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLIT % digits), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _with_digit_pairs(tokenizer: Tokenizer) -> Tokenizer:
    """Adds a merge for each pair of digits to a `tokenizer` trained on single digits; no other merge involves a digit."""
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for pair in product("0123456789", repeat=2):
        vocabulary["".join(pair)] = len(vocabulary)
        merges.append(list(pair))
    result = Tokenizer.from_str(json.dumps(content))
    result.pre_tokenizer = _pre_tokenizer(digits=2)
    return result


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps a `tokenizers` tokenizer for `transformers`; decoding does not clean up spaces."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # so that `generate` goes on right behind every prompt of a batch
        clean_up_tokenization_spaces=False,
    )


def beginning(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> tuple[int, ...]:
    """Returns the tokens that precede every document and every prompt (`DataConfig.add_bos`).

    None: the special tokens, if any, that the tokenizer itself puts before a text. True: the same, or the BOS token if
    there are none. False: no tokens.

    Raises ValueError for True if the tokenizer has no BOS token.
    """
    if add_bos is False:
        return ()
    encoded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    special = tuple(token for token, _ in takewhile(lambda pair: pair[1], pairs))
    if special or add_bos is None:
        return special
    if not isinstance(tokenizer.bos_token_id, int):
        raise ConfigError("add_bos", True, "false or none for a tokenizer that has no BOS token (bos_token)")
    return (tokenizer.bos_token_id,)


def describe_beginning(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> str:
    """Returns a sentence that describes `beginning`; empty if `add_bos` is None and the tokenizer adds no token."""
    tokens = beginning(tokenizer, add_bos)
    if not tokens and add_bos is None:
        return ""
    reason = "as the tokenizer does" if add_bos is None else f"add_bos is {add_bos}"
    names = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens)))) or "no special token"
    return f"Each document and prompt begins with {names} ({reason})."


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raises ValueError if the tokenizer has more tokens than the model has embeddings, or no end-of-text token."""
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has {num_embeddings} embeddings: they do not match"
        )
    end_of_text(tokenizer)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that ends a document or an answer. Raises ValueError if the tokenizer has none."""
    if isinstance(end := tokenizer.eos_token_id, int):
        return end
    raise ValueError("the tokenizer has no end-of-text token (eos_token), which ends documents and answers")
