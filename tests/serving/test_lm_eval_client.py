"""Ask a server through lm-eval's own API models, and compare with our adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from random_llama import save_random_llama
from running import running

from lwm.evaluation.lm_eval import LwmHarness
from lwm.generation.load import load
from lwm.serving.host import Host

pytestmark = pytest.mark.filterwarnings("ignore")  # of the client's libraries
PAIRS = [
    ("the question and the", " answer"),
    ("once upon a", " time there was a man"),
    ("the answer and the question", " once upon"),
]
LIMITS = {"until": ["e"], "max_gen_toks": 12, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_random_llama(directory)
    return directory


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    host = Host("tiny", lambda: load(str(checkpoint)), slots=2, context=0, queue=8)
    with running(host) as address:
        yield address


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> LwmHarness:
    return LwmHarness(pretrained=str(checkpoint), batch_size="auto")


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def completions(address: str, checkpoint: Path) -> Any:
    model: Any = LocalCompletionsAPI
    return model(
        base_url=f"{address}/v1/completions", model="tiny", tokenizer=str(checkpoint),
        tokenizer_backend="huggingface", add_bos_token=True, num_concurrent=1, max_retries=1,
    )  # fmt: skip


def test_the_tokenizer_can_be_asked(address: str, checkpoint: Path) -> None:
    remote: Any = LocalCompletionsAPI
    model = remote(base_url=f"{address}/v1/completions", model="tiny", max_retries=1)
    assert model.tokenizer_backend == "remote"
    tokens = load(str(checkpoint)).tokenizer.encode(PAIRS[0][0], specials=False)
    assert model.tok_encode(PAIRS[0][0]) == tokens


def test_log_likelihoods_equal_the_adapter(completions: Any, adapter: LwmHarness) -> None:
    requests = asked("loglikelihood", *PAIRS)
    expected: Any = adapter.loglikelihood(requests)
    for (value, greedy), (score, likeliest) in zip(
        completions.loglikelihood(requests), expected, strict=True
    ):
        assert value == pytest.approx(score, abs=1e-3)
        assert greedy == likeliest


def test_a_continuation_that_is_greedy_is_known_as_such(
    completions: Any, adapter: LwmHarness
) -> None:
    prompt = PAIRS[0][0]
    (answer,) = adapter.generate_until(
        asked("generate_until", (prompt, {"until": [], "max_gen_toks": 3}))
    )
    ((_, greedy),) = completions.loglikelihood(asked("loglikelihood", (prompt, answer)))
    ((_, expected),) = adapter.loglikelihood(asked("loglikelihood", (prompt, answer)))  # type: ignore[misc]
    assert greedy == expected


def test_answers_equal_the_adapter(completions: Any, adapter: LwmHarness) -> None:
    requests = asked("generate_until", *((prompt, dict(LIMITS)) for prompt, _ in PAIRS))
    expected = adapter.generate_until(
        asked("generate_until", *((prompt, dict(LIMITS)) for prompt, _ in PAIRS))
    )
    assert completions.generate_until(requests) == expected


def test_chats_are_answered(address: str, checkpoint: Path) -> None:
    model: Any = LocalChatCompletion
    chat = model(
        base_url=f"{address}/v1/chat/completions", model="tiny", num_concurrent=1, max_retries=1
    )
    messages = [{"role": "user", "content": "the question"}]
    request = (chat.apply_chat_template(messages), {"until": [], "max_gen_toks": 9})
    (answer,) = chat.generate_until(asked("generate_until", request))
    assert answer == load(str(checkpoint)).chat(messages, max_tokens=9)
