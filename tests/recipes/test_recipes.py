"""The paper's numbers stand in its recipe, and the methods of a recipe differ in the method alone."""

from dataclasses import replace

import pytest

from refine_lab.config import RefineConfig
from refine_lab.models import load_model
from refine_lab.recipes import (
    METHODS,
    RECIPES,
    midtrain,
    named,
    paper_midtrain,
    pretrain,
    pretrain_lact,
    recipe,
    release_updates,
)
from refine_lab.recipes.methods import KNOWN
from tests.support.refusals import refused


def test_paper_midtrain_holds_tables_2_and_d1():
    config = paper_midtrain()
    refine = config.refine
    assert refine is not None
    assert (refine.num_chunks, refine.rollout_length, refine.group_size) == (8, 5, 1)
    assert (refine.ntp_coef, refine.nsp_coef, refine.reward) == (1.0, 0.2, "cosine")
    assert (refine.tau, refine.temperature, refine.clip_eps) == (1.0, 1.0, 0.2)
    assert (refine.kl_coef, refine.entropy_coef) == (0.0, 0.0)
    assert (config.batch_size, config.mini_batch_size, config.steps) == (128, 32, 100)
    assert (config.lr, config.schedule, config.weight_decay) == (1e-6, "constant", 0.01)
    assert config.data.sequence_length == config.data.min_tokens == 16_384 and config.data.rows == "document"
    assert (config.eval_every, config.checkpoint_every) == (10, 20)
    assert config.model == "fla-hub/delta_net-1.3B-100B"


def test_paper_midtrain_follows_its_release_where_the_tables_are_silent():
    config = paper_midtrain()
    refine = config.refine
    assert refine is not None
    assert (refine.entropy_index, refine.margin, refine.smoothing_kernel) == ("release", 20, 5)
    assert (refine.dual_clip, config.max_grad_norm, refine.prefix_gradient) == (3.0, 1.0, "full")
    assert refine.group_by == "sequence"


def test_paper_midtrain_keeps_enough_tokens_to_train_on():
    """100 batches of 128 rows of 16,384 tokens, about 200M (section 4.2), and the held-out rows."""
    config = paper_midtrain()
    rows = config.steps * config.batch_size + config.data.validation_sequences
    assert rows * config.data.sequence_length <= config.data.max_tokens


@pytest.mark.parametrize("name", ["midtrain", "paper_midtrain"])
def test_fair_arms_differ_in_the_method_alone(name):
    sft, refine = (recipe(name).make(method, 3) for method in METHODS["midtrain"])
    assert sft.refine is None
    assert isinstance(refine.refine, RefineConfig)
    assert replace(refine, refine=None) == sft
    assert sft.updates_per_batch == refine.updates_per_batch


def test_release_updates_are_one_and_four():
    sft, refine = (release_updates(paper_midtrain(method)) for method in METHODS["midtrain"])
    assert (sft.updates_per_batch, refine.updates_per_batch) == (1, 4)
    assert replace(refine, updates="equal") == paper_midtrain()
    assert replace(sft, updates="equal", mini_batch_size=32) == paper_midtrain("sft")
    with refused("mini_batch_size", 8):
        release_updates(midtrain("sft"))


def test_only_the_papers_recipe_reads_one_document_per_row():
    recipes = [entry.make("m", None) if entry.phase == "pretrain" else [entry.make()] for entry in RECIPES.values()]
    forms = {config.recipe: config.data.rows for configs in recipes for config in configs}
    assert {name for name, form in forms.items() if form == "document"} == {"paper_midtrain"}
    assert len(forms) > 20


def test_midtrain_trains_on_160_000_tokens_and_evaluates_three_times_in_between():
    config = midtrain()
    assert config.steps * config.batch_size * config.data.sequence_length == 163_840
    assert len(range(config.eval_every, config.steps, config.eval_every)) >= 3
    assert config.updates_per_batch == 1


@pytest.mark.parametrize("name", [name for phase in METHODS for name in named(phase)])
def test_a_recipe_is_named_for_its_function_and_takes_the_seed(name):
    phase, make = recipe(name)
    assert recipe(name, phase) is RECIPES[name] and make().recipe == name
    assert make.__name__ == (f"ttt_{name}" if phase == "ttt" else name)
    assert make(seed=5).seed == 5 and make().method == METHODS[phase][-1]


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with refused("recipe", "midtrian") as error:
        recipe("midtrian")
    assert "'midtrain'?" in str(error.value)
    with refused("ttt recipe", "posttrain"):
        recipe("posttrain", "ttt")


def test_an_unknown_arm_is_refused():
    with refused("method", "rl", ", ".join(KNOWN["midtrain"])):
        midtrain("rl")


def test_lact_sees_more_tokens_from_stage_to_stage_up_to_its_shipped_window():
    """Its attention sees two at first; a chunk is as long, from 8 to 64; the last stage is the shipped configuration."""
    shipped = load_model("tiny-lact", device="cpu")[0].config
    windows = [stage.model_settings["window_size"] for stage in pretrain_lact("m")]
    assert windows == sorted(windows)
    assert (windows[0], windows[-1]) == (2, shipped.window_size)
    chunks = [stage.model_settings["lact_chunk_size"] for stage in pretrain_lact("m")]
    assert chunks == [min(max(8, window), 64) for window in windows]
    assert chunks[-1] == shipped.lact_chunk_size
    assert all(not stage.model_settings for stage in pretrain("m"))


def test_both_curricula_read_as_many_tokens_and_end_at_a_learning_rate_of_zero():
    tokens = {}
    for name, stages in ((name, recipe(name, "pretrain").make) for name in named("pretrain")):
        tokens[name] = sum(stage.steps * stage.batch_size * stage.data.sequence_length for stage in stages("m", None))
        assert [stage.schedule for stage in stages("m", None)][-2:] == ["constant", "linear"]
        assert len({stage.seed for stage in stages("m", None)}) == len(stages("m", None))
    assert tokens["pretrain_lact"] == pytest.approx(tokens["pretrain"], rel=0.02)


def test_prose_joins_the_stages_that_have_a_share_of_it():
    first, *_, last = pretrain_lact("m", "novels")
    assert first.data.sources == {"python": 1.0}
    assert last.data.sources == {"python": 0.95, "novels": 0.05}
