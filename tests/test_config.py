"""Configurations: what is refused, in which words, and that they come back from their JSON."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from refine_lab import recipes
from refine_lab.config import DataConfig, RefineConfig, TrainConfig, from_json, to_json
from refine_lab.recipes import METHODS, midtrain, named, recipe


def as_values() -> dict:
    return json.loads(to_json(midtrain()))


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for phase in METHODS for name in named(phase) for way in METHODS[phase]]
)
def test_every_recipe_comes_back_from_its_json(name, way):
    config = recipe(name).make(way, seed=7)
    assert from_json(to_json(config), kind=type(config)) == config


@pytest.mark.parametrize(
    ("recipe", "way", "told"),
    [
        ("paper_midtrain", "sft", "sft_release"),
        ("paper_midtrain", "refine", "refine"),
        ("posttrain", "sft", "sft"),
        ("posttrain", "nested_sft", "nested_sft_release"),
        ("per_prompt", "sft", "sft_release"),
        ("paper", "none", "none"),
    ],
)
def test_a_file_whose_recipe_is_named_for_the_releases_updates_reads_as_before(recipe, way, told):
    config = recipes.release_updates(recipes.recipe(recipe).make(way, 0))
    values = json.loads(to_json(config))
    del values["updates"]
    old = from_json(json.dumps({**values, "recipe": f"{recipe}_release_updates"}), kind=type(config))
    assert old == config and (old.recipe, old.updates, old.way) == (recipe, "release", told)


def test_json_is_readable_and_carries_its_version():
    values = as_values()
    assert values["format_version"] == 1
    assert values["method"]["num_chunks"] == 8
    assert values["data"]["sources"] == {"python": 1.0}


def test_none_as_method_comes_back_as_none():
    config = midtrain("sft")
    assert json.loads(to_json(config))["method"] is None
    assert from_json(to_json(config)).arm == "sft"


def test_whole_numbers_become_numbers():
    config = TrainConfig(recipe="x", lr=1, data=DataConfig(sources={"python": 2}))
    assert from_json(to_json(config)) == config
    assert isinstance(config.lr, float)
    assert isinstance(config.data.sources["python"], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version of config.json must be 1, the one read here, got 2"),
        ({"format_version": None}, "format_version of config.json must be 1, the one read here, got None"),
        ({"step": 5}, "unknown field of TrainConfig 'step'; did you mean 'steps'"),
        ({"data": {"sorces": {}}}, "unknown field of DataConfig 'sorces'; did you mean 'sources'"),
        ({"method": {"num_chunk": 4}}, "unknown field of RefineConfig 'num_chunk'; did you mean 'num_chunks'"),
        ({"method": {"tau": 0}}, "RefineConfig.tau must be above 0, got 0"),
        ({"method": "sft"}, "TrainConfig.method must be a RefineConfig or none, got 'sft'"),
        ({"data": None}, "TrainConfig.data must be a DataConfig, got None"),
        ({"lr": "1e-5"}, "TrainConfig.lr must be a number, got '1e-5'"),
    ],
)
def test_bad_files_are_refused(change, message):
    with pytest.raises(ValueError, match="^" + message):
        from_json(json.dumps({**as_values(), **change}))


def test_a_missing_field_is_named():
    values = as_values()
    del values["recipe"]
    with pytest.raises(ValueError, match="TrainConfig needs the field 'recipe'"):
        from_json(json.dumps(values))


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
        ("selection", "max", "one of 'entropy', 'uniform', 'argmax', 'argmin'"),
        ("entropy_index", "paper", "one of 'equation', 'release'"),
        ("temperature", 0.0, "above 0"),
        ("tau", float("nan"), "a number"),
        ("nsp_coef", float("inf"), "a number"),
        ("ntp_coef", -1.0, "at least 0"),
        ("margin", -1, "at least 0"),
        ("clip_eps", 1.0, "between 0 and 1"),
        ("dual_clip", 1.0, "above 1"),
        ("reward", "cosin", "one of 'cosine', 'binary', 'hybrid', 'custom'"),
        ("reward", "", "a text that is not empty"),
        ("kl_coef", False, "a number"),
    ],
)
def test_a_value_of_the_method_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"RefineConfig.{field} must be {allowed}, got {value!r}"):
        RefineConfig(**{field: value})


def test_prefix_groups_need_two_rollouts():
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        RefineConfig(group_by="prefix")
    assert RefineConfig(group_by="prefix", group_size=2).group_size == 2


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("sources", {}, "at least one source"),
        ("sources", ["python"], "a mapping from names to numbers"),
        ("recall", {"word-1": 0.7, "word-4": 0.7}, "shares that sum to at most 1"),
        ("sequence_length", 8, "at least 16"),
        ("validation_sequences", 0, "at least 1"),
    ],
)
def test_a_value_of_the_data_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"DataConfig.{field} must be {allowed}, got "):
        DataConfig(**{field: value})


def test_a_share_is_named_with_its_source():
    with pytest.raises(ValueError, match=r"DataConfig.sources\['books'\] must be a share above 0, got 0.0"):
        DataConfig(sources={"books": 0})
    with pytest.raises(ValueError, match=r"DataConfig.recall\['pairs'\] must be a number, got 'half'"):
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
    with pytest.raises(ValueError, match=f"TrainConfig.{field} must be {allowed}, got {value!r}"):
        replace(midtrain(), **{field: value})


def test_sequences_too_short_for_the_method_are_refused_before_training():
    data = DataConfig(sequence_length=160)
    with pytest.raises(ValueError, match=r"TrainConfig.data.sequence_length must be at least 161 .* got 160"):
        replace(midtrain(), data=data)
    assert replace(midtrain("sft"), data=data).data.sequence_length == 160
    assert replace(midtrain(), data=replace(data, sequence_length=161)).method is not None


@pytest.mark.parametrize("settings", ({3: 1}, {"": 1}, {"a": float("inf")}, {"a": "1"}, [("a", 1)]))
def test_settings_of_the_model_are_numbers_by_name(settings):
    with pytest.raises(
        ValueError, match=r"TrainConfig\.model_settings.* must be a (mapping from names to )?numbers?, got"
    ):
        TrainConfig(recipe="x", model_settings=settings)


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        midtrain().steps = 3  # type: ignore[misc]


def test_updates_of_a_batch():
    assert replace(midtrain(), mini_batch_size=2).updates_per_batch == 4


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan")])
def test_a_number_that_no_float_holds_is_refused(value):
    with pytest.raises(ValueError, match=r"TrainConfig\.lr must be a number, got"):
        TrainConfig(recipe="test", lr=value)
