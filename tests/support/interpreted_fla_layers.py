"""The kernels of some of fla's own layers under Triton's interpreter against recurrences in float64, forward and backward.

Run by tests/ops/test_triton_interpreter.py in a process of its own. A model of fla's runs these kernels in float32 or
bfloat16; here they run in float32, where errors are those of the algorithm alone, but for one that refuses float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from tests.support.interpreted_fla_kernels import values_and_gradients
from tests.support.triton_interpreter import install

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH, HEADS, K, V = 66, 1, 16, 32


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    install()
    for part in ("fwd", "bwd"):  # they have bound `tl.gather` by name, which the interpreter replaces in `tl`
        module = import_module(f"fla.ops.generalized_delta_rule.dplr.chunk_A_{part}")
        vars(module)["gather"] = lambda *arguments, **named: tl.gather(*arguments, **named)


# -- recurrences: S [B, H, dk, dv], one token after another ----------------------------------------------------------------


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def read(state: Tensor, q: Tensor) -> Tensor:
    return (state * q.unsqueeze(-1)).sum(-2)


def over_tokens(state: Tensor, step: Callable[..., tuple[Tensor, Tensor]], *streams: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, dv] and the final state of a step (state, one token of every stream) -> (output, state)."""
    outputs = []
    for token in zip(*(x.unbind(1) for x in streams), strict=True):
        output, state = step(state, *token)
        outputs.append(output)
    return torch.stack(outputs, 1), state


def gated_linear(q, k, v, g, state):
    def step(s, q, k, v, g):
        s = s * g.exp().unsqueeze(-1) + outer(k, v)
        return read(s, q) * K**-0.5, s

    return over_tokens(state, step, q, k, v, g)


def delta_with_diagonal_decay(q, k, v, g, beta, state):
    def step(s, q, k, v, g, beta):
        s = s * g.exp().unsqueeze(-1)
        s = s + outer(k, beta.unsqueeze(-1) * (v - read(s, k)))
        return read(s, q) * K**-0.5, s

    return over_tokens(state, step, q, k, v, g, beta)


def comba(q, k, v, p, g, beta, state):
    """What p removes is read before the state decays, in both of fla's kernels; `naive_recurrent_comba` reads it after."""

    def step(s, q, k, v, p, g, beta):
        write = outer(k, beta.unsqueeze(-1) * (v - read(s, p)))
        s = s * g.exp()[..., None, None] + write
        return read(s, q) * K**-0.5, s

    return over_tokens(state, step, q, k, v, p, g, beta)


def delta_product(q, k, v, g, beta, state):
    """Two writes a token: keys, values and strengths have two entries for each query."""

    def step(s, q, k, v, g, beta):
        s = s * g.exp()[..., None, None]
        for n in range(2):
            s = s + outer(k[:, n], beta[:, n].unsqueeze(-1) * (v[:, n] - read(s, k[:, n])))
        return read(s, q) * K**-0.5, s

    return over_tokens(state, step, q, *(x.unflatten(1, (-1, 2)) for x in (k, v)), g, beta.unflatten(1, (-1, 2)))


def rwkv7(q, w, k, v, a, b, state):
    """What a reads from the state is written at b."""

    def step(s, q, w, k, v, a, b):
        s = s * w.exp().unsqueeze(-1) + outer(b, read(s, a)) + outer(k, v)
        return read(s, q), s

    return over_tokens(state, step, q, w, k, v, a, b)


def mesa(q, k, v, g, beta, lamb, squares, state):
    """The query is first solved against the sum of the keys' outer products, where the kernel iterates."""

    def solve(squares, q, k, v, g, beta):
        squares = squares * g.exp()[..., None, None] + outer(beta.unsqueeze(-1) * k, k)
        return torch.linalg.solve(squares + torch.diag_embed(lamb), q), squares

    def step(s, q, k, v, g, beta):
        s = s * g.exp()[..., None, None] + outer(beta.unsqueeze(-1) * k, v)
        return read(s, q), s

    solved, squares = over_tokens(squares, solve, q, k, v, g, beta)
    outputs, state = over_tokens(state, step, solved, k, v, g, beta)
    return outputs, squares, state


def gated_slots(q, k, v, s, g, keys, values):
    """Gated slot attention: a memory of keys is read, its softmax reads a memory of values."""

    def write(state, q, k, s, g):
        state = state * g.exp().unsqueeze(-2) + outer(k, s)
        return read(state, q) * K**-0.5, state

    def fetch(state, p, s, v, g):
        state = state * g.exp().unsqueeze(-1) + outer(s, v)
        return read(state, p), state

    scores, keys = over_tokens(keys, write, q, k, s, g)
    outputs, values = over_tokens(values, fetch, scores.softmax(-1), s, v, g)
    return outputs, keys, values


