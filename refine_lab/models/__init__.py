"""Fast-weight language models whose memory is a value."""

from refine_lab.models.base import FastWeightLM
from refine_lab.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.loading import load_model, register
from refine_lab.models.state import State, Trace

__all__ = ["DeltaNetConfig", "DeltaNetForCausalLM", "FastWeightLM", "State", "Trace", "load_model", "register"]

register()
