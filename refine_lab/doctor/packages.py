"""Checks the installed packages: what the project requires, and versions that are known not to work together."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement

from refine_lab.doctor.fault import Fault
from refine_lab.models.hybrids import HYBRIDS
from refine_lab.ops.fla_delta_rule import REFUSED_BELOW, refuses_gate

SHOWN = ("torch", "transformers", "triton", "flash-linear-attention")
MODULES = {"flash-linear-attention": "fla"}
"""Required package -> the module it provides, where the names differ."""

INSTALL = "pip install -r requirements.lock installs the tested versions"

HOPPER = (9, 0)

NO_TORCH_RULE = ("comba", "gated_deltaproduct")
"""`model_type`s of fla's own layers that use its gated kernel and have no torch rule to fall back on."""

GATED = ("gated_deltanet", *HYBRIDS, *NO_TORCH_RULE)
"""`model_type`s whose layers use fla's kernel of the gated delta rule."""


def check_packages(model_type: str | None, capability: tuple[int, int] | None) -> str:
    """Returns the versions of the packages that decide how training runs.

    `capability` is the compute capability of the device, or None on a CPU. Raises Fault for a package that is missing or
    outside the range that the project requires, and for a known bad pair: on a Hopper GPU if the model has a gate, and on
    a CPU for every model, since a CPU does not tell which GPU will train the model.
    """
    wrong = list(_outside_their_ranges())
    if wrong:
        raise Fault(f"{'; '.join(wrong)}: {INSTALL}")
    versions = {name: metadata.version(name) for name in SHOWN if _installed(name)}
    triton = versions.get("triton")
    if triton is not None and "flash-linear-attention" in versions:
        concerned = capability is None or (model_type in GATED and refuses_gate(capability, triton))
        if concerned and refuses_gate(HOPPER, triton):
            raise Fault(_bad_pair(versions["flash-linear-attention"], triton, model_type))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Python {sys.version.split()[0]}, {named}"


def _bad_pair(fla: str, triton: str, model_type: str | None) -> str:
    effect = "they stop with an error" if model_type in NO_TORCH_RULE else "they run in plain torch, which is slower"
    return (
        f"fla {fla} refuses the backward pass of gated layers on Hopper GPUs (H100, H200) with Triton {triton}, whose "
        f"gradients are wrong, and {effect}: install Triton {REFUSED_BELOW} or later"
    )


def _outside_their_ranges() -> Iterator[str]:
    """Yields a phrase for every required package that is missing or of another version than required."""
    if not _installed("refine_lab"):
        yield "refine_lab is not installed, and its requirements are unknown until pip install --no-deps -e . has run"
        return
    for requirement in map(Requirement, metadata.requires("refine_lab") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not _installed(requirement.name):
            yield f"{requirement.name} is not installed, and {requirement.specifier} is required"
        elif not requirement.specifier.contains(version := metadata.version(requirement.name), prereleases=True):
            yield f"{requirement.name} is {version}, and {requirement.specifier} is required"


def _installed(name: str) -> bool:
    """Returns whether a package's metadata and its module exist."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return find_spec(MODULES.get(name, name)) is not None
