"""Lengths, positions and other small integers on the device, with the copies on the CPU that Python code decides by.

Reading a value of a CUDA tensor waits for all work that the device has been given. A tensor that was copied from the CPU,
or computed by `derived` from such tensors, has a copy on the CPU, so that `host` reads it without waiting. These tensors
must not be changed in place. On the CPU every function returns what it is given, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_COPY = "_host_copy"


def host(x: Tensor) -> Tensor:
    """Returns the tensor's copy on the CPU; the first call for a tensor without one waits for the device."""
    fetch(x)
    return x if x.device.type == "cpu" else getattr(x, _COPY)


def known(x: Tensor) -> bool:
    """Returns whether `host` returns the values of the tensor without waiting for the device."""
    return x.device.type == "cpu" or hasattr(x, _COPY)


def with_copy(x: Tensor, copy: Tensor) -> Tensor:
    """Returns `x`, whose copy on the CPU is `copy`."""
    if x.device.type != "cpu":
        setattr(x, _COPY, copy.detach())
    return x


def fetch(*tensors: Tensor) -> None:
    """Copies all tensors that have no copy on the CPU in one transfer; integers must be below 2^53 in magnitude."""
    unknown = [x for x in tensors if not known(x)]
    if not unknown:
        return
    values = transfer(torch.cat([x.detach().flatten().double() for x in unknown]))
    for x, part in zip(unknown, values.split([x.numel() for x in unknown]), strict=True):
        with_copy(x, part.view(x.shape).to(x.dtype))


def transfer(x: Tensor) -> Tensor:
    """Copies a tensor to the CPU and waits for it; the only function by which a training step does so."""
    return x.cpu()


def floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the numbers of scalar tensors, in one transfer."""
    if not values:
        return {}
    numbers = torch.stack([x.detach().double() for x in values.values()])
    return dict(zip(values, transfer(numbers).tolist(), strict=True))


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor on a device; copies to CUDA come from pinned memory and do not wait.

    Integers keep `x` as their copy on the CPU.
    """
    device = torch.device(device)
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    moved = pinned(x, device).to(device, non_blocking=True)
    return moved if x.is_floating_point() else with_copy(moved, x)


def pinned(x: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor in pinned memory if it is going to be copied to CUDA."""
    return x.pin_memory() if torch.device(device).type == "cuda" and x.device.type == "cpu" else x


def derived(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Returns `function` of the tensors, and computes it on the CPU as well if all of them have copies there."""
    result = function(*tensors)
    if known(result) or not all(map(known, tensors)):
        return result
    return with_copy(result, function(*map(host, tensors)))


def full(shape: tuple[int, ...], value: int, device: torch.device) -> Tensor:
    """Returns an integer tensor filled with one value."""
    return with_copy(torch.full(shape, value, device=device), torch.full(shape, value))


def indices(values: Any, device: torch.device) -> Tensor:
    """Returns a tensor of indices on a device; a list or a tensor on the CPU is copied without waiting."""
    return to_device(torch.as_tensor(values), device)
