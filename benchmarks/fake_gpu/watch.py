"""The mode through which every operation of a step passes: it counts, and answers what only a device could answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from benchmarks.fake_gpu.device import count_launches
from benchmarks.fake_gpu.ledger import GIB, Allocation, Ledger
from benchmarks.fake_gpu.roofline import Roofline, tensors_of
from benchmarks.fake_gpu.sources import place
from benchmarks.fake_gpu.values import as_list, computed, follow, give, known

BY_VALUE = frozenset("nonzero masked_select _unique2 unique_dim unique_consecutive bincount equal".split())
"""Operations whose result's shape, or whose result, is known only when the device has finished."""
INDEXING = frozenset("index index_put index_put_ _unsafe_index".split())
WIDE = (torch.float32, torch.float64)


class FakeDevice(FakeTensorMode):
    """torch's fake tensors, without asking whether there is a device."""

    avoid_device_init: Any = True


class Watch(TorchDispatchMode):
    """Counts what a step does. `begin` starts anew with what is in memory; operations before it are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.exchanges: Any = None  # of `workers`, if there are several
        self.begin()

    def begin(self, stream: int | None = None) -> None:
        """`stream` is the number of elements of one stream of hidden states, if the step computes in half precision."""
        self.stream = stream
        self.promotions: Counter[str] = Counter()
        self.roofline = Roofline()
        self.synchronisations: Counter[str] = Counter()
        self.mismatches: Counter[str] = Counter()
        self.ledger.begin()
        if self.exchanges is not None:
            self.exchanges.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if any(issubclass(x, DTensor) for x in types):
            return NotImplemented  # this worker's share of it comes next
        if name in ("device", "size"):
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return self._number(args[0])
        if name == "_pin_memory":  # without a device there is no pinned memory
            return give(torch.empty_like(args[0], device="cpu"), known(args[0]))
        where = place()
        self._copied_between_devices(name, args, kwargs, where.line)
        if self._needs_values(name, args, kwargs):
            if any(map(_on_cuda, tensors_of(args, kwargs.values()))):
                self.synchronisations[where.line] += 1
            out = self._by_value(func, args, kwargs)
        else:
            out = self._shapes(func, args, kwargs, where.line)
            follow(func, args, kwargs, out)
        inputs, results = tensors_of(args, kwargs.values()), tensors_of((out,))
        if self.exchanges is not None:
            self.exchanges.note(name, inputs, where.phase, self.roofline.device_seconds)
        if func.namespace == "c10d":
            return out
        self.roofline.add(where.phase, func, args, kwargs, inputs, results)
        for x in results:
            if _on_cuda(x):
                self.ledger.add(x, where)
        if self.stream is not None and any(map(self._wide_stream, results)) and any(map(self._half_stream, inputs)):
            self.promotions[where.line] += 1
        return out

    def _half_stream(self, x: Tensor) -> bool:
        return x.dtype in (torch.bfloat16, torch.float16) and x.numel() >= (self.stream or 0)

    def _wide_stream(self, x: Tensor) -> bool:
        return x.dtype in WIDE and x.numel() >= (self.stream or 0)

    def triton(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Counts the launch of a Triton kernel, whose results its caller has allocated."""
        where = place()
        if any(isinstance(x, Tensor) and not _on_cuda(x) for x in arguments.values()):
            self.mismatches[where.line] += 1
        self.roofline.add_triton(where.phase, name, arguments)

    def _shapes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], line: str) -> Any:
        """Returns the operation's fake results; arguments on two devices are noted and, to go on, moved to CUDA."""
        if not _indexes_across(func, args):
            try:
                return func(*args, **kwargs)
            except FakeTensorDeviceMismatchError:
                pass
        self.mismatches[line] += 1

        def moved(x: Any) -> Any:
            return torch.empty_like(x, device="cuda") if isinstance(x, Tensor) and not _on_cuda(x) else x

        return func(*tree_map(moved, args), **tree_map(moved, kwargs))

    def _number(self, x: Tensor) -> Any:
        """Returns the value of a tensor with one element, for which Python waits if it is on the device."""
        line, value = place().line, known(x)
        if _on_cuda(x):
            self.synchronisations[line] += 1
        if value is None:
            raise RuntimeError(
                f"{line} asks for an integer that is computed from activations, which have no values here"
            )
        with _disable_current_modes():
            return value.item()

    def listed(self, x: Tensor) -> Tensor:
        """Returns the values that `tolist` or `numpy` asks for, for which Python waits if they are on the device."""
        if _on_cuda(x) and x.numel():
            self.synchronisations[place().line] += 1
        return as_list(x)

    def _copied_between_devices(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], line: str) -> None:
        """Notes a blocking copy from one device to the other, in either direction."""
        if name not in ("_to_copy", "copy_"):
            return
        tensor, *others = args
        if name == "_to_copy":
            target, source = torch.device(kwargs.get("device") or tensor.device), tensor.device
            waits = not kwargs.get("non_blocking")
        else:
            target, source = tensor.device, others[0].device
            waits = not (kwargs.get("non_blocking") or any(others[1:2]))
        if waits and target.type != source.type and tensor.numel():
            self.synchronisations[line] += 1

    def _needs_values(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if name == "repeat_interleave":
            repeats = (args[1:] or args)[0]
            return isinstance(repeats, FakeTensor) and kwargs.get("output_size") is None
        if name in INDEXING:
            return any(map(_is_mask, args[1]))
        return name in BY_VALUE and any(isinstance(x, FakeTensor) for x in args)

    def _by_value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if name == "equal" and any(known(x) is None for x in args):
            return True
        if name.startswith("index_put"):
            return args[0] if name == "index_put_" else torch.empty_like(args[0])
        if name == "index":  # the shape follows from the masks alone
            return self._chosen(func, args)
        device = next(x.device for x in args if isinstance(x, FakeTensor))

        def fake(x: Any) -> Any:
            return give(torch.empty(x.shape, dtype=x.dtype, device=device), x) if isinstance(x, Tensor) else x

        return tree_map(fake, computed(func, args, kwargs))

    def _chosen(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """Returns what masks choose from a tensor: each mask counts as the places that it holds."""
        indices = []
        for x in args[1]:
            if not _is_mask(x):
                indices.append(x)
                continue
            mask = known(x)
            if mask is None:
                raise RuntimeError(
                    f"{place().line} chooses by a mask that is computed from activations, which have no values"
                )
            with _disable_current_modes():
                count = int(mask.count_nonzero())
            indices += [torch.empty(count, dtype=torch.int64, device=args[0].device) for _ in range(x.dim())]
        out = func(args[0], indices)
        if known(args[0]) is not None:
            give(out, computed(func, args, {}))
        return out


def _on_cuda(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _indexes_across(func: Any, args: tuple[Any, ...]) -> bool:
    """Returns whether a CPU tensor is indexed with indices on the device, which torch refuses and fake tensors allow."""
    if func.overloadpacket.__name__ not in INDEXING:
        return False
    return not _on_cuda(args[0]) and any(_on_cuda(x) for x in args[1])


@contextmanager
def watching() -> Iterator[Watch]:
    """Every tensor that is made within is fake, on the device that it names; every operation is counted."""
    from benchmarks.fake_gpu.attention import fused_attention

    watch = Watch()
    count_launches(watch.triton)
    with fused_attention(), _listed(watch), FakeDevice(allow_non_fake_inputs=True), watch:
        yield watch


@contextmanager
def _listed(watch: Watch) -> Iterator[None]:
    """Lets `tolist` and `numpy` of fake tensors return values, each by one copy of the whole tensor."""
    fake: Any = FakeTensor
    original = fake.tolist

    def values(x: Tensor) -> Tensor:
        found = watch.listed(x)
        return found.detach() if found.requires_grad else found

    def tolist(self: Tensor) -> Any:
        with _disable_current_modes():
            return values(self).tolist()

    def numpy(self: Tensor, *, force: bool = False) -> Any:
        with _disable_current_modes():
            return values(self).numpy()

    fake.tolist, fake.numpy = tolist, numpy
    try:
        yield
    finally:
        fake.tolist = original
        del fake.numpy


def fp32_streams(watch: Watch, made: Iterable[Allocation], weights: set[tuple[int, ...]]) -> dict[str, float]:
    """Returns the GiB of float32 tensors of the size of a stream, in a step in half precision, by the line that made them.

    Weights, their gradients and moments are meant to be float32, and are left out, as are tensors of a weight's shape.
    """
    found: dict[str, float] = defaultdict(float)
    for each in made:
        if watch.stream is None or each.dtype not in WIDE or each.part != "activations":
            continue
        if each.nbytes >= watch.stream * each.dtype.itemsize and not {each.shape, each.shape[::-1]} & weights:
            found[each.place.line] += each.nbytes / GIB
    return dict(sorted(found.items(), key=lambda item: -item[1]))
