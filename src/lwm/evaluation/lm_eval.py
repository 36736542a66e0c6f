"""Connect models to EleutherAI's lm-eval: log-likelihoods, rolling ones, and generation.

`pyproject.toml` declares `LwmHarness` as an entry point `lm_eval.models`, which lets a release of
lm-eval that reads entry points accept `lm_eval --model lwm --model_args pretrained=MODEL`. The
latest release, 0.4.13, does not read them; `python -m lwm.evaluation.lm_eval` registers the model,
then runs lm-eval's command with the same arguments.

Scoring follows lm-eval's `hf` model, down to truncation on the left and where an answer ends.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lwm.core.errors import CapacityError, ConfigError, LwmError
from lwm.core.progress import progress, say
from lwm.data.text.templates import choose_template, render
from lwm.engine.request import Request
from lwm.engine.sampling import Sampling
from lwm.engine.scoring import Scorer
from lwm.generation.load import load

_BATCH_TOKENS = 8192  # with the batch size `auto`
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")

Scored = tuple[Any, list[int], list[int]]  # cache key, context, continuation
Stoppable = tuple[Request, tuple[str, ...]]  # with its stop strings


class LwmHarness(TemplateLM):
    """Evaluate a MODEL with lm-eval; most arguments are those of `lwm.load`.

    Args:
        max_length: context in tokens; longer than the model's only with a theta.
        batch_size: rows of a batch, or `auto` for a few thousand tokens.
        device: ignored; lm-eval always passes a torch device such as `cuda:0`.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        config: str | None = None,
        mesh: str | Sequence[int] | None = None,
        dtype: str | None = None,
        theta: float | int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._templated = False
        # lm-eval forks to estimate errors, which can deadlock a process with JAX's threads.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        self._rows = _batch_rows(batch_size)
        self._max_rows = max_batch_size or sys.maxsize
        self.model = load(
            pretrained, config=config, tokenizer=tokenizer, dtype=dtype,
            mesh=mesh if mesh is None or isinstance(mesh, str) else ",".join(map(str, mesh)),
            theta=None if theta is None else float(theta),
            context=None if theta is None else max_length,
        )  # fmt: skip
        if max_length is not None:
            if max_length > self.max_length:
                raise CapacityError(
                    f"max_length is {max_length:,} and the context of {pretrained} is "
                    f"{self.max_length:,}; shorten it, or extend the context with theta"
                )
            # Before anything is compiled.
            self.model.config = replace(self.model.config, max_sequence_length=max_length)
        self.tokenizer = self.model.tokenizer
        self._scorer = Scorer(self.model.weights, self.model.config, self.model.mesh)

    @property
    def eot_token_id(self) -> int:
        if not self.tokenizer.eos:
            raise ConfigError(
                f"the tokenizer of {self.model.source} names no token that ends a text; add one "
                "to its tokenizer_config.json as eos_token"
            )
        return self.tokenizer.eos[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.config.max_sequence_length

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def batch_size(self) -> int | str:
        return self._rows or "auto"

    @property
    def tokenizer_name(self) -> str:
        return self.model.source

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        specials = add_special_tokens is not False
        if self._templated:  # with the control tokens of the template
            return self.tokenizer.encode_controlled(string, specials=specials)
        return self.tokenizer.encode(string, specials=specials)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._templated:  # the context is a rendered template, the continuation is not
            continuation = self.tokenizer.escape(continuation)
        return super()._encode_pair(context, continuation)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        self._templated = True  # lm-eval applies the template to all requests or to none
        return render(
            choose_template("auto", self.tokenizer),
            chat_history,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise CapacityError(
                    f"a continuation has {len(continuation):,} tokens and the context of "
                    f"{self.model.source} is {self.max_length:,}; leave the task out"
                )
            rows.append([*context, *continuation])
        whole = self.max_length + 1  # with the token that only the last position predicts
        self._report_truncated(sum(len(row) > whole for row in rows), len(rows))
        rows = [row[-whole:] for row in rows]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with progress("scoring", len(rows)) as advance:
            for batch, count in self._batches({i: len(row) for i, row in enumerate(rows)}):
                lengths = np.full(count, 1)
                lengths[: len(batch)] = [len(rows[i]) for i in batch]
                tokens = np.zeros((count, max(2, lengths.max())), np.int32)
                for line, i in enumerate(batch):
                    tokens[line, : len(rows[i])] = rows[i]
                scores, likeliest, *_ = self._scorer.log_likelihoods(tokens, lengths.tolist())
                for line, i in enumerate(batch):
                    key, _, continuation = requests[i]
                    last = len(rows[i]) - 1
                    part = slice(last - len(continuation), last)
                    total = float(scores[line, part].sum(dtype=np.float64))
                    answers[i] = total, bool(likeliest[line, part].all())
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[i])
                    advance()
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[tuple[int, Scored]] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((index, (None, *make_disjoint_window(window))))
        scores = self._loglikelihood_tokens([scored for _, scored in windows])
        totals = [0.0] * len(requests)
        for (index, _), (total, _) in zip(windows, scores, strict=True):
            totals[index] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        parsed = [self._parse(*request.args) for request in requests]
        rooms = [self.max_length - one.max_tokens for one, _ in parsed]
        longer = [len(one.prompt) > room for (one, _), room in zip(parsed, rooms, strict=True)]
        self._report_truncated(sum(longer), len(parsed))
        parsed = [
            (replace(one, prompt=one.prompt[-room:]), stops)
            for (one, stops), room in zip(parsed, rooms, strict=True)
        ]
        answers = [""] * len(parsed)
        sizes = {i: len(one.prompt) + one.max_tokens for i, (one, _) in enumerate(parsed)}
        with progress("answering", len(parsed)) as advance:
            for batch, slots in self._batches(sizes):
                generated = self._generate([parsed[i] for i in batch], slots)
                for i, tokens in zip(batch, generated, strict=True):
                    text = self.tokenizer.decode(tokens)
                    answers[i] = postprocess_generated_text(text, list(parsed[i][1]), None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    advance()
        return answers

    def _parse(self, context: str, settings: Mapping[str, Any]) -> Stoppable:
        rest: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        stops = (*rest.pop("until"), self.tokenizer.eos_text)
        max_tokens = rest.pop("max_gen_toks")
        temperature = float(rest.pop("temperature", 1.0))
        if not rest.pop("do_sample", False):
            temperature = 0.0
        sampling = {name: rest.pop(name) for name in _SAMPLING if name in rest}
        if rest:
            raise ConfigError(
                f"the task sets {next(iter(rest))!r} for generation, which is not supported; "
                f"use until, max_gen_toks, do_sample, temperature, {', '.join(_SAMPLING)}"
            )
        room = self.max_length - max_tokens
        if room < 1 or max_tokens < 1:
            raise ConfigError(
                f"the task asks for {max_tokens:,} tokens and the context of {self.model.source} "
                f"is {self.max_length:,}; set --gen_kwargs max_gen_toks=N"
            )
        request = Request(
            prompt=self.tok_encode(context),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, **sampling),
            stop_tokens=self.tokenizer.eos,
        )
        return request, tuple(stop for stop in stops if stop)

    def _report_truncated(self, count: int, total: int) -> None:
        if count:
            say(
                f"{count:,} of {total:,} prompts exceed the context of {self.max_length:,} tokens "
                "and are truncated on the left, as in lm-eval's hf model"
            )

    def _generate(self, batch: Sequence[Stoppable], slots: int) -> list[list[int]]:
        # Tokens may go a little beyond a stop string.
        longest = max(len(request.prompt) + request.max_tokens for request, _ in batch)
        engine = self.model.engine_for(longest - 1, 1, slots)
        stops_of = {engine.submit(request): stops for request, stops in batch}
        answers: dict[int, list[int]] = {number: [] for number in stops_of}
        for event in engine.follow(list(stops_of)):
            if event.token is None:
                continue
            tokens, stops = answers[event.request], stops_of[event.request]
            tokens.append(event.token)
            # A character takes four tokens at most.
            end = self.tokenizer.decode(tokens[-4 * max(map(len, stops), default=0) - 4 :])
            if any(stop in end for stop in stops):
                engine.cancel(event.request)
        return list(answers.values())

    def _batches(self, sizes: Mapping[int, int]) -> Iterator[tuple[list[int], int]]:
        """Yield the indices of each batch, longest rows first, and a power of two of rows to
        compute, so that few shapes are compiled."""
        order = sorted(sizes, key=lambda index: -sizes[index])
        while order:
            rows = self._rows or min(_BATCH_TOKENS // max(1, sizes[order[0]]), self._max_rows)
            rows = 1 << (max(1, min(rows, len(order))) - 1).bit_length()
            yield order[:rows], rows
            order = order[rows:]


def _batch_rows(batch_size: int | str) -> int:
    text = str(batch_size)
    if text.partition(":")[0] == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be at least 1, or auto")
    return int(text)


def register() -> None:
    """Register the model with lm-eval as `lwm`."""
    if "lwm" not in model_registry:
        model_registry.register("lwm", target="lwm.evaluation.lm_eval:LwmHarness")


def run_lm_eval(arguments: Iterable[str] | None = None) -> None:
    """Run lm-eval's command with our model registered."""
    from lm_eval.__main__ import cli_evaluate

    register()
    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except LwmError as error:
        say(f"lwm: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run_lm_eval()
