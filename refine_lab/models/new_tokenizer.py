"""Trains a tokenizer for a new model and writes it with a configuration that fits its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.models.families import configured
from refine_lab.models.hub import locate
from refine_lab.runs.durable import publishing
from refine_lab.validation import require

TRAINED_ON = "tokenizer_training.json"
"""File beside the tokenizer that records what it was trained on."""


def with_new_tokenizer(name: str, vocab_size: int, characters: Mapping[str, int], folder: Path) -> str:
    """Trains a tokenizer and writes it to `folder` with the configuration of the model `name`, for fresh weights.

    `name` is `new:NAME` as for `load_model`; `characters` maps each source to the number of characters of its training
    documents to train on. Returns the `new:` name of the folder. A folder written earlier with the same arguments is
    reused.

    Raises ValueError for another form of name, a vocabulary without room for a merge and a folder that holds anything
    else, and what `load_model` and `documents` raise.
    """
    require(
        name.startswith("new:"),
        "model",
        name,
        "new:NAME, since existing weights match only their own tokenizer",
    )
    made_of = {"model": name, "vocab_size": vocab_size, "characters": dict(characters)}
    if folder.exists():
        record = folder / TRAINED_ON
        same = record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_of
        require(
            same,
            "the folder of the new tokenizer",
            str(folder),
            f"a new folder, or one that was created from {made_of}",
        )
        return f"new:{folder}"
    config, _ = configured(locate(name.removeprefix("new:")))
    tokenizer = train_tokenizer(tokenizer_sample(characters), vocab_size)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    with publishing(folder) as unfinished:
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / TRAINED_ON).write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
    return f"new:{folder}"
