"""Selection against hand-made entropies: which positions are eligible, what each is worth, that pads change nothing."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from refine_lab.config import RefineConfig
from refine_lab.method.selection import select_positions, selection_probabilities, shift, smallest_length, smooth
from refine_lab.rng import Draws
from tests.support.refusals import naming

SMALL = RefineConfig(num_chunks=2, rollout_length=2, margin=0, smoothing_kernel=1)


def of_one_row(entropies: list[float], config: RefineConfig) -> list[float]:
    values = torch.tensor([entropies], dtype=torch.float64)
    return selection_probabilities(values, torch.tensor([len(entropies)]), config)[0].tolist()


def random_rows(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies of rows padded with NaN, so that a pad that is read cannot go unseen."""
    generator = torch.Generator().manual_seed(seed)
    entropies = 3 * torch.rand(len(lengths), max(lengths), generator=generator)
    for row, length in enumerate(lengths):
        entropies[row, length:] = torch.nan
    return entropies, torch.tensor(lengths)


def test_shift_by_hand():
    entropies = torch.tensor([[1.0, 2.0, 3.0]])
    assert shift(entropies, "release").tolist() == [[1, 2, 3]]
    assert shift(entropies, "equation").tolist() == [[0, 1, 2]]


def test_entropy_index_on_hand_made_logits():
    """The model is unsure about x_4 alone: the release rolls x_4 out first, equation 5 ends the prefix with it."""
    logits = torch.zeros(1, 12, 4)
    logits[..., 0] = 50.0  # certain everywhere
    logits[0, 3] = 0.0  # uniform over four tokens at position 3, which predicts x_4
    logp = logits.log_softmax(-1)
    entropies = -(logp.exp() * logp).sum(-1)
    assert entropies[0, 3].item() == pytest.approx(math.log(4))
    for entropy_index, preferred in (("release", 3), ("equation", 4)):
        config = replace(SMALL, num_chunks=1, entropy_index=entropy_index)
        probabilities = of_one_row(entropies[0].tolist(), config)
        others = {round(p, 9) for t, p in enumerate(probabilities) if t != preferred and t <= 9}
        assert probabilities[preferred] == pytest.approx(4 / 13)  # e^{log 4} = 4 against nine times e^0
        assert others == {round(1 / 13, 9)}
        assert probabilities[10:] == [0, 0]  # k = 2 tokens would leave the sequence


@pytest.mark.parametrize(("kernel", "width"), [(1, 1), (2, 3), (3, 3), (4, 5), (5, 5), (6, 7)])
def test_smooth_is_average_pooling_of_the_row_alone(kernel, width):
    lengths = [17, 9, 1]
    entropies, sizes = random_rows(lengths)
    smoothed = smooth(entropies, sizes, kernel)
    for row, length in enumerate(lengths):
        alone = F.avg_pool1d(entropies[row, :length].view(1, 1, -1), width, stride=1, padding=width // 2).flatten()
        assert torch.equal(smoothed[row, :length], alone)


def test_smooth_by_hand_divides_by_the_kernel_at_the_ends_too():
    smoothed = smooth(torch.tensor([[3.0, 6.0, 9.0, 100.0]]), torch.tensor([3]), 3)
    assert smoothed[0, :3].tolist() == [3, 6, 5]


def test_softmax_of_each_chunk_by_hand():
    """Eleven tokens, two chunks of five, a tail of one; k = 2 leaves the whole second chunk but its last position."""
    entropies = [math.log(v) for v in (1, 2, 3, 4, 10, 5, 1, 2, 2, 7, 9)]
    expected = [v / 20 for v in (1, 2, 3, 4, 10)] + [v / 10 for v in (5, 1, 2, 2)] + [0, 0]
    assert of_one_row(entropies, SMALL) == pytest.approx(expected)


def test_tau_sharpens():
    entropies = [math.log(v) for v in (1, 2, 1, 1)] + [0.0] * 4
    probabilities = of_one_row(entropies, replace(SMALL, tau=0.5))
    assert probabilities[:4] == pytest.approx([1 / 7, 4 / 7, 1 / 7, 1 / 7])


def test_probabilities_survive_huge_entropies_over_a_small_tau():
    probabilities = of_one_row([1000.0, 999.0] + [0.0] * 6, replace(SMALL, tau=0.01))
    assert probabilities[:4] == [1, pytest.approx(math.exp(-100)), 0, 0]
    assert probabilities[4:6] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("uniform", [0.25] * 4 + [0.5, 0.5, 0, 0]),
        ("argmax", [0, 1, 0, 0, 1, 0, 0, 0]),  # the first of the two highest; 9 at the end is not eligible
        ("argmin", [0, 0, 0, 1, 0, 1, 0, 0]),
    ],
)
def test_other_strategies_on_unsmoothed_entropy(selection, expected):
    config = replace(SMALL, selection=selection, smoothing_kernel=5)
    assert of_one_row([1, 3, 3, 0.5, 2, 1, 9, 0], config) == expected


def test_argmax_follows_entropy_index():
    config = replace(SMALL, selection="argmax", entropy_index="equation")
    assert of_one_row([1, 3, 3, 0.5, 2, 1, 9, 0], config) == [0, 0, 1, 0, 0, 1, 0, 0]


def test_smoothing_spreads_before_the_softmax():
    config = replace(SMALL, num_chunks=1, smoothing_kernel=3)
    probabilities = of_one_row([0, 0, 0, 3 * math.log(2), 0, 0, 0, 0], config)
    assert probabilities == pytest.approx([v / 9 for v in (1, 1, 2, 2, 2, 1)] + [0, 0])


