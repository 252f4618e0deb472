"""What the tests of tasks ruler and others share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def article(title: str, paragraphs: int = 4, questions: int = 2, words: int = 6) -> dict[str, Any]:
    """An article of SQuAD: each paragraph has its number, asked for `questions` times, and one question without answer."""

    def paragraph(number: int) -> dict[str, Any]:
        answers = [{"text": f"{title}{number}", "answer_start": 0}] * 2
        asked = [
            {"question": f"what is {q} of {title} {number}?", "is_impossible": False, "answers": answers}
            for q in range(questions)
        ]
        none = {"question": f"nothing of {title} {number}?", "is_impossible": True, "answers": []}
        return {"context": f"{title}{number} is it" + " and so on" * words, "qas": [*asked, none]}

    return {"title": title, "paragraphs": [paragraph(n) for n in range(paragraphs)]}


def squad(folder: Path, articles: list[dict[str, Any]]) -> Path:
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path
