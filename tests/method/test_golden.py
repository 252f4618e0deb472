"""A recorded trajectory that must not move: 20 REFINE steps of a fresh small DeltaNet on the fixture text, byte by byte.

After a change that is meant to move it, record it anew: `python tests/method/test_golden.py` (and say why in the commit).

Tolerance: 1e-3 of a value, and 1e-4 absolutely for those that pass through zero. Arithmetic in double precision stays
within a fiftieth of it, so another CPU's last bits do too; every single change below leaves it within 20 steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from refine_lab.config import RefineConfig, TrainConfig
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import TrainState, train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.rng import Draws
from refine_lab.training.optim import make_optimizers
from refine_lab.types import Batch
from tests.support.paths import TESTS

HERE = TESTS
GOLDEN = HERE / "golden" / "trajectory.json"
STEPS, ROWS, LENGTH = 20, 4, 224
METRICS = "ntp_loss ntp_accuracy nsp_loss reward_mean reward_std clip_fraction entropy_mean grad_norm".split()
RELATIVE, ABSOLUTE = 1e-3, 1e-4

METHOD = RefineConfig(num_chunks=5, margin=12, group_size=2, nsp_coef=0.5)
CONFIG = TrainConfig(recipe="golden", refine=METHOD, batch_size=ROWS, mini_batch_size=2, micro_batch_size=2, lr=3e-3)


def run(config: TrainConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, float]]:
    """The metrics of one step after the other. Two updates a batch, so that ratios leave 1 and some are clipped."""
    assert config.refine is not None
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=256)
    policy = DeltaNetForCausalLM(DeltaNetConfig(**sizes, initializer_range=0.1, tie_word_embeddings=True)).to(dtype)
    optimizers = make_optimizers(policy, config)
    train_state = TrainState(policy=policy, optimizers=optimizers, config=config, reward=REWARDS[config.refine.reward])
    text = b"".join(path.read_bytes() for path in sorted((HERE / "fixtures" / "text").glob("*.txt")))
    rows = torch.tensor(list(text[: STEPS * ROWS * LENGTH])).view(STEPS, ROWS, LENGTH)
    lengths = torch.tensor([LENGTH, LENGTH - 50, LENGTH, LENGTH - 7])
    for step, tokens in enumerate(rows, 1):
        ids = tuple(range(step * ROWS, (step + 1) * ROWS))
        batch = Batch(tokens=tokens, lengths=lengths, sequence_ids=ids)
        metrics = train_step(train_state, batch, Draws(seed=config.seed, step=step)).metrics
        yield {name: float(metrics[name]) for name in METRICS}


def recorded() -> list[dict[str, float]]:
    return json.loads(GOLDEN.read_text())["steps"]


def first_difference(trajectory: Iterable[dict[str, float]], expected: list[dict[str, float]]) -> str | None:
    """Step, name and values of the first metric outside the tolerance."""
    for step, (values, reference) in enumerate(zip(trajectory, expected, strict=False), 1):
        for name, value in reference.items():
            if not math.isclose(values[name], value, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
                return f"step {step}, {name}: {values[name]:.6g}, recorded {value:.6g}"
    return None


def test_the_trajectory_is_the_recorded_one():
    assert len(recorded()) == STEPS
    assert (difference := first_difference(run(), recorded())) is None, difference


def test_the_recorded_trajectory_learns_and_clips():
    steps = recorded()
    assert steps[-1]["ntp_loss"] < steps[0]["ntp_loss"] - 1
    assert any(0 < step["clip_fraction"] < 1 for step in steps)
    assert any(step["grad_norm"] > CONFIG.max_grad_norm for step in steps)


SELECTION = {"selection": "uniform", "entropy_index": "equation", "smoothing_kernel": 3, "tau": 0.9, "margin": 13}
ROLLOUTS = {"num_chunks": 4, "rollout_length": 4, "temperature": 0.95, "reward": "hybrid", "group_by": "prefix"}
LOSS = {"prefix_gradient": "detached", "nsp_coef": 0.45, "ntp_coef": 1.05, "clip_eps": 0.15, "entropy_coef": 0.01}
UPDATE = {"max_grad_norm": 0.9, "lr": 3.1e-3, "weight_decay": 0.1, "mini_batch_size": 4, "seed": 1}
CHANGES = {name: {"refine": replace(METHOD, **{name: value})} for name, value in (SELECTION | ROLLOUTS | LOSS).items()}
CHANGES |= {name: {name: value} for name, value in UPDATE.items()}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_of_the_method_moves_it(name):
    assert first_difference(run(replace(CONFIG, **CHANGES[name])), recorded()) is not None


def record() -> None:
    torch.set_num_threads(1)
    lines = ",\n".join("    " + json.dumps(step) for step in run())
    GOLDEN.write_text(f'{{\n  "torch": "{torch.__version__}",\n  "steps": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    record()
