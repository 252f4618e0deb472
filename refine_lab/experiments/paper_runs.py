"""Creates the runs that are needed to fill the paper's tables, phase by phase, and evaluates them.

Everything continues where it ended: runs by their configuration, answers by their question, evaluations task by task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refine_lab.config import TrainConfig
from refine_lab.evaluation.catalogue import chosen
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.run import evaluate
from refine_lab.experiments import posttrain
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.paper_rows import RANDOM, Row
from refine_lab.experiments.runs import text_runs, ttt_runs
from refine_lab.recipes.ablations import ABLATIONS
from refine_lab.recipes.paper_results import paper_numbers
from refine_lab.runs.queue import require_finished, run_in_turn
from refine_lab.runs.run import Run
from refine_lab.training.loading import load_prompts, load_training_task
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import Config, Count, Length, Seed, Size, Text, configuration, unknown

EVALUATIONS = "evaluations"
"""Folder of the evaluations, beside the runs."""

Report = Callable[[str], object]


@configuration
class PaperPlan(Config):
    """Which rows of the paper's tables are produced, and at what scale. None keeps a recipe's value."""

    model: Text = "tiny-deltanet"
    "The model before training, as in `load_model`."
    chain: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    "Rows of table 4 (1 to 8). Each phase begins with the model of the one before; table 3 needs rows 1 to 3."
    seeds: tuple[Seed, ...] = (0, 1)
    "Each seed is one chain of runs."
    midtrain_recipe: Text = "midtrain"
    "Recipe of mid-training."
    posttrain_recipe: Text = "posttrain"
    "Recipe of post-training."
    ttt_recipe: Text = "per_prompt"
    "Recipe of test-time training."
    steps: Size | None = None
    "Batches of mid-training."
    batch_size: Size | None = None
    "Sequences per batch of mid-training."
    sequence_length: Length | None = None
    "Tokens per sequence of mid-training."
    posttrain_steps: Size | None = None
    "Batches of post-training."
    ttt_steps: Size | None = None
    "Maximum number of updates on a prompt."
    task: Text | None = None
    "Source of the questions of post-training and test-time training."
    questions: Count | None = None
    "Number of test questions (the first ones) on which each row is evaluated."
    tasks: tuple[Text, ...] = ("niah", "recall")
    "Tasks and groups of `refine_lab.evaluation`."
    lengths: tuple[Length, ...] = (512, 1024)
    "Lengths (prompt plus answer, in tokens) of the evaluation tasks that have no fixed length."
    samples: Count | None = None
    "Samples per task and length; none: the number used in the paper."
    ablations: tuple[Text, ...] = ()
    "Ablations of mid-training whose settings are trained too (`refine_lab.sweep.paper`)."
    data: Text | None = None
    "Folder with the files of the benchmarks."
    essays: Text | None = None
    "Paul Graham's essays, for RULER's haystacks."
    device: Text = "auto"
    "`auto`, `cpu`, `cuda` or `cuda:N`."

    def __post_init__(self) -> None:
        rows = len(chain_rows())
        self._require(all(1 <= row <= rows for row in self.chain), "chain", f"numbers of rows from 1 to {rows}")
        self._require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds", "one or more distinct integers")
        chosen(self.tasks)
        known = [name for name, ablation in ABLATIONS.items() if ablation.phase == "midtrain"]
        if strange := [name for name in self.ablations if name not in known]:
            raise unknown("ablation of mid-training", strange[0], known)

    @property
    def wanted(self) -> list[Row]:
        """Returns the rows of table 4 to produce, in the table's order."""
        return [row for number, row in enumerate(chain_rows(), start=1) if number in self.chain]

    @property
    def midtrain_methods(self) -> list[str]:
        """Returns the methods of mid-training that the rows need."""
        return [method for method in ("sft", "refine") if any(row.midtrain == method for row in self.wanted)]

    @property
    def posttrain_methods(self) -> list[str]:
        """Returns the methods of post-training that the rows need."""
        return [*dict.fromkeys(row.posttrain for row in self.wanted if row.posttrain != "none")]

    @property
    def ttt_methods(self) -> list[str]:
        """Returns the methods of test-time training that the rows need."""
        return [*dict.fromkeys(row.ttt for row in self.wanted if row.ttt != "none")]


def plan_of(*, tasks: str, ablations: str | None = None, **settings: Any) -> PaperPlan:
    """Returns the plan that the notebook's parameters describe: `tasks` and `ablations` separated by commas, and lists.

    Raises ConfigError for a value that is not allowed.
    """
    varied = tuple(name.strip() for name in ablations.split(",")) if ablations else ()
    lists: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return PaperPlan(tasks=tuple(name.strip() for name in tasks.split(",")), ablations=varied, **lists)


def chain_rows() -> list[Row]:
    """Returns the rows of table 4 in order: mid-training, then post-training, then test-time training."""
    numbers = paper_numbers()
    table = numbers[(numbers["table"] == "table 4") & (numbers["model"] == numbers["model"].iloc[0])]
    return [Row(*values) for values in table[[*Row._fields]].drop_duplicates().itertuples(index=False)]


# -- runs --------------------------------------------------------------------------------------------------------------


def midtrain_configs(plan: PaperPlan) -> list[TrainConfig]:
    """Returns the configurations of mid-training: one for each method and seed."""
    names = ("model", "steps", "batch_size", "sequence_length", "device")
    if not (methods := plan.midtrain_methods):
        return []
    settings = {name: getattr(plan, name) for name in names}
    return method_configs(plan.midtrain_recipe, plan.seeds, phase="midtrain", methods=methods, **settings)


