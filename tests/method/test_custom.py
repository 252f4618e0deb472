"""The method of a user's own reward from a notebook's cell to a training process."""

import functools
import math
import math as maths
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import cosine_similarity
from torch.nn.functional import normalize as unit

from refine_lab.method import custom
from refine_lab.method.custom import load_function, reward_source
from refine_lab.method.rewards import checked, reward_function
from tests.support.refusals import naming, refused
from tests.support.reward_examples import two_rollouts

SCALE = 2.0
tokenizer = Counter("a text")


def mean_logprob(inputs):
    """A plain one."""
    return inputs.logprobs.mean(-1)


def annotated(inputs: "Unknown", scale: SCALE = 1.0) -> tokenizer:
    bonus: SCALE = 0.0
    return scale * inputs.logprobs.sum(-1) + bonus


def with_imports(inputs, scale=2.0):
    import statistics

    near = F.cosine_similarity(inputs.hidden_states, inputs.target_hidden_states, dim=-1)
    same = cosine_similarity(unit(inputs.hidden_states, dim=-1), inputs.target_hidden_states, dim=-1)
    middle = statistics.median([1, 2, 3]) * math.sqrt(maths.pi) * scale
    values = [max(0.0, float(value)) for value in (near + same).mean(-1)]
    return torch.tensor(values) * middle


@torch.no_grad()
def decorated(inputs):
    return inputs.logprobs.sum(-1)


def recursive(inputs):
    if inputs.logprobs.shape[1] == 1:
        return inputs.logprobs[:, 0]
    return recursive(inputs.map(lambda x: x[:, 1:]))


@pytest.mark.parametrize("function", [mean_logprob, annotated, with_imports, decorated, recursive])
def test_a_reward_of_ones_own_comes_back_from_its_source(function):
    rewards = reward_function("custom", reward_source(function))(two_rollouts())
    assert torch.equal(rewards, function(two_rollouts()))


