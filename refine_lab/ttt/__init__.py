"""Test-time training: a model adapts to a prompt, answers, and is put back (paper, section 4.4).

    from refine_lab.ttt import TTTConfig, adapted

    prompt = tokenizer(text, return_tensors="pt").input_ids        # [1, T]
    with adapted(model, prompt[0], TTTConfig()) as model:
        model.generate(prompt)                                     # with the weights as the prompt has moved them
    model.generate(prompt)                                         # with the weights as they were, bit for bit

`adaptation` is the procedure, `runs` goes through the prompts of a task, `answering` does so in a process.
The names below are imported when they are first asked for: a recipe of test-time training does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_lab.ttt.adaptation import Adapter, Restored, Update, adapt, adapted, fitted
    from refine_lab.ttt.config import TTTConfig, TTTRunConfig

__all__ = ["Adapter", "Restored", "TTTConfig", "TTTRunConfig", "Update", "adapt", "adapted", "fitted"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "config" if name.endswith("Config") else "adaptation"
    return getattr(import_module(f"{__name__}.{home}"), name)
