"""What docs/models.md says about our saved models in other programs: each sentence in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from refine_lab.models import load_model
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

SECTION = re.search(r"^## Use in other programs\n(.*?)^## ", (ROOT / "docs" / "models.md").read_text(), re.M | re.S)
PLACE = "runs/RUN/checkpoints/step-25"
TYPES = {"tiny-deltanet": "delta_net", "tiny-lact": "lact_swiglu"}

ALONE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder, model_type in zip(sys.argv[1::2], sys.argv[2::2]):
    for auto in (AutoConfig, AutoModelForCausalLM):
        try:
            auto.from_pretrained(folder)
        except ValueError as error:
            assert f"`{model_type}`" in str(error), error
        else:
            raise AssertionError(f"{auto.__name__} knows {model_type}")
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids
assert "refine_lab" not in sys.modules
"""

WITH_FLA = """
import sys
import fla.models, refine_lab.models
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
from fla.models import DeltaNetConfig, DeltaNetForCausalLM  # as if fla came last
AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM, exist_ok=True)
from transformers import AutoConfig
AutoConfig.register("delta_net", DeltaNetConfig, exist_ok=True)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
refine_lab.models.register()
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped models as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("saved")
    for name in TYPES:
        for part in load_model(name, device="cpu"):
            part.save_pretrained(folder / name)
    return {name: folder / name for name in TYPES}


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_transformers_does_not_know_our_model_types_and_says_so(saved: dict[str, Path]) -> None:
    python(ALONE, *(part for name, folder in saved.items() for part in (folder, TYPES[name])))
    assert SECTION is not None
    assert all(f"`{model_type}`" in SECTION[1] for model_type in TYPES.values())


def test_the_documented_import_makes_the_auto_classes_know_them(saved: dict[str, Path]) -> None:
    assert SECTION is not None
    (block,) = re.findall(r"^```python\n(.*?)^```$", SECTION[1], re.M | re.S)
    assert block.count(PLACE) == 1
    for name, folder in saved.items():
        policy, tokenizer = load_model(name, device="cpu")
        asked = tokenizer("def area(width, height):\n    return width *", return_tensors="pt").input_ids
        expected = policy.generate(asked, max_new_tokens=6, do_sample=False)[0].tolist()
        code = block.replace(PLACE, str(folder)) + (
            f"\nids = tokenizer({tokenizer.decode(asked[0])!r}, return_tensors='pt').input_ids"
            "\nprint(type(model).__module__)\nprint(model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist())"
        )
        assert python(code).splitlines() == [type(policy).__module__, str(expected)]


def test_whoever_registers_last_is_found_and_ours_can_be_again(saved: dict[str, Path]) -> None:
    ours, theirs, again = python(WITH_FLA, saved["tiny-deltanet"]).split()
    assert (ours, again) == ("refine_lab.models.deltanet", "refine_lab.models.deltanet")
    assert theirs.startswith("fla.models.")


def test_the_harness_loads_a_folder_and_a_model_alike(saved: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")
    code = """
import sys
import refine_lab.models
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from refine_lab.models import load_model

model, tokenizer = load_model("tiny-deltanet", device="cpu")
pairs = [("def f(x):\\n    return", " x"), ("import os\\nfor name in os.listdir(path):\\n    if name", " in")]
for given in ({"pretrained": sys.argv[1]}, {"pretrained": model, "tokenizer": tokenizer}):
    for size in (1, 2):
        harness = HFLM(**given, device="cpu", batch_size=size)
        assert harness.max_length == 2048
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        print(*(f"{value:.3f}" for value, _ in harness.loglikelihood(asked)))
"""
    lines = [line for line in python(code, saved["tiny-deltanet"]).splitlines() if re.fullmatch(r"[-\d. ]+", line)]
    assert len(lines) == 4
    assert len(set(lines)) == 1
