"""The step of a single token through DeltaNet or GatedDeltaNet as one compiled graph, for rollouts on CUDA.

Launching its kernels one by one takes longer than running them. The graph is captured once per number of rollouts, and
reads and overwrites the state in buffers that stay where they are, so that a CUDA graph replays it in one launch. Other
families, and the CPU, read each token with `FastWeightLM.read`, which gives the same result.

The environment variable `REFINE_COMPILE=0` switches the graph off, whose first compilation takes a minute or more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.models.backbone import Backbone
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import State
from refine_lab.models.writes import write_factors

SWITCH = "REFINE_COMPILE"
DEVICE = "cuda"
MOST_STEPS = 16
"""Most graphs at a time, each for a policy and a number of rollouts; further ones are read without one."""
RECOMPILATIONS = 64
"""Most graphs that torch compiles from `decode` before it raises an error; its own limit is 8."""


def decode(
    backbone: Backbone, buffers: dict[str, Tensor], tokens: Int[Tensor, "R"], places: Int[Tensor, "R 1"]
) -> None:
    """Reads one token from the state in `buffers`, and overwrites them with the new state and its hidden states.

    `places` are zeros: the position of the token in what is read.
    """
    x, state = backbone.embeddings(tokens.unsqueeze(1)), State(buffers, tokens)
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(backbone.layers):
        x, part = layer(x, state.layer(number))
        found |= {f"{number}.{name}": tensor for name, tensor in part(places).items()}
    found["hidden_states"] = backbone.norm(x)[:, 0]
    for name, tensor in found.items():
        buffers[name].copy_(tensor)


@cache
def compiled(backend: str = "inductor") -> Callable[..., None]:
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
    mode = "reduce-overhead" if backend == "inductor" else None
    return torch.compile(decode, fullgraph=True, dynamic=False, backend=backend, mode=mode)


class StaticStep:
    """The buffers of one number of rollouts, and the step that reads and overwrites them; made without gradients."""

    def __init__(self, state: State, hidden_states: Float[Tensor, "R D"]) -> None:
        self.buffers = {
            name: torch.empty_like(x) for name, x in ({**state.tensors, "hidden_states": hidden_states}).items()
        }
        self.places = torch.zeros(state.rows, 1, dtype=torch.int64, device=hidden_states.device)
        for buffer in (*self.buffers.values(), self.places):
            torch._dynamo.mark_static_address(buffer)

    def start(self, state: State) -> None:
        """Copies the state after the prefixes into the buffers."""
        for name, tensor in state.tensors.items():
            self.buffers[name].copy_(tensor)

    def __call__(self, backbone: Backbone, tokens: Int[Tensor, "R"]) -> Float[Tensor, "R D"]:
        """Returns the hidden states of `tokens`, which the next call overwrites."""
        compiled()(backbone, self.buffers, tokens, self.places)
        return self.buffers["hidden_states"]


_STEPS: WeakKeyDictionary[Backbone, dict[tuple, StaticStep]] = WeakKeyDictionary()


class Decoder:
    """Reads rollouts token by token from the `State` after their prefixes, without gradients."""

    def __init__(self, policy: FastWeightLM, state: State, hidden_states: Float[Tensor, "R D"]) -> None:
        self._policy, self._hidden_states = policy, hidden_states
        self._state: State | None = state
        self._step: StaticStep | None = None

    def __call__(self, tokens: Int[Tensor, "R"]) -> Float[Tensor, "R D"]:
        """Returns the final hidden states of the next tokens; they are valid until the next call."""
        if self._step is not None:
            return self._step(self._policy.model, tokens)
        state, self._state = self._state, None
        assert state is not None
        if compiles(self._policy, state) and (step := static_step(self._policy, state, self._hidden_states)):
            step.start(state)
            self._step = step
            return step(self._policy.model, tokens)
        trace = self._policy.read(tokens.unsqueeze(1), state=state)
        del state  # the memory of one state less while the next one is made
        self._state = trace.final_state
        return trace.hidden_states[:, 0]


def compiles(policy: FastWeightLM, state: State) -> bool:
    """Returns whether the step of a policy is compiled: on CUDA, if its blocks need nothing but their part of the state.

    Weights that are divided among devices (FSDP2) are gathered by hooks, and scaled writes change from token to token.
    """
    if policy.device.type != DEVICE or torch.is_grad_enabled() or os.environ.get(SWITCH) == "0":
        return False
    simple = isinstance(policy.model, Backbone) and type(policy.model).prepare is Backbone.prepare
    divided = hasattr(next(policy.parameters()), "device_mesh")
    return simple and not divided and state.sources is None and not write_factors()


def static_step(policy: FastWeightLM, state: State, hidden_states: Float[Tensor, "R D"]) -> StaticStep | None:
    """Returns the policy's step for states of this form, or None if there are `MOST_STEPS` others already."""
    steps = _STEPS.setdefault(policy.model, {})
    form = tuple((name, x.shape, x.dtype) for name, x in state.tensors.items())
    if form not in steps and sum(map(len, _STEPS.values())) < MOST_STEPS:
        steps[form] = StaticStep(state, hidden_states)
    return steps.get(form)
