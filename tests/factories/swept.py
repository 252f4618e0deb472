"""A small notebook whose parameters can be swept over, and its executions."""

from __future__ import annotations

from pathlib import Path

import nbformat

PARAMETERS = """count: int = 1  # how many
rate: float = 0.5  # how fast
name: "Optional[str]" = None  # of what
seeds: list[int] = [0, 1]  # which
fail: bool = False  # whether the notebook fails
wait: float = 0.0  # seconds
output: "Optional[str]" = None  # folder"""

BODY = """import time
from pathlib import Path

folder = Path(output)
folder.mkdir(exist_ok=True)
marks = folder / "executions.txt"
marks.write_text((marks.read_text() if marks.exists() else "") + f"{count} {rate} {name} {seeds}\\n")
mended = (folder.parent.parent / "mended").exists()
time.sleep(0 if mended else wait)
if fail and not mended:
    raise RuntimeError("the first line\\nthe last line")"""

TRAINING_PARAMETERS = """seeds: list[int] = [0]  # of the run
steps: int = 1  # batches
model: str = ""  # folder
output: "Optional[str]" = None  # folder"""

TRAINING = """from pathlib import Path

from refine_lab.experiments.runs import text_runs
from refine_lab.runs.queue import run_in_turn
from tests.factories.durable_runs import tiny_config

config = tiny_config(Path(model), seed=seeds[0], steps=steps, eval_every=1000, checkpoint_every=5)
run_in_turn(text_runs([config], Path(output)), detach=False)"""


def write_notebook(path: Path, parameters: str = PARAMETERS, body: str = BODY) -> Path:
    """Writes a notebook with a parameters cell and one cell of code."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# A notebook"), first, nbformat.v4.new_code_cell(body)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def executions(output: Path) -> list[str]:
    """The line that each execution of a cell has left in its output folder."""
    path = output / "executions.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
