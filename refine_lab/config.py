"""Configurations: frozen values, checked when they are created, written to and read from a run's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from refine_lab.refine_config import BUILT_IN_REWARDS as BUILT_IN_REWARDS
from refine_lab.refine_config import BUILT_IN_SELECTIONS as BUILT_IN_SELECTIONS
from refine_lab.refine_config import RefineConfig as RefineConfig
from refine_lab.refine_config import smallest_length as smallest_length
from refine_lab.validation import (
    MOST_IN_BATCH,
    Config,
    Count,
    Length,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Share,
    Size,
    Text,
    configuration,
    require,
)

C = TypeVar("C")

RELEASE = "_release_updates"
"""Suffix of the recipe's name in older files and calls; `updates="release"` replaces it."""

FORMAT_VERSION = 3
"""Format version of `config.json`, raised whenever an old file would be read differently. Versions 1 and 2 are still read."""

RENAMED_FIELDS = {"method": "refine", "recompute": "activation_checkpointing"}
"""Fields of format versions 1 and 2 and their present names."""

MOST_MADE = 2**26
"""Maximum number of tokens of all recall documents of a task."""

REMOVED = {"DataConfig.text_column": "text", "TTTRunConfig.model_settings": {}}
"""Removed fields that older files may contain, each with its only accepted value."""


@configuration
class DataConfig(Config):
    """The sequences that a run trains and evaluates on."""

    sources: Mapping[Text, Positive] = field(default_factory=lambda: {"python": 1.0})
    "Source -> fraction of the rows of ordinary text: `python`, .txt files or their folder, .jsonl, .parquet, `datasets:NAME`."
    sequence_length: Length = 1024
    "Tokens per row."
    rows: Literal["packed", "document"] = "packed"
    "Windows of a stream of joined documents, or the first tokens of one document each; shorter documents are padded."
    min_tokens: Count = 1
    "Documents with fewer tokens are left out."
    max_tokens: Annotated[int, Field(ge=1, le=10**11)] = 20_000_000
    "Maximum number of tokens kept of each source."
    recall: Mapping[Text, Share] = field(default_factory=dict)
    "Kind of recall document (`pairs`, `word-1`, `word-4`, `number-1`, ...) -> its fraction of rows; the rest is text."
    validation_sequences: Size = 8
    "Number of held-out rows on which NTP loss and accuracy are measured."
    add_bos: bool | None = None
    "Whether each document and prompt begins with the BOS token; none: as the tokenizer does by default."

    def __post_init__(self) -> None:
        self._require(len(self.sources) > 0, "sources", "at least one source")
        self._require(sum(self.recall.values()) <= 1 + 1e-9, "recall", "fractions that sum to at most 1")
        fits = self.rows == "packed" or self.max_tokens >= self.sequence_length
        self._require(fits, "max_tokens", f"at least sequence_length {self.sequence_length} for rows of one document")
        most = (
            f"at most {MOST_IN_BATCH // self.sequence_length:,}, so that the rows have at most {MOST_IN_BATCH:,} tokens"
        )
        held_out = self.validation_sequences * self.sequence_length
        self._require(held_out <= MOST_IN_BATCH, "validation_sequences", most)


