"""Custom rewards and selections: converts a notebook function to the `reward.py` or `selection.py` of a run and back."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import os
import signal
import symtable
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import fields
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from refine_lab.text import printable, shorten
from refine_lab.types import RewardFunction, RewardInputs
from refine_lab.validation import ConfigError, require

FIELDS = tuple(field.name for field in fields(RewardInputs))
"""The names, in order, of the five tensors that a reward took before `RewardInputs`."""

REFUSED = frozenset({"eval", "exec", "compile", "__import__", "globals", "locals", "vars"})
"""Builtins that give access to names that do not appear in the reward's source."""


Kind = Literal["reward", "selection"]
"""What a custom function computes; a run keeps the source as a file of that name."""


def reward_source(function: object) -> str:
    """Returns the text of a `reward.py` that defines `function`, a function of one `RewardInputs` (see `function_source`).

    A function of the five tensors of earlier versions is also accepted (see `of_inputs`).
    """
    source = function_source("reward", function)
    of_inputs(inspect.unwrap(function))  # type: ignore[arg-type]  # gives its notice where the user sees it
    return source


def selection_source(function: object) -> str:
    """Returns the text of a `selection.py` that defines `function`, a function of one `SelectionInputs`."""
    return function_source("selection", function)


def function_source(kind: Kind, function: object) -> str:
    """Returns the text of a file that defines `function`, which was written in a notebook cell or a file.

    It begins with the imports that the function needs, so that it runs in a process without the notebook's state.
    Annotations are kept but never evaluated. Raises ValueError, naming it, for a name that is not an argument, a
    builtin, or part of torch or the standard library, and for anything but a plain function of one argument.
    """
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        got = "a lambda" if isinstance(function, FunctionType) else type(function).__name__
        raise ConfigError(f"a {kind}", got, "a function written with def")
    name, plain = f"{kind} {function.__name__!r}", inspect.unwrap(function)
    tree, source = _definition(name, plain)
    accepted = _takes(plain, 1) or (kind == "reward" and _takes(plain, len(FIELDS)))
    allowed = f"a function of one argument, the {kind.capitalize()}Inputs"
    require(accepted, name, str(inspect.signature(plain)), allowed)
    names = _outer_names(name, tree)
    if around := [used for used in names if used in plain.__code__.co_freevars]:
        raise ValueError(f"{name} uses {around[0]!r} from its enclosing function; define both at module level")
    needed = filter(None, (_import_line(name, used, plain.__globals__) for used in names))
    imports = dict.fromkeys(["from __future__ import annotations", "", "import torch", *needed])
    return "\n".join(imports) + "\n\n\n" + source.rstrip() + "\n"


