"""What the tests of fla models and others share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from refine_lab.models import FastWeightLM
from refine_lab.models.fla_models import FlaLM, fla_family

VOCABULARY = 31


class Layer(nn.Module):
    """A decaying matrix memory over convolved tokens that keeps its state as fla's layers do, in-place decoding included."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.number, self.conv = number, nn.Parameter(torch.randn(width, 3) * 0.5)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor, cache) -> Tensor:
        last = cache[self.number] if len(cache) > self.number else None
        (window,) = last["conv_state"] if last else (x.new_zeros(len(x), x.shape[-1], 3),)
        memory, norm = (
            last["recurrent_state"] if last else (x.new_zeros(len(x), *[x.shape[-1]] * 2), torch.zeros_like(x[:, 0]))
        )
        outputs = []
        for token in x.unbind(1):
            moved = torch.cat([window[..., 1:], token.unsqueeze(-1)], -1)
            window = window.copy_(moved) if x.shape[1] == 1 and not torch.is_grad_enabled() else moved
            y = (window * self.conv).sum(-1)
            memory = 0.9 * memory + self.k(y).tanh().unsqueeze(-1) * self.v(y).unsqueeze(-2)
            norm = 0.9 * norm + y
            outputs.append((self.q(y).unsqueeze(-2) @ memory).squeeze(-2) + norm)
        cache.update(recurrent_state=(memory, norm), conv_state=(window,), layer_idx=self.number, offset=x.shape[1])
        return x + torch.stack(outputs, 1)


class Model(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Layer(width, number) for number in range(2)])
        self.seen: list[tuple[int, ...]] = []

    def forward(self, inputs_embeds, past_key_values, use_cache: bool, return_dict: bool, output_hidden_states: bool):
        assert use_cache and return_dict and self.training == torch.is_grad_enabled()
        self.seen.append(tuple(inputs_embeds.shape[:2]))
        x, inputs = inputs_embeds, []
        for layer in self.layers:
            inputs.append(x)
            x = layer(x, past_key_values)
        layers = (*inputs, x) if output_hidden_states else None
        return SimpleNamespace(last_hidden_state=x, past_key_values=past_key_values, hidden_states=layers)


class Double(FlaLM):
    """The adapter on a model whose kernels run here."""

    devices = ("cpu",)
    config_class = PreTrainedConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = Model()
        self.lm_head = nn.Linear(6, VOCABULARY, bias=False)


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def small(model_type: str, **fields) -> FastWeightLM:
    """A small random model of fla's."""
    config_class, model_class = fla_family(model_type)
    heads = {"num_heads": 2} | ({"head_dim": 32} if model_type not in ("gla", "gsa", "hgrn2") else {})
    narrow = {"expand_ratio": 32} if model_type == "hgrn2" else {}
    narrow |= {"expand_v": 1.0} if model_type in ("comba", "gated_deltaproduct", "kda") else {}
    sizes = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, vocab_size=VOCABULARY)
    return model_class(config_class(**{**sizes, **heads, **narrow, **fields})).eval()
