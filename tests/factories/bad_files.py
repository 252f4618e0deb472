"""A folder of files and model folders that no notebook can use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from refine_lab.models.hub import SHIPPED

DEEP = "[" * 100_000 + "]" * 100_000
LAYERS, TENSORS = 50_000, 500_000


def bad_files(folder: Path) -> Path:
    """Writes the files that `tests/fixtures/bad_parameters.json` names, and returns their folder."""
    texts = {
        "long.jsonl": '{"text": "a text"}\n' + json.dumps({"text": [1] * 10_000_000}),
        "surrogate.jsonl": '{"text": "a text"}\n{"text": "half \\ud800 of a pair"}',
        "surrogate_prompts.jsonl": '{"prompt": "half \\ud800 of a pair", "answer": "x"}\n' * 700,
        "late_surrogate.jsonl": '{"text": "a text"}\n' * 60 + '{"text": "half \\ud800 of a pair"}\n',
        "late_nested.jsonl": '{"text": "a text"}\n' * 60 + DEEP,
        "surrogate_answer.jsonl": '{"prompt": "a", "answer": "a"}\n{"prompt": "a", "answer": "\\udc00"}\n' * 350,
        "surrogate.json": '[{"question": "a", "answer": "\\udc00", "context": [["a", ["b"]]]}]',
        "nested.jsonl": '{"text": "a", "prompt": "a", "answer": "a"}\n' + DEEP,
        "nested.json": DEEP,
        "empty.jsonl": "\n",
        "columns.jsonl": '{"words": "a", "answer": "b"}\n' * 3,
        "prompts.jsonl": '{"prompt": "What is it?", "answer": "a cat"}\n' * 3,
        "pointer.txt": "version https://git-lfs.github.com/spec/v1\n",
        "broken.parquet": "PAR1 and nothing more",
        "large.txt": "a word " * 1_000_000,
        "nested_model/config.json": DEEP,
        "many_layers/config.json": json.dumps(_config() | {"num_hidden_layers": LAYERS}),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("binary.txt", "binary.bin"):
        (folder / name).write_bytes(bytes(range(256)))
    (folder / "folder").mkdir()
    for name in ("pipe_model", "many_tensors"):
        shutil.copytree(SHIPPED / "tiny-deltanet", folder / name)
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe_model" / "special_tokens_map.json")
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{number}":{empty}' for number in range(TENSORS)) + "}").encode()
    (folder / "many_tensors" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def _config() -> dict[str, object]:
    return json.loads((SHIPPED / "tiny-deltanet" / "config.json").read_text(encoding="utf-8"))
