"""Fast-weight language models whose state is an immutable value."""

from refine_lab.models.base import FastWeightLM
from refine_lab.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.families import family, register
from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM
from refine_lab.models.loading import load_model
from refine_lab.models.state import State, Trace

__all__ = [
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "FastWeightLM",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "LaCTConfig",
    "LaCTForCausalLM",
    "State",
    "Trace",
    "family",
    "load_model",
    "register",
]

register()
