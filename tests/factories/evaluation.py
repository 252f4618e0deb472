"""What the tests of the evaluation share: models, requests, and an oracle that finds answers in its prompts."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

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


class Oracle(RefineLM):
    """Copies the answer from the prompt: the values of the needles that are asked about, or a reference that it holds."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.copied(each.args[0], each.doc) for each in requests]

    def copied(self, prompt: str, doc: dict[str, Any]) -> str:
        if asked := ASKED.search(prompt):
            keys = re.split(r", and |, ", asked[1])
            return " " + ", ".join(value for key in keys for value in re.findall(NEEDLE.format(key=key), prompt))
        document = prompt.rpartition("Question:")[0]
        found = [reference for reference in doc["outputs"] if reference in document]
        return f" {found[0] if found else 'none'}\nQuestion: what is next?"
