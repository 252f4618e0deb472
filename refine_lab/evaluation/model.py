"""A fast-weight model for lm-evaluation-harness: prompts are read once without padding, and answered from their states."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.data.tasks.prompts import end_of_text
from refine_lab.evaluation.adapting import adapted_to, ttt_settings
from refine_lab.evaluation.config import ReadingConfig
from refine_lab.evaluation.generation import Sampler, StopRule, generate, greedy
from refine_lab.evaluation.packages import harness, require_packages
from refine_lab.evaluation.prompts import Encoder, cut_middle
from refine_lab.evaluation.reading import continuation_stats, read_prompts, text_logprobs
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import load_model
from refine_lab.ops.precision import autocast, use_tf32
from refine_lab.validation import ConfigError, require, unknown
from refine_lab.workers import ALONE, Workers

require_packages("lm_eval")
TemplateLM: Any = harness("api.model").TemplateLM

T = TypeVar("T", bound=Any)

UNLIMITED = 2**31 - 1
"""The `max_length` of a model that reads prompts of any length."""
ANSWER_TOKENS = 256
"""Maximum number of generated tokens for a task that sets none, as in the harness."""

Batch = list[tuple[int, ...]]
"""Prompts, as tokens, that are read together."""
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of the harness: context and continuation as text, and the tokens of both."""


