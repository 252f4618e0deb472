"""Records the software and hardware of a run: versions, commit, platform, device."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from refine_lab.text import printable


def project_root() -> Path | None:
    """Returns the checkout this package is imported from, or None for an installed copy."""
    root = Path(__file__).resolve().parent.parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def display_path(value: object) -> str:
    """Returns `value` as text with paths relative to the project's folder, so that notebook output can be shared."""
    root = project_root()
    return printable(str(value) if root is None else str(value).replace(f"{root}{os.sep}", ""))


def environment(device: str | None = None) -> dict[str, Any]:
    """Returns versions, commit and platform; with `device`, also the device's name and the number of threads."""

    def version(name: str) -> str | None:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)

    packages = {"fla": "flash-linear-attention"} | {
        name: name for name in ("torch", "transformers", "triton", "refine_lab")
    }
    torch = sys.modules.get("torch")  # not imported here: a process that only starts runs does not need it
    return {
        "python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device and _device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if device and torch else None,
        **_commit(),
    }


def _device_name(device: str) -> str:
    torch = sys.modules.get("torch")
    if torch and device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text(encoding="utf-8", errors="replace") if cpus.exists() else ""
    found = re.search(r"model name\s*: (.+)", text)
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    """Returns the checkout's commit and whether tracked files differ from it; None outside a checkout."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(root), *words]
        with suppress(OSError, subprocess.SubprocessError):
            options = {"encoding": "utf-8", "errors": "replace", "timeout": 10, "stderr": subprocess.DEVNULL}
            return subprocess.check_output(command, **options).strip()
        return None

    root = project_root()
    if root is None or not (root / ".git").exists() or (commit := git("rev-parse", "HEAD")) is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": git("status", "--porcelain", "--untracked-files=no") != ""}