def posttrain_configs(plan: PaperPlan, model: str, seed: int) -> list[TrainConfig]:
    """Returns the configurations of post-training a mid-trained model: one for each method."""
    settings = {"model": model, "task": plan.task, "test": plan.questions, "steps": plan.posttrain_steps}
    methods = plan.posttrain_methods
    return method_configs(
        plan.posttrain_recipe, [seed], phase="posttrain", methods=methods, device=plan.device, **settings
    )


def ttt_configs(plan: PaperPlan, model: str, seed: int, methods: Sequence[str]) -> list[TTTRunConfig]:
    """Returns the configurations of answering with a model, with and without test-time training."""
    settings: dict[str, Any] = {"model": model, "count": plan.questions, "steps": plan.ttt_steps}
    prompts = plan.task if methods == ["none"] else None  # a post-trained model answers its own test questions
    return method_configs(
        plan.ttt_recipe, [seed], phase="ttt", methods=methods, prompts=prompts, device=plan.device, **settings
    )


def launch(plan: PaperPlan, folder: Path, report: Report = print) -> list[Run]:
    """Executes every run and evaluation of a plan that `folder` lacks, phase after phase, and returns all runs.

    Raises RuntimeError for a run that fails, and what the recipes and evaluations raise for bad values.
    """
    midtrained = _finished(text_runs(midtrain_configs(plan), folder)) if plan.midtrain_methods else []
    runs = [*midtrained]
    models = {(run.config.method, run.config.seed): str(run.path) for run in midtrained}
    posttrained: dict[tuple[str, int], str] = {}
    for seed in plan.seeds if plan.posttrain_methods else ():
        configs = posttrain_configs(plan, models["refine", seed], seed)
        task = load_training_task(configs)
        report(str(task.report))
        found = _finished(posttrain.task_runs(configs, task, folder))
        posttrain.answer_test_prompts(found, task)
        posttrained |= {(run.config.method, seed): str(run.path) for run in found}
        runs += found
    answering: list[Run] = []
    for model, seed, methods in _answering(plan, models, posttrained):
        configs = ttt_configs(plan, model, seed, methods)
        policy, _, task = load_prompts(configs[-1])
        answering += ttt_runs(configs, policy, task.test, folder)
        del policy
    runs += _finished(answering)
    for config, out in evaluations(plan, folder, models, posttrained):
        report(f"\n{out.name}:")
        evaluate(config, out, report)
    return runs


def _finished(runs: list[Run]) -> list[Run]:
    run_in_turn([run for run in runs if run.state != "finished"], detach=False, every=10.0)
    require_finished(runs)
    return runs


def _answering(
    plan: PaperPlan, models: dict[tuple[str, int], str], posttrained: dict[tuple[str, int], str]
) -> Iterator[tuple[str, int, list[str]]]:
    """Yields model, seed and methods of the answering runs: rows without post-training as they are, then test-time training.

    Post-training answers the questions itself, also with the model that it begins with.
    """
    if not plan.posttrain_methods:
        return
    rows = plan.wanted
    yield f"new:{plan.model}", plan.seeds[0], ["none"]
    if Row() in rows:
        yield plan.model, plan.seeds[0], ["none"]
    for seed in plan.seeds:
        if Row("sft") in rows:
            yield models["sft", seed], seed, ["none"]
        if plan.ttt_methods:
            yield posttrained["nested_refine", seed], seed, plan.ttt_methods


# -- evaluations -------------------------------------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """A model to evaluate."""

    label: str
    model: str
    tasks: tuple[str, ...]
    ttt: str = "none"
    ttt_reward: str | None = None


def evaluations(
    plan: PaperPlan, folder: Path, models: dict[tuple[str, int], str], posttrained: dict[tuple[str, int], str]
) -> Iterator[tuple[EvaluationConfig, Path]]:
    """Yields the configuration and folder of each evaluation; random weights come first, then the model before training."""
    for each in _evaluated(plan, models, posttrained):
        if each.tasks:
            config = evaluation_of(plan, each.model, each.tasks)
            yield replace(config, ttt=each.ttt, ttt_reward=each.ttt_reward), folder / EVALUATIONS / each.label


def evaluation_of(plan: PaperPlan, model: str, tasks: tuple[str, ...]) -> EvaluationConfig:
    """Returns the configuration of an evaluation of a model at the plan's scale."""
    settings: dict[str, Any] = {name: getattr(plan, name) for name in ("lengths", "data", "essays", "device")}
    return EvaluationConfig(model=model, tasks=tasks, limit=plan.samples, **settings)


def _evaluated(
    plan: PaperPlan, models: dict[tuple[str, int], str], posttrained: dict[tuple[str, int], str]
) -> Iterator[Evaluated]:
    """Yields each model with its tasks: mid-trained models all of them, others those of tables 4 and 5."""
    tasks = tuple(chosen(plan.tasks))
    questions = tuple(task for task in tasks if task.startswith("ruler_"))
    longbench = tuple(task for task in tasks if task.startswith("longbench_"))
    yield Evaluated(RANDOM.midtrain, f"new:{plan.model}", tasks)
    yield Evaluated("base", plan.model, tasks)
    for (method, seed), model in models.items():
        yield Evaluated(f"{method}-s{seed}", model, tasks)
        for ttt in ("sft", "refine") if method == "refine" else ():
            yield Evaluated(f"{method}-ttt_{ttt}-s{seed}", model, longbench, ttt)
        if method == "refine":  # table E.2
            yield Evaluated(f"{method}-ttt_refine_cosine-s{seed}", model, longbench, "refine", "cosine")
    for (method, seed), model in posttrained.items():
        yield Evaluated(f"refine-{method}-s{seed}", model, questions)
        for ttt in plan.ttt_methods if method == "nested_refine" else ():
            yield Evaluated(f"refine-{method}-ttt_{ttt}-s{seed}", model, questions, ttt)
