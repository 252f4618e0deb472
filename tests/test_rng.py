"""Draws depend on (seed, step, sequence, purpose) alone, and fall where the inverse CDF says."""

import pytest
import torch

from refine_lab.rng import Draws, inverse_cdf


def test_a_draw_depends_on_its_sequence_alone():
    draws = Draws(seed=3, step=2)
    ids = [40, 7, 12, 9]
    together = draws.uniforms(ids, "position", (8,))
    permuted = draws.uniforms([12, 40, 9, 7], "position", (8,))
    split = torch.cat([draws.uniforms(ids[:1], "position", (8,)), draws.uniforms(ids[1:], "position", (8,))])
    assert torch.equal(permuted, together[[2, 0, 3, 1]])
    assert torch.equal(split, together)
    assert together.dtype == torch.float64
    assert together.min() >= 0
    assert together.max() < 1


@pytest.mark.parametrize(
    "other",
    [(Draws(seed=4), 5, "position"), (Draws(seed=3, step=1), 5, "position"), (Draws(seed=3), 5, "token")],
    ids=["seed", "step", "purpose"],
)
def test_each_part_of_the_key_changes_the_draw(other):
    draws, sequence_id, purpose = other
    here = Draws(seed=3).uniforms([5], "position", (64,))
    there = draws.uniforms([sequence_id], purpose, (64,))
    assert not torch.isclose(here, there).any()
    assert abs(torch.corrcoef(torch.cat([here, there]))[0, 1]) < 0.5


def test_draws_are_the_same_in_every_process():
    """Recorded values: a change of the key or the generator changes every run ever kept."""
    drawn = Draws(seed=0, step=1).uniforms([2], "position", (3,))[0].tolist()
    assert drawn == pytest.approx([0.16844568441008068, 0.37818623029662624, 0.0759010713568472], abs=1e-15)


def test_uniform_draws_over_many_sequences_are_uniform():
    drawn = Draws(seed=1).uniforms(range(2000), "position", (2,))
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_inverse_cdf_by_hand():
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3]).expand(6, 4)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.999], dtype=torch.float64)
    assert inverse_cdf(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_inverse_cdf_never_draws_what_has_no_probability():
    probabilities = torch.tensor([[0.0, 0.1, 0.9, 0.0], [0.0, 1 / 3, 2 / 3, 0.0]])
    for u in (0.0, 1 - 2**-53):
        choices = inverse_cdf(probabilities, torch.full((2,), u, dtype=torch.float64))
        assert choices.tolist() == ([1, 1] if u == 0 else [2, 2])


def test_inverse_cdf_of_unnormalised_weights_and_of_a_single_row():
    assert inverse_cdf(torch.tensor([2.0, 6.0]), torch.tensor(0.24, dtype=torch.float64)).item() == 0
    assert inverse_cdf(torch.tensor([2.0, 6.0]), torch.tensor(0.26, dtype=torch.float64)).item() == 1
