"""`estimate`: the memory and the time of a training step that has not been run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from refine_lab.config import TrainConfig
from refine_lab.estimate.blocks import Work, block_memory
from refine_lab.estimate.memory import PARTS, Setting, largest, moments
from refine_lab.estimate.models import described
from refine_lab.estimate.seconds import phases
from refine_lab.models.base import FastWeightLM
from refine_lab.recipes.paper import refine_of
from refine_lab.refine_config import RefineConfig
from refine_lab.validation import require

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """The estimated memory of one GPU at the peak of a training step, and the step's estimated time."""

    name: str
    "What was estimated, in words."
    memory: Mapping[str, float]
    "GiB at the peak by part: weights, gradients, moments, activations, and the weights of other workers (`gathered`)."
    moment: str
    "When memory is largest: `rollouts` (the end of the forward pass), the backward pass of a part, or the `update`."
    phases: Mapping[str, float]
    "Seconds by phase of the step; `exchange` is the part of exchanges that runs beside no other work."
    tokens: int
    "Tokens of the step, of all workers."

    @property
    def peak(self) -> float:
        """Returns the GiB at the peak: the sum over the parts."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        """Returns the speed of all workers together."""
        return self.tokens / self.seconds

    def __repr__(self) -> str:
        parts = {name: size for name, size in self.memory.items() if name != "gathered" or size}
        digits = 1 if self.peak >= 1 else 3
        rows = [f"  {name:12s} {size:7.{digits}f} GiB" for name, size in {**parts, "peak": self.peak}.items()]
        times = ", ".join(f"{name} {seconds * 1e3:,.0f}" for name, seconds in self.phases.items() if seconds)
        speed = f"{self.seconds:.2f} s a step, {self.tokens_per_second:,.0f} tokens/s (ms: {times})"
        return "\n".join([f"{self.name}; the peak is in the {self.moment}", *rows, f"  {speed}"])


def estimate(
    model: FastWeightLM | str | Path | Any,
    length: int,
    world_size: int = 1,
    *,
    method: str | RefineConfig = "refine",
    rows: int = 1,
    micro_batches: int = 1,
    activation_checkpointing: str = "blocks",
    sharding: str = "full",
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    open_chunk: int | None = None,
) -> Estimate:
    """Estimates the memory in GiB and the time in seconds of a training step on GPUs, by arithmetic, without a GPU.

    Each worker computes `micro_batches` micro-batches of `rows` rows of `length` tokens, by `sft`, by `refine`, or by REFINE
    with the settings of a `RefineConfig`. `model` is a DeltaNet or a LaCT: a `FastWeightLM`, its configuration,
    `DeltaNet-1.3B`, `LaCT-760M`, or a name for `load_model`, of which only the configuration is read. `world_size` is the
    number of GPUs; `sharding`, `activation_checkpointing` and `optimizer` are as in `TrainConfig`.

    Memory is the largest of a few sums over the tensors that a step holds (`refine_lab.estimate.blocks`), and is
    within 5 % of the counted peaks of `benchmarks.fake_gpu` (docs/scale.md). What CUDA itself needs and the fragmentation of
    its allocator come on top. States are taken in the middle of each of the row's chunks, as there. `open_chunk` sets the
    tokens of LaCT's open chunk at these positions, of which `lact_chunk_size` is the most. Time is a roofline for an H200
    (`refine_lab.estimate.seconds`), and real steps are slower.

    Raises ConfigError for a value or a model that cannot be estimated, and what `load_model` raises for a name.
    """
    _check(length=length, world_size=world_size, rows=rows, micro_batches=micro_batches)
    _allowed(activation_checkpointing=activation_checkpointing, sharding=sharding, optimizer=optimizer)
    require(dtype == "bfloat16", "dtype", dtype, "'bfloat16': the tensors of a step in float32 have not been counted")
    refine = _refine(method, length)
    config, weights = described(model)
    if open_chunk is not None:
        most = getattr(config, "lact_chunk_size", 0)
        require(0 < open_chunk <= most, "open_chunk", open_chunk, f"from 1 to {most}, or None" if most else "None")
    sharded = world_size > 1 and sharding == "full"
    require(not sharded or optimizer == "adamw", "optimizer", optimizer, "'adamw' if the model is sharded")
    setting = Setting(
        activation_checkpointing=activation_checkpointing,
        optimizer=optimizer,
        world_size=world_size,
        sharded=sharded,
        micro_batches=micro_batches,
    )
    work = Work(rows, length, refine, open_chunk)
    block = block_memory(config, weights.inner, work)
    found = moments(weights, block, work, config.hidden_size, config.vocab_size, setting)
    moment = largest(found)
    label = model if isinstance(model, (str, Path)) else config.model_type
    share = "" if world_size == 1 else f" on {world_size} GPUs, {'sharded' if sharded else 'copied'}"
    text = f"{label}, {'sft' if refine is None else refine.method}, {micro_batches * rows} x {length:,} tokens{share}, "
    return Estimate(
        name=f"{text}activation_checkpointing {activation_checkpointing!r}",
        memory={part: found[moment][part] / GIB for part in PARTS},
        moment=moment,
        phases=phases(config, weights, block, work, setting),
        tokens=micro_batches * rows * length * world_size,
    )


def _check(**numbers: object) -> None:
    for name, value in numbers.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(whole, name, value, "a whole number from 1 on")


def _allowed(**choices: str) -> None:
    """Raises ConfigError for a value that the field of that name of `TrainConfig` does not allow."""
    for name, value in choices.items():
        allowed = get_args(TrainConfig.__pydantic_fields__[name].annotation)  # type: ignore[attr-defined]
        require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)))


def _refine(method: str | RefineConfig, length: int) -> RefineConfig | None:
    """Returns the method's settings, or None for SFT."""
    refine = method if isinstance(method, RefineConfig) else refine_of(method, "midtrain")
    if refine is None:
        return None
    other = refine.reads_short_contexts or refine.placebo or refine.prefix_gradient != "full" or refine.kl_coef > 0
    allowed = "'sft', or REFINE with the full prefix gradient, without short contexts, placebo and KL term"
    require(refine.rolls_out and not other, "method", refine.method, allowed)
    require(refine.fits(length), "length", length, "long enough for the method's num_chunks, rollout_length and margin")
    return refine
