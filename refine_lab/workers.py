"""Workers: the processes that share one training, and the sums, rows and decisions that they exchange.

Every worker holds the same batch and computes its own share of each update's rows. Losses are divided by counts of the
whole update, so that the gradient of the update is the sum of the workers' gradients. Random draws are keyed by sequence
(see `rng`), so that the number of workers changes none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from refine_lab.validation import require

T = TypeVar("T")
stores: Any = dist
"""The module of the stores, which it exports at run time only."""

BUCKET = 2**25
"""Number of gradient elements that are summed over the workers in one exchange."""
EXCHANGE = timedelta(hours=24)
"""Time limit of one exchange: long, since the others wait while the first worker saves, or one has longer prompts."""


class SharedError(ValueError):
    """An error that every worker raises, so that the first one alone has to report it."""


@dataclass(frozen=True)
class Workers:
    """This worker's place among `count` of them; they exchange values through torch's default process group.

    A single worker exchanges nothing: every method then returns its argument.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Returns whether this is the worker that writes the run directory."""
        return self.rank == 0

    def share(self, rows: int) -> tuple[int, int]:
        """Returns the first row and the row after the last that this worker computes; the shares of all are equal.

        Raises ValueError for rows that cannot be divided equally.
        """
        if rows % self.count:
            raise ValueError(f"{rows} rows cannot be divided among {self.count} workers")
        size = rows // self.count
        return self.rank * size, (self.rank + 1) * size

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over all workers."""
        if self.count == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_each(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sums of named scalars over all workers, which have the same names, in one exchange."""
        if self.count == 1 or not values:
            return dict(values)
        total = self.sum(torch.stack([*values.values()]))
        return dict(zip(values, total.unbind(), strict=True))

    def gather(self, rows: Tensor) -> Tensor:
        """Returns the rows of all workers, in their order; every worker has equally many."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def gather_json(self, value: Any, what: str = "") -> list[Any]:
        """Returns the values of all workers, in their order; JSON must be able to represent each of them.

        `what` names the values. If the names differ between workers, because one of them has left out an exchange, every worker
        raises SharedError.
        """
        if self.count == 1:
            return [value]
        found = [json.loads(text) for text in self._texts(json.dumps([what, value]))]
        first = found[0][0]
        for rank, (other, _) in enumerate(found):
            if other != first:
                raise SharedError(f"worker {rank} of {self.count} exchanges {other!r}, but worker 0 {first!r}")
        return [value for _, value in found]

    def _texts(self, text: str) -> list[str]:
        """Returns the texts of all workers."""
        values = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(values)])).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(values)] = values
        rows = self.gather(padded).view(self.count, -1)
        return [row[:size].numpy().tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    def map(self, function: Callable[[T], Any], items: Sequence[T], what: str = "") -> list[Any]:
        """Returns the value of `function` for each item; each worker computes some of them, and all gather the results.

        JSON must be able to represent a value. The function must not exchange anything, so that a worker whose items take
        longer keeps no other waiting inside it; it must not use sharded weights. `what` is as in `gather_json`.
        """
        mine = [function(item) for item in items[self.rank :: self.count]]
        found = self.gather_json(mine, f"{what}, {len(items)} parts")
        return [found[i % self.count][i // self.count] for i in range(len(items))]

    def from_first(self, make: Callable[[], T]) -> T:
        """Returns what `make` returns in the first worker, which alone calls it; JSON must be able to represent it.

        If it raises ValueError or OSError, the others raise SharedError with the same sentence.
        """
        if self.count == 1:
            return make()
        value, error = None, None
        if self.first:
            try:
                value = make()
            except (ValueError, OSError) as raised:
                error = raised
        value, sentence = self.gather_json([value, None if error is None else str(error)], "what the first finds")[0]
        if error is not None:
            raise error
        if sentence is not None:
            raise SharedError(sentence)
        return value

    def every(self, condition: Tensor) -> Tensor:
        """Returns whether a condition holds for every worker, on the device, without waiting for it."""
        return condition if self.count == 1 else self.sum((~condition).long()) == 0

    def decide(self, value: int) -> int:
        """Returns the value of the first worker."""
        if self.count == 1:
            return value
        return int(self.sum(torch.tensor(int(value) if self.first else 0)))

    def any(self, condition: bool) -> bool:
        """Returns whether a condition holds for any worker."""
        return condition if self.count == 1 else bool(self.sum(torch.tensor(int(condition))))

    def wait(self) -> None:
        """Waits until every worker has come to this call."""
        self.decide(0)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Executes the block in the first worker, then in the others, which find the files that the first has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by its sum over all workers; a missing one counts as zeros unless all lack it.

        The gradients of sharded parameters are sums already (see `models.sharding`).
        """
        if self.count == 1:
            return
        whole = [x for x in parameters if x.requires_grad and not isinstance(x, DTensor)]
        if not whole:
            return
        present = self.sum(torch.tensor([int(x.grad is not None) for x in whole])).tolist()
        for parameter, number in zip(whole, present, strict=True):
            if number and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([x.grad for x in whole if x.grad is not None]):
            total = torch.cat([x.flatten() for x in bucket])
            dist.all_reduce(total)
            for x, part in zip(bucket, total.split([x.numel() for x in bucket]), strict=True):
                x.copy_(part.view_as(x))


ALONE = Workers()
"""The only worker of a training in one process."""


def join(store: Any, workers: Workers, device: str) -> None:
    """Joins torch's default process group, in which tensors on the CPU are exchanged too, and selects this worker's GPU.

    `device` is "cpu", or else the GPU of the worker's local rank is used where there is one.
    """
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, prefixed = "cpu:gloo,cuda:nccl" if cuda else "gloo", stores.PrefixStore("run", store)
    dist.init_process_group(backend, store=prefixed, rank=workers.rank, world_size=workers.count, timeout=EXCHANGE)


def require_devices(device: str, count: int, here: int) -> None:
    """Raises ConfigError unless each of `count` workers, of which `here` are on this machine, can have a device of its own.

    A single GPU such as "cuda:1" cannot be shared.
    """
    require(":" not in device, "device", device, f"'auto', 'cpu' or 'cuda' for {count} workers")
    if device != "cpu" and torch.cuda.is_available():
        devices = torch.cuda.device_count()
        require(here <= devices, "processes", here, f"at most {devices} on this machine, one for each of its GPUs")


def of_exchange(error: BaseException) -> bool:
    """Returns whether an error comes from an exchange between workers, which any of them may have caused."""
    return isinstance(error, stores.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextmanager
def launched(device: str) -> Iterator[Workers]:
    """Yields the workers that `torchrun` has started, of which this process is one; without it, the only worker.

    Raises ConfigError as `require_devices`.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield ALONE
        return
    require_devices(device, count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers = Workers(int(os.environ["RANK"]), count)
    store, _, _ = next(iter(stores.rendezvous("env://")))
    join(store, workers, device)
    try:
        yield workers
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Returns all values of a tensor that is sharded over the workers, and any other as it is; every worker must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(tensor: Tensor) -> Tensor:
    """Returns `whole` of a sharded tensor on the CPU, where it takes no device memory, and any other tensor as it is."""
    return whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor


def is_sharded(policy: Any) -> bool:
    """Returns whether the weights of a module are sharded over the workers, which then must call it equally often."""
    return any(isinstance(x, DTensor) for x in policy.parameters())


def sharded_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Returns this worker's share of values that belong to a sharded parameter, such as its moments; or else all of them."""
    if not isinstance(parameter, DTensor) or values.shape != parameter.shape:
        return values
    values = values.to(parameter.device)
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields gradients of one dtype together, up to `BUCKET` elements, or a larger one alone."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
