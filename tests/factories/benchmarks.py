"""Small made-up files of every benchmark that reads files, in the layouts that docs/evaluation.md names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_lab.data.recall import recall_words
from refine_lab.evaluation.trec import CLASSES

WORDS = "apple basket cedar dragon ember falcon garnet harbor island jungle kettle lantern meadow needle orchid".split()
Rows = Sequence[Mapping[str, Any]]


def phrase(number: int, words: int = 5) -> str:
    """Words that differ from those of nearby numbers."""
    return " ".join(WORDS[(number * 7 + 4 * place) % len(WORDS)] for place in range(words))


def write_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# -- LongBench -----------------------------------------------------------------------------------------------------------


def longbench_answer(task: str, number: int) -> str:
    if task == "trec":
        return CLASSES[number]
    if task in ("lcc", "repobench-p"):
        return f"    return {phrase(number).replace(' ', '_')}({number})"
    return phrase(number)


def write_released_longbench(folder: Path, task: str, rows: int = 8) -> None:
    """A .jsonl file in LongBench's own layout, whose contexts contain the answers."""
    answers = [longbench_answer(task, number) for number in range(rows)]
    write_lines(
        folder / f"{task}.jsonl",
        [
            {
                "context": f"Here is {answer} as it stands.",
                "input": f"Which one is number {number}?",
                "answers": [answer],
                "all_classes": CLASSES if task == "trec" else None,
                "length": 12,
            }
            for number, answer in enumerate(answers)
        ],
    )


# -- short tasks ---------------------------------------------------------------------------------------------------------


def choices(number: int, count: int) -> list[str]:
    """Different endings of equal length in words."""
    return [phrase(number + 3 * choice) for choice in range(count)]


def piqa(n: int) -> dict[str, Any]:
    one, other = choices(n, 2)
    return {"goal": phrase(n + 1), "sol1": one, "sol2": other, "label": n % 2}


def hellaswag(n: int) -> dict[str, Any]:
    context = {"activity_label": "Words", "ctx_a": f"{phrase(n)}.", "ctx_b": "then", "ctx": f"{phrase(n)}. then"}
    return {"ind": n, **context, "endings": choices(n, 4), "label": n % 4, "split": "val", "source_id": str(n)}


def winogrande(n: int) -> dict[str, Any]:
    one, other = WORDS[n % 15], WORDS[(n + 4) % 15]
    return {"sentence": f"The {one} and the _ were old.", "option1": one, "option2": other, "answer": str(n % 2 + 1)}


def arc(n: int) -> dict[str, Any]:
    listed = {"text": choices(n, 4), "label": ["A", "B", "C", "D"]}
    return {"id": str(n), "question": phrase(n + 2), "choices": listed, "answerKey": "ABCD"[n % 4]}


def extraction(n: int) -> dict[str, Any]:
    """A document that ends with a key, whose value stands in it."""
    return {
        "doc_id": str(n),
        "text": f"Device: {phrase(n, 2)}. Made in {phrase(n + 5, 3)}. Device:",
        "value": phrase(n, 2),
    }


HUB: dict[str, tuple[str, str, str, Any]] = {
    "piqa": ("baber/piqa", "default", "", piqa),
    "hellaswag": ("Rowan/hellaswag", "default", "", hellaswag),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "", winogrande),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "ARC-Easy/", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "ARC-Challenge/", arc),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "", lambda n: {"page": phrase(n, 12)}),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "", lambda n: {"text": phrase(n, 9)}),
    "fda": ("hazyresearch/based-fda", "default", "", extraction),
    "swde": ("hazyresearch/based-swde-v2", "default", "", extraction),
}
"""Task -> its data set on the Hub, configuration, subfolder of the files, and the row of a number."""


def write_short(folder: Path, task: str, rows: int = 40) -> None:
    """A data set in the layout of the Hub."""
    dataset, config, place, row = HUB[task]
    listed = [row(number) for number in range(rows)]
    splits = ("train", "validation", "test")
    for split in splits:
        write_lines(folder / dataset / f"{place}{split}.jsonl", listed)
    files = "".join(f"  - split: {split}\n    path: {place}{split}.jsonl\n" for split in splits)
    header = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
    (folder / dataset / "README.md").write_text(header, encoding="utf-8")


# -- books ---------------------------------------------------------------------------------------------------------------


def write_books(folder: Path, tokenizer: PreTrainedTokenizerBase, books: int = 4, words: int = 600) -> list[int]:
    """Books that repeat a list of words, each from another one on; returns the tokens of the list, one per word."""
    texts = recall_words(tokenizer).texts
    ids = sorted(texts)[:40]
    folder.mkdir(parents=True, exist_ok=True)
    for book in range(books):
        text = "".join(texts[ids[(book + place) % len(ids)]] for place in range(words))
        (folder / f"{book}.txt").write_text(text, encoding="utf-8")
    return ids
