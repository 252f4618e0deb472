"""Benchmarks of the paper on lm-evaluation-harness, which finds our models as `refine_lab` once this is imported."""

from importlib.util import find_spec

if find_spec("lm_eval") is not None:  # without it, what needs it names the package to install
    from lm_eval.api.registry import model_registry

    model_registry.register("refine_lab", target="refine_lab.evaluation.model:RefineLM")
