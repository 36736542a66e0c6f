"""MODEL in EleutherAI's lm-eval: log-likelihoods, rolling ones, and generation.

`pyproject.toml` names `LwmHarness` under the entry points `lm_eval.models`, so that `lm_eval
--model lwm --model_args pretrained=MODEL` finds it where lm-eval looks through them. 0.4.13, the
latest release there is, looks nowhere; `python -m lwm.evaluation.lm_eval` takes
the same arguments, registers the model and hands over.

Knows a loaded model and lm-eval's requests; knows no task. Follows lm-eval's own `hf` model in
what is scored: how a context and its continuation are parted, what is cut off on the left, which
token stands before a text without a context, where an answer ends.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from lwm.generation.model import Model

NAME = "lwm"
BATCH_TOKENS = 8192
"""Tokens that are computed together where the batch size is `auto`."""
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")

Scored = tuple[Any, list[int], list[int]]
"""What the answer is cached under, tokens of the context, tokens of the continuation."""


@dataclass(frozen=True)
class _Answer:
    """What `generate_until` is asked for, in tokens."""

    place: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]


class LwmHarness(TemplateLM):
    """A model of ours as lm-eval sees one.

    Args:
        pretrained: any MODEL.
        tokenizer, config, dtype: as `lwm.load` takes them.
        mesh: likewise, or a list of four sizes.
        theta: another RoPE theta than the model's own.
        max_length: of the context, in tokens; longer than the model's own only with a theta.
        batch_size: rows that are computed together, or `auto` for as many as make up a few
            thousand tokens.
        max_batch_size: most of them with `auto`.
        device: read over. lm-eval's command gives everyone `cuda:0`, a device of torch's; ours
            are jax's own, or those of the mesh.

    Raises:
        LwmError: as `lwm.load`, or a setting is out of range.
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
        # lm-eval forks to estimate errors, which can lock up a process with JAX's threads in it.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        self._rows = _batch_size(batch_size)
        self._most_rows = max_batch_size or sys.maxsize
        laid = mesh if mesh is None or isinstance(mesh, str) else ",".join(map(str, mesh))
        self.model = load(
            pretrained, config=config, tokenizer=tokenizer, dtype=dtype, mesh=laid,
            theta=None if theta is None else float(theta),
            context=None if theta is None else max_length,
        )  # fmt: skip
        if max_length is not None:
            _shorten(self.model, max_length)
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
        """Stands before a text without a context."""
        found = self.tokenizer.bos_id
        return self.eot_token_id if found is None else found

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
        begun = self.tokenizer.bos is not None and string.startswith(self.tokenizer.bos)
        specials = not begun if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, specials=specials)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
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
            rows.append([*context, *continuation][-(self.max_length + 1) :])
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with progress("scoring", len(rows)) as advance:
            for batch, count in self._batches({i: len(row) for i, row in enumerate(rows)}):
                lengths = np.full(count, 1)
                lengths[: len(batch)] = [len(rows[i]) for i in batch]
                tokens = np.zeros((count, max(2, lengths.max())), np.int32)
                for line, i in enumerate(batch):
                    tokens[line, : len(rows[i])] = rows[i]
                found, likeliest = self._scorer.log_likelihoods(tokens, lengths.tolist())
                for line, i in enumerate(batch):
                    key, _, continuation = requests[i]
                    last = len(rows[i]) - 1
                    part = slice(last - len(continuation), last)
                    total = float(found[line, part].sum(dtype=np.float64))
                    answers[i] = total, bool(likeliest[line, part].all())
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[i])
                    advance()
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        asked = [self._asked(place, *request.args) for place, request in enumerate(requests)]
        answers = [""] * len(asked)
        sizes = {one.place: len(one.prompt) + one.max_tokens for one in asked}
        with progress("answering", len(asked)) as advance:
            for batch, slots in self._batches(sizes):
                for one, tokens in self._generate([asked[i] for i in batch], slots):
                    text = postprocess_generated_text(
                        self.tokenizer.decode(tokens), list(one.stops), None
                    )
                    answers[one.place] = text
                    self.cache_hook.add_partial("generate_until", requests[one.place].args, text)
                    advance()
        return answers

    def _asked(self, place: int, context: str, settings: Mapping[str, Any]) -> _Answer:
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        sampled = given.pop("do_sample", False)
        stops = (*given.pop("until"), self.tokenizer.eos_text)
        max_tokens = given.pop("max_gen_toks")
        temperature = float(given.pop("temperature", 1.0)) if sampled else 0.0
        given.pop("temperature", None)
        chosen = {name: given.pop(name) for name in _SAMPLING if name in given}
        if given:
            raise ConfigError(
                f"the task sets {next(iter(given))!r} for generation, which is not known here; "
                f"known are until, max_gen_toks, do_sample, temperature, {', '.join(_SAMPLING)}"
            )
        room = self.max_length - max_tokens
        if room < 1 or max_tokens < 1:
            raise ConfigError(
                f"the task asks for {max_tokens:,} tokens and the context of {self.model.source} "
                f"is {self.max_length:,}; set --gen_kwargs max_gen_toks=N"
            )
        return _Answer(
            place=place,
            prompt=self.tok_encode(context)[-room:],
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, **chosen),
            stops=tuple(stop for stop in stops if stop),
        )

    def _generate(
        self, batch: Sequence[_Answer], slots: int
    ) -> Iterator[tuple[_Answer, list[int]]]:
        """Token ids of answers, up to a stop string or a little beyond."""
        longest = max(len(one.prompt) + one.max_tokens for one in batch)
        engine = self.model.engine_for(longest - 1, 1, slots)
        numbers = {
            engine.submit(
                Request(
                    prompt=one.prompt,
                    max_tokens=one.max_tokens,
                    sampling=one.sampling,
                    stop_tokens=self.tokenizer.eos,
                )
            ): one
            for one in batch
        }
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        for event in engine.follow(list(numbers)):
            if event.token is None:
                continue
            tokens, stops = answers[event.request], numbers[event.request].stops
            tokens.append(event.token)
            # A character takes four tokens at most.
            end = self.tokenizer.decode(tokens[-4 * max(map(len, stops), default=0) - 4 :])
            if any(stop in end for stop in stops):
                engine.cancel(event.request)
        return ((one, answers[number]) for number, one in numbers.items())

    def _batches(self, sizes: Mapping[int, int]) -> Iterator[tuple[list[int], int]]:
        """Numbers of rows to compute together, the longest first, and how many rows to compute:
        few different counts, so that little is compiled."""
        order = sorted(sizes, key=lambda number: -sizes[number])
        while order:
            rows = self._rows or min(BATCH_TOKENS // max(1, sizes[order[0]]), self._most_rows)
            rows = 1 << (max(1, min(rows, len(order))) - 1).bit_length()
            yield order[:rows], rows
            order = order[rows:]


def _batch_size(given: int | str) -> int:
    """Rows, or 0 for `auto`."""
    text = str(given)
    if text.partition(":")[0] == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"batch_size is {given!r}; it must be 1 or more, or auto")
    return int(text)


def _shorten(model: Model, max_length: int) -> None:
    """A shorter context, before anything is compiled."""
    own = model.config.max_sequence_length
    if max_length > own:
        raise CapacityError(
            f"max_length is {max_length:,} and the context of {model.source} is {own:,}; shorten "
            "it, or raise the context with theta"
        )
    model.config = replace(model.config, max_sequence_length=max_length)


def register() -> None:
    """Lets lm-eval find the model by its name."""
    if NAME not in model_registry:
        model_registry.register(NAME, target="lwm.evaluation.lm_eval:LwmHarness")


def main(arguments: Iterable[str] | None = None) -> None:
    """lm-eval's own command, with our model known to it."""
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
    main()