@configuration
class TaskConfig(Config):
    """Prompts with answers, for training and testing in post-training and for adaptation in test-time training."""

    source: Text = "recall:word-4"
    "`recall:KIND` of recall document, `ruler:FILE` (SQuAD v2.0 or HotpotQA as published), or a .parquet or .jsonl file."
    test_source: Text | None = None
    "Source of the test examples, in a format of `source`; none: `source` itself."
    prompt_tokens: Length = 512
    "Maximum number of tokens in a prompt."
    over_limit: Literal["refuse", "cut_middle", "drop"] = "refuse"
    "How to handle longer prompts: refuse the task, cut out the middle of the prompt, or drop the example."
    answer_tokens: Size | None = None
    "Maximum number of tokens generated as an answer; none: the number that the longest reference answer needs."
    lines: Literal["first", "all"] = "first"
    "Which part of the generated text is the answer: its first line, or all of it."
    strip_leading: bool | None = None
    "Whether empty lines before the answer are removed; none: yes for files, no for `recall:` and `ruler:`, as in RULER."
    train: Natural = 400
    "Number of training examples."
    validation: Natural = 0
    "Number of examples measured during training."
    test: Natural | None = 200
    "Number of test examples; none: all that remain."
    prompt_column: Text = "prompt"
    "Column of the .parquet or .jsonl file that holds the prompts."
    answer_column: Text | None = None
    "Column that holds the answer or a list of accepted answers; none: `answer` if the file has that column."
    shared: Literal["refuse", "allow"] = "refuse"
    "How to handle a question or document that two splits share: refuse it, or allow and report it."

    def __post_init__(self) -> None:
        self._require(self.test_source != self.source, "test_source", "different from TaskConfig.source, or none")
        made = self.train + self.validation if self.form == "recall" else 0
        self._require_few(made, "train")
        self._require_few(made + ((self.test or 0) if self.test_form == "recall" else 0), "test")

    def _require_few(self, made: int, name: str) -> None:
        """Raises ConfigError, which names a field, if that many recall documents are too many to be made."""
        most = f"such that the recall documents have at most {MOST_MADE:,} tokens together"
        self._require(made * self.prompt_tokens <= MOST_MADE, name, most)

    @property
    def form(self) -> str:
        """Returns the format of `source`: `recall`, `ruler`, or `file`."""
        return _form(self.source)

    @property
    def test_form(self) -> str:
        """Returns the format of the source of the test examples."""
        return _form(self.test_source or self.source)

    def settled(self) -> TaskConfig:
        """Returns the task with a `strip_leading` of none replaced by its source's default, as runs record it."""
        strip = self.test_form == "file" if self.strip_leading is None else self.strip_leading
        return dataclasses.replace(self, strip_leading=strip)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Overrides `Config.upgraded`: without `lines`, an answer was the first line, even if empty, from column `answer`."""
        if "lines" in values:
            return values
        column = {"answer_column": None} if values.get("answer_column") == "answer" else {}
        return {**values, "lines": "first", "strip_leading": False, **column}


def _form(source: str) -> str:
    return source.partition(":")[0] if source.startswith(("recall:", "ruler:")) else "file"


@configuration
class RunConfig(Config):
    """Fields shared by training runs and runs of test-time training."""

    recipe: Annotated[str, Field(pattern=r"^[\w-]+$"), "letters, digits, - and _"]
    "Name of the recipe in `recipes`; part of the run directory's name."
    updates: Literal["equal", "release", "compute"] = "equal"
    "Whether SFT makes as many updates as the other methods, or fewer or more (`recipes.release_updates`, `compute_updates`)."
    model: Text = "tiny-deltanet"
    "What `load_model` accepts: a shipped name, a run, a folder, `org/repo[:subfolder][@revision]`; `new:` gives fresh weights."
    data: DataConfig = field(default_factory=DataConfig)
    "The sequences; with a task, the text in which its recall documents are embedded."
    batch_size: Size = 1
    "Sequences or prompts per batch."
    mini_batch_size: Size = 1
    "Sequences per optimizer update; a batch makes batch_size / mini_batch_size updates."
    micro_batch_size: Size = 1
    "Sequences in memory at once; it affects neither random draws nor gradients."
    seed: Seed = 0
    "Seed of all random draws."
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$"), "'auto', 'cpu', 'cuda' or 'cuda:N'"] = (
        "auto"
    )
    "`auto`, `cpu`, `cuda` or `cuda:N`."
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    "Processes on this machine that share the work, one a GPU; `torchrun` decides the number of those that it starts."

    def __post_init__(self) -> None:
        divisible = self.batch_size % self.mini_batch_size == 0
        self._require(divisible, "mini_batch_size", f"a divisor of batch_size {self.batch_size}")
        self.require_shares(self.processes)

    def require_shares(self, processes: int) -> None:
        """Raises ConfigError unless so many processes can share the rows of each update equally."""
        shared = f"a multiple of the number of processes, {processes}, which share the rows of each update equally"
        self._require(self.mini_batch_size % processes == 0, "mini_batch_size", shared)

    def _require_batch(self, tokens: int) -> None:
        """Raises ConfigError for a batch of too many tokens, where each of its rows has `tokens`."""
        most = f"at most {MOST_IN_BATCH // tokens:,}, since a batch has at most {MOST_IN_BATCH:,} tokens"
        self._require(self.batch_size * tokens <= MOST_IN_BATCH, "batch_size", most)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Overrides `Config.upgraded`: sets `updates` from the recipe's name, where an older file encoded it."""
        recipe = str(values.get("recipe", ""))
        if "updates" in values or not recipe.endswith(RELEASE):
            return values
        return {**values, "recipe": recipe.removesuffix(RELEASE), "updates": "release"}


