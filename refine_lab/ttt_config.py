"""Configurations of test-time training: of one adaptation, and of a run over many prompts (its `config.json`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from refine_lab.config import BUILT_IN_REWARDS, OptimizationConfig, RefineConfig, RunConfig, TaskConfig, with_updates
from refine_lab.validation import ConfigError, Count, Text, configuration


@configuration
class TTTConfig(OptimizationConfig):
    """How a model is adapted to a prompt."""

    method: RefineConfig | None = field(default_factory=lambda: RefineConfig(reward="binary", nsp_coef=0.4))
    "REFINE's settings (table 2: binary reward, weight 0.4), or none: SFT on the prompt."
    steps: Count = 2
    "The most updates of a prompt; where prompts are adapted on together, the most passes over all of them."
    parameters: Text = ".*"
    "A regular expression: only parameters that take gradients and whose names it is found in are updated."
    stop_at_reward: float | None = None
    "A mean reward at or above which no more updates are made."
    stop_at_loss: float | None = None
    "A next-token loss, in nats, at or below which no more updates are made."

    def __post_init__(self) -> None:
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ConfigError("TTTConfig.parameters", self.parameters, f"a regular expression ({error})") from None
        if self.method is None:
            self._require(self.stop_at_reward is None, "stop_at_reward", "none for SFT")
            return
        known = ", ".join(map(repr, BUILT_IN_REWARDS))  # a run keeps no source of another reward
        self._require(self.method.reward in BUILT_IN_REWARDS, "method.reward", f"one of {known}")
        self._require(self.method.kl_coef == 0, "method.kl_coef", "0: there is no policy to stay near to")


@configuration
class TTTRunConfig(RunConfig):
    """A run: the test examples of a task, each answered after the model was adapted to its prompt, or without."""

    ttt: TTTConfig | None = field(default_factory=TTTConfig)
    "How the model is adapted, or none: it answers as it is."
    task: TaskConfig = field(default_factory=lambda: TaskConfig(train=0))
    "Where the prompts come from; its test examples are answered. A model that a run trained on it has the run's own task."
    count: Count | None = None
    "Only the first `count` test examples are answered; none: all."
    reset: Literal["prompt", "never"] = "prompt"
    "Weights and moments are put back after each prompt, or never: both go on from batch to batch."
    adapt_on: Literal["prompt", "document"] = "prompt"
    "What is adapted on: the whole prompt, question included (the paper), or the part before its question."
    kind: Literal["answer"] = "answer"
    "Tells a run of test-time training from one of training."

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.reset == "never" or self.batch_size == 1
        self._require(alone, "batch_size", "1 where weights are reset after each prompt")
        if self.ttt is not None:
            self._require(self.ttt.seed == self.seed, "ttt.seed", f"the run's, {self.seed}")

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_updates(values)

    @property
    def arm(self) -> Literal["none", "sft", "refine"]:
        if self.ttt is None:
            return "none"
        return "sft" if self.ttt.method is None else "refine"

    @property
    def dtype(self) -> str:
        """Of the arithmetic in which prompts are read, adapted on and answered; float32 where nothing is adapted."""
        return "float32" if self.ttt is None else self.ttt.dtype

    @property
    def way(self) -> str:
        """The arm, and whether it makes fewer updates than the other, as in the paper's release."""
        return self.arm + ("_release" if self.updates == "release" and self.arm == "sft" else "")
