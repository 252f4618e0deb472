"""Checks the kernels: the delta rule, norms and the head on the model's device against float64 on the CPU, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refine_lab.doctor.fault import Fault
from refine_lab.doctor.packages import GATED
from refine_lab.models import FastWeightLM
from refine_lab.models.fla_models import FLA_MODELS
from refine_lab.ops.delta_rule import chunk_delta_rule, delta_rule
from refine_lab.ops.fla_delta_rule import serves
from refine_lab.ops.fused import add_and_norm, swiglu
from refine_lab.ops.head import token_stats
from refine_lab.ops.kernels import chosen
from refine_lab.ops.precision import autocast

LENGTH = 150
"""Tokens of the comparison: two chunks and a part of a third."""

ROUNDING = {"cpu": (1e-5, 1e-4), "cuda": (3e-2, 6e-2)}
"""Device type -> largest relative errors of values and of gradients; on CUDA kernels read and write bfloat16."""

Rule = Callable[..., tuple[Tensor, ...]]


def check_kernels(model: FastWeightLM, rule: Rule | None = None) -> str:
    """Returns the errors of the rule that the model's layers use, and of the head's statistics.

    `rule` replaces the rule of the device. Raises Fault for an error above `ROUNDING`.
    """
    shape, kind = _head_shape(model), model.config.get_text_config().model_type
    errors = {"head": _head_errors(model), "norms and SwiGLU": _layer_errors(model)}
    if shape is not None:
        errors["delta rule"] = _errors(
            lambda *x: _on(model.device, rule or run_rule, x),
            lambda *x: run_rule(*x, one_by_one=True),
            _inputs(*shape, gated=kind in GATED),
        )
    _require_small(errors, model.device.type)
    head = f"the head's statistics differ from float64 by at most {max(errors['head']):.1e}, norms and SwiGLU by "
    head += f"{max(errors['norms and SwiGLU']):.1e}"
    if shape is None:
        reason = (
            "fla's own layers have no torch rule" if kind in FLA_MODELS else "its layers use no kernel of ours or fla's"
        )
        return f"{head}; {reason}: the parity check compares them with re-reading"
    name, parts = _name_of_rule(model, gated=kind in GATED), "values and gradients"
    return f"{name} differs from float64, token by token, by at most {max(errors['delta rule']):.1e} in {parts}; {head}"


def _name_of_rule(model: FastWeightLM, *, gated: bool) -> str:
    if chosen("chunks", torch.empty(0, device=model.device)):
        return "the delta rule on our kernel"
    return "fla's kernel of the delta rule" if serves(model.device, gated=gated) else "the delta rule in torch"


def run_rule(*inputs: Tensor, one_by_one: bool = False) -> tuple[Tensor, Tensor]:
    """Returns outputs and final state of (q, k, v, beta, initial state, log gate if there is one)."""
    q, k, v, beta, state, *rest = inputs
    gate = rest[0] if rest else None
    if not one_by_one:
        outputs, states = delta_rule(q, k, v, beta, state, gate)
        return outputs, states.at(torch.full((len(q), 1), q.shape[1] - 1, device=q.device))
    columns = []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        gates = None if gate is None else gate[:, now]
        outputs, states = chunk_delta_rule(q[:, now], k[:, now], v[:, now], beta[:, now], state, gates)
        state = states.at(torch.zeros(len(q), 1, dtype=torch.long))
        columns.append(outputs)
    return torch.cat(columns, 1), state


def _head_shape(model: FastWeightLM) -> tuple[int, int, int] | None:
    """Returns heads, key and value width of the model's first matrix-valued delta-rule state, or None if it has none."""
    if model.config.get_text_config().model_type in FLA_MODELS:
        return None
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        tensors = model.read(token).final_state.tensors
    shapes = [x.shape for name, x in tensors.items() if name.endswith("recurrent_state") and x.ndim == 4]
    return (shapes[0][1], shapes[0][2], shapes[0][3]) if shapes else None


def _inputs(heads: int, dk: int, dv: int, *, gated: bool) -> list[Tensor]:
    """Returns random inputs of one row in float64, at most four heads of them."""
    generator, heads = torch.Generator().manual_seed(0), min(heads, 4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(LENGTH, heads, dk), dim=-1) for _ in range(2))
    inputs = [q * dk**-0.5, k, normal(LENGTH, heads, dv), normal(LENGTH, heads).sigmoid(), normal(heads, dk, dv)]
    return [*inputs, -F.softplus(normal(LENGTH, heads))] if gated else inputs


def _on(device: torch.device, rule: Rule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return rule(*(x.to(device, torch.float32) for x in inputs))


def _errors(found: Rule, expected: Rule, inputs: list[Tensor]) -> tuple[float, float]:
    """Returns the largest relative errors of two functions' values and gradients."""
    generator, results = torch.Generator().manual_seed(1), []
    weights: list[Tensor] = []
    for function in (expected, found):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        values = [x.double().cpu() for x in function(*leaves)]
        weights = weights or [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in values]
        loss = sum((x * w).sum() for x, w in zip(values, weights, strict=True))
        assert isinstance(loss, Tensor)
        results.append(([x.detach() for x in values], torch.autograd.grad(loss, leaves)))
    (values, gradients), (ours, our_gradients) = results
    return _furthest(ours, values), _furthest(our_gradients, gradients)


def _furthest(found, expected) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def _head_errors(model: FastWeightLM) -> tuple[float, float]:
    """Returns the errors of log-probabilities, entropies and their gradients for a few random hidden states."""
    generator = torch.Generator().manual_seed(2)
    head: Any = model.lm_head
    vocabulary, width = model.head.out_features, head.in_features
    hidden = torch.randn(8, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * width**-0.5
    ids = torch.randint(vocabulary, (8,), generator=generator)

    def statistics(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found = token_stats(hidden, weight, ids.to(hidden.device))
        return found.logprobs, found.entropies

    return _errors(lambda *x: _on(model.device, statistics, x), statistics, [hidden, weight])


def _layer_errors(model: FastWeightLM) -> tuple[float, float]:
    """Returns the errors of a residual connection with its norm and of SwiGLU, in the arithmetic of training."""
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(2, 9, width, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5

    def layers(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        norm = nn.RMSNorm(width, eps=1e-5)
        del norm.weight
        norm.weight = weight  # type: ignore[assignment]  # a tensor through which gradients flow
        with autocast(x.device, "bfloat16" if x.is_cuda else "float32"):
            y, total = add_and_norm(norm, x, residual)
            gate = y.bfloat16() if x.is_cuda else y
            return y, total, swiglu(gate, gate, lambda product: product)

    return _errors(lambda *x: _on(model.device, layers, x), layers, [x, residual, weight])


def _require_small(errors: Mapping[str, tuple[float, float]], device: str) -> None:
    """Raises Fault for errors above what the device's arithmetic rounds, and for NaN."""
    for name, (value, gradient) in errors.items():
        for kind, error, allowed in zip(("values", "gradients"), (value, gradient), ROUNDING[device], strict=True):
            if not error <= allowed:
                raise Fault(
                    f"the {kind} of the {name} differ from float64 on the CPU by {error:.1e}, and {allowed:.0e} is allowed: "
                    "do not train with this combination of device, driver, Triton and fla; install the versions of "
                    "requirements.lock, and unset REFINE_KERNELS if it is set"
                )
