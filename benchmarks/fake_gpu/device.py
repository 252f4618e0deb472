"""Makes torch's CPU build and Triton believe in one H200, whose kernels are never compiled and never run.

`prepare` loads a device guard that does nothing (`guard.cpp`), which torch asks for once: call it before torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("guard.cpp")
SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block may ask for on an H100 or H200; fla chooses its block sizes by it."""
PROPERTIES = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "total_memory": 141 * 10**9,
    "multi_processor_count": 132,
    "shared_memory_per_block_optin": SHARED_MEMORY,
    "warp_size": 32,
}


class Unavailable(RuntimeError):
    """The fake device cannot be made here; the message says why in one sentence."""


def prepare() -> None:
    """Loads the guard, and replaces what torch and Triton ask of a GPU. Raises Unavailable."""
    if "torch" in sys.modules:
        raise Unavailable("the fake CUDA device must be made before torch is imported")
    ctypes.CDLL(str(guard()))
    _answer_for_torch()
    _answer_for_triton()


def guard() -> Path:
    """Returns the compiled guard, from the cache folder of this version of torch. Raises Unavailable without a compiler."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("benchmarks.fake_gpu needs torch, which is not installed")
    torch, tag = Path(spec.origin).parent, version("torch")
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise Unavailable(f"benchmarks.fake_gpu needs torch's CPU build, and torch {tag} is built for CUDA")
    source = SOURCE.read_bytes()
    target = cache_folder() / f"cuda-guard-{tag}-{len(source)}.so"
    if target.exists() and target.stat().st_mtime >= SOURCE.stat().st_mtime:
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("benchmarks.fake_gpu compiles a CUDA device guard with g++, which is not on the path")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}")
    library = torch / "lib"
    flags = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-I{torch / 'include'}"]
    links = [f"-L{library}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{library}"]
    command = [compiler, *flags, str(SOURCE), "-o", str(temporary), *links]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise Unavailable(f"g++ cannot compile the CUDA device guard against torch {tag}: {first}")
    temporary.replace(target)
    return target


def cache_folder() -> Path:
    """Returns a folder outside the work tree: that of `REFINE_CACHE`, or the user's cache folder."""
    named = os.environ.get("REFINE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refine_lab"


class Idle:
    """A stream or an event of the device, on which nothing happens."""

    def __init__(self, **settings: Any) -> None:
        pass

    def record_event(self) -> Idle:
        return self

    def record(self, stream: object = None) -> Idle:
        return self

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


def _answer_for_torch() -> None:
    import torch
    import torch.cuda.amp.common as amp

    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.is_bf16_supported = lambda *a, **b: True
    cuda.get_device_name = lambda *a: PROPERTIES["name"]
    cuda.get_device_capability = lambda *a: (PROPERTIES["major"], PROPERTIES["minor"])
    cuda.get_device_properties = lambda *a: SimpleNamespace(**PROPERTIES)
    cuda.Stream = cuda.Event = Idle
    cuda.stream, cuda.current_stream = nullcontext, lambda *a: Idle()
    cuda._exchange_device = cuda._maybe_exchange_device = lambda device: 0
    amp.amp_definitely_not_available = lambda: False


def _answer_for_triton() -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class IdleDriver(DriverBase):
        """Says which GPU there is; nothing is ever compiled for it, since `count_launches` answers first."""

        def __init__(self) -> None:
            properties = {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "warpSize": 32}
            self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cuda

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Callable[..., list[float]]:
            return lambda call, quantiles=None, **settings: [0.0]

    driver.set_active(IdleDriver())


def count_launches(count: Callable[[str, dict[str, Any]], None]) -> None:
    """Calls `count` with a kernel's name and arguments in the place of each launch; its first variant stands for all."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def launch(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **named: Any) -> None:
        count(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | named)

    def first_variant(self: Any, *args: Any, **named: Any) -> Any:
        return self.fn.run(*args, **named, **self.configs[0].all_kwargs())

    JITFunction.run = launch
    Autotuner.run = first_variant
    if find_spec("fla") is not None:
        from fla.ops.utils import cache

        cache.CachedAutotuner.run = first_variant
