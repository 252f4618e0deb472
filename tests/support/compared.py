"""Answers of several methods, seeds and prompts, made up."""

from __future__ import annotations

import math

import pandas as pd


def answers_of(methods: dict[str, list[list[float]]]) -> pd.DataFrame:
    """Method -> a list of scores per seed, prompt by prompt."""
    rows = [
        {
            "method": method,
            "seed": seed,
            "name": f"p{number}",
            "question": f"q{number}",
            "references": ["x", "y"],
            "answer": f"{method if value else 'no'}",
            "contains_answer": value,
            "exact_match": math.nan,
            "f1": value / 2,
            "loss_before": 2.0,
            "loss_after": 2.0 - value,
            "entropy_before": 1.0,
            "entropy_after": 1.0,
        }
        for method, seeds in methods.items()
        for seed, values in enumerate(seeds)
        for number, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


ANSWERS = answers_of({"none": [[0, 0, 1]], "sft": [[0, 1, 1], [0, 0, 1]], "refine": [[1, 1, 1], [1, 0, 1]]})

PER_SEED = pd.DataFrame(
    [
        ("sft", 0, 0.50),
        ("nested", 2, 0.90),
        ("sft", 1, 0.60),
        ("nested", 0, 0.60),
        ("sft", 2, 0.70),
        ("nested", 1, 0.75),
    ],
    columns=["method", "seed", "contains_answer"],
)
