"""Rewards by hand, and the way of a user's own function to a training process."""

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

from refine_lab.rewards import binary, checked, cosine, hybrid, load_reward, reward_function, reward_source

SCALE = 2.0
tokenizer = Counter("a text")


def example() -> tuple[torch.Tensor, ...]:
    """Two rollouts of two tokens; hidden states at 0, 90, 180 degrees and at 3-4-5."""
    rollout_ids = torch.tensor([[4, 7], [1, 2]])
    target_ids = torch.tensor([[4, 8], [2, 1]])
    hidden_states = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
    target_hidden_states = torch.tensor([[[5.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [-2.0, -2.0]]])
    logprobs = torch.tensor([[-0.5, -1.5], [-1.0, -2.0]])
    return rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs


def test_cosine_by_hand():
    assert cosine(*example()).tolist() == pytest.approx([(1 + 0) / 2, (0.6 - 1) / 2])


def test_binary_by_hand():
    assert binary(*example()).tolist() == [0.5, 0]


def test_hybrid_is_the_sum():
    assert hybrid(*example()).tolist() == pytest.approx([1.0, -0.2])


def test_cosine_of_bfloat16_is_taken_in_float32_and_of_float64_in_float64():
    ids, targets, hidden, target_hidden, logprobs = example()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        rewards = cosine(ids, targets, hidden.to(dtype), target_hidden.to(dtype), logprobs)
        assert rewards.dtype == expected
        assert rewards.tolist() == pytest.approx([0.5, -0.2], abs=1e-6)


@pytest.mark.parametrize("name", ["cosine", "binary", "hybrid"])
def test_no_gradient_passes_through_a_reward(name):
    ids, targets, hidden, target_hidden, logprobs = example()
    rewards = reward_function(name)(ids, targets, hidden.requires_grad_(), target_hidden, logprobs.requires_grad_())
    assert not rewards.requires_grad


def test_unknown_rewards_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'cosin'; did you mean 'cosine'"):
        reward_function("cosin")
    with pytest.raises(ValueError, match="'custom' needs the source"):
        reward_function("custom")


# A user's own reward.


def mean_logprob(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    """A plain one."""
    return logprobs.mean(-1)


def annotated(
    rollout_ids: "Ids",
    target_ids: tokenizer,
    hidden: torch.Tensor,
    target_hidden: SCALE,
    logprobs,
) -> tokenizer:
    bonus: SCALE = 0.0
    return logprobs.sum(-1) + bonus


def with_imports(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs, scale=2.0):
    import statistics

    near = F.cosine_similarity(hidden_states, target_hidden_states, dim=-1)
    same = cosine_similarity(unit(hidden_states, dim=-1), target_hidden_states, dim=-1)
    middle = statistics.median([1, 2, 3]) * math.sqrt(maths.pi) * scale
    values = [max(0.0, float(value)) for value in (near + same).mean(-1)]
    return torch.tensor(values) * middle


@torch.no_grad()
def decorated(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return logprobs.sum(-1)


def recursive(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    if logprobs.shape[1] == 1:
        return logprobs[:, 0]
    return recursive(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs[:, 1:])


@pytest.mark.parametrize("function", [mean_logprob, annotated, with_imports, decorated, recursive])
def test_a_reward_of_ones_own_comes_back_from_its_source(function):
    rewards = reward_function("custom", reward_source(function))(*example())
    assert torch.equal(rewards, function(*example()))


def test_the_source_runs_in_a_process_that_knows_nothing_else(tmp_path):
    (tmp_path / "reward.py").write_text(reward_source(with_imports))
    program = (
        "import torch, reward; h = torch.tensor([[[1.0, 0.0]]]); i = torch.zeros(1, 1, dtype=torch.long);"
        "print(float(reward.with_imports(i, i, h, h, h[..., 0])))"
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
            "def mine(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):\n"
            "    return math.exp(1) * logprobs.sum(-1)\n"
            "def shown(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):\n"
            "    display(logprobs)\n"
        )
        source = reward_source(shell.user_ns["mine"])
        with pytest.raises(ValueError, match="reward 'shown' uses 'display'"):
            reward_source(shell.user_ns["shown"])
    finally:
        InteractiveShell.clear_instance()
    assert "import math" in source.splitlines()
    assert load_reward(source)(*example()).tolist() == pytest.approx([-2 * math.e, -3 * math.e])


def uses_tokenizer(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return torch.tensor([len(tokenizer) for _ in rollout_ids])


def uses_a_constant_inside(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return torch.stack([(lambda row: row * SCALE)(row).sum() for row in logprobs])


def uses_a_default(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs, scale=SCALE):
    return logprobs.sum(-1) * scale


def uses_a_helper(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return mean_logprob(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs)


def uses_numpy(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    import numpy as np

    return torch.as_tensor(np.zeros(len(rollout_ids)))


def uses_a_package(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    from transformers.utils import logging

    return logging


def uses_a_misspelt_name(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return logprob.sum(-1)


def uses_a_library(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return pytest.approx(1)


def writes_outside(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    global SCALE
    SCALE = 3.0
    return logprobs.sum(-1)


def by_hand(function):
    @functools.wraps(function)
    def run(*arguments):
        return function(*arguments)

    return run


@by_hand
def uses_a_decorator(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return logprobs.sum(-1)


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

    def mine(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
        return weight * logprobs.sum(-1)

    with pytest.raises(ValueError, match="reward 'mine' uses 'weight' of the function around it"):
        reward_source(mine)


class Callable:
    def __call__(self, rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
        return logprobs.sum(-1)


@pytest.mark.parametrize(
    ("thing", "got"),
    [
        (lambda a, b, c, d, e: e.sum(-1), "a lambda"),
        (torch.sum, "builtin_function_or_method"),
        (Callable(), "Callable"),
        (Callable().__call__, "method"),
        (functools.partial(mean_logprob), "partial"),
        ("cosine", "str"),
    ],
)
def test_what_is_no_plain_function_is_refused(thing, got):
    with pytest.raises(ValueError, match=f"a reward must be a function written with def, got {got}"):
        reward_source(thing)


def takes_three(rollout_ids, target_ids, logprobs):
    return logprobs.sum(-1)


def takes_a_keyword(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs, *, scale):
    return scale * logprobs.sum(-1)


async def waits(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return logprobs.sum(-1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (takes_three, r"must take rollout_ids, .*, logprobs, got \(rollout_ids, target_ids, logprobs\)"),
        (takes_a_keyword, r"must take rollout_ids, .*\*, scale\)"),
        (waits, "must be a plain function, got 'async def waits"),
    ],
)
def test_functions_of_another_kind_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        reward_source(function)


def test_a_function_without_source_is_refused():
    namespace: dict = {}
    exec("def hidden(a, b, c, d, e): return e.sum(-1)", namespace)
    with pytest.raises(ValueError, match="reward 'hidden' has no source to read"):
        reward_source(namespace["hidden"])


@pytest.mark.parametrize(
    ("source", "message"),
    [("def mine(:", "is not Python: .* in line 1"), ("x = 1", "must define a function, got 'x = 1'")],
)
def test_a_damaged_reward_file_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_reward(source)


def returning(result):
    def mine(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
        return result

    return mine


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (0.5, "reward 'mine' must return .* shape .2., got float"),
        (None, "got NoneType"),
        (torch.zeros(2, 5), r"got torch.float32 of shape \[2, 5\]"),
        (torch.zeros(()), r"got torch.float32 of shape \[\]"),
        (torch.tensor([1, 2]), r"got torch.int64 of shape \[2\]"),
        (torch.tensor([0.0, torch.nan]), "must be finite, got nan for rollout 1"),
        (torch.tensor([-torch.inf, 0.0]), "must be finite, got -inf for rollout 0"),
    ],
)
def test_a_wrong_result_is_named(result, message):
    with pytest.raises(ValueError, match=message):
        checked(returning(result))(*example())


def changes_its_arguments(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    for x in (rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
        x.zero_()
    return logprobs.sum(-1)


def test_a_reward_that_changes_its_arguments_changes_no_training():
    given = example()
    before = [x.clone() for x in given]
    assert checked(changes_its_arguments)(*given).tolist() == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def evaluates(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return eval("SCALE") * logprobs.sum(-1)


def looks_around(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return globals()["SCALE"] * logprobs.sum(-1)


def imports_anything(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    import importlib

    return importlib.import_module("numpy").sum(logprobs)


see = vars


def looks_under_another_name(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
    return see(logprobs)["x"]


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
    with pytest.raises(ValueError, match=f"reward '{function.__name__}' uses '{name}', which"):
        reward_source(function)


def test_an_error_in_a_reward_reaches_the_caller():
    with pytest.raises(IndexError):
        checked(lambda a, b, c, d, e: e[:, 99])(*example())
