"""Rewards: how well a rollout matches the true continuation (paper, equations 9, 11 and 12), and a user's own.

A reward is a plain function of (rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs) that returns
one value a rollout. `hidden_states` are the final layer's, after the final norm, of the rolled-out tokens as inputs
(eq. 7); `target_hidden_states` are those of the true tokens in the first forward (eq. 8).
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import symtable
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.config import unknown
from refine_lab.types import RewardFunction


def cosine(
    rollout_ids: Int[Tensor, "R K"],
    target_ids: Int[Tensor, "R K"],
    hidden_states: Float[Tensor, "R K D"],
    target_hidden_states: Float[Tensor, "R K D"],
    logprobs: Float[Tensor, "R K"],
) -> Float[Tensor, "R"]:
    """Cosine similarity of hidden states averaged over the k tokens (eq. 9), in [-1, 1], at least float32."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return F.cosine_similarity(hidden_states.to(dtype), target_hidden_states.to(dtype), dim=-1).mean(-1)


def binary(
    rollout_ids: Int[Tensor, "R K"],
    target_ids: Int[Tensor, "R K"],
    hidden_states: Float[Tensor, "R K D"],
    target_hidden_states: Float[Tensor, "R K D"],
    logprobs: Float[Tensor, "R K"],
) -> Float[Tensor, "R"]:
    """The share of the k tokens that equal the truth at their place (eq. 11), in [0, 1], at least float32."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return (rollout_ids == target_ids).to(dtype).mean(-1)


def hybrid(
    rollout_ids: Int[Tensor, "R K"],
    target_ids: Int[Tensor, "R K"],
    hidden_states: Float[Tensor, "R K D"],
    target_hidden_states: Float[Tensor, "R K D"],
    logprobs: Float[Tensor, "R K"],
) -> Float[Tensor, "R"]:
    """The sum of `cosine` and `binary` (eq. 12), in [-1, 2]."""
    arguments = (rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs)
    return cosine(*arguments) + binary(*arguments)


ARGUMENTS = tuple(inspect.signature(cosine).parameters)
"""What a reward is called with, in this order."""

REFUSED = frozenset({"eval", "exec", "compile", "__import__", "globals", "locals", "vars"})
"""Builtins that reach names which cannot be seen in the source of a reward."""

REWARDS: dict[str, RewardFunction] = {"cosine": cosine, "binary": binary, "hybrid": hybrid}


def reward_function(name: str, source: str | None = None) -> RewardFunction:
    """The reward of that name, checked; `custom` is the function that `source` defines.

    Raises ValueError for an unknown name, and for `custom` without a source.
    """
    if name == "custom":
        if source is None:
            raise ValueError("reward 'custom' needs the source of a function, got none")
        return checked(load_reward(source))
    if name not in REWARDS:
        raise unknown("reward", name, (*REWARDS, "custom"))
    return checked(REWARDS[name])


def reward_source(function: object) -> str:
    """The text of a `reward.py` that defines `function`, a reward written in a notebook cell or a file.

    It begins with the imports that the function needs, so that it runs in a process that knows nothing of the notebook.
    Annotations are kept but never evaluated. Raises ValueError, naming it, for a name that is neither an argument, a
    builtin, torch (a part of it) nor of the standard library; for anything but a plain function of five arguments.
    """
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise ValueError(f"a reward must be a function written with def, got {_describe(function)}")
    name, plain = function.__name__, inspect.unwrap(function)
    tree, source = _definition(name, plain)
    _require_five(name, plain)
    imports = ["from __future__ import annotations", "", "import torch"]
    for used in _outer_names(name, tree):
        if used in plain.__code__.co_freevars:
            raise ValueError(f"reward {name!r} uses {used!r} of the function around it; define both at the top level")
        line = _import_line(name, used, plain.__globals__)
        if line and line not in imports:
            imports.append(line)
    return "\n".join(imports) + "\n\n\n" + source.rstrip() + "\n"


def load_reward(source: str) -> RewardFunction:
    """The last function that a run directory's `reward.py` defines, given its text.

    Raises ValueError where the text is no Python or defines no function.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the source of the reward is not Python: {error.msg} in line {error.lineno}") from error
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not names:
        raise ValueError(f"the source of the reward must define a function, got {source[:60]!r}")
    namespace = {"__name__": "reward", "torch": torch}
    exec(compile(tree, "reward.py", "exec"), namespace)
    return namespace[names[-1]]  # type: ignore[return-value]