def test_margin_keeps_both_ends_free():
    """The prefix has at least `margin` tokens and at least `margin` follow it: t from 2 to 12 - 3 - 1."""
    probabilities = of_one_row([1.0] * 12, replace(SMALL, num_chunks=1, margin=3))
    assert [t for t, p in enumerate(probabilities) if p > 0] == list(range(2, 9))


def test_rollout_ends_on_the_last_token():
    probabilities = of_one_row([1.0] * 12, replace(SMALL, num_chunks=1, rollout_length=5))
    assert [t for t, p in enumerate(probabilities) if p > 0] == list(range(7))  # 6 + 5 = 11


@pytest.mark.parametrize("selection", ["entropy", "uniform", "argmax", "argmin"])
def test_pads_change_nothing_to_the_last_bit(selection):
    lengths = [203, 165, 700, 161]
    config = RefineConfig(selection=selection)
    entropies, sizes = random_rows(lengths)
    together = selection_probabilities(entropies, sizes, config)
    for row, length in enumerate(lengths):
        alone = selection_probabilities(entropies[row : row + 1, :length], sizes[row : row + 1], config)
        assert torch.equal(together[row, :length], alone[0])
        assert together[row, length:].count_nonzero() == 0
        chunks = alone[0, : length // 8 * 8].view(8, -1)
        assert chunks.sum(1).tolist() == pytest.approx([1.0] * 8)
        assert alone[0, length // 8 * 8 :].count_nonzero() == 0


def test_draws_do_not_depend_on_batching():
    lengths, ids, draws = [203, 165, 700, 161], (11, 5, 8, 2), Draws(seed=1, step=4)
    config = RefineConfig()
    entropies, sizes = random_rows(lengths)

    def positions(rows: list[int]) -> torch.Tensor:
        width = max(lengths[row] for row in rows)
        probabilities = selection_probabilities(entropies[rows, :width], sizes[rows], config)
        return select_positions(probabilities, sizes[rows], [ids[row] for row in rows], draws, 8)

    together = positions([0, 1, 2, 3])
    assert torch.equal(positions([2, 0, 3, 1]), together[[2, 0, 3, 1]])
    assert torch.equal(torch.cat([positions([row]) for row in range(4)]), together)
    assert torch.equal(torch.cat([positions([0, 1]), positions([2, 3])]), together)
    for row, length in enumerate(lengths):
        assert (together[row] // (length // 8)).tolist() == list(range(8))


def test_positions_are_drawn_with_their_probabilities():
    """1,000 sequences over the same entropies: frequencies within four standard errors."""
    entropies = torch.tensor([[math.log(v) for v in (1, 2, 3, 4, 5, 1, 1, 1)]]).expand(1000, 8)
    lengths = torch.full((1000,), 8)
    probabilities = selection_probabilities(entropies, lengths, SMALL)
    positions = select_positions(probabilities, lengths, range(1000), Draws(seed=0), 2)
    for chunk, expected in enumerate([[0.1, 0.2, 0.3, 0.4], [5 / 6, 1 / 6, 0, 0]]):
        counts = torch.bincount(positions[:, chunk] - 4 * chunk, minlength=4) / 1000
        for seen, p in zip(counts.tolist(), expected, strict=True):
            assert abs(seen - p) <= 4 * math.sqrt(p * (1 - p) / 1000)


def works(length: int, config: RefineConfig) -> bool:
    """By brute force: every chunk has a position whose prefix, rest and rollout all fit."""
    size, margin, k = length // config.num_chunks, config.margin, config.rollout_length
    eligible = [margin <= t + 1 <= length - margin and t + k <= length - 1 for t in range(length)]
    return size > 0 and all(any(eligible[i * size : (i + 1) * size]) for i in range(config.num_chunks))


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 8])
@pytest.mark.parametrize("rollout_length", [1, 2, 5, 9])
@pytest.mark.parametrize("margin", [0, 1, 4, 20])
def test_smallest_length_by_brute_force(num_chunks, rollout_length, margin):
    config = RefineConfig(num_chunks=num_chunks, rollout_length=rollout_length, margin=margin)
    smallest = smallest_length(config)
    assert not works(smallest - 1, config)
    assert all(works(length, config) for length in range(smallest, smallest + 6 * num_chunks))
    assert [config.fits(length) for length in range(1, smallest + 3)] == [
        works(length, config) for length in range(1, smallest + 3)
    ]
    if margin >= rollout_length:  # then no shorter row works at all
        assert not any(works(length, config) for length in range(1, smallest))


def test_what_fits_has_probabilities_and_what_does_not_is_refused():
    config = RefineConfig(num_chunks=3, rollout_length=4, margin=1)
    for length in range(1, 20):
        if works(length, config):
            assert sum(of_one_row([1.0] * length, config)) == pytest.approx(3)
        else:
            with naming(ValueError, f"a row of {length} tokens"):
                of_one_row([1.0] * length, config)


def test_a_short_row_is_refused_with_the_length_it_needs():
    entropies, lengths = random_rows([200, 160])
    with naming(ValueError, "a row of 160 tokens", "161 tokens"):
        selection_probabilities(entropies, lengths, RefineConfig())


def test_entropies_that_are_no_numbers_are_refused():
    entropies, lengths = random_rows([200, 200])
    entropies[1, 60] = torch.nan
    with naming(ValueError, "entropies", "nan", "row 1"):
        selection_probabilities(entropies, lengths, replace(RefineConfig(), smoothing_kernel=1))


def test_no_gradient_passes_through_selection():
    entropies = torch.rand(1, 200, requires_grad=True)
    assert not selection_probabilities(entropies, torch.tensor([200]), RefineConfig()).requires_grad