@configuration
class OptimizationConfig(Config):
    """Loss and optimizer settings shared by training and test-time training."""

    refine: RefineConfig | None = field(default_factory=RefineConfig)
    "Settings of the next-sequence loss, REFINE's or another; none: SFT on the next token."
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-6
    "Learning rate; the peak of the schedule where there is one."
    weight_decay: NotNegative = 0.01
    "Decoupled weight decay."
    max_grad_norm: Positive = 1.0
    "Gradients are clipped to this norm."
    seed: Seed = 0
    "Seed of all random draws."
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Precision of the arithmetic (autocast); parameters and optimizer moments keep the model's dtype, float32 in training."

    @property
    def rolls_out(self) -> bool:
        """Returns whether the method samples rollouts."""
        return self.refine is not None and self.refine.rolls_out


@configuration
class UpdateConfig(OptimizationConfig):
    """The settings that `make_optimizers` and `train_step` need: the optimizer and the sizes into which a batch is divided."""

    skip_above_grad_norm: Positive | None = None
    "Updates with a larger gradient norm (before clipping) are skipped; none: no bound. NaN and infinity are always skipped."
    optimizer: Literal["adamw", "muon"] = "adamw"
    "AdamW for everything, or Muon (Jordan et al., 2024) for the hidden matrices and AdamW for the rest."
    mini_batch_size: Size = 32
    "Sequences per optimizer update; a batch makes batch_size / mini_batch_size updates."
    micro_batch_size: Size = 8
    "Sequences in memory at once; it affects neither random draws nor gradients."


