"""Configuration of the method: selection, rollouts, rewards, advantages and losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from refine_lab.validation import (
    MOST_TOKENS,
    Config,
    ConfigError,
    Natural,
    NotNegative,
    Positive,
    Size,
    Text,
    configuration,
)

BUILT_IN_REWARDS = ("cosine", "binary", "hybrid", "edit", "exact")
"""Names of the functions in `refine_lab.method.rewards.REWARDS`, listed here so that torch need not be loaded."""

BUILT_IN_SELECTIONS = ("entropy", "uniform", "argmax", "argmin", "memory", "copy")
"""Values of `RefineConfig.selection` that need no function."""

PLACE_FIELDS = ("num_chunks", "rollout_length", "selection", "tau", "smoothing_kernel", "entropy_index", "margin")
"""Fields of `RefineConfig` that determine the positions and the tokens after them."""

EXPECTED_REWARDS = ("exact", "binary")
"""Rewards for which the estimator `expected` has a formula."""


@configuration
class RefineConfig(Config):
    """REFINE's settings: selection, rollout, reward, advantage, loss (paper, section 3; defaults of tables 2 and D.1)."""

    num_chunks: Size = 8
    "c: chunks per sequence, with one target position each."
    rollout_length: Size = 5
    "k: tokens per rollout."
    group_size: Size = 1
    "n: rollouts per position."
    estimator: Literal["rollouts", "expected", "weighted", "longce", "dft"] = "rollouts"
    "How the next-sequence loss is computed: from sampled rollouts, or by a formula of `refine_lab.method.estimators`."
    selection: Literal["entropy", "uniform", "argmax", "argmin", "memory", "copy", "custom"] = "entropy"
    "How the target position is chosen in each chunk: table 7, `memory` or `copy` (docs/method.md), or the run's selection.py."
    window: Annotated[int, Field(ge=4, le=65_536)] = 128
    "w: tokens of a short context, for `memory`; for `copy`, tokens between the continuation and its earlier occurrence."
    short_contexts: Literal["segments", "windows"] = "segments"
    "`memory` reads disjoint segments of w tokens, or windows of 2 w tokens at twice the cost."
    tau: Positive = 1.0
    "Temperature of the softmax over a chunk's entropies (eq. 6), or over its scores for `memory`, `copy` and `custom`."
    smoothing_kernel: Size = 5
    "Width of the average pooling over entropies; an even width is rounded up to the next odd one, and 1 does not smooth."
    entropy_index: Literal["equation", "release"] = "release"
    "H_t is the uncertainty about x_t (eq. 5) or about x_{t+1}, the first token rolled out (the paper's released code)."
    margin: Natural = 20
    "Minimum number of tokens before a rollout, and from its first token to the end of the row (20 in the released code)."
    temperature: Positive = 1.0
    "Sampling temperature of rollouts."
    reward: Text = "cosine"
    "One of `BUILT_IN_REWARDS` (see `refine_lab.method.rewards`), or `custom` for the function in the run's reward.py."
    group_by: Literal["sequence", "prefix"] = "sequence"
    "Group over which rewards are standardised: all c * n rollouts of a sequence, or the n rollouts of one position."
    baseline: Literal["mean", "leave_one_out"] = "mean"
    "What is subtracted from a reward: the mean of its group (GRPO), or the mean of the group's other rewards (RLOO)."
    scale_by_std: bool = True
    "Whether advantages are divided by the standard deviation of the group's rewards (GRPO)."
    placebo: bool = False
    "Whether rewards are permuted at random within the batch before advantages are computed: a control, not a method."
    prefix_gradient: Literal["full", "detached"] = "full"
    "Whether the gradient of the next-sequence loss flows through the state into the prefix."
    ntp_coef: NotNegative = 1.0
    "Weight of the next-token loss (lambda_SFT)."
    nsp_coef: NotNegative = 0.2
    "Weight of the next-sequence loss (lambda_RL)."
    clip_eps: Annotated[float, Field(gt=0, lt=1), "between 0 and 1"] = 0.2
    "PPO clip of the probability ratio."
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    "Upper bound of the loss where the advantage is negative (Ye et al., 2020)."
    kl_coef: NotNegative = 0.0
    "Weight of the KL divergence from the initial policy, on the rollout tokens."
    entropy_coef: NotNegative = 0.0
    "Weight of the entropy bonus on the rollout tokens."

    def __post_init__(self) -> None:
        allowed = (*BUILT_IN_REWARDS, "custom")
        self._require(self.reward in allowed, "reward", "one of " + ", ".join(map(repr, allowed)))
        tokens = self.num_chunks * self.group_size * self.rollout_length
        most = f"such that num_chunks * group_size * rollout_length is at most {MOST_TOKENS:,}"
        self._require(tokens <= MOST_TOKENS, "group_size", most)
        if self.group_by == "prefix" and self.group_size < 2:
            name = f"{type(self).__name__}.group_size"
            needed = f"grouping by prefix needs at least 2 rollouts per position ({name}), got {self.group_size}"
            raise ConfigError(name, self.group_size, "at least 2 if group_by is 'prefix'", needed)
        if not self.rolls_out:
            self._require_formula()

    def _require_formula(self) -> None:
        """Raises ConfigError for a setting that an estimator without rollouts cannot have."""
        without = f"for the estimator {self.estimator!r}"
        full = f"'full' {without}, which uses every token of the prefix"
        self._require(self.has_places or self.prefix_gradient == "full", "prefix_gradient", full)
        for name, value in (("kl_coef", 0), ("entropy_coef", 0), ("temperature", 1), ("placebo", False)):
            allowed = f"{str(value).lower()} {without}, which samples no rollouts"
            self._require(getattr(self, name) == value, name, allowed)
        if self.estimator == "expected":
            allowed = " or ".join(map(repr, EXPECTED_REWARDS)) + f" {without}"
            self._require(self.reward in EXPECTED_REWARDS, "reward", allowed)

    @property
    def method(self) -> str:
        """Returns the name of the method: `refine`, `refine_memory`, `placebo`, or the estimator."""
        if not self.rolls_out:
            return self.estimator
        if self.placebo:
            return "placebo"
        return "refine_memory" if self.selection == "memory" else "refine"

    @property
    def rolls_out(self) -> bool:
        """Returns whether the estimator samples rollouts."""
        return self.estimator == "rollouts"

    @property
    def needs_states(self) -> bool:
        """Returns whether a step reads on from the states at positions: for rollouts, or with a detached prefix."""
        return self.rolls_out or (self.has_places and self.prefix_gradient == "detached")

    @property
    def reads_short_contexts(self) -> bool:
        """Returns whether a step compares each prediction with that from a short context of `window` tokens."""
        return self.estimator == "longce" or (self.has_places and self.selection == "memory")

    @property
    def has_places(self) -> bool:
        """Returns whether the estimator uses the positions that `selection` draws; the others use every token."""
        return self.estimator in ("rollouts", "expected", "weighted")

    def uses(self, name: str) -> bool:
        """Returns whether the field `name` can affect training with this estimator, at some selection."""
        if name == "reward":
            return self.rolls_out or self.estimator == "expected"
        if name == "nsp_coef":
            return self.ntp_coef > 0  # otherwise there is only one loss
        if name in ("window", "short_contexts"):
            return self.has_places or self.estimator == "longce"
        if name in PLACE_FIELDS:
            return self.has_places
        if name == "prefix_gradient":
            return self.has_places
        return self.rolls_out or name in ("estimator", "ntp_coef")

    @property
    def ends(self) -> tuple[int, int]:
        """Returns (first, gap): a rollout may start from positions `first` to `length - 1 - gap` of a row."""
        return max(self.margin - 1, 0), max(self.margin, self.rollout_length)

    def fits(self, length: int) -> bool:
        """Returns whether each of the `num_chunks` chunks of a row of that length has a position to roll out from."""
        first, gap = self.ends
        size, last = length // self.num_chunks, length - 1 - gap
        return first < size and max((self.num_chunks - 1) * size, first) <= last


def smallest_length(config: RefineConfig) -> int:
    """Returns the length from which every row fits.

    Where `rollout_length` exceeds `margin`, some shorter rows fit as well: those whose dropped tail leaves enough room.
    """
    first, gap = config.ends
    return max(config.num_chunks * gap + 1, first + gap + 1)
