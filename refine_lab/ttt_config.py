"""Configurations of test-time training: one adaptation, and a run over many prompts (its `config.json`)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import field
from typing import Annotated, Literal

import regex
from pydantic import Field

from refine_lab.config import BUILT_IN_REWARDS, OptimizationConfig, RefineConfig, RunConfig, TaskConfig
from refine_lab.validation import ConfigError, Count, Size, configuration

MATCH_SECONDS = 1.0
"""Maximum time to match a regular expression with the names of all parameters of a model."""
MOST_REPEATS = 10_000
"""Maximum product of the repeat counts of a regular expression, each of which is compiled separately."""


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Returns the names in which the regular expression `pattern` is found. Raises ConfigError if that takes too long."""
    deadline = time.monotonic() + MATCH_SECONDS
    try:
        compiled = regex.compile(pattern)
        return {name for name in names if compiled.search(name, timeout=max(1e-3, deadline - time.monotonic()))}
    except TimeoutError:
        allowed = f"a regular expression that can be matched against all parameter names within {MATCH_SECONDS:g} s"
        raise ConfigError("TTTConfig.parameters", pattern, allowed) from None


@configuration
class TTTConfig(OptimizationConfig):
    """How a model is adapted to a prompt."""

    refine: RefineConfig | None = field(default_factory=lambda: RefineConfig(reward="binary", nsp_coef=0.4))
    "REFINE's settings (table 2: binary reward, weight 0.4); none: SFT on the prompt."
    steps: Size = 2
    "Maximum number of updates per prompt; for prompts adapted to jointly, the maximum number of passes over them."
    parameters: Annotated[str, Field(min_length=1, max_length=1000)] = ".*"
    "Regular expression: only trainable parameters whose name matches are updated."
    stop_at_reward: float | None = None
    "Adaptation stops once the mean reward is at least this value."
    stop_at_loss: float | None = None
    "Adaptation stops once the next-token loss, in nats, is at most this value."

    def __post_init__(self) -> None:
        repeats = math.prod(max(1, int(number)) for number in re.findall(r"\{(\d+)", self.parameters))
        most = f"a regular expression whose repeat counts multiply to at most {MOST_REPEATS:,}"
        self._require(repeats <= MOST_REPEATS, "parameters", most)
        try:
            regex.compile(self.parameters)
        except (regex.error, RecursionError) as error:
            raise ConfigError("TTTConfig.parameters", self.parameters, f"a regular expression ({error})") from None
        if self.refine is None:
            self._require(self.stop_at_reward is None, "stop_at_reward", "none for SFT")
            return
        rewarded = self.rolls_out or self.stop_at_reward is None
        self._require(rewarded, "stop_at_reward", f"none for the estimator {self.refine.estimator!r}")
        known = ", ".join(map(repr, BUILT_IN_REWARDS))  # a run keeps no source of another reward
        self._require(self.refine.reward in BUILT_IN_REWARDS, "refine.reward", f"one of {known}")
        self._require(self.refine.selection != "custom", "refine.selection", "a built-in selection")
        self._require(self.refine.kl_coef == 0, "refine.kl_coef", "0, since test-time training has no reference policy")


@configuration
class TTTRunConfig(RunConfig):
    """Configuration of a test-time training run: test examples are answered with or without adaptation to each prompt."""

    ttt: TTTConfig | None = field(default_factory=TTTConfig)
    "How the model is adapted; none: it answers unchanged."
    task: TaskConfig = field(default_factory=lambda: TaskConfig(train=0))
    "Source of the prompts; its test examples are answered. A model from a post-training run uses the task of that run instead."
    count: Count | None = None
    "Answers only the first `count` test examples; none: all of them."
    reset: Literal["prompt", "never"] = "prompt"
    "When weights and optimizer moments are reset: after each prompt, or never, so that they carry over from batch to batch."
    adapt_on: Literal["prompt", "document"] = "prompt"
    "What the model is adapted to: the whole prompt including the question (the paper), or the part before the question."
    kind: Literal["answer"] = "answer"
    "Distinguishes runs of test-time training from training runs."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_batch(self.task.prompt_tokens)
        separate = self.reset == "never" or self.batch_size == 1
        self._require(separate, "batch_size", "1 if weights are reset after each prompt")
        if self.ttt is not None:
            self._require(self.ttt.seed == self.seed, "ttt.seed", f"the run's, {self.seed}")

    @property
    def drifts(self) -> bool:
        """Returns whether the weights of a batch begin with what the batch before has left."""
        return self.ttt is not None and self.reset == "never"

    def require_shares(self, processes: int) -> None:
        """Overrides `RunConfig.require_shares`: processes that share no update answer different prompts."""
        if self.drifts:
            super().require_shares(processes)

    @property
    def dtype(self) -> str:
        """Returns the dtype used to read, adapt to and answer prompts; float32 without adaptation."""
        return "float32" if self.ttt is None else self.ttt.dtype

    @property
    def method(self) -> str:
        """Returns the name of the method, one of `recipes.methods.ORDER`; `none` without adaptation.

        SFT that makes fewer or more updates ends in `_release` or `_compute`.
        """
        if self.ttt is None:
            return "none"
        if self.ttt.refine is not None:
            return self.ttt.refine.method
        return "sft" if self.updates == "equal" else f"sft_{self.updates}"
