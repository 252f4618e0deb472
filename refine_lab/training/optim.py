"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from refine_lab.config import TrainConfig, UpdateConfig
from refine_lab.models.base import FastWeightLM


def make_optimizers(
    policy: FastWeightLM, config: UpdateConfig, parameters: Sequence[Tensor] | None = None
) -> list[Optimizer]:
    """Returns AdamW (betas 0.9 and 0.999, table D.1), or Muon for the hidden matrices and AdamW for the rest.

    They update `parameters`, a subset of the policy's parameters, or all of them.
    """
    parameters = list(policy.parameters() if parameters is None else parameters)
    if config.optimizer == "adamw":
        return [AdamW(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)]
    ends = {id(p) for module in (policy.lm_head, policy.get_input_embeddings()) for p in module.parameters()}
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in ends]
    chosen = {id(p) for p in hidden}
    rest = [p for p in parameters if id(p) not in chosen]
    # scaled to AdamW's update size (Liu et al., 2025; arXiv 2502.16982), so that one learning rate serves both
    muon = Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)]


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


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Returns the moments of all optimizers as named tensors, for safetensors: `<optimizer>.<parameter>.<moment>`."""
    return {
        f"{number}.{index}.{name}": torch.as_tensor(value).contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def load_optimizer_tensors(optimizers: Sequence[Optimizer], tensors: dict[str, Tensor]) -> None:
    """Restores the moments returned by `optimizer_tensors`."""
    for number, optimizer in enumerate(optimizers):
        whole, state = optimizer.state_dict(), {}
        for key, value in tensors.items():
            which, index, name = key.split(".", 2)
            if int(which) == number:
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**whole, "state": state})
