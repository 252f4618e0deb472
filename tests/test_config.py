"""Configurations: what is refused, in which words, and that they come back from their JSON."""

import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from refine_lab import recipes
from refine_lab.config import (
    DataConfig,
    OptimizationConfig,
    RefineConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    UpdateConfig,
    from_json,
    to_json,
)
from refine_lab.recipes import METHODS, midtrain, named, recipe, ttt_per_prompt
from refine_lab.text import quote
from refine_lab.ttt_config import TTTConfig, TTTRunConfig
from refine_lab.validation import ConfigError
from tests.support.refusals import refused

KINDS = (RefineConfig, DataConfig, TaskConfig, UpdateConfig, TrainConfig, TTTConfig, TTTRunConfig)


def as_values() -> dict:
    return json.loads(to_json(midtrain()))


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for phase in METHODS for name in named(phase) for method in METHODS[phase]]
)
def test_every_recipe_comes_back_from_its_json(name, method):
    config = recipe(name).make(method, seed=7)
    assert from_json(to_json(config), kind=type(config)) == config


@pytest.mark.parametrize(
    ("recipe", "method", "recorded"),
    [
        ("paper_midtrain", "sft", "sft_release"),
        ("paper_midtrain", "refine", "refine"),
        ("posttrain", "sft", "sft"),
        ("posttrain", "nested_sft", "nested_sft_release"),
        ("per_prompt", "sft", "sft_release"),
        ("paper", "none", "none"),
    ],
)
def test_a_file_whose_recipe_is_named_for_the_releases_updates_reads_as_before(recipe, method, recorded):
    config = recipes.release_updates(recipes.recipe(recipe).make(method, 0))
    values = json.loads(to_json(config))
    del values["updates"]
    old = from_json(json.dumps({**values, "recipe": f"{recipe}_release_updates"}), kind=type(config))
    assert old == config and (old.recipe, old.updates, old.method) == (recipe, "release", recorded)


def test_json_is_readable_and_carries_its_version():
    values = as_values()
    assert values["format_version"] == 3
    assert values["refine"]["num_chunks"] == 8
    assert values["data"]["sources"] == {"python": 1.0}


def test_none_as_method_comes_back_as_none():
    config = midtrain("sft")
    assert json.loads(to_json(config))["refine"] is None
    assert from_json(to_json(config)).method == "sft"


def test_whole_numbers_become_numbers():
    config = TrainConfig(recipe="x", lr=1, data=DataConfig(sources={"python": 2}))
    assert from_json(to_json(config)) == config
    assert isinstance(config.lr, float)
    assert isinstance(config.data.sources["python"], float)


@pytest.mark.parametrize(
    ("change", "field", "value", "allowed"),
    [
        ({"format_version": 4}, "format_version of config.json", 4, "1 to 3"),
        ({"format_version": None}, "format_version of config.json", None, "1 to 3"),
        ({"refine": {"tau": 0}}, "RefineConfig.tau", 0, "above 0"),
        ({"refine": "sft"}, "TrainConfig.refine", "sft", "a RefineConfig, or none"),
        ({"data": None}, "TrainConfig.data", None, "a DataConfig"),
        ({"lr": "1e-5"}, "TrainConfig.lr", "1e-5", "a number"),
        ({"kind": "answer"}, "TrainConfig.kind", "answer", "one of 'train'"),
    ],
)
def test_bad_files_are_refused(change, field, value, allowed):
    with refused(field, value, allowed):
        from_json(json.dumps({**as_values(), **change}))


@pytest.mark.parametrize(
    ("change", "kind", "name", "nearest"),
    [
        ({"step": 5}, "TrainConfig", "step", "steps"),
        ({"data": {"sorces": {}}}, "DataConfig", "sorces", "sources"),
        ({"refine": {"num_chunk": 4}}, "RefineConfig", "num_chunk", "num_chunks"),
        ({"lr": "1e-5", "step": 5}, "TrainConfig", "step", "steps"),
    ],
)
def test_unknown_fields_of_files_are_refused(change, kind, name, nearest):
    with pytest.raises(ConfigError) as error:
        from_json(json.dumps({**as_values(), **change}))
    assert (error.value.field, error.value.value) == (f"field of {kind}", name)
    assert str(error.value).startswith(f"unknown field of {kind} {name!r}; did you mean {nearest!r}? allowed values: ")
    assert nearest in error.value.allowed.split(", ")


@pytest.mark.parametrize(
    ("kind", "path", "default", "other"),
    [
        (TrainConfig, ("data", "text_column"), "text", "body"),
        (TTTRunConfig, ("model_settings",), {}, {"window_size": 8}),
    ],
)
def test_files_of_version_1_open_and_fields_that_are_gone_have_the_value_that_is_used_now(kind, path, default, other):
    config = midtrain() if kind is TrainConfig else ttt_per_prompt()
    values = json.loads(to_json(config)) | {"format_version": 1}
    del values["kind"]
    *outer, name = path
    holder = values[outer[0]] if outer else values
    holder[name] = default
    assert from_json(json.dumps(values), kind=kind) == config
    holder[name] = other
    place = f"{'DataConfig' if outer else kind.__name__}.{name}"
    with refused(place, other, f"{default!r}, since this version has no such setting"):
        from_json(json.dumps(values), kind=kind)