class RefineLM(TemplateLM):
    """The harness's interface to a model; `lm_eval --model refine_lab --model_args pretrained=NAME`."""

    def __init__(
        self,
        pretrained: str | FastWeightLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        over_limit: str = "cut_middle",
        workers: Workers = ALONE,
        **settings: Any,
    ) -> None:
        """Loads the model named `pretrained` (see `load_model`), or uses a loaded one with its `tokenizer`.

        `settings` are fields of `ReadingConfig`. Each of several `workers` makes the same requests, and they divide the work
        among themselves. If a prompt and its answer have more tokens than `max_length`, the
        middle of the prompt is cut out, or the prompt is rejected (`over_limit`).

        Raises ConfigError for settings that are unknown or not allowed, and what `load_model` raises.
        """
        super().__init__()
        config = ReadingConfig(**settings)
        require(over_limit in ("cut_middle", "refuse"), "over_limit", over_limit, "'cut_middle' or 'refuse'")
        if isinstance(pretrained, str):
            self.policy, loaded = load_model(pretrained, device=config.device, seed=config.seed)
        else:
            self.policy, loaded = pretrained, tokenizer
        use_tf32(self.policy.device)
        require(loaded is not None, "tokenizer", tokenizer, "the tokenizer of the loaded model")
        assert loaded is not None
        self.tokenizer: PreTrainedTokenizerBase = loaded
        self.name = pretrained if isinstance(pretrained, str) else str(self.policy.config.model_type)
        most = self.policy.longest_context or UNLIMITED
        self.max_length = config.max_length or most
        require(self.max_length <= most, "max_length", self.max_length, f"at most {most} for this model")
        self.encoder = Encoder.of(self.tokenizer, config.add_bos)
        self.over_limit, self.add_bos = over_limit, config.add_bos
        self.dtype, self.batch_size = config.dtype, config.batch_size
        self.sampled, self.seed = config.sampled, config.seed
        self.ttt_per, self.ttt = config.ttt_per, ttt_settings(config)
        self.workers, self.counts = workers, Counter[str]()
        self.on_batch: Callable[[int, int], object] = lambda done, total: None
        self.unit = ""
        "What is measured at present."

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Any:
        """Makes the model of `--model_args`, whose values precede those of lm_eval's own options.

        Raises ConfigError, which lists the allowed names, for an unknown name, and if `pretrained` is missing.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == "cuda:0" and not torch.cuda.is_available():
            del options["device"]  # lm_eval's default, which it passes without a GPU too
        values = {**options, **arg_dict}
        most = values.pop("max_batch_size", None)  # an upper bound of automatic batch sizes, which there are none of
        allowed = ["pretrained", "over_limit", *(field.name for field in fields(ReadingConfig))]
        for name in values:
            if name not in allowed:
                raise unknown("name in --model_args", name, allowed)
        require(bool(values.get("pretrained")), "pretrained in --model_args", None, "the name of a model")
        if str(size := values.get("batch_size", 8)).isdecimal():
            values["batch_size"] = int(size) if most is None else min(int(size), int(most))
        return cls(str(values.pop("pretrained")), **values)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Any:
        """Makes the model of `--model_args` as text, as `create_from_arg_obj`."""
        values = harness("utils").simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(values, additional_config)

    # -- what the harness asks about a tokenizer ---------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """Returns the end-of-text token."""
        return end_of_text(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """Returns the token that precedes a text without a context."""
        return self.encoder.prefix

    @property
    def device(self) -> torch.device:
        """Returns the model's device."""
        return self.policy.device

    @property
    def tokenizer_name(self) -> str:
        """Returns the name that the harness's cache of requests uses."""
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the tokens of a text: with one BOS token if the tokenizer adds it, unless it is a continuation."""
        return self.encoder.text(string) if add_special_tokens is False else self.encoder.prompt(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as one prompt, by the tokenizer's own template."""
        rest = not add_generation_prompt
        tokenizer: Any = self.tokenizer  # its return type depends on `tokenize`
        return tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=not rest, continue_final_message=rest
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of context and continuation, separately if joining leaves the continuation no token."""
        before, after = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], after or self.encoder.text(continuation)

    # -- what the harness asks of a model ----------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns log-probability and greedy match of the continuation of each request, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns log-probability and greedy match of each continuation; a context is read once for all of its own."""
        owned: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            owned.setdefault(tuple(self._within(context, len(continuation) - 1)), []).append(number)

        def numbers_of(contexts: Batch) -> list[int]:
            return [number for context in contexts for number in owned[context]]

        def stats_of(contexts: Batch, counts: Counter[str]) -> list[tuple[float, bool]]:
            owners = [owner for owner, context in enumerate(contexts) for _ in owned[context]]
            asked, stats = list(zip(owners, numbers_of(contexts), strict=True)), list[tuple[float, bool]]()
            with adapted_to(self.policy, contexts, self.ttt, counts), autocast(self.device, self.dtype):
                read = read_prompts(self.policy, contexts)
                for start in range(0, len(asked), self.batch_size):
                    places, numbers = zip(*asked[start : start + self.batch_size], strict=True)
                    stats += continuation_stats(self.policy, read, [requests[i][2] for i in numbers], list(places))
            return stats

        batches = list(self._batches(list(owned)))
        results = self.divided(stats_of, batches, lambda contexts: len(numbers_of(contexts)))
        found: dict[int, tuple[float, bool]] = {}
        for contexts, stats in zip(batches, results, strict=True):
            found |= {
                number: (value, match) for number, (value, match) in zip(numbers_of(contexts), stats, strict=True)
            }
        for number, (text, _, _) in enumerate(requests):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text after the prefix token.

        A text is read as a whole, whatever its length, unless the model has a longest context: then it is read in the
        harness's windows. Raises ValueError with test-time training, since a text without a context leaves nothing to
        adapt to.
        """
        require(self.ttt is None, "ttt", "sft or refine", "'none' for a text without a context")
        rows = [[self.prefix_token_id, *self.encoder.text(request.args[0])] for request in requests]
        if self.max_length < UNLIMITED:
            found = [self._rolled(row[1:]) for row in rows]
        else:

            def sums_of(batch: Batch, _: Counter[str]) -> list[float]:
                with autocast(self.device, self.dtype):
                    return [float(part.sum()) for part in text_logprobs(self.policy, batch)]

            batches = list(self._batches([tuple(row) for row in rows]))
            results = self.divided(sums_of, batches)
            sums = dict(zip(chain.from_iterable(batches), chain.from_iterable(results), strict=True))
            found = [sums[tuple(row)] for row in rows]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def _rolled(self, ids: list[int]) -> float:
        """Returns the log-probability of a text, in windows of the model's longest context."""
        utils = harness("utils")
        sizes = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        windows = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, **sizes))
        return sum(value for value, _ in self._loglikelihood_tokens([(None, *window) for window in windows]))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each prompt, decoded from the state after it."""
        rules = [self._rule(request.args[1]) for request in requests]
        pairs = zip(requests, rules, strict=True)
        prompts = [self._prompt(request.args[0], rule.max_tokens) for request, (rule, _) in pairs]
        keys = draw_keys(prompts)
        kinds: dict[tuple[StopRule, float], list[int]] = {}
        for number, rule in enumerate(rules):
            kinds.setdefault(rule, []).append(number)
        batches = [
            (kind, [-1 - row[-1] for row in batch])  # the numbers of its prompts, by which equal prompts differ
            for kind, numbers in kinds.items()
            for batch in self._batches([(*prompts[i], -1 - i) for i in numbers])
        ]

        def texts_of(part: tuple[tuple[StopRule, float], list[int]], counts: Counter[str]) -> list[str]:
            (rule, temperature), numbers = part
            asked = [tuple(prompts[i]) for i in numbers]
            choose = Sampler(self.seed, [keys[i] for i in numbers], temperature) if temperature else greedy
            with adapted_to(self.policy, asked, self.ttt, counts), autocast(self.device, self.dtype):
                return generate(self.policy, self.tokenizer, read_prompts(self.policy, asked), rule, choose)

        results = self.divided(texts_of, batches, lambda part: len(part[1]))
        order = chain.from_iterable(numbers for _, numbers in batches)
        found = dict(zip(order, chain.from_iterable(results), strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def divided(
        self, function: Callable[[T, Counter[str]], Any], parts: Sequence[T], size: Callable[[T], int] = len
    ) -> list[Any]:
        """Returns the value of `function` for each part; the workers divide the parts (see `Workers.map`).

        What the function counts in its second argument is added to `counts`. `on_batch` receives the number of requests that
        are done, of which a part has `size`; with several workers, the others are assumed to be as far as this one.
        """
        total, done = sum(map(size, parts)), 0

        def counted(part: T) -> tuple[Any, Counter[str]]:
            nonlocal done
            counts = Counter[str]()
            value = function(part, counts)
            done += size(part) * self.workers.count
            self.on_batch(min(done, total), total)
            return value, counts

        values = []
        for value, counts in self.workers.map(counted, parts, self.unit):
            self.counts.update(counts)
            values.append(value)
        return values

    # -- one request -------------------------------------------------------------------------------------------------

    def _rule(self, settings: dict[str, Any]) -> tuple[StopRule, float]:
        """Returns when an answer ends, and its temperature: 0 for greedy decoding."""
        chosen = harness("models.utils").normalize_gen_kwargs(settings, ANSWER_TOKENS)
        temperature = float(chosen.get("temperature", 0.0)) if chosen.get("do_sample") else 0.0
        until = tuple(text for text in chosen["until"] if text)
        skip = bool(chosen.get("skip_newlines", False))
        rule = StopRule(max_tokens=chosen["max_gen_toks"], until=until, skip_newlines=skip)
        return rule, 1.0 if self.sampled else temperature

    def _prompt(self, text: str, room: int) -> list[int]:
        return self._within(self.encoder.prompt(text) or [self.prefix_token_id], room)

    def _within(self, ids: list[int], room: int) -> list[int]:
        """Returns a prompt within the limit, with `room` tokens for what follows it.

        Raises ValueError for a longer prompt if over_limit is "refuse", and if `room` leaves nothing of it.
        """
        self.counts["prompts"] += 1
        limit = self.max_length - room
        require(
            limit > 0,
            "max_length",
            self.max_length,
            f"greater than {room}, the number of tokens reserved for the answer",
        )
        if len(ids) <= limit:
            return ids
        if self.over_limit == "refuse":
            sentence = (
                f"the prompt has {len(ids)} tokens, but the limit is {limit}; set over_limit='cut_middle' to shorten "
                "such prompts"
            )
            raise ConfigError("a prompt's tokens", len(ids), f"at most {limit}", sentence)
        self.counts["cut"] += 1
        return cut_middle(ids, limit)

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Yields distinct rows in batches of similar length, the longest first."""
        size = 1 if self.ttt is not None and self.ttt_per == "prompt" else self.batch_size
        ordered = sorted(dict.fromkeys(rows), key=len, reverse=True)
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def draw_keys(prompts: Sequence[Sequence[int]]) -> list[str]:
    """Returns a key for the draws of each answer: equal prompts have different keys, no matter what is between them."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.sha256(repr(tuple(prompt)).encode()).hexdigest()
        keys.append(f"{digest} {seen[digest]}")
        seen[digest] += 1
    return keys
