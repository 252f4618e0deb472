"""Training by others' tools: transformers' Trainer with accumulation, PEFT's LoRA on every linear layer and on the head."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from refine_lab.config import RefineConfig, TrainConfig
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import FastWeightLM
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.head import Head, WrappedHead
from refine_lab.ops.head import HEAD_ROWS
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from tests.factories.step import make_batch
from tests.factories.transformers_contract import FAMILIES, tokens_of
from tests.support.naive import naive_loss
from tests.support.paths import ROOT

SWITCH = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""TrainingArguments' field, by its name in this version of transformers."""

LENGTHS = (9, 23, 14, 5, 30, 11, 8, 17, 26, 12, 6, 20)


@pytest.fixture(params=FAMILIES)
def policy(request) -> FastWeightLM:
    return FAMILIES[request.param]().double()


@pytest.fixture
def deltanet() -> FastWeightLM:
    return FAMILIES["delta_net"]().double()


# -- transformers' Trainer -----------------------------------------------------------------------------------------------


def collate(side: str):
    """Pad rows of unequal length on one side; labels of pads are -100."""

    def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        pads = [width - len(row["input_ids"]) for row in rows]
        ends = [(n, 0) if side == "left" else (0, n) for n in pads]
        ids = [row["input_ids"] for row in rows]
        padded = {
            "input_ids": [F.pad(x, end) for x, end in zip(ids, ends, strict=True)],
            "attention_mask": [F.pad(torch.ones_like(x), end) for x, end in zip(ids, ends, strict=True)],
            "labels": [F.pad(x, end, value=-100) for x, end in zip(ids, ends, strict=True)],
        }
        return {name: torch.stack(parts) for name, parts in padded.items()}

    return pad


def first_unlabelled(collated: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]):
    """The same batches with the label of each row's first token -100, as the warning on left pads advises."""

    def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collated(rows)
        first = batch["attention_mask"].cumsum(-1) * batch["attention_mask"] == 1
        return batch | {"labels": batch["labels"].masked_fill(first, -100)}

    return pad