def load_function(kind: Kind, source: str) -> Callable[..., Tensor]:
    """Returns the last function that the text of a run directory's `reward.py` or `selection.py` defines.

    Raises ValueError if the text is not Python or defines no function.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the source of the {kind} is not Python: {error.msg} in line {error.lineno}") from error
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    require(bool(names), f"the source of the {kind}", source[:60], "Python that defines a function")
    namespace = {"__name__": kind, "torch": torch}
    exec(compile(tree, f"{kind}.py", "exec"), namespace)
    return namespace[names[-1]]  # type: ignore[return-value]


def contained(kind: Kind, name: str, compute: Callable[[], object]) -> object:
    """Calls `compute`, a custom function with its inputs, without gradients, and returns its result.

    Raises a RuntimeError that names the function for any error inside it, including `SystemExit`. A process that the
    function forks ends with it.
    """
    process = os.getpid()
    try:
        with torch.no_grad():
            return compute()
    except BaseException as error:
        user_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(error, KeyboardInterrupt) and user_interrupts:
            raise
        reason = printable(shorten(str(error)))
        raise RuntimeError(f"{kind} {name!r} raised {type(error).__name__}: {reason}") from error
    finally:
        if os.getpid() != process:
            os._exit(1)


def of_inputs(function: Callable[..., Tensor]) -> RewardFunction:
    """Returns `function` as a function of one `RewardInputs`; a function of five tensors (earlier versions) is wrapped.

    Warns with FutureWarning about a function of five tensors, once per name.
    """
    if not _takes(function, len(FIELDS)):
        return function
    name = getattr(function, "__name__", repr(function))
    _suggest_one_argument(name)

    def reward(inputs: RewardInputs) -> Tensor:
        return function(*(getattr(inputs, field) for field in FIELDS))

    reward.__name__ = name
    return reward


@functools.cache
def _suggest_one_argument(name: str) -> None:
    warnings.warn(
        f"reward {name!r} takes five tensors, which a later version will reject: write `def {name}(inputs)` and use "
        + ", ".join(f"inputs.{field}" for field in FIELDS),
        FutureWarning,
        stacklevel=4,
    )


def _takes(function: Callable[..., object], count: int) -> bool:
    """Returns whether `function` accepts `count` positional arguments; False for a builtin without a signature."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _definition(name: str, function: FunctionType) -> tuple[ast.Module, str]:
    """Returns the parsed source of a function, without its annotations, and the source itself."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise ValueError(f"{name} has no source to read; define it in a notebook cell or a file") from error
    tree = ast.parse(source)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise ConfigError(name, source.splitlines()[0], "a plain function")
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree, source


def _outside(name: str, used: str) -> ValueError:
    return ValueError(f"{name} uses {used!r}, which is neither an argument, torch nor the standard library")


def _hidden(name: str, used: str) -> ValueError:
    return ValueError(
        f"{name} uses {used!r}, which can access names that do not appear in its source; refer to what it needs directly "
        "by name"
    )


def _outer_names(name: str, tree: ast.Module) -> list[str]:
    """Returns the sorted names that the definition uses from outside; refuses inner imports of other packages."""
    nodes = [*ast.walk(tree)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += ["." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    for module in modules:
        if not _allowed(module):
            raise _outside(name, module)
    top = symtable.symtable(ast.unparse(tree), "function.py", "exec")
    scopes = top.get_children()
    for scope in scopes:  # the list grows by the scopes inside each scope
        scopes += scope.get_children()
    names = {symbol.get_name() for scope in scopes for symbol in scope.get_symbols() if symbol.is_global()}
    names |= {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    return sorted(names - {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()})


def _allowed(module: str) -> bool:
    top = module.partition(".")[0]
    return top == "torch" or (top in sys.stdlib_module_names and top != "importlib")


def _import_line(name: str, used: str, namespace: dict[str, Any]) -> str | None:
    """Returns the import statement for `used`, a name of the function's module; None for a builtin and torch itself."""
    if used not in namespace:
        if used in REFUSED:
            raise _hidden(name, used)
        notebook_only = {"display", "get_ipython"}  # IPython puts them among the builtins
        if used == "torch" or (hasattr(builtins, used) and used not in notebook_only):
            return None
        raise _outside(name, used)
    value = namespace[used]
    if isinstance(value, ModuleType):
        if not _allowed(value.__name__):
            raise _outside(name, used)
        return f"import {value.__name__}" + (f" as {used}" if value.__name__ != used else "")
    original = getattr(value, "__name__", used)
    if original in REFUSED and getattr(value, "__module__", None) == "builtins":
        raise _hidden(name, used)
    # Numbers and dtypes do not know their home: only these two modules are searched for them.
    homes = [getattr(value, "__module__", None), "torch", "math"]
    if hasattr(value, "__name__"):
        homes += sorted(filter(_allowed, sys.modules), key=lambda home: ("._" in home, home.count("."), home))
    for home in homes:
        if isinstance(home, str) and _allowed(home) and getattr(sys.modules.get(home), original, None) is value:
            return f"from {home} import {original}" + (f" as {used}" if original != used else "")
    raise _outside(name, used)
