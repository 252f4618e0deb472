"""A Triton driver for a GPU that is not there: kernels are compiled for it and launches do nothing.

`pretend` must be called before fla is imported, since fla asks for the device's properties when it is imported. Triton
compiles with the `ptxas` of its wheel, and autotuning compiles every variant and times none. `Compiled` collects what the
compiler says about each variant.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


@dataclass(frozen=True)
class Gpu:
    """The properties of a device that decide which variants it can run."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    "Bytes that a block can use (CUDA C++ Programming Guide, table of technical specifications)."
    multiprocessors: int
    memory: int


GPUS = {
    "sm_90": Gpu("NVIDIA H200", (9, 0), 227 * 1024, 132, 141 * 2**30),
    "sm_80": Gpu("NVIDIA A100", (8, 0), 163 * 1024, 108, 80 * 2**30),
}


class _Utils:
    """What Triton asks of a driver's module: the device's limits, and a loaded binary, which nothing runs."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        found = dict(max_shared_mem=self.gpu.shared_memory, multiprocessor_count=self.gpu.multiprocessors)
        return dict(found, max_num_regs=65_536, warpSize=32, sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        return "module", "function", 0, 0, 1024


class _Launcher:
    launch_cooperative_grid = False

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver(DriverBase):
    launcher_cls = _Launcher

    def __init__(self, gpu: Gpu) -> None:
        self.utils, self.gpu = _Utils(gpu), gpu

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        major, minor = self.gpu.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        def benchmark(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
            call()  # compiles the variant
            return [0.0, 0.0, 0.0]

        return benchmark

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: Any) -> None:
        pass


def pretend(gpu: Gpu) -> None:
    """Makes Triton compile for `gpu` and torch describe it; tensors stay on the CPU."""
    active: Any = driver
    active.set_active(_Driver(gpu))
    active._default = active.active
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.multiprocessors,
        shared_memory_per_block_optin=gpu.shared_memory,
        warp_size=32,
    )
    cuda: Any = torch.cuda
    cuda.get_device_name = lambda *_: gpu.name
    cuda.get_device_capability = lambda *_: gpu.capability
    cuda.get_device_properties = lambda *_: properties
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0


class Compiled:
    """Collects one row for every variant that Triton compiles, or finds in its cache, while it is `listening`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.rows: list[dict[str, Any]] = []
        self._seen: set[str] = set()

    def listening(self) -> Compiled:
        compilation: Any = knobs.compilation
        compilation.listener = self._note
        return self

    def _note(self, *, src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        if metadata["hash"] in self._seen:
            return
        self._seen.add(metadata["hash"])
        (cubin,) = (path for name, path in metadata_group.items() if name.endswith(".cubin"))
        names = src.fn.arg_names
        constants = {names[place[0]]: value for place, value in src.constants.items() if len(place) == 1}
        self.rows.append(
            {
                "kernel": metadata["name"],
                "warps": metadata["num_warps"],
                "stages": metadata["num_stages"],
                "constants": {name: value for name, value in constants.items() if isinstance(value, (int, float))},
                "shared_bytes": metadata["shared"],
                "fits": metadata["shared"] <= self.gpu.shared_memory,
                **resources(Path(cubin)),
            }
        )


def resources(cubin: Path) -> dict[str, int]:
    """Returns the registers per thread and the bytes of stack, which holds spilled registers, of the kernel in a cubin."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(program), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"]}