def test_the_source_runs_in_a_process_that_knows_nothing_else(tmp_path):
    (tmp_path / "reward.py").write_text(reward_source(with_imports))
    program = (
        "import torch, types, reward; h = torch.tensor([[[1.0, 0.0]]]);"
        "inputs = types.SimpleNamespace(hidden_states=h, target_hidden_states=h);"
        "print(float(reward.with_imports(inputs)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(run.stdout) == pytest.approx(2 * 2 * math.sqrt(math.pi) * 2, rel=1e-6)


def test_the_source_of_a_notebook_cell(tmp_path):
    """As IPython runs a cell: compiled from text that linecache knows, with IPython's own builtins in place."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        shell.run_cell(
            "import torch\nimport math\n"
            "def mine(inputs):\n"
            "    return math.exp(1) * inputs.logprobs.sum(-1)\n"
            "def shown(inputs):\n"
            "    display(inputs.logprobs)\n"
        )
        source = reward_source(shell.user_ns["mine"])
        with naming(ValueError, "'shown'", "'display'"):
            reward_source(shell.user_ns["shown"])
    finally:
        InteractiveShell.clear_instance()
    assert "import math" in source.splitlines()
    assert load_function("reward", source)(two_rollouts()).tolist() == pytest.approx([-2 * math.e, -3 * math.e])


def uses_tokenizer(inputs):
    return torch.tensor([len(tokenizer) for _ in inputs.rollout_ids])


def uses_a_constant_inside(inputs):
    return torch.stack([(lambda row: row * SCALE)(row).sum() for row in inputs.logprobs])


def uses_a_default(inputs, scale=SCALE):
    return inputs.logprobs.sum(-1) * scale


def uses_a_helper(inputs):
    return mean_logprob(inputs)


def uses_numpy(inputs):
    import numpy as np

    return torch.as_tensor(np.zeros(len(inputs.rollout_ids)))


def uses_a_package(inputs):
    from transformers.utils import logging

    return logging


def uses_a_misspelt_name(inputs):
    return logprob.sum(-1)


def uses_a_library(inputs):
    return pytest.approx(1)


def writes_outside(inputs):
    global SCALE
    SCALE = 3.0
    return inputs.logprobs.sum(-1)


def by_hand(function):
    @functools.wraps(function)
    def run(*arguments):
        return function(*arguments)

    return run


@by_hand
def uses_a_decorator(inputs):
    return inputs.logprobs.sum(-1)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (uses_tokenizer, "tokenizer"),
        (uses_a_constant_inside, "SCALE"),
        (uses_a_default, "SCALE"),
        (uses_a_helper, "mean_logprob"),
        (uses_numpy, "numpy"),
        (uses_a_package, "transformers.utils"),
        (uses_a_misspelt_name, "logprob"),
        (uses_a_library, "pytest"),
        (writes_outside, "SCALE"),
        (uses_a_decorator, "by_hand"),
    ],
)
def test_a_reward_that_uses_more_is_refused_by_name(function, name):
    said = f"reward '{function.__name__}' uses '{name}', which is neither an argument, torch nor the standard library"
    with pytest.raises(ValueError, match=f"^{said}$"):
        reward_source(function)


def test_a_closure_is_refused_by_name():
    weight = 3.0

    def mine(inputs):
        return weight * inputs.logprobs.sum(-1)

    with naming(ValueError, "'mine'", "'weight'", "its enclosing function"):
        reward_source(mine)


class Callable:
    def __call__(self, inputs):
        return inputs.logprobs.sum(-1)


@pytest.mark.parametrize(
    ("thing", "got"),
    [
        (lambda inputs: 0, "a lambda"),
        (torch.sum, "builtin_function_or_method"),
        (Callable(), "Callable"),
        (Callable().__call__, "method"),
        (functools.partial(mean_logprob), "partial"),
        ("cosine", "str"),
    ],
)
def test_what_is_no_plain_function_is_refused(thing, got):
    with refused("a reward", got):
        reward_source(thing)


def takes_three(a, b, c):
    return c.sum(-1)


def takes_a_keyword(inputs, *, scale):
    return scale * inputs.logprobs.sum(-1)


async def waits(inputs):
    return inputs.logprobs.sum(-1)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (takes_three, "(a, b, c)"),
        (takes_a_keyword, "(inputs, *, scale)"),
        (waits, "async def waits(inputs):"),
    ],
)
def test_functions_of_another_kind_are_refused(function, got):
    with refused(f"reward '{function.__name__}'", got):
        reward_source(function)


def test_a_function_without_source_is_refused():
    namespace: dict = {}
    exec("def hidden(inputs): return 0", namespace)
    with naming(ValueError, "'hidden'", "source"):
        reward_source(namespace["hidden"])


@pytest.mark.parametrize(
    ("source", "fact"),
    [("def mine(:", "in line 1"), ("x = 1", "'x = 1'")],
)
def test_a_damaged_reward_file_is_refused(source, fact):
    with naming(ValueError, fact):
        load_function("reward", source)


def evaluates(inputs):
    return eval("SCALE") * inputs.logprobs.sum(-1)


def looks_around(inputs):
    return globals()["SCALE"] * inputs.logprobs.sum(-1)


def imports_anything(inputs):
    import importlib

    return importlib.import_module("numpy").sum(inputs.logprobs)


see = vars


def looks_under_another_name(inputs):
    return see(inputs.logprobs)["x"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (evaluates, "eval"),
        (looks_around, "globals"),
        (imports_anything, "importlib"),
        (looks_under_another_name, "see"),
    ],
)
def test_a_reward_that_reaches_hidden_names_is_refused(function, name):
    with naming(ValueError, f"'{function.__name__}'", f"'{name}'"):
        reward_source(function)


# Functions of the five tensors, as before `RewardInputs`.

FORMER = """import torch


def first_token(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return (rollout_ids[:, 0] == target_ids[:, 0]).float() + logprobs.mean(-1)
"""


def five_tensors(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs, scale=2.0):
    return scale * logprobs.sum(-1)


def any_number(*arguments):
    assert len(arguments) == 5
    return arguments[4].sum(-1)


@pytest.fixture
def as_first_seen():
    """Each name has its notice once in a process: forget those of other tests."""
    custom._suggest_one_argument.cache_clear()


@pytest.mark.parametrize("function", [five_tensors, any_number])
def test_a_function_of_five_tensors_still_works_and_says_once_how_to_write_it(as_first_seen, function):
    with pytest.warns(FutureWarning, match=rf"`def {function.__name__}\(inputs\)`.* inputs.logprobs"):
        source = reward_source(function)
    rewards = reward_function("custom", source)(two_rollouts())  # where a second notice would be an error
    assert torch.equal(checked(checked(function))(two_rollouts()), rewards)
    assert torch.equal(rewards, function(*(getattr(two_rollouts(), name) for name in custom.FIELDS)))


def test_the_reward_of_an_older_run_still_loads(as_first_seen):
    with pytest.warns(FutureWarning, match="first_token"):
        reward = reward_function("custom", FORMER)
    assert reward(two_rollouts()).tolist() == pytest.approx([1 - 1, 0 - 1.5])