def test_a_missing_field_is_named():
    values = as_values()
    del values["recipe"]
    with pytest.raises(ConfigError) as error:
        from_json(json.dumps(values))
    assert error.value.field == "TrainConfig.recipe"
    assert str(error.value) == "TrainConfig needs the field 'recipe', which is missing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "runs/a/config.json is not JSON: Expecting value: line 1"),
        (to_json(midtrain())[:200], "runs/a/config.json is not JSON: .* line"),
        ("[1, 2]", r"runs/a/config.json must be a JSON object, got \[1, 2\]"),
    ],
)
def test_malformed_json_is_named(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_json(text, "runs/a/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_chunks", 0, "at least 1"),
        ("num_chunks", 8.0, "a whole number"),
        ("group_size", True, "a whole number"),
        ("selection", "max", "one of 'entropy', 'uniform', 'argmax', 'argmin', 'memory', 'copy', 'custom'"),
        ("entropy_index", "paper", "one of 'equation', 'release'"),
        ("temperature", 0.0, "above 0"),
        ("tau", float("nan"), "a number"),
        ("nsp_coef", float("inf"), "a number"),
        ("ntp_coef", -1.0, "at least 0"),
        ("margin", -1, "at least 0"),
        ("clip_eps", 1.0, "between 0 and 1"),
        ("dual_clip", 1.0, "above 1"),
        ("reward", "cosin", "one of 'cosine', 'binary', 'hybrid', 'edit', 'exact', 'custom'"),
        ("reward", "", "a non-empty string"),
        ("kl_coef", False, "a number"),
        ("estimator", "expect", "one of 'rollouts', 'expected', 'weighted', 'longce', 'dft'"),
        ("baseline", "value", "one of 'mean', 'leave_one_out'"),
        ("scale_by_std", 1, "true or false"),
    ],
)
def test_a_value_of_the_method_is_refused(field, value, allowed):
    with refused(f"RefineConfig.{field}", value, allowed):
        RefineConfig(**{field: value})


@pytest.mark.parametrize("estimator", ["expected", "weighted", "longce", "dft"])
@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("kl_coef", 0.1, "0 for the estimator {}, which samples no rollouts"),
        ("entropy_coef", 0.1, "0 for the estimator {}, which samples no rollouts"),
        ("temperature", 0.8, "1 for the estimator {}, which samples no rollouts"),
        ("placebo", True, "false for the estimator {}, which samples no rollouts"),
    ],
)
def test_what_only_rollouts_have_is_refused_without_them(estimator, field, value, allowed):
    with refused(f"RefineConfig.{field}", value, allowed.format(repr(estimator))):
        RefineConfig(estimator=estimator, reward="exact", **{field: value})


@pytest.mark.parametrize("estimator", ["longce", "dft"])
def test_the_prefix_is_not_detached_from_a_loss_of_every_token(estimator):
    with refused("RefineConfig.prefix_gradient", "detached"):
        RefineConfig(estimator=estimator, prefix_gradient="detached")
    assert RefineConfig(estimator="weighted", prefix_gradient="detached").needs_states


def test_expected_needs_a_reward_with_a_formula():
    for reward in ("cosine", "custom"):
        with refused("RefineConfig.reward", reward, "'exact' or 'binary' for the estimator 'expected'"):
            RefineConfig(estimator="expected", reward=reward)
    for estimator in ("weighted", "longce", "dft"):
        assert RefineConfig(estimator=estimator).reward == "cosine"


def test_prefix_groups_need_two_rollouts():
    with refused("RefineConfig.group_size", 1, "at least 2 if group_by is 'prefix'"):
        RefineConfig(group_by="prefix")
    assert RefineConfig(group_by="prefix", group_size=2).group_size == 2


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("sources", {}, "at least one source"),
        ("sources", ["python"], "a mapping from names to numbers"),
        ("recall", {"word-1": 0.7, "word-4": 0.7}, "fractions that sum to at most 1"),
        ("sequence_length", 8, "at least 16"),
        ("validation_sequences", 0, "at least 1"),
    ],
)
def test_a_value_of_the_data_is_refused(field, value, allowed):
    with refused(f"DataConfig.{field}", value, allowed):
        DataConfig(**{field: value})


