"""The models of which a step can be estimated, and how many weights each of their parts has."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM
from refine_lab.models.activation_checkpointing import blocks_of
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM
from refine_lab.models.loading import prepared
from refine_lab.validation import ConfigError, require


def _deltanet() -> DeltaNetConfig:
    return DeltaNetConfig(hidden_size=2048, num_hidden_layers=24, num_heads=16, vocab_size=32_000)


def _lact() -> LaCTConfig:
    return LaCTConfig(
        hidden_size=1536,
        num_hidden_layers=24,
        num_attn_heads=24,
        num_lact_heads=4,
        lact_chunk_size=2048,
        window_size=2048,
        use_muon=True,
        use_momentum=True,
        ttt_prenorm=True,
        w0_w2_low_rank=32,
        fp32_states=True,
        muon_dtype="bfloat16",
        max_position_embeddings=32_768,
        vocab_size=32_000,
    )


PUBLISHED: dict[str, Callable[[], Any]] = {"DeltaNet-1.3B": _deltanet, "LaCT-760M": _lact}
"""Name -> the shape of fla-hub/delta_net-1.3B-100B, and of LaCT-760M as in its paper (arXiv 2505.23884)."""

FAMILIES = {DeltaNetConfig: DeltaNetForCausalLM, LaCTConfig: LaCTForCausalLM}


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of the model, of its embedding and its head (one matrix if tied), and of each block."""

    all: int
    embedding: int
    head: int
    tied: bool
    blocks: int
    "The number of blocks."
    block: int
    linear: int
    "Those of a block's linear layers, which autocast copies to 16 bits."
    mlp: int
    "Those of its feed-forward layer."
    hidden_matrices: int
    "Those of all matrices except embedding and head, which the optimizer Muon updates."
    inner: int
    "The width of the feed-forward layer."

    @property
    def ends(self) -> int:
        """Returns the weights of embedding and head."""
        return self.head if self.tied else self.head + self.embedding


def described(model: FastWeightLM | str | Path | Any) -> tuple[Any, Weights]:
    """Returns the configuration of a model, of a name or of a configuration itself, and its numbers of weights.

    Raises ConfigError for a model whose tensors are not known here, and what `load_model` raises for a name.
    """
    if isinstance(model, (str, Path)):
        found: Any = PUBLISHED[str(model)]() if str(model) in PUBLISHED else prepared(model, device="cpu")[1]
    else:
        found = getattr(model, "config", model)
    allowed = "a DeltaNet or a LaCT: the tensors of other models have not been counted"
    if type(found) not in FAMILIES:
        name = getattr(found, "model_type", type(found).__name__)
        raise ConfigError("model", name, allowed, f"model must be {allowed}, got {name!r}")
    if isinstance(found, DeltaNetConfig):
        usual = (True, False, "l2", "silu")
        mine = (found.use_short_conv, found.use_gate, found.qk_norm, found.qk_activation)
        require(mine == usual, "use_short_conv, use_gate, qk_norm and qk_activation", mine, f"{usual} for an estimate")
    with torch.device("meta"):
        return found, _weights(FAMILIES[type(found)](deepcopy(found)))


def _weights(policy: FastWeightLM) -> Weights:
    def number(module: nn.Module) -> int:
        return sum(x.numel() for x in module.parameters())

    blocks, embedding, head = blocks_of(policy), policy.get_input_embeddings(), policy.lm_head
    first: Any = blocks[0]
    ends = {id(x) for module in (embedding, head) for x in module.parameters()}
    matrices = (x for x in policy.parameters() if x.ndim == 2 and id(x) not in ends)
    return Weights(
        all=number(policy),
        embedding=number(embedding),
        head=number(head),
        tied=embedding.weight is head.weight,
        blocks=len(blocks),
        block=number(first),
        linear=sum(x.weight.numel() for x in first.modules() if isinstance(x, nn.Linear)),
        mlp=number(first.mlp),
        hidden_matrices=sum(x.numel() for x in matrices),
        inner=first.mlp.gate_proj.out_features,
    )