def trained(policy: FastWeightLM, folder: Path, batch: int, accumulation: int, collator, **settings) -> float:
    """Three updates of four rows each by SGD; the mean training loss, in float64 (Trainer adds it up in float32)."""
    settings |= dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3)
    settings |= dict(optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True)
    settings |= dict(report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)
    rows = [{"input_ids": tokens_of(1, n, seed)[0]} for seed, n in enumerate(LENGTHS)]
    arguments = TrainingArguments(str(folder), **settings)
    losses: list[float] = []
    hook = policy.register_forward_hook(lambda *call: losses.append(call[2].loss.item()))
    Trainer(policy, arguments, train_dataset=rows, data_collator=collator).train()
    hook.remove()
    assert len(losses) == 12 // batch
    return sum(losses) / 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_accumulating_four_rows_is_training_on_them_at_once(policy, tmp_path, side):
    start = {name: x.clone() for name, x in policy.state_dict().items()}
    at_once = trained(policy, tmp_path, 4, 1, collate(side))
    once = {name: x.clone() for name, x in policy.state_dict().items()}
    policy.load_state_dict(start)
    one_by_one = trained(policy, tmp_path, 1, 4, collate(side))
    assert one_by_one == pytest.approx(at_once, abs=1e-8)
    for name, x in policy.state_dict().items():
        assert torch.allclose(x, once[name], rtol=0, atol=1e-8), name
    assert not all(torch.equal(x, start[name]) for name, x in once.items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_accumulating_two_by_two_is_training_on_four_at_once(deltanet, tmp_path, side):
    """With pads on the left only where no row's first token has a label: transformers counts that one, a pad before it."""
    collator = first_unlabelled(collate(side)) if side == "left" else collate(side)
    start = {name: x.clone() for name, x in deltanet.state_dict().items()}
    at_once = trained(deltanet, tmp_path, 4, 1, collator)
    once = {name: x.clone() for name, x in deltanet.state_dict().items()}
    deltanet.load_state_dict(start)
    assert trained(deltanet, tmp_path, 2, 2, collator) == pytest.approx(at_once, abs=1e-8)
    for name, x in deltanet.state_dict().items():
        assert torch.allclose(x, once[name], rtol=0, atol=1e-8), name


@torch.no_grad()
def test_num_items_in_batch_divides_the_sum_over_an_update(policy):
    rows = [{"input_ids": tokens_of(1, n, seed)[0]} for seed, n in enumerate(LENGTHS[:4])]
    count = sum(LENGTHS[:4]) - 4
    means = [float(policy(row["input_ids"][None], labels=row["input_ids"][None]).loss) for row in rows]
    mean = sum(m * (n - 1) for m, n in zip(means, LENGTHS, strict=False)) / count
    for parts in ([rows], [rows[:3], rows[3:]], [[row] for row in rows]):
        losses = [
            float(policy(**collate("right")(part), num_items_in_batch=torch.tensor(count)).loss) for part in parts
        ]
        assert sum(losses) == pytest.approx(mean, abs=1e-12)
    assert float(policy(**collate("right")(rows)).loss) == pytest.approx(mean, abs=1e-12)


def test_trainer_switches_checkpointing_on(deltanet, tmp_path):
    plain = {name: x.clone() for name, x in deltanet.state_dict().items()}
    expected = trained(deltanet, tmp_path, 4, 1, collate("right"))
    deltanet.load_state_dict(plain)
    assert trained(deltanet, tmp_path, 4, 1, collate("right"), **{SWITCH: True}) == pytest.approx(expected, abs=1e-10)
    assert deltanet.is_gradient_checkpointing


# -- the head as a module ------------------------------------------------------------------------------------------------


def own_loss(policy: FastWeightLM, tokens: Tensor) -> Tensor:
    """The next-token loss of the logits that the model gives."""
    logits = policy(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(loss: Tensor, policy: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-12) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)


def test_a_bias_on_the_head_is_trained(policy):
    policy.lm_head.bias = nn.Parameter(torch.randn(policy.head.out_features, dtype=torch.float64))
    tokens = tokens_of(2, 20)
    loss = policy(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(own_loss(policy, tokens).item(), abs=1e-12)
    assert same(gradients(loss, policy), gradients(own_loss(policy, tokens), policy))


def with_lora(policy: FastWeightLM, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are tied, of mixtures of experts
        model = get_peft_model(policy, LoraConfig(r=3, lora_alpha=9, lora_dropout=dropout, target_modules=linear))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zeros at first, which would hide what is left out
                p.normal_(std=0.1)
    return model.double()


def test_lora_on_every_linear_layer_and_on_the_head_trains_its_own_logits(policy):
    model, tokens = with_lora(policy), tokens_of(2, 20)
    assert isinstance(policy.head, WrappedHead)
    loss = model(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(own_loss(model, tokens).item(), abs=1e-12)
    found = gradients(loss, model)
    assert same(found, gradients(own_loss(model, tokens), model))
    assert any("lm_head.lora_A" in name for name in found)
    written = model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert written[0, 20] == model(tokens).logits[0, -1].argmax()


def test_checkpointing_drops_the_same_twice(deltanet):
    model, tokens, found = with_lora(deltanet, dropout=0.3).train(), tokens_of(2, 20), []
    for part in ("none", "blocks"):
        checkpoint_activations(deltanet, part)
        torch.manual_seed(1)
        found.append(gradients(model(tokens, labels=tokens).loss, model))
    assert same(*found)


def test_a_refine_step_trains_the_lora_that_its_own_logits_have(deltanet):
    model, batch = with_lora(deltanet), make_batch()
    refine = RefineConfig(num_chunks=2, rollout_length=3, margin=4, reward="cosine", clip_eps=0.2)
    sizes = dict(batch_size=3, mini_batch_size=3, micro_batch_size=3)
    config = TrainConfig(recipe="test", refine=refine, **sizes, lr=1e-13, max_grad_norm=1e9)
    trainable = [p for p in deltanet.parameters() if p.requires_grad]
    train_state = TrainState(
        policy=deltanet,
        optimizers=make_optimizers(deltanet, config, trainable),
        config=config,
        reward=REWARDS["cosine"],
    )
    result = train_step(train_state, batch, Draws(seed=0, step=1))
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    naive = gradients(naive_loss(deltanet, batch, result.rollouts, refine), model)
    assert same(fast, naive, 1e-9)
    assert float(fast["base_model.model.lm_head.lora_B.default.weight"].norm()) > 0


def test_a_wrapped_head_gives_the_statistics_of_a_plain_one():
    plain = Head(6, 11, dtype=torch.float64)
    wrapped = WrappedHead(nn.Sequential(plain), 11)
    hidden = torch.randn(2, HEAD_ROWS // 2 + 3, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, hidden.shape[:2])
    weights = torch.randn(2, *ids.shape, dtype=torch.float64)
    found = []
    for head in (plain, wrapped):
        stats = head(hidden, ids, temperature=0.7)
        loss = (weights[0] * stats.logprobs + weights[1] * stats.entropies).sum()
        found.append([*stats, *torch.autograd.grad(loss, [hidden, plain.weight, plain.bias])])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-11)
    assert not head(hidden, ids, entropy=False).entropies.any()


def test_a_head_that_is_resized_stays_a_head(deltanet):
    deltanet.resize_token_embeddings(60, mean_resizing=False)
    assert isinstance(deltanet.lm_head, Head) and deltanet.head.out_features == 60
    tokens = torch.tensor([[1, 59, 3, 58]])
    assert deltanet(tokens, labels=tokens).loss.item() == pytest.approx(own_loss(deltanet, tokens).item(), abs=1e-12)


def test_nothing_but_the_head_computes_with_its_weight():
    """No file of the package but models/head.py takes `.weight` of a head, other than to ask whether it is the embedding's."""
    package = ROOT / "refine_lab"
    files = sorted(path for path in package.rglob("*.py") if path.relative_to(package).as_posix() != "models/head.py")
    found = []
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        compared = [n for n in nodes if isinstance(n, ast.Compare) and isinstance(n.ops[0], (ast.Is, ast.IsNot))]
        asked = {id(operand) for n in compared for operand in (n.left, *n.comparators)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("weight", "head_weight") and id(node) not in asked:
                of = ast.unparse(node.value)
                if node.attr == "head_weight" or of.endswith(("head", "output_embeddings()")):
                    found.append(f"{path.name}:{node.lineno}")
    assert len(files) > 90 and not found
