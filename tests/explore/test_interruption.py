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


def test_a_graph_that_outlives_the_block_is_not_interrupted() -> None:
    policy, _ = load_model("tiny-deltanet", device="cpu")
    calls = []
    with interruptible(lambda: calls.append(1)):
        loss = policy(torch.arange(5, 25).unsqueeze(0)).logits.sum()
    within = len(calls)
    loss.backward()
    assert len(calls) == within > 10


def test_a_graph_is_captured_within_the_block() -> None:
    layer, calls = torch.nn.Linear(3, 3), []
    graph = torch.compile(lambda x: layer(x), fullgraph=True, backend="eager")
    x = torch.ones(2, 3)
    with interruptible(lambda: calls.append(1)):
        assert torch.equal(graph(x), layer(x))
    assert len(calls) == 1, "the hook is called for what is not compiled"
