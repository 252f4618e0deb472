"""The parity comparison: branching from states against re-reading each prefix, quantity by quantity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import chain
from math import inf, isnan, nan

import torch
from torch import Tensor, nn
from transformers.utils import logging

from refine_lab.config import TrainConfig
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.ops.precision import without_tf32
from refine_lab.parity.procedures import GROUP, Branched, Probe, Reread, gradients, layer_outputs, logits_of, reread
from refine_lab.parity.report import Comparison, Parity
from refine_lab.validation import require

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-2, 1e-1),
    torch.bfloat16: (5e-2, 3e-1),
}
"""Precision of the arithmetic -> allowed relative errors of hidden states and logits, and of gradients."""

MUON_GRADIENT = 1e-4
"""Tolerance of float32 gradients if a layer orthogonalises its updates: five Newton-Schulz steps magnify rounding."""

SMALL = 1e-3
"""A parameter whose gradient is below this fraction of the model's largest is measured relative to that fraction."""

ROUNDING, ROUNDING_LIMIT = 4.0, 1e-3
"""A float32 gradient may deviate by this many times re-reading's own deviation from float64, up to the limit."""

QUANTITIES = ("state", "hidden", "logits", "decoded", "greedy", "gradient")


def parity(
    model: FastWeightLM,
    *,
    prefixes: Sequence[int] | None = None,
    rollout_length: int = 5,
    autocast: str | None = None,
    seed: int = 0,
) -> Parity:
    """Compares state-and-branch with re-reading each prefix, on the model's own device and in its dtype.

    For each prefix (by default those around the boundaries of the model's chunks and windows), a is compared with b from
    re-reading:

        state      the state that was branched from, after branching, against a copy from before: bitwise equal, and its
                   length equal to the prefix's
        hidden     of the prefix's last token and of a continuation read at once:  max|a - b| / max|b|; if the prefix is
                   its whole row, also of the continuation read from the row's final state
        logits     at the same positions
        decoded    logits of the same continuation, read token by token from state to state
        greedy     by how much the logit of a greedy token is below the largest:  max(b) - b[token], over max|b|
        gradient   of REFINE's policy loss (eq. 10) through branch and prefix, for each parameter p:
                   ||a_p - b_p|| / max(||b_p||, 1e-3 max_q ||b_q||)

    The gradient's floor is needed because a gradient that nearly cancels keeps the rounding of its terms; one that is
    missing altogether is still detected down to 1e-8 of the largest. If a float32 gradient deviates by more than
    allowed, the rounding of re-reading itself is measured in float64, and four times that is allowed, up to 1e-3: with
    a key of nearly zero norm, any order of summation gives a different result. `autocast` corresponds to
    `TrainConfig.dtype`; the text is random, drawn from `seed`.

    Raises ValueError for a length below 1, a precision without tolerances, and a model without trainable parameters.
    """
    lengths = default_prefixes(model) if prefixes is None else list(prefixes)
    valid = len(lengths) > 0 and all(type(length) is int and length >= 1 for length in lengths)
    require(valid, "prefixes", lengths, "whole numbers, at least one, each at least 1")
    require(rollout_length >= 1, "rollout_length", rollout_length, "at least 1")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the parity check compares gradients, but no parameter of the model requires gradients")
    low = autocast not in (None, "float32")
    precision = getattr(torch, autocast) if autocast is not None and low else model.dtype
    subject, allowed = _tolerances(model, precision)
    with (
        without_tf32(),
        torch.autocast(model.device.type, precision if low else None, enabled=low),
        torch.enable_grad(),
    ):
        branched = Branched.of(model, Probe.of(model, sorted(set(lengths)), rollout_length, seed))
        found = [_compare(model, branched, prefix, allowed) for prefix in branched.prefixes.unique().tolist()]
        rows = sorted(chain.from_iterable(found), key=lambda row: (QUANTITIES.index(row.quantity), row.prefix))
        forward = [row for row in rows if row.quantity in ("hidden", "logits") and not row.holds]
        layer = _first_wrong_layer(model, branched, forward[0]) if forward else None
    return Parity(subject, tuple(rows), layer)


