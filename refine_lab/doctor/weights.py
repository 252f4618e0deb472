"""Checks a model's weights and head: finite numbers, the configured shapes and tying, and sensible predictions."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.data.sample import TEXT
from refine_lab.doctor.fault import Fault
from refine_lab.models import FastWeightLM
from refine_lab.training.loading import require_finite

SAMPLE_TOKENS = 512
"""Tokens of the sample text on which a trained model's head is judged."""


def check_weights(model: FastWeightLM, name: str) -> str:
    """Returns the size of the model. Raises Fault if a weight is NaN or infinite."""
    try:
        require_finite(model, name)
    except ValueError as error:
        raise Fault(f"{error}: use an earlier checkpoint, or fetch the files again") from error
    count = sum(p.numel() for p in model.parameters())
    return f"{count:,} parameters of {type(model).__name__}, all finite"


@torch.no_grad()
def check_head(model: FastWeightLM, tokenizer: PreTrainedTokenizerBase, config: Any, *, trained: bool) -> str:
    """Returns how well the head predicts the sample text, if the model is trained.

    `config` is the configuration as it was before the weights were read. Raises Fault if the head's shape or tying differs
    from it, and if a trained model's next-token loss on the sample text is not below that of a uniform guess.
    """
    text, head = config.get_text_config(), cast(Any, model.lm_head)
    shape, expected = (model.head.out_features, head.in_features), (text.vocab_size, text.hidden_size)
    if shape != expected:
        raise Fault(f"the head has the shape {shape}, and config.json says {expected}: use the head of this model")
    tied = head.weight is model.get_input_embeddings().weight
    if tied != bool(config.tie_word_embeddings):
        raise Fault(
            f"config.json sets tie_word_embeddings to {config.tie_word_embeddings}, but the weights contain "
            f"{'one tensor' if tied else 'two different tensors'} for embedding and head: correct config.json if the file is "
            "right, or the file if it holds another model's head"
        )
    if not trained:
        return f"{shape[0]:,} tokens from {shape[1]:,} channels; the weights are random"
    encoded: Any = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")
    tokens = encoded.input_ids[:, :SAMPLE_TOKENS].to(model.device)
    hidden = model.read(tokens).hidden_states
    loss = -float(model.head(hidden[:, :-1], tokens[:, 1:], entropy=False).logprobs.mean())
    guess = math.log(shape[0])
    if not loss < guess:
        raise Fault(
            f"the loss on a sample text is {loss:.2f} nats a token, and a uniform guess has {guess:.2f}: the weights are "
            "untrained, or the head or the tokenizer belongs to another model; compare them with their source"
        )
    return f"{shape[0]:,} tokens from {shape[1]:,} channels; {loss:.2f} nats a token on a sample text (a guess: {guess:.2f})"
