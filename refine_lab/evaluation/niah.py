"""RULER's needle-in-a-haystack tasks (Hsieh et al., 2024) at any length, from lm-evaluation-harness's generator.

The paper does not name its variants; `niah_single_1`, `niah_multikey_1`, `niah_multiquery` and `niah_multivalue` are
our interpretation of its four columns (table 3). The score is the fraction of the values that the answer contains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from refine_lab.data.corpus import Manifest
from refine_lab.data.files import json_lines, read_text
from refine_lab.data.sources import documents
from refine_lab.evaluation.benchmark import Benchmark, Measured, Missing, Setting, seeded
from refine_lab.evaluation.harness_tasks import measure_task, prompts_task
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.packages import harness
from refine_lab.validation import require

WORDS = {"type_needle_k": "words", "type_needle_v": "numbers"}
VARIANTS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", **WORDS},
    "niah_single_2": {"type_haystack": "essay", **WORDS},
    "niah_single_3": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", **WORDS, "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle", **WORDS},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multiquery": {"type_haystack": "essay", **WORDS, "num_needle_q": 4},
    "niah_multivalue": {"type_haystack": "essay", **WORDS, "num_needle_v": 4},
}
"""Name -> arguments of the harness's generator (`lm_eval/tasks/ruler/niah_utils.py`)."""
PAPER_VARIANTS = ("niah_single_1", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
SAMPLES = 500
"""Samples per length (table C.1)."""
ANSWER_TOKENS = 128
"""Tokens of the answer, which count towards the length."""
RULER_TOKENS = 4096
"""Length from which the harness sets the size of a haystack of essays; its steps of 500 words are too large below it."""
STEP_WORDS = 10
"""Step, in words, by which shorter haystacks of essays are enlarged."""
AT_FULL_STOPS = "at full stops"
"""How a haystack is cut into sentences without nltk's data, by `sentences_of`."""
SENTENCE_WORDS = 20
"""Maximum words of a sentence of the Python corpus, in which full stops are rare."""
HAYSTACK_WORDS = 60_000


def generator() -> ModuleType:
    """Returns the harness's generator without fetching the sentence splitter that it asks for when it is imported."""
    harness("api.task", "nltk", "wonderwords")
    import nltk

    with patch.object(nltk.data, "find"):
        return harness("tasks.ruler.prepare_niah")


def essays_of(path: Path) -> str:
    """Returns the essays in a .txt file, a folder of .txt files, or the column `text` of a .jsonl file."""
    if path.is_dir():
        texts = [read_text(file) for file in sorted(path.rglob("*.txt"))]
    elif path.suffix == ".jsonl":
        texts = [str(row["text"]) for _, row in json_lines(path)]
    else:
        require(path.suffix == ".txt" and path.is_file(), "essays", str(path), "a .txt or .jsonl file, or a folder")
        texts = [read_text(path)]
    require(any(text.strip() for text in texts), "essays", str(path), "a file with text")
    return " ".join(texts)


def sentences_of(text: str) -> list[str]:
    """Cuts a text into sentences that end with `.`, `!` or `?`, or after `SENTENCE_WORDS` words."""
    cut = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        words = sentence.split()
        cut += [" ".join(words[i : i + SENTENCE_WORDS]) for i in range(0, len(words), SENTENCE_WORDS)]
    return cut


def words_of(text: str) -> list[str]:
    """Returns the words of a haystack as the harness cuts them."""
    return re.sub(r"\s+", " ", text).strip().split(" ")


def corpus_words(manifest: Manifest | None) -> list[str]:
    """Returns the first words of the validation split of the Python corpus."""
    every = (word for document in documents("python", "validation", manifest) for word in words_of(document))
    return list(islice(every, HAYSTACK_WORDS))


def has_sentence_splitter() -> bool:
    """Returns whether nltk's English sentence splitter is installed."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def haystack(setting: Setting, kind: str) -> tuple[list[str] | str, dict[str, str]]:
    """Returns the haystack of a variant, and where it comes from."""
    if kind != "essay":
        return generator().get_haystack(kind), {"haystack": "RULER's own sentences", "benchmark": "RULER"}
    if setting.essays is None:
        words = corpus_words(setting.manifest)
        facts = {"haystack": "held-out text of the Python corpus", "benchmark": "RULER's questions in other text"}
        return words, {**facts, "sentence splitting": AT_FULL_STOPS}
    splitter = "nltk's punkt_tab" if has_sentence_splitter() else AT_FULL_STOPS
    facts = {"haystack": "Paul Graham's essays", "benchmark": "RULER", "sentence splitting": splitter}
    return words_of(essays_of(setting.essays)), facts


def samples(setting: Setting, name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns the samples of a variant at a length, the same whichever tasks were run before, and where they come from.

    Raises `Missing` if no sample fits into the length.
    """
    variant, length = VARIANTS[name], setting.length or RULER_TOKENS
    made, (hay, facts) = generator(), haystack(setting, variant["type_haystack"])
    template = harness("tasks.ruler.niah_utils", "nltk", "wonderwords").TEMPLATE
    chosen = {"max_seq_length": length, "template": template, "num_samples": setting.limit or SAMPLES, **variant}
    tokenizer = partial(setting.tokenizer, verbose=False)
    own = facts.get("sentence splitting") == AT_FULL_STOPS
    draw: Any = short_samples if own_sizes(variant, length) else made.generate_samples
    try:
        with (
            seeded(setting.seed, name, length),
            patch.object(made, "cached_sent_tokenize", sentences_of if own else made.cached_sent_tokenize),
            patch.object(made, "tqdm", lambda numbers, **_: numbers),
        ):
            return draw(hay, tokenizer, **chosen), facts
    except ValueError as error:
        raise Missing(f"{name!r} has no sample of {length} tokens: {error}") from error


def own_sizes(variant: Mapping[str, Any], length: int) -> bool:
    """Returns whether the harness's steps are too large for a variant's haystack at a length."""
    return variant["type_haystack"] == "essay" and length < RULER_TOKENS


def short_samples(
    words: list[str],
    tokenizer: Any,
    *,
    max_seq_length: int,
    num_samples: int,
    template: str,
    **variant: Any,
) -> list[dict[str, Any]]:
    """Returns samples in a haystack of essays that the harness's steps of 500 words would leave almost empty.

    Each sample is made by the harness; the haystack has as many words, in steps of `STEP_WORDS`, as fit. Raises
    ValueError if not even the needles alone fit.
    """
    made = generator()
    needles = {name: variant.get(name, 1) for name in ("num_needle_k", "num_needle_v", "num_needle_q")}
    needles["num_needle_k"] = max(needles["num_needle_k"], needles["num_needle_q"])
    arguments = {**variant, **needles, "template": template}

    def draw(size: int) -> dict[str, Any]:
        text, outputs, query = made.generate_input_output(size, words, **arguments)
        several = needles["num_needle_q"] * needles["num_needle_v"] > 1
        needle, verb = variant["type_needle_v"], "are" if several else "is"
        prefix = f"The special magic {needle if several else needle[:-1]} for {query} mentioned in the provided text"
        return {"input": text, "outputs": outputs, "gen_prefix": f"{prefix} {verb}"}

    def fits(sample: Mapping[str, Any]) -> bool:
        text = f"{sample['input']} {sample['gen_prefix']}"
        return len(tokenizer(text).input_ids) + ANSWER_TOKENS <= max_seq_length

    largest = needles["num_needle_k"] * needles["num_needle_v"]
    while largest + STEP_WORDS <= len(words) and fits(draw(largest + STEP_WORDS)):
        largest += STEP_WORDS
    found = []
    for _ in range(num_samples):
        sizes = range(largest, 0, -STEP_WORDS)
        found.append(next((sample for size in sizes if fits(sample := draw(size))), None))
    kept = [sample for sample in found if sample is not None]
    if not kept:
        raise ValueError(f"its needles and an answer of {ANSWER_TOKENS} tokens leave no room")
    return kept


def score(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Returns the fraction of the values that the answer contains, as the harness scores it."""
    ruler = harness("tasks.ruler.common_utils")
    return {"score": ruler.string_match_all(ruler.postprocess_pred(results), [doc["outputs"]])}


def measure(lm: RefineLM, setting: Setting, name: str) -> Measured:
    """Measures one variant."""
    found, facts = samples(setting, name)
    docs = [
        {"input": each["input"], "gen_prefix": each["gen_prefix"], "outputs": each["outputs"], "item": each["input"]}
        for each in found
    ]
    task = prompts_task(name, docs, score, ["score"], max_tokens=ANSWER_TOKENS)
    return measure_task(lm, task, setting, facts)


BENCHMARKS = [
    Benchmark(
        name=name,
        group="ruler",
        main="score",
        by_length=True,
        measure=partial(measure, name=name),
        about="fraction of values found" + (" (table 3)" if name in PAPER_VARIANTS else ""),
    )
    for name in VARIANTS
]
