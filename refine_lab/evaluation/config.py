"""The configuration of an evaluation: a model, the tasks and lengths, and how the model reads and answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from refine_lab.config import BUILT_IN_REWARDS
from refine_lab.validation import Config, Count, Length, Positive, Seed, Size, Text, configuration, path_of


@configuration
class ReadingConfig(Config):
    """How a model reads prompts and answers them: the settings of `refine_lab.evaluation.model.RefineLM`."""

    batch_size: Size = 8
    "Maximum number of prompts in a batch."
    max_length: Length | None = None
    "Maximum length of prompt plus answer in tokens; none: the model's own limit."
    add_bos: bool | None = None
    "Whether a prompt begins with the BOS token; none: as the tokenizer does by default."
    sampled: bool = False
    "Whether answers are sampled at temperature 1, as in the release's validation, instead of decoded greedily."
    seed: Seed = 0
    "Seed of the samples, of sampled answers, and of test-time training."
    ttt: Literal["none", "sft", "refine"] = "none"
    "Test-time training on each context before the answer; the weights are restored afterwards."
    ttt_per: Literal["prompt", "batch"] = "prompt"
    "Whether the model adapts to each prompt alone or to a batch of prompts jointly."
    ttt_steps: Size | None = None
    "Maximum number of updates per prompt or batch; none: that of the recipe `per_prompt`."
    ttt_lr: Positive | None = None
    "Learning rate of test-time training; none: that of the recipe `per_prompt`."
    ttt_reward: Text | None = None
    "Reward of test-time training with REFINE; none: binary, that of the recipe `per_prompt` (table E.2 compares cosine)."
    device: Text = "auto"
    "`auto`, `cpu`, `cuda` or `cuda:N`."
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Autocast dtype of the forward passes."

    def __post_init__(self) -> None:
        if self.ttt_reward is not None:
            known = ", ".join(map(repr, BUILT_IN_REWARDS))
            self._require(self.ttt_reward in BUILT_IN_REWARDS, "ttt_reward", f"one of {known}")
            self._require(self.ttt == "refine", "ttt_reward", "none unless ttt is 'refine'")


@configuration
class EvaluationConfig(ReadingConfig):
    """What is evaluated and how. The results of different configurations are never mixed."""

    model: Text = "tiny-deltanet"
    "A shipped model, a run directory, a folder, or org/repo, as in `load_model`."
    tasks: tuple[Text, ...] = ("niah",)
    "Names of tasks or of groups (`refine_lab.evaluation.catalogue`)."
    lengths: tuple[Length, ...] = (512, 1024)
    "Lengths (prompt plus answer, in tokens) of the tasks that have no fixed length."
    limit: Count | None = None
    "Number of samples per task and length (the first ones); none: the number used in the paper."
    data: Text | None = None
    "Folder that contains the files of the benchmarks, at any depth."
    essays: Text | None = None
    "Paul Graham's essays: a .txt or .jsonl file or a folder of .txt files; none: held-out text of the Python corpus."
    books: Text | None = None
    "Folder of .txt files for the task `books`."
    key_model: Text | None = None
    "Model that selects the key tokens of LongPPL; none: the model that an evaluated run started from, or the model itself."
    over_limit: Literal["cut_middle", "drop"] = "cut_middle"
    "Whether the middle of a longer prompt is cut out, or its sample left out of tasks that generate answers."
    paper_rows: bool = False
    "Whether the last incomplete batch of eight samples of a LongBench task is dropped, as in the paper."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(len(self.tasks) > 0, "tasks", "at least one task")
        self._require(len(self.lengths) > 0, "lengths", "at least one length")
        for name in ("data", "books"):
            if (text := getattr(self, name)) is not None:
                self._require(path_of(name, text).is_dir(), name, "a folder that exists")
        if self.essays is not None:
            self._require(path_of("essays", self.essays).exists(), "essays", "a file or a folder that exists")

    @property
    def reading(self) -> dict[str, Any]:
        """Returns the settings that the model has, by name."""
        return {field.name: getattr(self, field.name) for field in fields(ReadingConfig)}
