"""Imports third-party model code on demand and without its import warnings."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from warnings import catch_warnings, simplefilter


def import_quietly(module: str, needs: str) -> ModuleType:
    """Imports a module without the warnings of its import, such as fla's about a missing GPU and torch's deprecations.

    transformers imports fla with its hybrids, and treats a warning raised as an error as an unusable fla. Raises
    ImportError that names what the module `needs`.
    """
    try:
        with catch_warnings():
            simplefilter("ignore")
            return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} needs {needs}: {error}") from error
