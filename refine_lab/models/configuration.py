"""The base of our models' configurations; an invalid value raises a one-sentence error that names the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose, isfinite
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

from refine_lab.validation import ConfigError


class FastWeightConfig(PreTrainedConfig):
    """The fields that all families have in common, with flash-linear-attention's defaults.

    Raises ConfigError for a field whose value does not match its annotation or is not in `ALLOWED`, and for what a
    family's `check` rejects. `int` is a size and hence a positive whole number, `float` a positive number, `bool` True
    or False, each optionally with `| None`. A token id (`*_token_id`) is any whole number below the vocabulary size,
    and `initializer_range` may be 0. Other annotations are not checked.
    """

    __no_type_check__ = True  # a type checker at run time would refuse the further settings that transformers takes
    keys_to_ignore_at_inference = ["past_key_values"]

    ALLOWED = {"hidden_act": ("swish",)}  # field -> its allowed values; without an annotation, since it is not a field

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    max_position_embeddings: int = 2048
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: Any = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    vocab_size: int = 32000

    def __post_init__(self, **others: Any) -> None:  # transformers makes a dataclass of every configuration
        for name, annotation in _annotations(type(self)).items():
            kind, value = annotation.removesuffix(" | None"), getattr(self, name)
            if kind not in KINDS or (value is None and kind != annotation):
                continue
            fits, allowed = (
                TOKEN if name.endswith("_token_id") else RANGE if name == "initializer_range" else KINDS[kind]
            )
            self.require(fits(value), name, allowed if kind == annotation else f"{allowed} or None")
        if self.pad_token_id is not None:
            fits = -self.vocab_size <= self.pad_token_id < self.vocab_size
            self.require(fits, "pad_token_id", f"below vocab_size {self.vocab_size}")
        for name, values in self.ALLOWED.items():
            self.require(getattr(self, name) in values, name, f"one of {values}")
        self.check()
        super().__post_init__(**others)

    def check(self) -> None:
        """Raises ConfigError for values that the family cannot compute."""

    def require(self, ok: bool, name: str, allowed: str) -> None:
        """Raises ConfigError for the field of that name, unless `ok`."""
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name}", getattr(self, name), allowed)


def whole_width(width: float) -> bool:
    """Returns whether the product of a size and a ratio is a whole number, up to rounding."""
    return isclose(width, round(width), rel_tol=1e-9)


def _annotations(kind: type) -> dict[str, str]:
    """Returns our own fields with their annotations as written, those of base classes first."""
    ours = [cls for cls in reversed(kind.__mro__) if issubclass(cls, FastWeightConfig)]
    return {name: str(text) for cls in ours for name, text in cls.__annotations__.items()}


def whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: object) -> TypeGuard[float]:
    return (isinstance(value, float) and isfinite(value)) or whole(value)


Allowed = tuple[Callable[[Any], bool], str]
KINDS: Mapping[str, Allowed] = {
    "int": (lambda x: whole(x) and x > 0, "a positive whole number"),
    "float": (lambda x: number(x) and x > 0, "a positive number"),
    "bool": (lambda x: isinstance(x, bool), "True or False"),
}
TOKEN: Allowed = (whole, "a token id")
RANGE: Allowed = (lambda x: number(x) and x >= 0, "a non-negative number")
