"""Configurations of test-time training: of one adaptation, and of a run over many prompts (`ttt.json`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from refine_lab.config import Checked, DataConfig, RefineConfig, TaskConfig, Updates, require, with_updates

REWARDS = ("cosine", "binary", "hybrid")
"""What a prompt's rollouts can be rewarded by: a run of test-time training keeps no source of a reward of one's own."""


@dataclass(frozen=True, kw_only=True)
class TTTConfig(Checked):
    """How a model is adapted to a prompt."""

    method: RefineConfig | None = field(default_factory=lambda: RefineConfig(reward="binary", nsp_coef=0.4))
    "REFINE's settings (table 2: binary reward, weight 0.4), or none: SFT on the prompt."
    steps: int = 2
    "Updates, at most; of prompts that are adapted on together, times that all of them are gone through."
    lr: float = 1e-6
    "Learning rate of AdamW (table 2)."
    weight_decay: float = 0.01
    "Decoupled (table D.1)."
    max_grad_norm: float = 1.0
    "Gradients are scaled down to this norm."
    parameters: str = ".*"
    "A regular expression: of the parameters that take gradients, those move in whose names it is found."
    stop_at_reward: float | None = None
    "A mean reward at or above which no more updates are made."
    stop_at_loss: float | None = None
    "A next-token loss, in nats, at or below which no more updates are made."
    seed: int = 0
    "Of every draw."
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Of the arithmetic (autocast); parameters and Adam moments keep the model's."

    def check(self) -> None:
        self._at_least(1, "steps")
        self._at_least(0, "weight_decay", "seed")
        for name in ("lr", "max_grad_norm"):
            require(getattr(self, name) > 0, f"TTTConfig.{name}", getattr(self, name), "above 0")
        try:
            re.compile(self.parameters)
        except re.error as error:
            sentence = f"TTTConfig.parameters must be a regular expression, got {self.parameters!r}: {error}"
            raise ValueError(sentence) from None
        if self.method is None:
            require(self.stop_at_reward is None, "TTTConfig.stop_at_reward", self.stop_at_reward, "none for SFT")
            return
        known = ", ".join(map(repr, REWARDS))
        require(self.method.reward in REWARDS, "TTTConfig.method.reward", self.method.reward, f"one of {known}")
        require(self.method.kl_coef == 0, "TTTConfig.method.kl_coef", self.method.kl_coef, "0: nothing to stay near to")


@dataclass(frozen=True, kw_only=True)
class TTTRunConfig(Checked):
    """A run: the test examples of a task, each answered after the model was adapted to its prompt, or without."""

    recipe: str
    "The function of `recipes` this came from; part of the run directory's name."
    updates: Updates = "equal"
    "Whether both methods make as many updates, or SFT half as many as in the paper's release (`recipes.release_updates`)."
    model: str = "tiny-deltanet"
    "What `load_model` takes."
    model_settings: Mapping[str, float] = field(default_factory=dict)
    "Numbers of the model's configuration that this run changes."
    ttt: TTTConfig | None = field(default_factory=TTTConfig)
    "How the model is adapted, or none: it answers as it is."
    task: TaskConfig = field(default_factory=lambda: TaskConfig(train=0))
    "Where the prompts come from; its test examples are answered. Of a model that a run trained on it: the run's own task."
    count: int | None = None
    "Of the test examples, the first `count` are answered; none: all."
    data: DataConfig = field(default_factory=DataConfig)
    "Text that recall documents are made in."
    batch_size: int = 1
    "Prompts that are adapted on together; a last batch with fewer is dropped."
    mini_batch_size: int = 1
    "Prompts of one update."
    micro_batch_size: int = 1
    "Prompts in memory at once; changes no draw."
    reset: Literal["prompt", "never"] = "prompt"
    "Weights and moments are put back after each prompt, or never: both go on from batch to batch."
    adapt_on: Literal["prompt", "document"] = "prompt"
    "What is adapted on: the whole prompt, question included (the paper), or the part before its question."
    seed: int = 0
    "Of every draw."
    device: str = "auto"
    "`auto`, `cpu`, `cuda` or `cuda:N`."

    def check(self) -> None:
        self._at_least(1, "batch_size", "mini_batch_size", "micro_batch_size")
        self._at_least(0, "seed")
        require(self.count is None or self.count >= 1, "TTTRunConfig.count", self.count, "at least 1, or none for all")
        self._check_run()
        alone = self.reset == "never" or self.batch_size == 1
        require(alone, "TTTRunConfig.batch_size", self.batch_size, "1 where weights are reset after each prompt")
        if self.ttt is not None:
            require(self.ttt.seed == self.seed, "TTTRunConfig.ttt.seed", self.ttt.seed, f"the run's, {self.seed}")

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