def parity_of(config: TrainConfig) -> Parity:
    """Runs the gate for the initial model of a run of `config`, on its device and in its arithmetic."""
    quiet()
    model, _ = load_model(config.model, device=config.device, seed=config.seed, settings=config.model_settings)
    checkpoint_activations(model, config.activation_checkpointing)
    return parity(model, autocast=config.dtype)


def quiet() -> None:
    """Disables progress bars for short loads, which a notebook would keep as blank output."""
    logging.disable_progress_bar()


def default_prefixes(model: FastWeightLM) -> list[int]:
    """Returns 1, 2, three lengths around each of the model's borders (-2, 0, +1 tokens) and one beyond twice the largest.

    See `FastWeightLM.borders` and `FastWeightLM.later_borders`.
    """
    around = (border + step for border in model.borders | model.later_borders for step in (-2, 0, 1))
    return sorted({1, 2, 2 * max(model.borders) + 1, *around})


def _tolerances(model: FastWeightLM, precision: torch.dtype) -> tuple[str, tuple[float, float]]:
    """Returns a description of the comparison, and the allowed errors of outputs and of gradients."""
    if precision not in TOLERANCES:
        names = ", ".join(str(x).removeprefix("torch.") for x in TOLERANCES)
        raise ValueError(f"parity has tolerances for {names}, but not for {str(precision).removeprefix('torch.')}")
    subject = f"{type(model).__name__} in {str(precision).removeprefix('torch.')} on {model.device}"
    if precision in (torch.float32, torch.float64) and (kernels := model.kernel_dtype) is not None:
        return f"{subject} (kernels in {str(kernels).removeprefix('torch.')})", TOLERANCES[kernels]
    outputs, gradient = TOLERANCES[precision]
    if precision == torch.float32 and model.orthogonalises_updates:
        gradient = MUON_GRADIENT
    return subject, (outputs, gradient)


def _compare(
    model: FastWeightLM, branched: Branched, prefix: int, allowed: tuple[float, float]
) -> Iterator[Comparison]:
    """Yields the rows of all branches with one prefix length."""
    outputs, gradient = allowed
    members, named = branched.members(prefix), {name: p for name, p in model.named_parameters() if p.requires_grad}
    num_tokens, parameters = len(members) * branched.tokens.shape[1], list(named.values())
    worst: dict[str, tuple[float, str]] = {}
    reference = [torch.zeros_like(p) for p in parameters]
    for branch in members:
        expected = reread(model, branched, branch, num_tokens, parameters)
        for total, part in zip(reference, expected.gradients, strict=True):
            total += part
        for name, error, place in _forward_errors(model, branched, branch, expected):
            where = f"row {branched.row(branch)}, branch {branch % GROUP}, token {place}"
            worst[name] = max(worst.get(name, (-inf, "")), (error, where), key=lambda x: _size(x[0]))
    changed = _changes(branched, members)
    tensor = max(changed, key=lambda name: _size(changed[name]))
    yield Comparison("state", prefix, changed[tensor], 0.0, tensor)
    for name, (error, where) in worst.items():  # two logits, each off by what is allowed, may change places
        yield Comparison(name, prefix, error, 2 * outputs if name == "greedy" else outputs, where)
    if any(change for name, change in changed.items() if name != "lengths"):  # torch refuses a backward through it
        yield Comparison("gradient", prefix, nan, gradient, "not taken: the state was changed in place")
        return
    ours = gradients(branched.loss(branched.logprobs[members], members, num_tokens), parameters, keep=True)
    errors = dict(zip(named, _distances(ours, reference), strict=True))
    if gradient < max(map(_size, errors.values())) <= ROUNDING_LIMIT and parameters[0].dtype == torch.float32:
        rounding = _rounding(model, branched, prefix, reference)
        name = max(errors, key=lambda name: errors[name] / max(gradient, rounding[name]))
        gradient = max(gradient, min(ROUNDING_LIMIT, rounding[name]))
    else:
        name = max(errors, key=lambda name: _size(errors[name]))
    yield Comparison("gradient", prefix, errors[name], gradient, name)