# -- kernels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A kernel by module and name, its settings, its streams, which of them are states, and the recurrence."""

    kernel: str
    streams: str
    reference: Callable[..., tuple[Tensor, ...]]
    states: tuple[str, ...] = ("initial_state",)
    settings: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    bound: float = 2e-5

    @property
    def names(self) -> list[str]:
        return [*self.streams.split(), *self.states]

    def dtype_of(self, name: str) -> torch.dtype:
        """States and gates are float32 in every case."""
        return torch.float32 if name in (*self.states, "g_head") else self.dtype

    def call(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = {name: name.partition("_")[0].rstrip("2") for name in self.streams.split()}
        named = {
            arguments.get(name, name): x.to(self.dtype_of(name)) for name, x in zip(self.names, inputs, strict=True)
        }
        if len(self.states) == 2 and "initial" in self.states[0]:
            named["initial_state"] = (named.pop(self.states[0]), named.pop(self.states[1]))
        module, _, name = self.kernel.rpartition(".")
        function = getattr(import_module(f"fla.ops.{module}"), name)
        outputs, *final = function(**named, **dict(self.settings), output_final_state=True)
        return (outputs, *(final[0] if isinstance(final[0], (tuple, list)) else final))


CASES = {
    "gla": Case("gla.chunk_gla", "q k v g", gated_linear),
    "kda": Case("kda.chunk_kda", "q k v g beta", delta_with_diagonal_decay),
    "comba": Case("comba.chunk_comba", "q k v p g_head beta", comba),
    "gated_deltaproduct": Case(
        "gated_delta_product.chunk_gated_delta_product",
        "q k2 v2 g_head beta2",
        delta_product,
        settings=(("num_householder", 2), ("scale", K**-0.5)),
        dtype=torch.bfloat16,
        bound=1.2e-2,
    ),
    "rwkv7": Case("rwkv7.chunk_rwkv7", "r w k v a b", rwkv7),
    "mesa_net": Case(
        "mesa_net.chunk_mesa_net", "q k v_k g_head beta lamb", mesa, states=("h_kk_init", "h_kv_init"), bound=5e-3
    ),
    "gsa": Case("gsa.chunk_gsa", "q k v s g_slots", gated_slots, states=("initial_keys", "initial_values")),
}
"""`model_type` -> its kernel; HGRN2 runs that of GLA."""


def stream(name: str, generator: torch.Generator) -> Tensor:
    """A random input of that name, as the layers of fla make it: unit keys, gates below 0 in the log."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (1, LENGTH, HEADS)
    match name:
        case "q" | "k" | "p" | "r" | "a":
            return F.normalize(normal(*tokens, K), dim=-1)
        case "k2":
            return F.normalize(normal(1, 2 * LENGTH, HEADS, K), dim=-1)
        case "v":
            return normal(*tokens, V)
        case "b":
            return F.normalize(normal(*tokens, K), dim=-1) / 2
        case "v_k":
            return normal(*tokens, K)
        case "v2":
            return normal(1, 2 * LENGTH, HEADS, V)
        case "s":
            return normal(*tokens, 16).sigmoid()
        case "g" | "g_slots" | "w":
            return F.logsigmoid(normal(*tokens, K) + 2)
        case "g_head":
            return F.logsigmoid(normal(*tokens) + 2)
        case "beta":
            return normal(*tokens).sigmoid()
        case "beta2":
            return normal(1, 2 * LENGTH, HEADS).sigmoid()
        case "lamb":
            return F.softplus(normal(HEADS, K)) + 0.25
        case "h_kk_init":
            x = normal(1, HEADS, K, K)
            return x @ x.mT / K
        case "h_kv_init":
            return normal(1, HEADS, K, K)
        case "initial_keys":
            return normal(1, HEADS, K, 16)
        case "initial_values":
            return normal(1, HEADS, 16, V)
    return normal(1, HEADS, K, V)


@pytest.mark.parametrize("model_type", CASES)
def test_a_kernel_of_flas_layers(model_type):
    case, generator = CASES[model_type], torch.Generator().manual_seed(0)
    inputs = [stream(name, generator).to(case.dtype_of(name)).double() for name in case.names]
    found, expected = (values_and_gradients(function, inputs) for function in (case.call, case.reference))
    for name, a, b in zip([*["values"] * (len(found) - len(inputs)), *case.names], found, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        print(f"{model_type} {name}: {error:.1e}")
        assert error < case.bound, (name, error)
