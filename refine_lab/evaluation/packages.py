"""Imports lm-evaluation-harness and the packages of its tasks, and lists the missing ones in a one-sentence error."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from refine_lab.evaluation.benchmark import Missing

INSTALL = {
    "lm_eval": "lm_eval==0.4.13",
    "wonderwords": "wonderwords",
    "nltk": "nltk",
    "fuzzywuzzy": "fuzzywuzzy",
    "jieba": "jieba",
    "rouge": "rouge",
}
"""Module -> what pip installs, all of them in the extra `eval`."""


def missing_packages(*names: str) -> str | None:
    """Returns a sentence that names the modules among `names` that are not installed, or None."""
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return None
    command = " ".join(f"'{INSTALL[name]}'" if "=" in INSTALL[name] else INSTALL[name] for name in missing)
    return (
        f"evaluation needs these packages: {', '.join(missing)}; pip install {command} (the extra `eval` of refine_lab)"
    )


def require_packages(*names: str) -> None:
    """Raises `Missing`, in one sentence, if a module among `names` is not installed."""
    if sentence := missing_packages(*names):
        raise Missing(sentence)


def harness(module: str, *packages: str) -> ModuleType:
    """Returns a module of lm_eval, without the warnings and the output that importing it causes.

    Raises `Missing`, in one sentence, if lm_eval or one of `packages` is not installed.
    """
    require_packages("lm_eval", *packages)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that its own tasks leave open
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # fuzzywuzzy warns about a faster package, and jieba about its own escapes
        return import_module(f"lm_eval.{module}")


def versions() -> dict[str, str | None]:
    """Returns the version of each package that an evaluation uses; None if it is not installed."""

    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: found(name) for name in (*INSTALL, "datasets")}
