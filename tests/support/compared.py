"""Answers of several methods, seeds and prompts, made up."""

from __future__ import annotations

import math

import pandas as pd


def answers_of(ways: dict[str, list[list[float]]]) -> pd.DataFrame:
    """Way -> a list a seed of recalls, prompt by prompt."""
    rows = [
        {
            "way": way,
            "seed": seed,
            "name": f"p{number}",
            "question": f"q{number}",
            "references": ["x", "y"],
            "answer": f"{way if value else 'no'}",
            "recall": value,
            "exact_match": math.nan,
            "f1": value / 2,
            "loss_before": 2.0,
            "loss_after": 2.0 - value,
            "entropy_before": 1.0,
            "entropy_after": 1.0,
        }
        for way, seeds in ways.items()
        for seed, values in enumerate(seeds)
        for number, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


WAYS = answers_of({"none": [[0, 0, 1]], "sft": [[0, 1, 1], [0, 0, 1]], "refine": [[1, 1, 1], [1, 0, 1]]})
