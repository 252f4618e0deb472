"""Configurations: frozen values, checked when they are made, written to and read from a run's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field

from refine_lab.validation import Config, Count, Natural, NotNegative, Positive, Share, Text, configuration, require
from refine_lab.validation import ConfigError as ConfigError
from refine_lab.validation import unknown as unknown

C = TypeVar("C")

RELEASE = "_release_updates"
"""Ended the recipe's name in older files and calls, where `updates="release"` is written now."""

Updates = Literal["equal", "release"]

BUILT_IN_REWARDS = ("cosine", "binary", "hybrid", "edit")
"""The names of the functions in `refine_lab.method.rewards.REWARDS`, known without loading torch."""

FORMAT_VERSION = 2
"""Of `config.json`; raised whenever an old file would be read differently. Version 1 is still read."""

REMOVED = {"DataConfig.text_column": "text", "TTTRunConfig.model_settings": {}}
"""Fields that older files hold and the value that they are read with; every other value is refused."""


def with_updates(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a run's configuration, of which an older file kept `updates` at the end of the recipe's name."""
    recipe = str(values.get("recipe", ""))
    if "updates" in values or not recipe.endswith(RELEASE):
        return values
    return {**values, "recipe": recipe.removesuffix(RELEASE), "updates": "release"}


@configuration
class RefineConfig(Config):
    """REFINE itself: selection, rollout, reward, advantage, loss (paper, section 3; defaults of tables 2 and D.1)."""

    num_chunks: Count = 8
    "c: chunks of a sequence, one target position each."
    rollout_length: Count = 5
    "k: tokens of a rollout."
    group_size: Count = 1
    "n: rollouts of one position."
    selection: Literal["entropy", "uniform", "argmax", "argmin"] = "entropy"
    "How a position is chosen in its chunk (table 7)."
    tau: Positive = 1.0
    "Temperature of the softmax over a chunk's entropies (eq. 6)."
    smoothing_kernel: Count = 5
    "Width of the average pooling over entropies; the next odd number where even, 1 does not smooth."
    entropy_index: Literal["equation", "release"] = "release"
    "H_t is the uncertainty about x_t (eq. 5) or about x_{t+1}, the first token rolled out (the paper's released code)."
    margin: Natural = 20
    "Fewest tokens before and after the start of a rollout, its own included in those after (the released code's 20)."
    temperature: Positive = 1.0
    "Sampling temperature of rollouts."
    reward: Text = "cosine"
    "One of `BUILT_IN_REWARDS` (see `refine_lab.method.rewards`), or `custom`: the function in the run's reward.py."
    group_by: Literal["sequence", "prefix"] = "sequence"
    "What rewards are standardised over: all c * n rollouts of a sequence, or the n of one position."
    prefix_gradient: Literal["full", "detached"] = "full"
    "Whether the policy gradient flows from a rollout through the state into its prefix."
    ntp_coef: NotNegative = 1.0
    "Weight of the next-token loss (lambda_SFT)."
    nsp_coef: NotNegative = 0.2
    "Weight of the next-sequence loss (lambda_RL)."
    clip_eps: Annotated[float, Field(gt=0, lt=1), "between 0 and 1"] = 0.2
    "PPO clip of the probability ratio."
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    "Bound of the loss where the advantage is negative (Ye et al., 2020)."
    kl_coef: NotNegative = 0.0
    "Weight of the divergence from the policy that training started with, on the rollout tokens."
    entropy_coef: NotNegative = 0.0
    "Weight of the entropy bonus on the rollout tokens."

    def __post_init__(self) -> None:
        allowed = (*BUILT_IN_REWARDS, "custom")
        self._require(self.reward in allowed, "reward", "one of " + ", ".join(map(repr, allowed)))
        compared = self.group_by == "sequence" or self.group_size > 1
        self._require(compared, "group_size", "at least 2 where group_by is 'prefix'")

    @property
    def ends(self) -> tuple[int, int]:
        """(first, gap): a rollout may start from positions `first` to `length - 1 - gap` of a row."""
        return max(self.margin - 1, 0), max(self.margin, self.rollout_length)

    def fits(self, length: int) -> bool:
        """Whether each of the `num_chunks` chunks of a row of that length has a position to roll out from."""
        first, gap = self.ends
        size, last = length // self.num_chunks, length - 1 - gap
        return first < size and max((self.num_chunks - 1) * size, first) <= last


def smallest_length(config: RefineConfig) -> int:
    """The number of tokens from which on every row fits.

    Where `rollout_length` exceeds `margin`, some shorter rows do as well: those whose dropped tail gives room.
    """
    first, gap = config.ends
    return max(config.num_chunks * gap + 1, first + gap + 1)


@configuration
class DataConfig(Config):
    """Which sequences are trained and evaluated on."""

    sources: Mapping[Text, Positive] = field(default_factory=lambda: {"python": 1.0})
    "Source -> share of the plain rows: `python`, .txt files or a folder of them, .jsonl, .parquet, or `datasets:NAME`."
    sequence_length: Annotated[int, Field(ge=16)] = 1024
    "Tokens of a row."
    min_tokens: Count = 1
    "Documents with fewer tokens are left out."
    max_tokens: Count = 20_000_000
    "Tokens kept of each source."
    recall: Mapping[Text, Share] = field(default_factory=dict)
    "Kind of recall document (`pairs`, `word-1`, `word-4`, `number-1`, ...) -> its share of rows; the rest is text."
    validation_sequences: Count = 8
    "Held-out rows that NTP loss and accuracy are measured on."
    add_bos: bool | None = None
    "Whether each document and prompt begins with the BOS token; none: with what the tokenizer itself puts before a text."

    def __post_init__(self) -> None:
        self._require(len(self.sources) > 0, "sources", "at least one source")
        self._require(sum(self.recall.values()) <= 1 + 1e-9, "recall", "shares that sum to at most 1")


@configuration
class TaskConfig(Config):
    """Prompts with answers: what post-training trains and tests on, and what test-time training adapts to."""

    source: Text = "recall:word-4"
    "`recall:KIND` of recall document, `ruler:FILE` (SQuAD v2.0 or HotpotQA as published), or a .parquet or .jsonl."
    test_source: Text | None = None
    "Where the test examples come from, in the forms of `source`; none: from `source` too."
    prompt_tokens: Annotated[int, Field(ge=16)] = 512
    "Tokens of a prompt, at most."
    over_limit: Literal["refuse", "cut_middle", "drop"] = "refuse"
    "What becomes of a longer prompt: all are refused, its middle is cut out, or it is left out."
    answer_tokens: Count | None = None
    "Tokens that are generated as an answer, at most; none: what the longest reference answer needs."
    lines: Literal["first", "all"] = "first"
    "What of the generated text is the answer: its first line, or all of it."
    strip_leading: bool | None = None
    "Whether empty lines before the answer are left out; none: yes, but not for `recall:` and `ruler:`, as RULER does."
    train: Natural = 400
    "Examples to train on."
    validation: Natural = 0
    "Examples that are measured during training."
    test: Natural | None = 200
    "Examples that the answers are measured on; none: all that are left."
    prompt_column: Text = "prompt"
    "Column of a .parquet or .jsonl that holds the prompts."
    answer_column: Text | None = None
    "Column that holds the answer, or a list of answers any of which is right; none: `answer`, where there is one."
    shared: Literal["refuse", "allow"] = "refuse"
    "What becomes of a question or document that two splits share: refused, or allowed and told."

    def __post_init__(self) -> None:
        self._require(self.test_source != self.source, "test_source", "another than TaskConfig.source, or none")

    @property
    def form(self) -> str:
        """The form of `source`: `recall`, `ruler`, or `file`."""
        return _form(self.source)

    @property
    def asked_form(self) -> str:
        """The form of the source that the test examples come from."""
        return _form(self.test_source or self.source)

    def settled(self) -> TaskConfig:
        """The task with the value of its test examples' source in place of a `strip_leading` of none, as runs record it."""
        strip = self.asked_form == "file" if self.strip_leading is None else self.strip_leading
        return dataclasses.replace(self, strip_leading=strip)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `Config.upgraded`: before `lines`, an answer was its first line as it stood, in the column `answer` by default."""
        if "lines" in values:
            return values
        column = {"answer_column": None} if values.get("answer_column") == "answer" else {}
        return {**values, "lines": "first", "strip_leading": False, **column}


def _form(source: str) -> str:
    before, colon, _ = source.partition(":")
    return before if colon and before in ("recall", "ruler") else "file"


@configuration
class RunConfig(Config):
    """What every run has, of training and of test-time training."""

    recipe: Annotated[str, Field(pattern=r"^[\w-]+$"), "letters, digits, - and _"]
    "The recipe this came from, a name in `recipes`; part of the run directory's name."
    updates: Updates = "equal"
    "Whether all methods make as many updates, or SFT fewer as in the paper's release (`recipes.release_updates` sets both)."
    model: Text = "tiny-deltanet"
    "What `load_model` takes: a shipped name, a run, a folder, `org/repo[:subfolder][@revision]`; after `new:` fresh weights."
    data: DataConfig = field(default_factory=DataConfig)
    "Sequences; with a task, the text that its recall documents are made in."
    batch_size: Count = 1
    "Sequences or prompts of a batch."
    mini_batch_size: Count = 1
    "Sequences of one optimizer update; a batch makes batch_size / mini_batch_size updates."
    micro_batch_size: Count = 1
    "Sequences in memory at once; changes no draw and no gradient."
    seed: Natural = 0
    "Seed of every draw."
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"), "'auto', 'cpu', 'cuda' or 'cuda:N'"] = "auto"
    "`auto`, `cpu`, `cuda` or `cuda:N`."

    def __post_init__(self) -> None:
        whole = self.batch_size % self.mini_batch_size == 0
        self._require(whole, "mini_batch_size", f"a divisor of batch_size {self.batch_size}")


@configuration
class OptimizationConfig(Config):
    """What is minimised, and how far an update moves: the same settings in training and in test-time training."""

    method: RefineConfig | None = field(default_factory=RefineConfig)
    "REFINE's settings, or none: SFT on the next token."
    lr: Positive = 1e-6
    "Learning rate, where it has a schedule its peak."
    weight_decay: NotNegative = 0.01
    "Decoupled."
    max_grad_norm: Positive = 1.0
    "Gradients are scaled down to this norm."
    seed: Natural = 0
    "Seed of every draw."
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Precision of the arithmetic (autocast); parameters and moments keep the model's, float32 in training."


@configuration
class UpdateConfig(OptimizationConfig):
    """What `make_optimizers` and `train_step` need: the optimizer, and how a batch is divided."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    "AdamW for everything, or Muon (Jordan et al., 2024) for the hidden matrices and AdamW for the rest."
    mini_batch_size: Count = 32
    "Sequences of one optimizer update; a batch makes batch_size / mini_batch_size updates."
    micro_batch_size: Count = 8
    "Sequences in memory at once; changes no draw and no gradient."


@configuration
class TrainConfig(UpdateConfig, RunConfig):  # in this order: the sizes of `UpdateConfig` are the defaults
    """One training run: a model, its data, the method (none: SFT on the next token), the optimizer."""

    model_settings: Mapping[Text, float] = field(default_factory=dict)
    "Numbers of the model's configuration that this run changes, such as a LaCT's `window_size` or `lact_chunk_size`."
    task: TaskConfig | None = None
    "Post-training: prompts with answers, in place of sequences."
    nested: bool = False
    "Post-training: whether updates on a batch's prompts (by `method`) come before the one on its answers."
    steps: Natural = 100
    "Batches."
    batch_size: Count = 128
    "Sequences of a batch."
    schedule: Literal["constant", "linear"] = "constant"
    "After the warm-up: constant, or linear to zero."
    warmup_steps: Natural = 0
    "Batches over which the learning rate rises linearly."
    eval_every: Count = 10
    "Batches between two evaluations; the first is before training."
    checkpoint_every: Count = 20
    "Batches between two checkpoints; there is always one at the end."
    recompute: Literal["none", "mlp", "blocks"] = "none"
    "What the backward computes again to save memory: nothing, the feed-forward parts, or every block as a whole."
    threads: Natural = 0
    "CPU threads; 0 leaves torch's choice."
    kind: Literal["train"] = "train"
    "Tells a run of training from one of test-time training."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None:
            allowed = f"at least {smallest_length(self.method)} for the method's num_chunks, rollout_length and margin"
            name = "data.sequence_length" if self.task is None else "task.prompt_tokens"
            tokens = self.data.sequence_length if self.task is None else self.task.prompt_tokens
            self._require(self.method.fits(tokens), name, allowed)
        if self.task is None:
            self._require(not self.nested, "nested", "false without a task: there are no answers")
            return
        self._require(self.task.train >= self.batch_size, "batch_size", f"at most task.train, {self.task.train}")
        alone = self.nested or self.method is None
        self._require(alone, "nested", "true where a task is trained with REFINE: it reads the prompts")

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_updates(values)

    @property
    def arm(self) -> Literal["sft", "refine", "nested_sft", "nested_refine"]:
        if self.nested:
            return "nested_sft" if self.method is None else "nested_refine"
        return "sft" if self.method is None else "refine"

    @property
    def way(self) -> str:
        """The arm, and whether it makes fewer updates than the others, as in the paper's release."""
        unequal = self.updates == "release" and self.arm in ("sft", "nested_sft")
        return self.arm + ("_release" if unequal and (self.nested or self.task is None) else "")

    @property
    def updates_per_batch(self) -> int:
        """Updates by next-token loss or REFINE, and with a task the one on the answers."""
        inner = self.batch_size // self.mini_batch_size
        return inner if self.task is None else 1 + inner * self.nested


def to_json(config: Any) -> str:
    """A configuration as JSON text, with `format_version`."""
    return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str, name: str = "config.json", kind: type[C] = TrainConfig) -> C:
    """The configuration that `to_json` wrote, a `TrainConfig` or another `kind`; `name` is what errors call the text.

    Raises ValueError for text that is not JSON. Raises ConfigError for JSON that is no object, for a format version that is
    not read, for an unknown or missing field, and for a value that is not allowed.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    require(isinstance(values, dict), name, values, "a JSON object")
    version = values.pop("format_version", None)
    require(version in (1, FORMAT_VERSION), f"format_version of {name}", version, f"1 or {FORMAT_VERSION}")
    return _built(kind, values)


def _built(cls: Any, values: Mapping[str, Any]) -> Any:
    """A configuration from plain values, as a file holds them."""
    plain = dict(cls.upgraded(values))
    for name, value in values.items():
        place, annotation = f"{cls.__name__}.{name}", getattr(cls.__pydantic_fields__.get(name), "annotation", None)
        inner = next((each for each in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(each)), None)
        if place in REMOVED:
            default = REMOVED[place]
            require(plain.pop(name) == default, place, value, f"{default!r}, since this version has no such setting")
        elif inner is not None and isinstance(value, Mapping):
            plain[name] = _built(inner, value)
    return cls(**plain)
