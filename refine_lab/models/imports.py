"""Importing other people's model code when it is asked for, not before."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from warnings import catch_warnings, simplefilter


def import_quietly(module: str, needs: str) -> ModuleType:
    """The module, imported without the warnings of its import: fla's that there is no GPU, torch's of its own past.

    transformers imports fla with its hybrids, and takes a warning that is an error for a fla that cannot be used. Raises
    ImportError naming what it `needs`.
    """
    try:
        with catch_warnings():
            simplefilter("ignore")
            return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} needs {needs}: {error}") from error
