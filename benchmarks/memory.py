"""Peak resident memory of one REFINE step above the loaded model, for 4,096 and 8,192 tokens, each in a fresh process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from benchmarks.common import arguments, write

LENGTHS = (4096, 8192)


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(model: str, length: int, threads: int) -> int:
    """Bytes above the loaded model, which has made one short step so that nothing is left to be set up."""
    import torch

    from benchmarks.step_cost import random_batch, train_state
    from refine_lab.method.step import train_step
    from refine_lab.models import load_model
    from refine_lab.rng import Draws

    torch.set_num_threads(threads)
    policy, _ = load_model(model, device="cpu")
    refine = train_state(policy, "refine", 1, 1)
    train_step(refine, random_batch(policy, 1, 512), Draws(seed=0, step=0))
    before = peak_bytes()
    train_step(refine, random_batch(policy, 1, length), Draws(seed=0, step=1))
    return peak_bytes() - before


def in_fresh_process(model: str, length: int, threads: int) -> int:
    code = f"from benchmarks.memory import measure; print(measure({json.dumps(model)}, {length}, {threads}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    return int(result.stdout.split()[-1])


def main() -> None:
    chosen = arguments(__doc__)
    peaks = {length: in_fresh_process(chosen.model, length, chosen.threads) for length in LENGTHS}
    for length, peak in peaks.items():
        print(f"{length:6d} tokens  {peak / 2**20:8.1f} MiB above the loaded model")
    ratio = peaks[LENGTHS[1]] / peaks[LENGTHS[0]]
    print(f"ratio {ratio:.3f}")
    figures = {"ratio": ratio, **{str(length): peak for length, peak in peaks.items()}}
    write(chosen.json, figures, model=chosen.model)


if __name__ == "__main__":
    main()
