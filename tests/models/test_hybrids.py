"""The hybrids of transformers: states as values beside re-reading, plain transformers as the reference, what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from refine_lab.config import RefineConfig
from refine_lab.models import FastWeightLM, State, families
from refine_lab.models.activation_checkpointing import checkpoint_activations
from refine_lab.models.hybrid_layers import top_k_router
from refine_lab.models.hybrids import HYBRIDS, REFUSED, hybrid_family, rotary_embeddings
from refine_lab.models.prefix_cache import Grouping
from refine_lab.types import Batch
from tests.factories.hybrids import ROPE, VOCABULARY, K, configuration, make
from tests.factories.step import fast_gradients
from tests.support.naive import naive_loss
from tests.support.paths import ROOT
from tests.support.refusals import naming, refused

FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(policy: FastWeightLM, hidden: Tensor, targets: Tensor) -> Tensor:
    return -torch.log_softmax(policy.lm_head(hidden), -1).gather(-1, targets.unsqueeze(-1)).sum()


def gradients(policy: FastWeightLM, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def compare_with_rereading(
    policy: FastWeightLM, prefixes: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[float, float]:
    """The largest relative error of hidden states and logits, and of a parameter's gradient, over all branches."""
    text = tokens_of(len(lengths), max(lengths))
    positions = torch.tensor([[min(p, length) - 1 for p in prefixes] for length in lengths])
    branches = tokens_of(positions.numel(), K, seed=1)
    trace = policy.read(text, torch.tensor(lengths))
    hidden = policy.read(branches, state=trace.state_at(positions)).hidden_states
    targets = branches.roll(1, 0)
    fast = gradients(policy, loss_of(policy, hidden, targets))
    alone = []
    for branch, position in enumerate(positions.flatten().tolist()):
        row = text[branch // len(prefixes), : position + 1]
        whole = torch.cat([row, branches[branch]]).unsqueeze(0)
        alone.append(policy.read(whole).hidden_states[:, position + 1 :])
    reread = torch.cat(alone)
    naive = gradients(policy, loss_of(policy, reread, targets))
    assert naive.keys() == fast.keys() == {name for name, p in policy.named_parameters()}
    errors = (relative(hidden, reread), relative(policy.lm_head(hidden), policy.lm_head(reread)))
    return max(errors), max(relative(fast[name], naive[name]) for name in naive)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_branches_are_what_rereading_each_prefix_gives(family, dtype, tolerance):
    policy = make(family, dtype, initializer_range=0.02)
    values, grads = compare_with_rereading(policy, (1, 2, 63, 64, 65), (90, 66))
    assert values <= tolerance
    assert grads <= tolerance


def test_olmo_with_rotary_positions():
    policy = make("olmo_hybrid", rope_parameters=ROPE)
    assert policy.model.rotary_emb is not None
    assert max(compare_with_rereading(policy, (1, 20), (30,))) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_branches_after_a_thousand_tokens(family, dtype, tolerance):
    values, grads = compare_with_rereading(make(family, dtype, initializer_range=0.02), (1, 65, 1000), (1001,))
    assert max(values, grads) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_unequal_pieces_is_reading_at_once(family):
    policy, text = make(family), tokens_of(2, 60)
    ends = ((10, 3), (10, 4), (42, 30), (60, 55))  # where each piece ends in either row
    whole = policy.read(text, torch.tensor(ends[-1]))
    state, starts, loss = None, (0, 0), 0.0
    for stops in ends:
        lengths = torch.tensor([b - a for a, b in zip(starts, stops, strict=True)])
        if (lengths == 0).any():  # row 0 rests: a row that reads nothing is not read
            rest, row = state.select([0]), policy.read(text[1:, 3:4], state=state.select([1]))
            state = State.stack([rest, row.final_state])
            hidden = [(1, 3, row.hidden_states[0])]
        else:
            piece = torch.zeros(2, int(lengths.max()), dtype=torch.long)
            for row in range(2):
                piece[row, : lengths[row]] = text[row, starts[row] : stops[row]]
            trace = policy.read(piece, lengths, state)
            state = trace.final_state
            hidden = [(row, starts[row], trace.hidden_states[row, : lengths[row]]) for row in range(2)]
        for row, start, x in hidden:
            assert torch.allclose(x, whole.hidden_states[row, start : start + len(x)], atol=1e-10)
            loss = loss + (x * torch.sin(torch.arange(start, start + len(x)).double()).unsqueeze(-1)).sum()
        starts = stops
    wave = torch.sin(torch.arange(60.0, dtype=torch.float64)).unsqueeze(-1)
    pieces = gradients(policy, loss)
    once = gradients(policy, sum((whole.hidden_states[r, :n] * wave[:n]).sum() for r, n in enumerate(ends[-1])))
    assert max(relative(pieces[name], once[name]) for name in once) < 1e-9
    assert state.lengths.tolist() == [60, 55]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pad_changes_nothing(family):
    policy, text = make(family), tokens_of(2, 70)
    other = text.clone()
    other[1, 50:] = 7
    results = []
    for batch in (text, other):
        trace = policy.read(batch, torch.tensor([70, 50]))
        going_on = policy.read(tokens_of(2, 4, seed=2), torch.tensor([2, 4]), trace.final_state)
        after = policy.read(tokens_of(2, 1, seed=3), state=going_on.final_state).hidden_states
        results.append((trace.hidden_states[1, :50], going_on.hidden_states[1], after))
    for a, b in zip(*results, strict=True):  # not to the bit: with experts, pads stand in the same products as tokens
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    alone = policy.read(torch.cat([text[1, :50], tokens_of(2, 4, seed=2)[1]]).unsqueeze(0)).hidden_states[0]
    assert torch.allclose(results[0][0], alone[:50], atol=1e-12)
    assert torch.allclose(results[0][1], alone[50:], atol=1e-12)


@pytest.mark.parametrize("family", ("qwen3_5_text", "olmo_hybrid"))
def test_branches_of_branches_hang_on_one_prefix(family, tmp_path):
    policy, text = make(family), tokens_of(2, 40)
    trace = policy.read(text)
    state = trace.state_at(torch.tensor([[4, 30], [17, 39]])).repeat(2)  # rows: 4, 4, 30, 30, 17, 17, 39, 39
    assert state.shared["3.keys"].shape[0] == 2 and state.tensors["3.keys"].shape[:2] == (8, 0)
    first = policy.read(tokens_of(8, 6, seed=1), state=state)
    second = first.state_at(torch.tensor([[2, 5]] * 8))
    assert second.shared["3.keys"] is state.shared["3.keys"]  # no copy of the prefix, however deep the branch
    assert second.tensors["3.keys"].shape[:2] == (16, 6) and not second.tensors["3.keys"][0, 3:].any()
    chosen = second.select([13, 2, 5, 2])  # a part of the rows, one twice, sources in no order
    later = policy.read(text[:1, :1].expand(4, 1), state=policy.read(tokens_of(4, 3, seed=2), state=chosen).final_state)
    parts = [((1, 40), 6, 6), ((0, 5), 1, 3), ((0, 31), 2, 6), ((0, 5), 1, 3)]
    for number, ((row, prefix), branch, taken) in enumerate(parts):
        pieces = (
            text[row, :prefix],
            tokens_of(8, 6, seed=1)[branch, :taken],
            tokens_of(4, 3, seed=2)[number],
            text[0, :1],
        )
        alone = policy.read(torch.cat(pieces).unsqueeze(0)).hidden_states[0, -1]
        assert torch.allclose(later.hidden_states[number, 0], alone, atol=1e-11), number
    stacked = State.stack([chosen, trace.final_state])  # prefixes on their own, and rows with tokens of theirs
    stacked.save(tmp_path / "state.safetensors")
    step = tokens_of(6, 1, seed=4)
    loaded = policy.read(step, state=State.load(tmp_path / "state.safetensors")).hidden_states
    apart = [policy.read(step[:4], state=chosen), policy.read(step[4:], state=trace.final_state)]
    assert torch.allclose(loaded, torch.cat([x.hidden_states for x in apart]), atol=1e-11)


def test_reading_changes_no_state():
    policy = make("qwen3_next")
    state = policy.read(tokens_of(2, 30)).state_at(torch.tensor([[3, 29], [0, 12]])).detach()
    state = policy.read(tokens_of(4, 2), state=state).final_state.detach()
    before = copy.deepcopy(state)
    results = [policy.read(tokens_of(4, 1), state=state).hidden_states for _ in range(2)]
    assert torch.equal(*results)
    for part in ("tensors", "shared"):
        assert all(torch.equal(x, getattr(before, part)[name]) for name, x in getattr(state, part).items())


def test_a_gradient_reaches_the_prefix_and_no_further():
    policy, text = make("qwen3_5_text"), tokens_of(1, 40)
    embedded = policy.model.embed_tokens(text).detach().requires_grad_()
    handle = policy.model.embed_tokens.register_forward_hook(lambda *_: embedded)
    state = policy.read(text).state_at(torch.tensor([[20]]))
    handle.remove()
    policy.read(tokens_of(1, 3), state=state).hidden_states.square().sum().backward()
    size = embedded.grad[0].norm(dim=-1)
    assert (size[:21] > 0).all() and (size[21:] == 0).all()


def test_the_policy_gradient_is_that_of_the_plain_procedure():
    policy = make("qwen3_5_text")
    text = tokens_of(2, 40)
    batch = Batch(tokens=text, lengths=torch.tensor([40, 33]), sequence_ids=(0, 1))
    refine = RefineConfig(num_chunks=3, group_size=2, rollout_length=K, clip_eps=0.2)
    positions = torch.tensor([[0, 15, 34], [5, 6, 27]])
    rollouts, _ = fast_gradients(policy, batch, refine, positions, shift=0.1)
    fast = {name: p.grad.clone() for name, p in policy.named_parameters()}
    naive = gradients(policy, naive_loss(policy, batch, rollouts, refine))
    assert max(relative(fast[name], naive[name]) for name in naive) < 1e-9


@pytest.mark.parametrize("part", ("mlp", "blocks"))
def test_blocks_run_again_in_the_backward_change_no_gradient(part):
    policy, text = make("qwen3_next"), tokens_of(2, 40)
    results = []
    for recomputed in ("none", part):
        checkpoint_activations(policy, recomputed)
        trace = policy.read(text)
        state = trace.state_at(torch.tensor([[3, 39], [20, 21]]))
        hidden = policy.read(tokens_of(4, K, seed=1), state=state).hidden_states
        results.append(gradients(policy, hidden.sin().sum() + trace.hidden_states.cos().sum()))
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


def test_layers_of_one_kind_alone():
    for kind in ("linear_attention", "full_attention"):
        policy = make("qwen3_5_text", layer_types=[kind] * 4)
        state = policy.read(tokens_of(1, 30)).state_at(torch.tensor([[7, 29]]))
        assert (state.sources is None) == (kind == "linear_attention")
        read = policy.read(tokens_of(2, 3, seed=1), state=state).hidden_states[0]
        whole = policy.read(torch.cat([tokens_of(1, 30)[0, :8], tokens_of(2, 3, seed=1)[0]]).unsqueeze(0))
        assert torch.allclose(read, whole.hidden_states[0, 8:], atol=1e-11)


def test_a_model_cast_as_a_whole_keeps_its_rotary_frequencies():
    policy = make("qwen3_5_text", torch.float32)
    state, branch = policy.read(tokens_of(1, 200)).final_state, tokens_of(1, 3, seed=1)
    exact = rotary_embeddings(policy.model, torch.arange(200).view(1, -1), torch.zeros(1, dtype=torch.float32))
    cast = rotary_embeddings(
        policy.to(torch.bfloat16).model, torch.arange(200).view(1, -1), torch.zeros(1, dtype=torch.bfloat16)
    )
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact, cast, strict=True))
    assert policy.read(branch, state=state).hidden_states.dtype == torch.bfloat16


