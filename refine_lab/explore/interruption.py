"""Ends a model's forward or backward pass between two of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` before each module of every forward pass in a `with` block, and again in the backward pass.

    An exception that `check` raises ends the pass. Values and gradients do not change.
    """

    active = True

    def before(_: Any, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():  # a graph is captured without the hooks
            return
        check()
        for each in inputs:
            if isinstance(each, Tensor) and each.grad_fn is not None:
                each.register_hook(backward)

    def backward(_: Tensor) -> None:
        if active:  # the graph, and this hook in it, may outlive the block
            check()

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        active = False
        hook.remove()
