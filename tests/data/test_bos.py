"""A tokenizer that puts a BOS token before every text: followed through rows, prompts and explored documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from refine_lab.config import DataConfig, TaskConfig, TrainConfig, from_json, to_json
from refine_lab.data.batches import SequenceData, plain_rows
from refine_lab.data.recall import make_document
from refine_lab.data.tasks.examples import Task, load_task
from refine_lab.data.tasks.prompts import cut_middle
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tasks.splits import report
from refine_lab.data.tokenizer import beginning, describe_beginning, tokenizer_sample, train_tokenizer, wrap
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.runs import create_runs
from refine_lab.experiments.ttt import prompt_to_trace
from refine_lab.explore.client import Worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.session import Session
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.models.loading import load_tokenizer
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.answering import adapt_ids, example_of
from refine_lab.training.evaluation import recall_documents
from refine_lab.training.inputs import changes, inputs_of
from refine_lab.training.trainer import train
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

BOS, END, VOCABULARY = 1200, 0, 1201
DATA = DataConfig(sources={str(TEXT): 1.0}, sequence_length=160, validation_sequences=1, recall={"word-1": 0.5})


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bare() -> PreTrainedTokenizerFast:
    """As those that are shipped: it puts nothing before a text."""
    return train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), VOCABULARY - 1)


@pytest.fixture(scope="module")
def tokenizer(bare: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, with `<s>` before every text and another token after it, as its post-processor says."""
    backend = wrap(bare.backend_tokenizer).backend_tokenizer
    backend.add_special_tokens(["<s>"])
    end = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(single=f"<s> $A {end}", special_tokens=[("<s>", BOS), (end, END)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end, pad_token=end)
    assert made("a").input_ids[0] == BOS
    return made


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=16, num_heads=2, num_hidden_layers=1, intermediate_size=24, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    DeltaNetForCausalLM(DeltaNetConfig(**sizes, bos_token_id=BOS, eos_token_id=END)).save_pretrained(folder)
    return folder


def test_what_a_text_begins_with_is_a_choice(bare: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    assert [beginning(tokenizer, choice) for choice in (None, True, False)] == [(BOS,), (BOS,), ()]
    assert [beginning(bare, choice) for choice in (None, True, False)] == [
        (),
        (END,),
        (),
    ]  # their BOS is the end of text
    assert describe_beginning(bare) == ""
    assert describe_beginning(tokenizer) == "Each document and prompt begins with <s> (as the tokenizer does)."
    assert describe_beginning(tokenizer, False).endswith("begins with no special token (add_bos is False).")
    without = wrap(bare.backend_tokenizer)
    without.bos_token = None
    with refused("add_bos", True):
        beginning(without, True)


@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-lact"])
def test_the_shipped_tokenizers_add_none(name: str) -> None:
    assert beginning(load_tokenizer(name)) == ()


# -- training rows -------------------------------------------------------------------------------------------------------


def test_every_document_of_a_packed_stream_begins_with_it(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = plain_rows(DATA, tokenizer, str(TEXT), "train").tokens.tolist()
    starts = [0, *(i + 1 for i, token in enumerate(stream[:-1]) if token == END)]
    assert len(starts) == 7 and [stream[i] for i in starts] == [BOS] * 7 and stream.count(BOS) == 7
    texts = [path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.txt"))]
    assert stream[: stream.index(END) + 1] in [
        tokenizer(text).input_ids for text in texts
    ]  # as the tokenizer itself does


def test_without_it_the_stream_is_that_of_the_bare_tokenizer(
    bare: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also from the cache, where both are kept."""
    with_it = plain_rows(DATA, tokenizer, str(TEXT), "train").tokens.tolist()
    without = plain_rows(replace(DATA, add_bos=False), tokenizer, str(TEXT), "train").tokens.tolist()
    assert without == plain_rows(DATA, bare, str(TEXT), "train").tokens.tolist()
    assert [token for token in with_it if token != BOS] == without


@pytest.mark.parametrize("kind", ["word-1", "pairs", "number-2-d10"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_recall_document_begins_with_it_once_and_its_questions_stand_where_they_say(
    tokenizer: PreTrainedTokenizerFast, kind: str, split: str
) -> None:
    filler = plain_rows(DATA, tokenizer, str(TEXT), "train").tokens
    generator = torch.Generator().manual_seed(0)
    document = make_document(kind, 160, filler, generator, tokenizer, split, beginning=(BOS,))  # type: ignore[arg-type]
    assert len(document.tokens) <= 160 and (kind == "pairs" or len(document.tokens) == 160)
    assert document.tokens[0] == BOS and document.tokens.count(BOS) == 1 and END not in document.tokens
    for question in document.questions:
        assert question.key in tokenizer.decode(document.tokens[question.start : question.prompt_end])
        after = document.tokens[question.prompt_end :]
        assert after[: len(question.answer_ids)] == question.answer_ids


def test_rows_of_a_run_and_documents_of_its_evaluation_have_it(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(replace(DATA, recall={"word-1": 1.0}), tokenizer, seed=0)
    assert data.batch(0, 4).tokens[:, 0].tolist() == [BOS] * 4
    held_out = SequenceData(DATA, tokenizer, 0, "validation")
    assert held_out.tokens[str(TEXT)][0] == BOS
    assert [document.tokens[0] for document in recall_documents("word-1", 3, 160, held_out)] == [BOS] * 3


# -- prompts -------------------------------------------------------------------------------------------------------------


def prompts_file(folder: Path, count: int = 6) -> Path:
    rows = [
        {
            "prompt": f"Document 1:\nTree {n} is {'very ' * n}high.\n\nQuestion: How high is tree {n}?\nAnswer:",
            "answer": "high",
        }
        for n in range(count)
    ]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", ["file", "recall:word-2"])
def test_a_prompt_begins_with_it_and_an_answer_does_not(
    bare: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, source: str
) -> None:
    source = str(prompts_file(tmp_path)) if source == "file" else source
    config = TaskConfig(source=source, train=2, test=2, prompt_tokens=160)
    task, plain = load_task(config, tokenizer, DATA), load_task(config, bare, DATA)
    assert "Each document and prompt begins with <s> (as the tokenizer does)." in str(task.report)
    for example, other in zip(task.examples, plain.examples, strict=True):
        assert example.prompt_ids[0] == BOS and example.prompt_ids.count(BOS) == 1 and example.begins == 1
        assert BOS not in example.answer_ids and example.answer_ids[-1] == END
        document, question = example.parts(tokenizer)
        assert not document.startswith("<s>") and question.lstrip().startswith("Question:")
        assert adapt_ids(example, "document").tolist() == list(example.prompt_ids[: example.question_start])
        if source != "recall:word-2":
            assert example.prompt_ids[1:] == other.prompt_ids and example.question_start == other.question_start + 1
            assert example.documents == other.documents and example.answer_ids == other.answer_ids
        else:
            assert len(example.prompt_ids) == 160 and "<s>" not in example.documents[0]
    without = load_task(config, tokenizer, replace(DATA, add_bos=False))
    assert [example.prompt_ids for example in without.examples] == [example.prompt_ids for example in plain.examples]


def test_it_stays_where_the_middle_is_cut_out(tokenizer: PreTrainedTokenizerFast) -> None:
    example = example_of(tokenizer, "a tree and another tree " * 20, "How many trees are there?")
    question = len(example.prompt_ids) - example.question_start
    for limit in (question + 1, question + 5, 3 * question):
        cut = cut_middle(example, limit)
        assert len(cut.prompt_ids) == limit and cut.prompt_ids[0] == BOS
        assert cut.prompt_ids[cut.question_start :] == example.prompt_ids[example.question_start :]
    with naming(ValueError, f"{question + 1} tokens", f"TaskConfig.prompt_tokens is {question}"):
        cut_middle(example, question)


def test_ones_own_text_has_it_as_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [example_of(tokenizer, "a tree", "Which?", add_bos=choice) for choice in (None, True, False)]
    assert [example.begins for example in asked] == [1, 1, 0]
    assert asked[0].prompt_ids == asked[1].prompt_ids == (BOS, *asked[2].prompt_ids)
    nothing = Task(train=(), validation=(), test=(), report=report({}), rule=AnswerRule())
    watched, _ = prompt_to_trace(tokenizer, nothing, TaskConfig(), text="a tree", add_bos=False)
    assert watched.begins == 0


# -- the explorer --------------------------------------------------------------------------------------------------------


def test_an_explored_document_begins_with_it(model: Path, bare: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokens = [Exploration(Worker("cpu"), str(model), add_bos=choice).tokens_of("two trees") for choice in (None, False)]
    assert tokens[0].tolist() == [BOS, *tokens[1]]
    session = Session("cpu")
    reading = session.read(str(model), tokens[0], text="two trees")  # the same tokens for the model that is compared
    assert len(reading.entropies) == len(tokens[0])
    with refused("a model to compare with"):
        session.read(str(model), tokens[1], text="two trees")
    assert len(session.read(str(model), tokens[1], text="two trees", add_bos=False).entropies) == len(tokens[1])


# -- the record ----------------------------------------------------------------------------------------------------------


def config_of(model: Path, **data: object) -> TrainConfig:
    sizes = dict(batch_size=2, mini_batch_size=2, micro_batch_size=2, steps=2, checkpoint_every=1)
    rows = replace(DATA, recall={}, sequence_length=64, **data)  # type: ignore[arg-type]
    return TrainConfig(recipe="test", model=str(model), refine=None, data=rows, **sizes, device="cpu", threads=1)


def trained(config: TrainConfig, folder: Path) -> Run:
    run = RunWriter.create(config, folder).run
    train(run.path, StopSignal(run.path))
    return run


def test_the_run_records_and_tells_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "Each document and prompt begins with <s> (as the tokenizer does).\n"
    (made,) = create_runs([config_of(model)], tmp_path)
    assert capsys.readouterr().out == told  # in the notebook
    train(made.path, StopSignal(made.path))
    assert capsys.readouterr().out == told  # in log.txt
    assert made.inputs is not None and made.inputs["begins_with"] == [BOS]
    without = trained(config_of(model, add_bos=False), tmp_path).inputs
    assert without is not None and without["begins_with"] == []


def test_a_run_that_was_begun_without_it_does_not_go_on_with_it(model: Path, tmp_path: Path) -> None:
    """As one of an earlier version was, whose configuration and record say nothing of it."""
    run = trained(config_of(model, add_bos=False), tmp_path)
    (run.path / "inputs.json").unlink()
    config = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    del config["data"]["add_bos"]
    (run.path / "config.json").write_text(json.dumps(config | {"steps": 4}), encoding="utf-8")
    with naming(ValueError, run.path, "add_bos to false"):
        train(run.path, StopSignal(run.path))
    config["data"]["add_bos"] = False
    (run.path / "config.json").write_text(json.dumps(config | {"steps": 4}), encoding="utf-8")
    train(run.path, StopSignal(run.path))
    assert Run(run.path).status.state == "finished"


def test_a_choice_that_is_changed_under_a_run_is_refused(model: Path, tmp_path: Path) -> None:
    run = trained(config_of(model), tmp_path)
    config = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    config["data"]["add_bos"] = False
    (run.path / "config.json").write_text(json.dumps(config | {"steps": 4}), encoding="utf-8")
    with naming(ValueError, run.path, "(add_bos)"):
        train(run.path, StopSignal(run.path))


def test_prompts_with_it_are_other_prompts(model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = TaskConfig(source=str(prompts_file(tmp_path)), train=2, test=2)
    with_it, without = (
        inputs_of(str(model), load_task(config, tokenizer, replace(DATA, add_bos=choice)).examples)
        for choice in (None, False)
    )
    assert (with_it["begins_with"], without["begins_with"]) == ([BOS], [])
    assert changes(with_it, without, replace(config_of(model), task=config, batch_size=2, mini_batch_size=2))


def test_the_choice_reaches_every_configuration() -> None:
    configs = [
        *method_configs("midtrain", [0], add_bos=False),
        *method_configs("posttrain", [0], add_bos=False),
        *method_configs("per_prompt", [0], add_bos=False),
    ]
    assert len(configs) == 8 and not any(config.data.add_bos is not False for config in configs)
    assert method_configs("midtrain", [0])[0].data.add_bos is None
    assert from_json(to_json(configs[0])) == configs[0]
    with refused("DataConfig.add_bos", "yes"):
        DataConfig(add_bos="yes")  # type: ignore[arg-type]


def test_nothing_that_the_shipped_models_read_changes(bare: PreTrainedTokenizerFast) -> None:
    explicit, default = (SequenceData(replace(DATA, add_bos=choice), bare, 0).batch(0, 8) for choice in (False, None))
    assert np.array_equal(explicit.tokens.numpy(), default.tokens.numpy())
