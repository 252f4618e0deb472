"""A pass that is ended between two modules, forward or backward, and what is left of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refine_lab.explore.attribution import write_attribution
from refine_lab.explore.interruption import interruptible
from refine_lab.explore.targets import Target
from refine_lab.models import load_model


class Stopped(Exception):
    pass


@pytest.mark.parametrize("model", ["tiny-deltanet", "tiny-lact"])
def test_a_pass_ends_anywhere_and_changes_nothing(model: str) -> None:
    policy, _ = load_model(model, device="cpu")
    ids, target = torch.arange(5, 105), Target(position=99, token_ids=(7,))
    calls, last, backward = 0, -1, []

    def check() -> None:
        nonlocal calls
        calls += 1
        backward.append(torch._C._current_graph_task_id() >= 0)
        if calls == last:
            raise Stopped

    plain = write_attribution(policy, ids, target)
    with interruptible(check):
        same = write_attribution(policy, ids, target)
    np.testing.assert_array_equal(same.effects, plain.effects)
    count, first = calls, backward.index(True)
    assert count > first > 10 and sum(backward) > 5, "it is also called in the backward pass"
    for last in (1, first // 2, first + 1, first + 4):  # in the forward pass, then in the backward pass
        calls = 0
        with pytest.raises(Stopped), interruptible(check):
            write_attribution(policy, ids, target)
        assert calls == last
    before = calls
    np.testing.assert_array_equal(write_attribution(policy, ids, target).effects, plain.effects)
    assert calls == before, "nothing is called after the block"
    assert all(parameter.requires_grad for parameter in policy.parameters())