@pytest.mark.parametrize("sources", ([0, 0, 1, 1], [1, 0, 1, 1, 3], [2], [3, 2, 1, 0]))
def test_rows_are_grouped_by_source_and_back(sources):
    group, x = Grouping.of(torch.tensor(sources), 4), torch.arange(len(sources) * 6.0).view(-1, 3, 2) + 1
    packed = group.pack(x)
    assert torch.equal(group.unpack(packed, 3), x)
    for source in range(4):
        rows = [row for row, of in enumerate(sources) if of == source]
        expected = torch.cat([x[rows].flatten(0, 1), torch.zeros((group.slots - len(rows)) * 3, 2)])
        assert torch.equal(packed[source], expected)


# -- transformers ------------------------------------------------------------------------------------------------------

PLAIN = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):  # where fla can be imported, transformers' own path runs on CUDA only
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ("fla", "causal_conv1d") else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    given = load_file(f"{folder}/given")
    output = model(given["text"], labels=given["text"])
    output.loss.backward()
    ask = dict(attention_mask=given["mask"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    written = model.generate(given["text"][:, :20], **ask)
    grads = {name: p.grad for name, p in model.named_parameters()}
    save_file({"logits": output.logits.detach(), "written": written, **grads}, f"{folder}/plain")
assert "refine_lab" not in sys.modules
"""


@pytest.mark.slow
def test_plain_transformers_loads_what_is_saved_and_computes_the_same(tmp_path):
    from safetensors.torch import save_file

    text, mask = tokens_of(2, 130), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0  # transformers pads on the left
    models = {family: make(family, torch.float32) for family in FAMILIES}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
        save_file({"text": text, "mask": mask}, tmp_path / family / "given")
    folders = [str(tmp_path / family) for family in FAMILIES]
    run = subprocess.run([sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for family, model in models.items():
        plain = load_file(tmp_path / family / "plain")
        output = model(text, labels=text)
        assert relative(output.logits, plain["logits"]) < 1e-5, family
        ask = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(text[:, :20], **ask), plain["written"]), family
        largest = max(float(plain[name].norm()) for name, _ in model.named_parameters())
        for name, grad in gradients(model, output.loss).items():
            # The floor is there for what sets the decay: theirs are off their own float64 by up to 1e-2 of themselves.
            assert (grad - plain[name]).norm() <= 1e-5 * max(float(plain[name].norm()), 0.1 * largest), (family, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_plain_transformers_and_comes_back(family, tmp_path):
    policy = make(family, torch.float32)
    policy.save_pretrained(tmp_path)
    theirs = type(policy).__mro__[3]
    assert theirs.__module__.startswith("transformers.") and theirs.__name__ == type(policy).__name__
    assert policy.config.architectures == [theirs.__name__]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        experts = [name for name in file.keys() if "experts.1." in name]  # noqa: SIM118
    assert bool(experts) == (family in ("qwen3_next", "qwen3_5_moe_text"))  # an expert a tensor, as the hub has them
    plain = theirs.from_pretrained(tmp_path).state_dict()
    again = type(policy).from_pretrained(tmp_path)
    for name, x in policy.state_dict().items():
        assert torch.equal(plain[name], x) and torch.equal(again.state_dict()[name], x), name
    text = tokens_of(1, 20)
    assert torch.equal(copy.deepcopy(again)(text).logits, policy(text).logits)


def test_the_text_model_of_a_checkpoint_with_images_is_read(tmp_path):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4)
    config = Qwen3_5Config(text_config=configuration("qwen3_5_text").to_dict(), vision_config=vision)
    whole = Qwen3_5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    config_class, model_class = hybrid_family("qwen3_5")
    model, info = model_class.from_pretrained(
        tmp_path, config=config_class.from_pretrained(tmp_path), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, x in whole.model.language_model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], x), name


@torch.no_grad()
def test_generate_is_greedy_decoding_whatever_the_padding():
    policy, text = make("qwen3_5_text"), tokens_of(2, 20)
    mask = torch.ones_like(text)
    mask[1, :7] = 0
    written = policy.generate(text, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 20:]
    for row in range(2):
        context = text[row][mask[row].bool()]
        for token in written[row]:
            assert token == policy.lm_head(policy.read(context.unsqueeze(0)).hidden_states[0, -1]).argmax()
            context = torch.cat([context, token.view(1)])


def test_transformers_itself_is_left_alone():
    policy = make("qwen3_5_text")
    theirs = type(policy.model.layers[0].linear_attn)
    assert theirs.forward.__module__ == theirs.__module__ and "forward" not in theirs(policy.config, 0).__dict__
    assert policy.model.layers[0].linear_attn.forward.__func__.__module__ == "refine_lab.models.hybrid_layers"


@pytest.mark.slow
def test_importing_our_models_imports_no_modeling_of_theirs():
    code = "import sys, refine_lab.models, refine_lab.models.hybrids as h; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert loaded.returncode == 0, loaded.stderr
    assert not {"fla", "transformers.models.qwen3_next.modeling_qwen3_next"} & set(loaded.stdout.split())


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("jamba", "transformers gives wrong results when continuing it from a cache"),
        ("falcon_mamba", "transformers gives wrong results when continuing it from a cache"),
        ("falcon_h1", "transformers changes its cache in place"),
        ("zamba2", "transformers changes its cache in place"),
    ],
)
def test_a_family_that_is_not_taken_is_refused_with_the_reason(model_type, reason):
    with pytest.raises(ValueError, match=f"^model_type '{model_type}', which is not supported: {reason}") as caught:
        families.family(model_type)
    assert "\n" not in str(caught.value)


def test_every_family_there_is_a_word_on_is_one_of_transformers():
    assert {*HYBRIDS, *REFUSED} <= CONFIG_MAPPING_NAMES.keys() and not HYBRIDS.keys() & REFUSED.keys()
    with refused("model_type", "bert") as caught:
        families.family("bert")
    assert all(f"'{name}'" in caught.value.allowed for name in ("delta_net", "qwen3_next", "qwen3_5_text"))


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, ["rope_type", "'dynamic'"]),
        ({"attn_implementation": "eager"}, ["attn_implementation", "'eager'"]),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(fields, facts):
    with naming(ValueError, *facts):
        make("qwen3_5_text", **fields)


def test_a_model_switched_to_another_attention_is_refused_when_it_reads():
    policy = make("qwen3_5_text")
    policy.set_attn_implementation("eager")
    with refused("attn_implementation", "eager", "'sdpa'"):
        policy.read(tokens_of(1, 4))
    policy.set_attn_implementation("sdpa")
    policy.read(tokens_of(1, 4))


def test_a_state_of_other_rows_or_of_another_model_is_refused():
    policy = make("qwen3_5_text")
    state = policy.read(tokens_of(2, 4)).final_state
    with refused("the rows of a state", 2, "3"):
        policy.read(tokens_of(3, 4), state=state)
    attention = make("qwen3_5_text", layer_types=["full_attention"] * 4)
    with naming(ValueError, "state", sorted(state.layer(0)[0])):
        attention.read(tokens_of(2, 4), state=state)


@pytest.mark.parametrize("normalised", (True, False))
def test_experts_are_weighed_as_transformers_weighs_them(normalised):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

    config = configuration("qwen3_next", norm_topk_prob=normalised)
    router, x = Qwen3NextTopKRouter(config), torch.randn(3, 7, 32)
    torch.nn.init.normal_(router.weight)
    expected = router(x)
    for ours, theirs in zip(top_k_router(router, x), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(expected[1].sum(-1), torch.ones(21)) == normalised


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_with_bf16_kernels_it_is_the_cpus_model(family):
    """Tolerance 3e-2: fla's kernels compute in bfloat16, whose rounding is 4e-3 an operation."""
    policy, text = make(family, torch.float32, initializer_range=0.02), tokens_of(2, 600)
    positions, branches = torch.tensor([[0, 63, 511], [64, 512, 590]]), tokens_of(6, K, seed=1)
    results = []
    for device in ("cpu", "cuda"):
        policy = policy.to(device)
        state = policy.read(text.to(device)).state_at(positions.to(device))
        hidden = policy.read(branches.to(device), state=state).hidden_states
        grads = gradients(policy, loss_of(policy, hidden, branches.to(device).roll(1, 0)))
        results.append((hidden.cpu(), {name: x.cpu() for name, x in grads.items()}))
    (hidden, grads), (on_gpu, grads_on_gpu) = results
    largest = max(float(x.norm()) for x in grads.values())
    assert relative(on_gpu, hidden) < 3e-2
    assert max(float((grads_on_gpu[name] - x).norm()) for name, x in grads.items()) < 3e-2 * largest
