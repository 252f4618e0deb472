"""Sharding: each worker stores a share of every weight, gradient and moment, and gathers a block's weights when it runs.

The blocks, the embedding, the final norm and the head are sharded one by one with torch's `fully_shard` (FSDP2). None may
be left to the model around them: its own backward begins when the gradient of a state arrives, and a weight that is
gathered by it would then lose its gradient silently. Tied embedding and head form one group, since they share a weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from refine_lab.models.activation_checkpointing import blocks_of
from refine_lab.workers import Workers, whole_on_cpu


def shard(policy: Any, workers: Workers) -> None:
    """Shards a policy's parameters over all workers, in place; gradients are then summed in the backward pass.

    Every worker must hold the same weights, and call the policy equally often. Raises ValueError for a policy of which a
    parameter would not be sharded.
    """
    mesh = init_device_mesh(policy.device.type, (workers.count,))
    for group in _groups(policy):
        fully_shard(group[0] if len(group) == 1 else group, mesh=mesh)
    if left := [name for name, x in policy.named_parameters() if not hasattr(x, "device_mesh")]:
        raise ValueError(f"{type(policy).__name__} cannot be sharded: {left[0]!r} belongs to no block, norm or head")
    fully_shard(policy, mesh=mesh)  # holds no weight itself; it lets the parts share their exchanges
    register_fsdp_forward_method(policy, "read")
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: losses are divided by the counts of the whole update
            module.set_force_sum_reduction_for_comms(True)
    # what leaves a block is never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _groups(policy: Any) -> Iterator[list[nn.Module]]:
    """Yields the modules whose weights are gathered together."""
    yield from ([block] for block in blocks_of(policy))
    ends = [policy.get_input_embeddings(), policy.lm_head]
    tied = {id(x) for x in ends[0].parameters()} & {id(x) for x in ends[1].parameters()}
    yield from [ends] if tied else [[end] for end in ends]
    yield [policy.model.norm]


def full_state(policy: Any) -> dict[str, Tensor]:
    """Returns a policy's `state_dict` with whole tensors, sharded or not; every worker must call it."""
    names, state = dict(policy.named_parameters(remove_duplicate=False)), policy.state_dict()
    owner = {name: id(names.get(name, tensor)) for name, tensor in state.items()}
    once = {owner[name]: name for name in state}  # tied weights remain one tensor
    gathered = {key: whole_on_cpu(state[name]) for key, name in once.items()}
    return {name: gathered[owner[name]] for name in state}