@torch.no_grad()
def _forward_errors(
    model: FastWeightLM, branched: Branched, branch: int, expected: Reread
) -> list[tuple[str, float, int]]:
    """Returns (quantity, relative error, position: 0 is the prefix's last token) of one branch."""
    hidden, scale = branched.hidden_states[branch], expected.logits.abs().max()
    before, decoded = expected.logits[:-1], logits_of(model, branched.decoded[branch])
    found = [
        ("hidden", (hidden - expected.hidden_states).abs().amax(-1) / expected.hidden_states.abs().max()),
        ("logits", (logits_of(model, hidden) - expected.logits).abs().amax(-1) / scale),
        ("decoded", (decoded - before).abs().amax(-1) / scale),
    ]
    if branched.prefixes[branch] == branched.lengths[branched.row(branch)]:
        at_once = model.read(branched.tokens[[branch]], state=branched.final.select([branched.row(branch)]))
        from_final = (at_once.hidden_states[0] - expected.hidden_states[1:]).abs().amax(-1)
        found.append(("hidden", from_final / expected.hidden_states.abs().max()))
    if branch % GROUP == 0:
        chosen = before.gather(-1, branched.tokens[branch].unsqueeze(-1)).squeeze(-1)
        found.append(("greedy", (before.amax(-1) - chosen) / scale))
    return [
        (name, float(errors.max()), int(errors.argmax())) for name, errors in found
    ]  # torch counts NaN as the largest


def _size(error: float) -> float:
    return inf if isnan(error) else error


def _changes(branched: Branched, members: list[int]) -> dict[str, float]:
    """Returns how much branching changed each tensor of the original state; lengths are compared with the prefixes."""
    before, after = branched.before.select(members), branched.after.select(members)
    sources = [{} if state.sources is None else {"sources": state.sources} for state in (before, after)]
    lengths = ({"lengths": branched.prefixes[members]}, {"lengths": after.lengths})
    parts = ((before.tensors, after.tensors), (before.shared, after.shared), (sources[0], sources[1]), lengths)
    return {name: float((b[name] - x).abs().max()) if x.numel() else 0.0 for a, b in parts for name, x in a.items()}


def _distances(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Returns ||a_p - b_p|| / max(||b_p||, 1e-3 max_q ||b_q||) for each parameter p."""
    sizes = [float(b.norm()) for b in reference]
    floor = max(SMALL * max(sizes), torch.finfo(torch.float64).tiny)
    return [float((a - b).norm()) / max(size, floor) for a, b, size in zip(gradient, reference, sizes, strict=True)]


def _rounding(model: FastWeightLM, branched: Branched, prefix: int, reference: list[Tensor]) -> dict[str, float]:
    """Returns `ROUNDING` times the distance of each parameter's re-read gradient from its float64 value."""
    exact, members = deepcopy(model).double(), branched.members(prefix)
    named = {name: p for name, p in exact.named_parameters() if p.requires_grad}
    totals, num_tokens = [torch.zeros_like(p) for p in named.values()], len(members) * branched.tokens.shape[1]
    for branch in members:
        expected = reread(exact, branched, branch, num_tokens, list(named.values()))
        for total, part in zip(totals, expected.gradients, strict=True):
            total += part
    distances = _distances([b.double() for b in reference], totals)
    return {name: ROUNDING * distance for name, distance in zip(named, distances, strict=True)}


@torch.no_grad()
def _first_wrong_layer(model: FastWeightLM, branched: Branched, row: Comparison) -> str | None:
    """Returns the first layer whose outputs for a continuation read at once differ from those of re-reading."""
    layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for branch in branched.members(row.prefix):
        outputs = layer_outputs(model, branched.tokens[[branch]], branched.before.select([branch]))
        expected = (x[:, row.prefix :] for x in layer_outputs(model, branched.whole(branch)))
        for number, (a, b) in enumerate(zip(outputs, expected, strict=True)):
            if not float((a - b).abs().max()) <= row.tolerance * float(b.abs().max()):
                return f"{layers}.{number}"
    return None
