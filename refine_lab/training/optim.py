"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from refine_lab.config import TrainConfig, UpdateConfig
from refine_lab.models.base import FastWeightLM
from refine_lab.runs.checkpoints import OPTIMIZER
from refine_lab.workers import sharded_like, whole_on_cpu


def make_optimizers(
    policy: FastWeightLM, config: UpdateConfig, parameters: Sequence[Tensor] | None = None
) -> list[Optimizer]:
    """Returns AdamW (betas 0.9 and 0.999, table D.1), or Muon for the hidden matrices and AdamW for the rest.

    They update `parameters`, a subset of the policy's parameters, or all of them.
    """
    parameters = list(policy.parameters() if parameters is None else parameters)
    fused = True if parameters and all(p.is_cuda for p in parameters) else None  # None: torch's own choice
    if config.optimizer == "adamw":
        return [AdamW(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=fused)]
    ends = {id(p) for module in (policy.lm_head, policy.get_input_embeddings()) for p in module.parameters()}
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in ends]
    rest = [p for p in parameters if p.ndim != 2 or id(p) in ends]
    # scaled to AdamW's update size (Liu et al., 2025; arXiv 2502.16982), so that one learning rate serves both
    muon = Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=fused)]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the rate of batch `step`, from 1: linear warm-up, then constant, or linear to zero one batch after the last."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = (config.steps - step + 1) / max(1, config.steps - config.warmup_steps)
    return config.lr * left


def set_learning_rate(optimizers: Sequence[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def moments_of(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Returns the moments of all optimizers as whole tensors `<optimizer>.<parameter>.<moment>`; every worker must call it."""
    return {
        f"{number}.{index}.{name}": whole_on_cpu(torch.as_tensor(value)).contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def save(optimizers: Sequence[Optimizer], folder: Path, moments: Mapping[str, Tensor] | None = None) -> None:
    """Saves the moments of all optimizers in a checkpoint's folder; `moments` are those that `moments_of` has returned."""
    tensors = dict(moments_of(optimizers) if moments is None else moments)
    save_file(tensors, folder / OPTIMIZER, metadata={"optimizers": _names(optimizers)})


def load(optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Restores the moments that `save` wrote; prints a notice, and keeps new moments, if those are of other optimizers."""
    with safe_open(folder / OPTIMIZER, "pt") as file:
        saved = (file.metadata() or {}).get("optimizers")
    if saved not in (None, _names(optimizers)):
        print(f"The moments of {saved} are not used: the run continues with {_names(optimizers)}.", flush=True)
        return
    states: list[dict[int, dict[str, Tensor]]] = [defaultdict(dict) for _ in optimizers]
    parameters = [[x for group in each.param_groups for x in group["params"]] for each in optimizers]
    for key, value in load_file(folder / OPTIMIZER).items():
        number, index, name = key.split(".", 2)
        states[int(number)][int(index)][name] = sharded_like(parameters[int(number)][int(index)], value)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _names(optimizers: Sequence[Optimizer]) -> str:
    return ", ".join(type(optimizer).__name__ for optimizer in optimizers)