def test_a_share_is_named_with_its_source():
    with refused("DataConfig.sources['books']", 0, "above 0"):
        DataConfig(sources={"books": 0})
    with refused("DataConfig.recall['pairs']", "half", "a number"):
        DataConfig(recall={"pairs": "half"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", -1, "at least 0"),
        ("mini_batch_size", 3, "a divisor of batch_size 8"),
        ("optimizer", "sgd", "one of 'adamw', 'muon'"),
        ("lr", 0.0, "above 0"),
        ("device", "tpu", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("device", "cuda:", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("dtype", "float16", "one of 'float32', 'bfloat16'"),
        ("recipe", "../elsewhere", "letters, digits, - and _"),
        ("seed", -1, "at least 0"),
    ],
)
def test_a_value_of_the_training_is_refused(field, value, allowed):
    with refused(f"TrainConfig.{field}", value, allowed):
        replace(midtrain(), **{field: value})


def test_sequences_too_short_for_the_method_are_refused_before_training():
    data = DataConfig(sequence_length=160)
    allowed = "at least 161 for the method's num_chunks, rollout_length and margin"
    with refused("TrainConfig.data.sequence_length", 160, allowed):
        replace(midtrain(), data=data)
    assert replace(midtrain("sft"), data=data).data.sequence_length == 160
    assert replace(midtrain(), data=replace(data, sequence_length=161)).refine is not None


NUMBERS = "a mapping from names to numbers"


@pytest.mark.parametrize(
    ("settings", "key", "value", "allowed"),
    [
        ({3: 1}, "", {3: 1}, NUMBERS),
        ({"": 1}, "", {"": 1}, NUMBERS),
        ({"a": float("inf")}, "['a']", float("inf"), "a number"),
        ({"a": "1"}, "['a']", "1", "a number"),
        ([("a", 1)], "", [("a", 1)], NUMBERS),
    ],
)
def test_settings_of_the_model_are_numbers_by_name(settings, key, value, allowed):
    with refused(f"TrainConfig.model_settings{key}", value, allowed):
        TrainConfig(recipe="x", model_settings=settings)


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        midtrain().steps = 3  # type: ignore[misc]


def test_updates_of_a_batch():
    assert replace(midtrain(), mini_batch_size=2).updates_per_batch == 4


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan")])
def test_a_number_that_no_float_holds_is_refused(value):
    with refused("TrainConfig.lr", value, "a number"):
        TrainConfig(recipe="test", lr=value)


HOSTILE = (
    None,
    True,
    2,
    -1,
    0.5,
    float("nan"),
    10**400,
    10**5000,
    "x" * 5000,
    "",
    "no such",
    "\udcff",
    b"",
    [],
    [1],
    {"a": "b"},
    {"": 1},
    object(),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_is_one_sentence(kind):
    """Whatever a field is given, it is taken, or refused in one sentence that names it; and so are all of them at once."""
    required = {"recipe": "test"} if issubclass(kind, RunConfig) else {}
    errors: list[ConfigError] = []
    for value in HOSTILE:
        every = {item.name: value for item in fields(kind)}
        for settings in (every, every | {"no_such": value}, *({name: value} for name in every)):
            try:
                kind(**{**required, **settings})
            except ConfigError as error:
                errors.append(error)
    assert len(errors) > 5 * len(fields(kind))
    for error in errors:
        sentence = str(error)
        assert "\n" not in sentence and "pydantic" not in sentence and len(sentence) < 1000
        assert sentence.startswith((f"{kind.__name__}.", f"unknown field of {kind.__name__} 'no_such'; "))
        assert error.allowed and sentence == (
            error.sentence or f"{error.field} must be {error.allowed}, got {quote(error.value)}"
        )


def test_an_error_travels_between_processes():
    error = ConfigError("TrainConfig.lr", -1.0, "above 0")
    travelled = pickle.loads(pickle.dumps(error))
    assert (travelled.field, travelled.value, travelled.allowed) == ("TrainConfig.lr", -1.0, "above 0")
    assert str(travelled) == "TrainConfig.lr must be above 0, got -1.0" and isinstance(travelled, ValueError)


@pytest.mark.parametrize("kind", [RunConfig, OptimizationConfig, *KINDS])
def test_every_field_has_a_description(kind):
    described = [parent.__pydantic_fields__ for parent in kind.__mro__ if hasattr(parent, "__pydantic_fields__")]
    for item in fields(kind):
        assert any(item.name in each and each[item.name].description for each in described), item.name


def test_training_and_test_time_training_share_what_an_update_needs():
    shared = {item.name for item in fields(OptimizationConfig)}
    assert shared == {"refine", "lr", "weight_decay", "max_grad_norm", "seed", "dtype"}
    for kind in (UpdateConfig, TrainConfig, TTTConfig):
        assert issubclass(kind, OptimizationConfig) and shared <= {item.name for item in fields(kind)}
    own = {"skip_above_grad_norm", "optimizer", "mini_batch_size", "micro_batch_size"}
    assert {item.name for item in fields(UpdateConfig)} - shared == own
