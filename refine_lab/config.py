"""Configurations: frozen values, checked when they are made, written to and read from a run's `config.json`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar

C = TypeVar("C")

RELEASE = "_release_updates"
"""Ended the recipe's name in older files and calls, where `updates="release"` is written now."""

Updates = Literal["equal", "release"]

FORMAT_VERSION = 1
"""Of `config.json`; raised whenever an old file would be read differently."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise one sentence that names the value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def with_updates(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a run's configuration, of which an older file kept `updates` at the end of the recipe's name."""
    recipe = str(values.get("recipe", ""))
    if "updates" in values or not recipe.endswith(RELEASE):
        return values
    return {**values, "recipe": recipe.removesuffix(RELEASE), "updates": "release"}


def unknown(what: str, name: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is none of the allowed ones, with the nearest of them."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {name!r}; {hint}allowed are {', '.join(names)}")


class Checked:
    """A dataclass whose fields are checked by their annotations."""

    __no_type_check__ = True  # a type checker at run time would refuse a value before the sentence below does

    def __post_init__(self) -> None:
        hints = inspect.get_annotations(type(self), eval_str=True)
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(f"{type(self).__name__}.{item.name}", hints[item.name], getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Ranges; overridden."""

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a saved file, where an older one lacks fields that it would be read differently without; overridden."""
        return values

    def _at_least(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= low, f"{type(self).__name__}.{name}", value, f"at least {low}")

    def _check_run(self) -> None:
        """What every run has: the recipe it is named for, its device, a batch in whole mini-batches."""
        values = {name: getattr(self, name) for name in ("recipe", "device", "batch_size", "mini_batch_size")}
        whole = values["batch_size"] % values["mini_batch_size"] == 0
        for name, fine, allowed in (
            ("recipe", re.fullmatch(r"[\w-]+", values["recipe"]), "letters, digits, - and _"),
            ("device", re.fullmatch(r"auto|cpu|cuda(:\d+)?", values["device"]), "'auto', 'cpu', 'cuda' or 'cuda:N'"),
            ("mini_batch_size", whole, f"a divisor of batch_size {values['batch_size']}"),
        ):
            require(bool(fine), f"{type(self).__name__}.{name}", values[name], allowed)


@dataclass(frozen=True, kw_only=True)
class RefineConfig(Checked):
    """REFINE itself: selection, rollout, reward, advantage, loss (paper, section 3; defaults of tables 2 and D.1)."""

    num_chunks: int = 8
    "c: chunks of a sequence, one target position each."
    rollout_length: int = 5
    "k: tokens of a rollout."
    group_size: int = 1
    "n: rollouts of one position."
    selection: Literal["entropy", "uniform", "argmax", "argmin"] = "entropy"
    "How a position is chosen in its chunk (table 7)."
    tau: float = 1.0
    "Temperature of the softmax over a chunk's entropies (eq. 6)."
    smoothing_kernel: int = 5
    "Width of the average pooling over entropies; the next odd number where even, 1 does not smooth."
    entropy_index: Literal["equation", "release"] = "release"
    "H_t is the uncertainty about x_t (eq. 5) or about x_{t+1}, the first token rolled out (the paper's released code)."
    margin: int = 20
    "Fewest tokens before and after the start of a rollout, its own included in those after (the released code's 20)."
    temperature: float = 1.0
    "Sampling temperature of rollouts."
    reward: str = "cosine"
    "`cosine` (eq. 9), `binary` (eq. 11), `hybrid` (eq. 12), or `custom`: the function in the run's reward.py."
    group_by: Literal["sequence", "prefix"] = "sequence"
    "What rewards are standardised over: all c * n rollouts of a sequence, or the n of one position."
    prefix_gradient: Literal["full", "detached"] = "full"
    "Whether the policy gradient flows from a rollout through the state into its prefix."
    ntp_coef: float = 1.0
    "Weight of the next-token loss (lambda_SFT)."
    nsp_coef: float = 0.2
    "Weight of the next-sequence loss (lambda_RL)."
    clip_eps: float = 0.2
    "PPO clip of the probability ratio."
    dual_clip: float = 3.0
    "Bound of the loss where the advantage is negative (Ye et al., 2020)."
    kl_coef: float = 0.0
    "Weight of the divergence from the policy that training started with, on the rollout tokens."
    entropy_coef: float = 0.0
    "Weight of the entropy bonus on the rollout tokens."

    def check(self) -> None:
        self._at_least(1, "num_chunks", "rollout_length", "group_size", "smoothing_kernel")
        self._at_least(0, "margin", "ntp_coef", "nsp_coef", "kl_coef", "entropy_coef")
        for name in ("tau", "temperature"):
            require(getattr(self, name) > 0, f"RefineConfig.{name}", getattr(self, name), "above 0")
        require(0 < self.clip_eps < 1, "RefineConfig.clip_eps", self.clip_eps, "between 0 and 1")
        require(self.dual_clip > 1, "RefineConfig.dual_clip", self.dual_clip, "above 1")
        allowed = ("cosine", "binary", "hybrid", "custom")
        require(self.reward in allowed, "RefineConfig.reward", self.reward, "one of " + ", ".join(map(repr, allowed)))
        if self.group_by == "prefix" and self.group_size == 1:
            raise ValueError(
                "RefineConfig.group_by 'prefix' compares rollouts of one position: group_size must be at least 2, got 1"
            )

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


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Which sequences are trained and evaluated on."""

    sources: Mapping[str, float] = field(default_factory=lambda: {"python": 1.0})
    "Source -> share of the plain rows. `python`, a folder of .txt, a .jsonl/.parquet, or `datasets:NAME`."
    text_column: str = "text"
    "Column of a .jsonl, .parquet or data set that holds the text."
    sequence_length: int = 1024
    "Tokens of a row."
    min_tokens: int = 1
    "Documents with fewer tokens are left out."
    max_tokens: int = 20_000_000
    "Tokens kept of each source."
    recall: Mapping[str, float] = field(default_factory=dict)
    "Kind of recall document (`pairs`, `word-1`, `word-4`, `number-1`, ...) -> its share of rows; the rest is text."
    validation_sequences: int = 8
    "Held-out rows that NTP loss and accuracy are measured on."
    add_bos: bool | None = None
    "Whether each document and prompt begins with the BOS token; none: with what the tokenizer itself puts before a text."

    def check(self) -> None:
        self._at_least(16, "sequence_length")
        self._at_least(1, "min_tokens", "max_tokens", "validation_sequences")
        require(len(self.sources) > 0, "DataConfig.sources", self.sources, "at least one source")
        for name, share in self.sources.items():
            require(share > 0, f"DataConfig.sources[{name!r}]", share, "a share above 0")
        for name, share in self.recall.items():
            require(0 <= share <= 1, f"DataConfig.recall[{name!r}]", share, "a share from 0 to 1")
        total = sum(self.recall.values())
        require(total <= 1 + 1e-9, "DataConfig.recall", self.recall, "shares that sum to at most 1")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Checked):
    """Prompts with answers: what post-training trains and tests on, and what test-time training adapts to."""

    source: str = "recall:word-4"
    "`recall:KIND` of recall document, `ruler:FILE` (SQuAD v2.0 or HotpotQA as published), or a .parquet or .jsonl."
    test_source: str | None = None
    "Where the test examples come from, in the forms of `source`; none: from `source` too."
    prompt_tokens: int = 512
    "Tokens of a prompt, at most."
    over_limit: Literal["refuse", "cut_middle", "drop"] = "refuse"
    "What becomes of a longer prompt: all are refused, its middle is cut out, or it is left out."
    answer_tokens: int | None = None
    "Tokens that are generated as an answer, at most; none: what the longest reference answer needs."
    lines: Literal["first", "all"] = "first"
    "What of the generated text is the answer: its first line, or all of it."
    strip_leading: bool | None = None
    "Whether empty lines before the answer are left out; none: yes, but not for `recall:` and `ruler:`, as RULER does."
    train: int = 400
    "Examples to train on."
    validation: int = 0
    "Examples that are measured during training."
    test: int | None = 200
    "Examples that the answers are measured on; none: all that are left."
    prompt_column: str = "prompt"
    "Column of a .parquet or .jsonl that holds the prompts."
    answer_column: str | None = None
    "Column that holds the answer, or a list of answers any of which is right; none: `answer`, where there is one."
    shared: Literal["refuse", "allow"] = "refuse"
    "What becomes of a question or document that two splits share: refused, or allowed and told."

    def check(self) -> None:
        self._at_least(16, "prompt_tokens")
        self._at_least(0, "train", "validation")
        enough = self.answer_tokens is None or self.answer_tokens >= 1
        require(enough, "TaskConfig.answer_tokens", self.answer_tokens, "at least 1, or none for the longest answer's")
        require(self.test is None or self.test >= 0, "TaskConfig.test", self.test, "at least 0, or none for all")
        other = self.test_source != self.source
        require(other, "TaskConfig.test_source", self.test_source, "another than TaskConfig.source, or none")

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
        """As `Checked.upgraded`: older answers were the first line as it stood, and `answer` was the default column."""
        if "lines" in values:
            return values
        column = {"answer_column": None} if values.get("answer_column") == "answer" else {}
        return {**values, "lines": "first", "strip_leading": False, **column}


def _form(source: str) -> str:
    before, colon, _ = source.partition(":")
    return before if colon and before in ("recall", "ruler") else "file"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """One training run: a model, its data, the method (none: SFT on the next token), the optimizer."""

    recipe: str
    "The function of `recipes` this came from; part of the run directory's name."
    updates: Updates = "equal"
    "Whether all methods make as many updates, or SFT fewer as in the paper's release (`recipes.release_updates` sets both)."
    model: str = "tiny-deltanet"
    "What `load_model` takes: a shipped name, a run, a folder, `org/repo[:subfolder][@revision]`; after `new:` fresh weights."
    model_settings: Mapping[str, float] = field(default_factory=dict)
    "Numbers of the model's configuration that this run changes, such as a LaCT's `window_size` or `lact_chunk_size`."
    method: RefineConfig | None = field(default_factory=RefineConfig)
    "REFINE's settings, or none: plain SFT."
    data: DataConfig = field(default_factory=DataConfig)
    "Sequences; with a task, the text that its recall documents are made in."
    task: TaskConfig | None = None
    "Post-training: prompts with answers, in place of sequences."
    nested: bool = False
    "Post-training: whether updates on a batch's prompts (by `method`) come before the one on its answers."
    steps: int = 100
    "Batches."
    batch_size: int = 128
    "Sequences of a batch."
    mini_batch_size: int = 32
    "Sequences of one optimizer update; a batch makes batch_size / mini_batch_size updates."
    micro_batch_size: int = 8
    "Sequences in memory at once; changes no draw and no gradient."
    optimizer: Literal["adamw", "muon"] = "adamw"
    "AdamW for everything, or Muon (Jordan et al., 2024) for the hidden matrices and AdamW for the rest."
    lr: float = 1e-6
    "Peak learning rate."
    schedule: Literal["constant", "linear"] = "constant"
    "After the warm-up: constant, or linear to zero."
    warmup_steps: int = 0
    "Batches over which the learning rate rises linearly."
    weight_decay: float = 0.01
    "Decoupled."
    max_grad_norm: float = 1.0
    "Gradients are scaled down to this norm."
    eval_every: int = 10
    "Batches between two evaluations; the first is before training."
    checkpoint_every: int = 20
    "Batches between two checkpoints; there is always one at the end."
    seed: int = 0
    "Of every draw."
    device: str = "auto"
    "`auto`, `cpu`, `cuda` or `cuda:N`."
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Of the arithmetic (autocast); parameters and Adam moments stay float32."
    recompute: Literal["none", "mlp", "blocks"] = "none"
    "What the backward computes again to save memory: nothing, the feed-forward parts, or every block as a whole."
    threads: int = 0
    "CPU threads; 0 leaves torch's choice."

    def check(self) -> None:
        self._at_least(1, "batch_size", "mini_batch_size", "micro_batch_size", "eval_every", "checkpoint_every")
        self._at_least(0, "steps", "warmup_steps", "weight_decay", "seed", "threads")
        for name in ("lr", "max_grad_norm"):
            require(getattr(self, name) > 0, f"TrainConfig.{name}", getattr(self, name), "above 0")
        self._check_run()
        if self.method is not None:
            allowed = f"at least {smallest_length(self.method)} for the method's num_chunks, rollout_length and margin"
            name, tokens = "data.sequence_length", self.data.sequence_length
            if self.task is not None:
                name, tokens = "task.prompt_tokens", self.task.prompt_tokens
            require(self.method.fits(tokens), f"TrainConfig.{name}", tokens, allowed)

        self._check_task()

    def _check_task(self) -> None:
        if self.task is None:
            require(not self.nested, "TrainConfig.nested", self.nested, "false without a task: there are no answers")
            return
        require(
            self.task.train >= self.batch_size,
            "TrainConfig.batch_size",
            self.batch_size,
            f"at most task.train, {self.task.train}",
        )
        alone = self.nested or self.method is None
        require(
            alone, "TrainConfig.nested", self.nested, "true where a task is trained with REFINE: it reads the prompts"
        )

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
    """The configuration written by `to_json`, a `TrainConfig` or a `kind` of one's own; `name` is what errors call the text.

    Raises ValueError for text that is no JSON object, for another format version, for an unknown or missing field, and
    for a value out of its range.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    require(isinstance(values, dict), name, values, "a JSON object")
    version = values.pop("format_version", None)
    require(version == FORMAT_VERSION, f"format_version of {name}", version, f"{FORMAT_VERSION}, the one read here")
    return _build(kind, values)


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    upgraded = getattr(kind, "upgraded", None)  # plain values have none
    values = upgraded(values) if upgraded else values
    hints = inspect.get_annotations(kind, eval_str=True)
    for name in sorted(set(values) - set(hints)):
        raise unknown(f"field of {kind.__name__}", name, hints)
    for item in dataclasses.fields(kind):
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if not optional and item.name not in values:
            raise ValueError(f"{kind.__name__} needs the field {item.name!r}, which is missing")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    for option in _options(hint):
        if isinstance(option, type) and dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return _build(option, value)
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of `A | None`, or of `A` alone."""
    return typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _checked(name: str, hint: Any, value: Any) -> Any:
    """`value` as its field holds it: shares as a dict, numbers as float, everything else as it is."""
    options = _options(hint)
    if any(dataclasses.is_dataclass(option) for option in options):
        allowed = " or ".join("none" if option is type(None) else f"a {option.__name__}" for option in options)
        require(isinstance(value, options), name, value, allowed)
    elif isinstance(hint, UnionType):
        (kind,) = (option for option in options if option is not type(None))
        return None if value is None else _checked(name, kind, value)
    elif typing.get_origin(hint) is Mapping:
        named = isinstance(value, Mapping) and all(isinstance(key, str) and key for key in value)
        require(named, name, value, "a mapping from names to numbers")
        return {key: _checked(f"{name}[{key!r}]", float, share) for key, share in value.items()}
    elif typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)))
    elif hint is int:
        require(isinstance(value, int) and not isinstance(value, bool), name, value, "a whole number")
    elif hint is bool:
        require(isinstance(value, bool), name, value, "true or false")
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        require(number, name, value, "a number")
        return float(value)
    elif hint is str:
        require(isinstance(value, str) and value != "", name, value, "a text that is not empty")
    return value