@configuration
class TrainConfig(UpdateConfig, RunConfig):  # in this order: the sizes of `UpdateConfig` are the defaults
    """Configuration of a training run: model, data, method (none: SFT on the next token) and optimizer."""

    model_settings: Mapping[Text, float] = field(default_factory=dict)
    "Numeric settings of the model's configuration that this run overrides, such as LaCT's `window_size` or `lact_chunk_size`."
    task: TaskConfig | None = None
    "Post-training: prompts with answers instead of sequences."
    nested: bool = False
    "Post-training: whether updates on a batch's prompts (by `refine`) precede the update on its answers."
    steps: Natural = 100
    "Number of batches."
    batch_size: Size = 128
    "Sequences per batch."
    schedule: Literal["constant", "linear"] = "constant"
    "Learning rate after the warm-up: constant, or linear decay to zero."
    warmup_steps: Natural = 0
    "Batches over which the learning rate rises linearly."
    eval_every: Count = 10
    "Batches between two evaluations; the first evaluation is before training."
    gradient_noise: bool = False
    "Whether evaluations measure signal and noise of the NSP gradient, at the cost of about two batches each (docs/method.md)."
    checkpoint_every: Count = 20
    "Batches between two checkpoints; the final state is always saved."
    checkpoint_minutes: NotNegative = 0.0
    "Minutes after which a checkpoint is also written, at the end of a batch; 0: never."
    keep_checkpoints: Count = 3
    "Newest checkpoints that are kept, besides the one with the lowest held-out loss."
    keep_every: Natural = 0
    "Number of batches between checkpoints that are kept in addition; 0: none."
    activation_checkpointing: Literal["none", "mlp", "blocks"] = "none"
    "What the backward pass recomputes to save memory: nothing, the feed-forward layers, or whole blocks."
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    "Number of CPU threads; 0 keeps torch's default."
    sharding: Literal["none", "full"] = "none"
    "Whether each process stores all weights, gradients and moments, or (`full`, FSDP2) gathers weights when they are used."
    kind: Literal["train"] = "train"
    "Distinguishes training runs from runs of test-time training."

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "data.sequence_length" if self.task is None else "task.prompt_tokens"
        tokens = self.data.sequence_length if self.task is None else self.task.prompt_tokens
        self._require_batch(tokens)
        halves = self.refine is None or not self.gradient_noise or self.batch_size > 1
        self._require(halves, "batch_size", "at least 2 for gradient_noise, which compares two halves of a batch")
        adamw = self.sharding == "none" or self.optimizer == "adamw"
        self._require(adamw, "sharding", "'none' for the optimizer Muon, which needs whole matrices")
        if self.refine is not None and self.refine.has_places:
            least = smallest_length(self.refine)
            allowed = f"at least {least} for the method's num_chunks, rollout_length and margin"
            self._require(self.refine.fits(tokens), name, allowed)
            whole = self.task is not None or self.data.rows == "packed" or self.data.min_tokens >= tokens
            self._require(whole or self.data.min_tokens >= least, "data.min_tokens", f"{allowed} in every document")
        if self.task is None:
            self._require(not self.nested, "nested", "false without a task: there are no answers")
            return
        self._require(self.task.train >= self.batch_size, "batch_size", f"at most task.train, {self.task.train}")
        alone = self.nested or self.refine is None
        self._require(alone, "nested", "true for a task with REFINE, since REFINE makes its updates on the prompts")

    def require_shares(self, processes: int) -> None:
        """Overrides `RunConfig.require_shares`: a training that measures its gradient's noise has one process."""
        super().require_shares(processes)
        alone = processes == 1 or not self.gradient_noise
        self._require(alone, "gradient_noise", f"false with {processes} processes: it is measured in one process only")

    @property
    def method(self) -> str:
        """Returns the name of the method, one of `recipes.methods.ORDER`.

        SFT that makes fewer or more updates ends in `_release` or `_compute`.
        """
        name = ("nested_" if self.nested else "") + ("sft" if self.refine is None else self.refine.method)
        unequal = self.updates != "equal" and self.refine is None and (self.nested or self.task is None)
        return name + (f"_{self.updates}" if unequal else "")

    @property
    def updates_per_batch(self) -> int:
        """Returns the number of updates per batch: by next-token loss or REFINE, and with a task the one on the answers."""
        inner = self.batch_size // self.mini_batch_size
        return inner if self.task is None else 1 + inner * self.nested


def to_json(config: Any) -> str:
    """Returns a configuration as JSON text, with `format_version`."""
    return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str, name: str = "config.json", kind: type[C] = TrainConfig) -> C:
    """Returns the configuration that `to_json` wrote, of class `kind`; errors refer to the text as `name`.

    Raises ValueError for text that is not JSON. Raises ConfigError for JSON that is not an object, for an unsupported
    format version, for an unknown or missing field, and for a value that is not allowed.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    require(isinstance(values, dict), name, values, "a JSON object")
    version = values.pop("format_version", None)
    allowed = f"1 to {FORMAT_VERSION}"
    require(version in range(1, FORMAT_VERSION + 1), f"format_version of {name}", version, allowed)
    return _built(kind, values, RENAMED_FIELDS if version < FORMAT_VERSION else {})


def _built(cls: Any, values: Mapping[str, Any], renamed: Mapping[str, str]) -> Any:
    """Builds a configuration from the plain values in a file; `renamed` maps older names of fields to present ones."""
    values = {renamed.get(name, name): value for name, value in values.items()}
    plain, inner = dict(cls.upgraded(values)), cls.inner_configs()
    for name, value in values.items():
        if (place := f"{cls.__name__}.{name}") in REMOVED:
            default = REMOVED[place]
            require(plain.pop(name) == default, place, value, f"{default!r}, since this version has no such setting")
        elif name in inner and isinstance(value, Mapping):
            plain[name] = _built(inner[name], value, renamed)
    return cls(**plain)
