"""Activation checkpointing: saves memory by recomputing parts of a model in the backward pass.

    none    nothing is recomputed
    mlp     the blocks' feed-forward layers, whose widest tensors are the largest of a block
    blocks  whole blocks: only their inputs are stored, and what a trace needs for its states while it exists

Gradients are bitwise identical if the arithmetic is deterministic. `Trace.state_at` remains exact: it uses tensors of
the first forward pass, which the trace stores unchanged, and their gradients flow into the block as usual. A block must
be a function of its arguments alone: a family whose blocks are not sets `RECOMPUTABLE` to `("mlp",)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from refine_lab.ops.delta_rule import SHORT
from refine_lab.validation import require


def checkpoint_activations(policy: Any, part: str) -> None:
    """Recomputes `part` of the policy ("none", "mlp" or "blocks") in the backward pass; replaces the previous setting.

    Raises ValueError for an unknown part, and for one that the policy lacks or that cannot be recomputed.
    """
    allowed = ("none", *policy.RECOMPUTABLE)
    names = f"one of {', '.join(map(repr, allowed))} for {type(policy).__name__}"
    require(part in allowed, "activation_checkpointing", part, names)
    blocks = blocks_of(policy)
    layers = [x for block in blocks for name, x in block.named_children() if name in ("mlp", "feed_forward", "ffn")]
    found = {"none": [], "mlp": layers, "blocks": blocks}[part]
    if part != "none" and not found:
        raise ValueError(
            f"activation_checkpointing is {part!r}, but {type(policy).__name__} has no such layers to recompute"
        )
    for module in policy.modules():
        if runs_again(module):
            module.forward = vars(module).pop("forward_once")
    for module in found:  # bound methods: a copy of the module has its own
        vars(module)["forward_once"], module.forward = module.forward, MethodType(_run_again, module)


def runs_again(module: nn.Module) -> bool:
    """Returns whether this module itself is recomputed in the backward pass."""
    return "forward_once" in vars(module)


def blocks_of(policy: Any) -> Sequence[Any]:
    """Returns the modules of the list whose length is the model's number of layers, if there is one."""
    lists = (module for module in policy.modules() if isinstance(module, nn.ModuleList))
    return next((list(modules) for modules in lists if len(modules) == policy.config.num_hidden_layers), [])


def _run_again(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    """Replaces the module's `forward`."""
    forward = vars(module)["forward_once"]
    if not torch.is_grad_enabled() or (arguments and arguments[0].shape[1] <= SHORT):
        return forward(*arguments, **named)
    # our own layers draw nothing; a dropout that PEFT has put around one must drop the same the second time
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=module.training, **named)
