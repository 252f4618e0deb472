"""What the tests of the evaluation share: models, requests, and an oracle that finds answers in its prompts."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from refine_lab.data.tokenizer import train_tokenizer
from refine_lab.evaluation.model import RefineLM
from refine_lab.models import FastWeightLM, load_model
from tests.factories.loading import TEXTS


@cache
def loaded(name: str = "tiny-deltanet") -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    return load_model(name, device="cpu")


@cache
def small_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 400)


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def generations(*prompts: str, **settings: Any) -> list[Any]:
    return [request("generate_until", prompt, {"until": [], "max_gen_toks": 12, **settings}) for prompt in prompts]


NEEDLE = r"One of the special magic \w+ for {key} is: ([\w-]+)\."
ASKED = re.compile(r"The special magic \w+ for (.+) mentioned in the provided text (?:is|are)$")


def right_choice(doc: dict[str, Any]) -> int | None:
    """The number of a sample's right choice in the fields of the short tasks; none for one without choices."""
    if "answerKey" in doc:
        return doc["choices"]["label"].index(doc["answerKey"])
    if "option1" in doc:
        return int(doc["answer"]) - 1
    return int(doc["label"]) if "label" in doc else None


class Oracle(RefineLM):
    """Copies the answer from the prompt: the values of the needles that are asked about, or a reference that it holds.

    It is certain of the right choice, of the continuation of a text, and of whole texts.
    """

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        right = [right_choice(each.doc) in (None, each.idx) for each in requests]
        return [(0.0, True) if each else (-100.0, False) for each in right]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [0.0] * len(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.copied(each.args[0], each.doc) for each in requests]

    def copied(self, prompt: str, doc: dict[str, Any]) -> str:
        if asked := ASKED.search(prompt):
            keys = re.split(r", and |, ", asked[1])
            return " " + ", ".join(
                value for key in keys for value in re.findall(NEEDLE.format(key=re.escape(key)), prompt)
            )
        if "value" in doc:  # FDA and SWDE
            return f" {doc['value'] if doc['value'] in prompt else 'none'}"
        document = prompt.rpartition("Question:")[0] or prompt
        found = [reference for reference in doc["outputs"] if reference in document]
        return f"{self.before}{found[0] if found else 'none'}{self.rest}"

    before = " "
    "What precedes an answer."
    rest = "\nQuestion: what is next?"
    "What follows an answer; it is not part of the answer where only its first line counts."


PROMPT = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nQuestion: {question}\nAnswer:"
)


def write_longbench(folder: Path, task: str = "hotpotqa", rows: int = 10, words: int = 8) -> Path:
    """A file of the paper's form with short prompts, whose answers are in their documents."""
    folder.mkdir(parents=True, exist_ok=True)
    contexts = [
        " ".join(f"word{i * 31 % 97 + n}" for n in range(words)) + f" The answer is town{i}." for i in range(rows)
    ]
    table = [
        {
            "prompt": PROMPT.format(context=contexts[i], question=f"What is answer {i}?"),
            "answers": [f"town{i}", f"Town {i}"],
            "max_gen_tokens": 8,
            "task": task,
        }
        for i in range(rows)
    ]
    path = folder / f"{task}_16384.parquet"
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def write_ruler(folder: Path, kind: str = "squadqa", length: int = 512, rows: int = 10) -> Path:
    """A file of the paper's form with one row per question."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [
        {
            "prompt": PROMPT.format(
                context=f"Document 1:\nThe town of row {i} is town{i}.", question=f"Which town is {i}?"
            ),
            "answer": [f"town{i}", f"the town{i}"],
        }
        for i in range(rows)
    ]
    path = folder / f"ruler_{kind}_delta_net_{length}_200_test.parquet"
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def write_piqa(folder: Path, rows: int = 6) -> Path:
    """PIQA in the layout of the hub, with made-up goals."""
    place = folder / "baber" / "piqa"
    place.mkdir(parents=True)
    lines = [
        {"goal": f"count to {i}", "sol1": f"say the numbers up to {i}", "sol2": "sing", "label": i % 2}
        for i in range(rows)
    ]
    for split in ("train", "validation"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (place / f"{split}.jsonl").write_text(text, encoding="utf-8")
    header = "configs:\n- config_name: default\n  data_files:\n"
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation"))
    (place / "README.md").write_text(f"---\n{header}{files}---\n", encoding="utf-8")
    return place
