"""Copied tokens on planted rows, by hand and against a search by brute force."""

from __future__ import annotations

import torch

from refine_lab.method.copies import copied_tokens


def brute_force(row: list[int], window: int, k: int) -> list[int]:
    """The largest m <= k for which the last earlier occurrence of the next m tokens begins more than `window` back."""
    scores = []
    for t in range(len(row)):
        best, start = 0, t + 1
        for m in range(1, k + 1):
            wanted = row[start : start + m]
            earlier = [s for s in range(start) if len(wanted) == m and row[s : s + m] == wanted]
            if earlier and start - earlier[-1] > window:
                best = m
        scores.append(best)
    return scores


def test_a_planted_copy_by_hand():
    """The tokens 1 2 3 4 stand at 2 and again at 12: from 11 on all k = 3 next tokens are copied, then two, then one."""
    row = [90, 91, 1, 2, 3, 4, 92, 93, 94, 95, 96, 97, 1, 2, 3, 4, 98, 99]
    tokens, lengths = torch.tensor([row]), torch.tensor([len(row)])
    expected = [0] * 11 + [3, 3, 2, 1, 0, 0, 0]
    assert copied_tokens(tokens, lengths, 9, 3)[0].tolist() == expected
    assert copied_tokens(tokens, lengths, 10, 3).count_nonzero() == 0, "the copy is 10 tokens back, within the window"


def test_a_nearer_occurrence_hides_a_far_one():
    """The pair 1 2 stands at 0 and at 8; the token 1 alone is also at 6, within a window of 4."""
    row = [1, 2, 50, 51, 52, 53, 1, 54, 1, 2]
    scores = copied_tokens(torch.tensor([row]), torch.tensor([10]), 4, 2)[0].tolist()
    assert scores[7] == 2, "the pair as a whole is far"
    assert scores[8] == 1, "the token 2 is far"
    assert scores[5] == 1, "the token 1 is far at its second occurrence"
    assert copied_tokens(torch.tensor([row]), torch.tensor([10]), 4, 1)[0, 7] == 0, "the token 1 is near at its third"


def test_random_rows_against_brute_force_whatever_the_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([60, 41, 7, 1])
    tokens = torch.randint(5, (4, 60), generator=generator)
    for window, k in ((4, 3), (9, 5), (20, 1), (4, 70)):
        found = copied_tokens(tokens, lengths, window, k)
        for row, length in enumerate(lengths.tolist()):
            assert found[row, :length].tolist() == brute_force(tokens[row, :length].tolist(), window, k)
            assert found[row, length:].count_nonzero() == 0
        assert found.count_nonzero() > 0
