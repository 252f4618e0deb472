"""RULER's SQuADQA and HotpotQA: the paper's test files unchanged, or prompts built from the published data sets.

A prompt's length counts the tokens of its answer. The paper and NVIDIA's RULER count an answer as correct if it contains
any reference (`any_match`); the harness averages over the references (`average_match`). The answer is the first line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from refine_lab.config import TaskConfig
from refine_lab.data.files import refuse_pointer
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.ruler_qa import ruler_splits
from refine_lab.data.tasks.scores import contains_answer, f1
from refine_lab.evaluation.benchmark import Benchmark, Measured, Missing, Setting, find_file, readable
from refine_lab.evaluation.cutting import CUTS, cut_figures
from refine_lab.evaluation.harness_tasks import measure_task, prompts_task
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.packages import harness

SAMPLES, ANSWER_TOKENS = 200, 32
"""Test samples and tokens of an answer (table C.1; RULER)."""
PAPER_LENGTHS = (4096, 8192, 16384)

PUBLISHED = {
    "squadqa": ("dev-v2.0.json", "SQuAD v2.0 is at https://rajpurkar.github.io/SQuAD-explorer"),
    "hotpotqa": ("hotpot_dev_distractor*.json", "HotpotQA's distractor setting is at https://hotpotqa.github.io"),
}
"""Task -> its published file, and where to get it."""
RELEASE = "the paper's files are in data/ruler of https://github.com/princetonvisualai/ReFINE"
METRICS = ("any_match", "average_match", "f1", "any_match_after_newlines", "leading_newline", "empty_answer")


def score(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Returns the scores of an answer, cut as in the release; `any_match_after_newlines` strips leading newlines first.

    A reference without any text never counts as found.
    """
    text, references = results[0], [each for each in doc["outputs"] if each.strip()]
    answer, stripped = CUTS["first_line"](text), CUTS["first_line_after_newlines"](text)
    ruler = harness("tasks.ruler.common_utils")
    return {
        "any_match": contains_answer(answer, references) if references else 0.0,
        "average_match": ruler.string_match_part(ruler.postprocess_pred([answer]), [references]) if references else 0.0,
        "f1": f1(answer, references) if references else 0.0,
        "any_match_after_newlines": contains_answer(stripped, references) if references else 0.0,
        **cut_figures("first_line", text),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of one of the paper's parquet files."""
    return pq.read_table(refuse_pointer(path)).to_pylist()


def paper_docs(path: Path) -> list[dict[str, Any]]:
    """Returns the samples of one of the paper's files, prompts unchanged."""
    rows = read_rows(path)
    questions = [parse(path.stem, row["prompt"], tuple(row["answer"])).question for row in rows]
    return [
        {"input": row["prompt"], "gen_prefix": "", "outputs": list(row["answer"]), "item": question}
        for row, question in zip(rows, questions, strict=True)
    ]


def made_docs(path: Path, setting: Setting, length: int) -> list[dict[str, Any]]:
    """Returns prompts of at most `length` tokens with their answers, from a published file."""
    count = setting.limit or SAMPLES
    config = TaskConfig(source=f"ruler:{path}", train=0, validation=0, test=count, prompt_tokens=length - ANSWER_TOKENS)
    examples = ruler_splits(path, config, setting.tokenizer).examples["test"]
    return [
        {
            "input": "".join(each.parts(setting.tokenizer)),
            "gen_prefix": "",
            "outputs": list(each.answers),
            "item": each.question,
        }
        for each in examples
    ]


def docs_of(setting: Setting, name: str, model_type: str = "") -> tuple[Sequence[dict[str, Any]], dict[str, Any]]:
    """Returns the samples of a task at a length, and the file that they come from.

    The paper has a file for DeltaNet's tokenizer and one for LaCT's; a LaCT model gets the latter if it is there.

    Raises `Missing` if there is neither one of the paper's files of that length nor the published data set.
    """
    kind, length = name.removeprefix("ruler_"), setting.length or PAPER_LENGTHS[0]
    published, where = PUBLISHED[kind]
    own = [f"ruler_{kind}_lact_{length}_*_test.parquet"] * model_type.startswith("lact")
    try:
        path = find_file(setting, [*own, f"ruler_{kind}_*_{length}_*_test.parquet"], RELEASE)
    except Missing as missing:
        try:
            path = find_file(setting, [published], f"{where}; {RELEASE}")
        except Missing:
            raise missing from None
    else:
        with readable(path):
            docs = paper_docs(path)
        return docs, {"file": path.name, "prompts": "the paper's", "length includes": "prompt and answer"}
    try:
        docs = made_docs(path, setting, length)
    except ValueError as error:
        raise Missing(f"{name!r} has no prompts of {length} tokens: {error}") from error
    return docs, {"file": path.name, "prompts": "the harness's", "length includes": "prompt and answer"}


def measure(lm: RefineLM, setting: Setting, name: str) -> Measured:
    """Measures one of the two tasks."""
    docs, facts = docs_of(setting, name, lm.policy.config.model_type)
    generation = {"max_tokens": ANSWER_TOKENS, "until": ["\n"], "skip_newlines": True}
    task = prompts_task(name, docs, score, METRICS, **generation)
    return measure_task(lm, task, replace(setting, limit=setting.limit or SAMPLES), facts)


BENCHMARKS = [
    Benchmark(
        name=f"ruler_{kind}",
        group="ruler",
        main="any_match",
        by_length=True,
        measure=partial(measure, name=f"ruler_{kind}"),
        about="fraction of answers that contain a reference (table 4)",
    )
    for kind in PUBLISHED
]