def checked(reward: RewardFunction) -> RewardFunction:
    """`reward` without gradients and on copies of its arguments, with its result verified: a floating, finite tensor [R].

    The wrapped function raises ValueError that names the reward and what came back.
    """
    name = getattr(reward, "__name__", repr(reward))

    @functools.wraps(reward)
    def run(
        rollout_ids: Tensor, target_ids: Tensor, hidden_states: Tensor, target_hidden_states: Tensor, logprobs: Tensor
    ) -> Tensor:
        with torch.no_grad():
            given = (rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs)
            rewards = reward(*(x.detach().clone() for x in given))  # one that changes them changes no training
        count = len(rollout_ids)
        allowed = f"reward {name!r} must return one floating-point number a rollout, a tensor of shape [{count}]"
        if not isinstance(rewards, Tensor):
            raise ValueError(f"{allowed}, got {type(rewards).__name__}")
        if rewards.shape != (count,) or not rewards.is_floating_point():
            raise ValueError(f"{allowed}, got {rewards.dtype} of shape {list(rewards.shape)}")
        if not rewards.isfinite().all():
            bad = int((~rewards.isfinite()).nonzero()[0])
            raise ValueError(f"reward {name!r} must be finite, got {float(rewards[bad])} for rollout {bad}")
        return rewards.detach()

    return run


def _describe(thing: object) -> str:
    return "a lambda" if isinstance(thing, FunctionType) else type(thing).__name__


def _definition(name: str, function: FunctionType) -> tuple[ast.Module, str]:
    """The parsed source of a function, without its annotations, and the source itself."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise ValueError(f"reward {name!r} has no source to read; define it in a notebook cell or a file") from error
    tree = ast.parse(source)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise ValueError(f"reward {name!r} must be a plain function, got {source.splitlines()[0]!r}")
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree, source


def _require_five(name: str, function: FunctionType) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(*ARGUMENTS)
    except TypeError as error:
        raise ValueError(f"reward {name!r} must take {', '.join(ARGUMENTS)}, got {signature}") from error


def _outside(name: str, used: str) -> ValueError:
    return ValueError(f"reward {name!r} uses {used!r}, which is neither an argument, torch nor the standard library")


def _hidden(name: str, used: str) -> ValueError:
    return ValueError(f"reward {name!r} uses {used!r}, which can reach what its source does not show; name it directly")


def _outer_names(name: str, tree: ast.Module) -> list[str]:
    """The names that the definition takes from outside, sorted; refuses imports inside it from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        else:
            continue
        for module in modules:
            if not _allowed(module):
                raise _outside(name, module)
    top = symtable.symtable(ast.unparse(tree), "reward.py", "exec")
    names = {symbol.get_name() for table in _tables(top) for symbol in table.get_symbols() if symbol.is_global()}
    names |= {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    return sorted(names - {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()})


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """The scopes inside a scope, at any depth."""
    for child in table.get_children():
        yield child
        yield from _tables(child)


def _allowed(module: str) -> bool:
    top = module.partition(".")[0]
    return top == "torch" or (top in sys.stdlib_module_names and top != "importlib")


def _import_line(name: str, used: str, namespace: dict[str, Any]) -> str | None:
    """How `used`, a name of the function's module, is imported elsewhere; None for a builtin and torch itself."""
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
        return f"import {used}" if used == value.__name__ else f"import {value.__name__} as {used}"
    own = getattr(value, "__name__", used)
    if own in REFUSED and getattr(value, "__module__", None) == "builtins":
        raise _hidden(name, used)
    # Numbers and dtypes do not know their home: only these two modules are searched for them.
    homes = [getattr(value, "__module__", None), "torch", "math"]
    if hasattr(value, "__name__"):
        homes += sorted(filter(_allowed, sys.modules), key=lambda home: ("._" in home, home.count("."), home))
    for home in homes:
        if isinstance(home, str) and _allowed(home) and getattr(sys.modules.get(home), own, None) is value:
            return f"from {home} import {own}" if own == used else f"from {home} import {own} as {used}"
    raise _outside(name, used)
