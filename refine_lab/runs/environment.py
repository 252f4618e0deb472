"""Records what a run was made with, and where: versions, commit, platform, device."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def project_root() -> Path | None:
    """Returns the checkout this package is imported from, or None for an installed copy."""
    root = Path(__file__).resolve().parent.parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def shown(value: object) -> str:
    """Returns `value` as text with paths relative to the project's folder, so that notebook output can be shared."""
    root = project_root()
    return str(value) if root is None else str(value).replace(f"{root}{os.sep}", "")


def environment(device: str | None = None) -> dict[str, Any]:
    """Returns versions, commit and platform; with `device`, also the device's name and the number of threads."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    packages = {"torch": "torch", "transformers": "transformers", "fla": "flash-linear-attention", "triton": "triton"}
    torch = sys.modules.get("torch")  # whoever only starts a run need not load it
    return {
        "python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
        "refine_lab": version("refine_lab"),
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
    found = (
        re.search(r"model name\s*: (.+)", cpus.read_text(encoding="utf-8", errors="replace")) if cpus.exists() else None
    )
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    """Returns the checkout's commit and whether tracked files differ from it; None outside a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, encoding="utf-8", errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    root = project_root()
    if root is None or not (root / ".git").exists() or (commit := git("rev-parse", "HEAD")) is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": git("status", "--porcelain", "--untracked-files=no") != ""}
