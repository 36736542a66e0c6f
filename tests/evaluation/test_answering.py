"""Check answers against the logits of whole texts, which need no cache."""

from collections.abc import Sequence

import pytest
from tiny_evaluation import END, WORDS, words, write_model

import lwm
from lwm.core.errors import CapacityError
from lwm.evaluation.answering import ModelAnswerer
from lwm.evaluation.task import Case

LENGTHS = (20, 90, 45, 33, 70)
ANSWER = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> lwm.Model:
    return lwm.load(write_model(tmp_path_factory.mktemp("work") / "tiny"))


def next_tokens(model: lwm.Model, tokens: Sequence[int]) -> list[int]:
    """Return the likeliest token after each token."""
    return model.logits([list(tokens)]).text[0].argmax(axis=-1).tolist()


def greedy(model: lwm.Model, prompt: Sequence[int], count: int = ANSWER) -> list[int]:
    """Return the likeliest continuation, with a whole forward pass for each token."""
    text = list(prompt)
    for _ in range(count):
        token = next_tokens(model, text)[-1]
        if token == END:
            break
        text.append(token)
    return text[len(prompt) :]


def asked(prompt: Sequence[int], target: Sequence[int] = (0,), max_tokens: int = ANSWER) -> Case:
    return Case(prompt=prompt, target=target, max_tokens=max_tokens, reference="")


def text(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(("budget", "together"), [(0, 1), (96, 1), (191, 1), (192, 2), (9999, 5)])
def test_answers_are_greedy_with_every_budget(
    model: lwm.Model, budget: int, together: int
) -> None:
    """Check several budgets; the longest prompt and its answer take 96 tokens."""
    prompts = [words(length, 1) for length in LENGTHS]
    cases = [asked(prompt) for prompt in prompts]
    answerer = ModelAnswerer(model, budget)
    answers = list(answerer.answer(cases))
    assert answers == [text(greedy(model, prompt)) for prompt in prompts]
    assert answerer.engine is not None
    assert answerer.engine.slots == together


@pytest.mark.parametrize("budget", [0, 9999])
def test_follow_agrees_with_the_argmax_of_the_logits(model: lwm.Model, budget: int) -> None:
    cases, expected = [], []
    for number, length in enumerate(LENGTHS):
        prompt = words(length, 1)
        target = greedy(model, prompt, number + 1)
        if number % 2:  # a wrong token in the middle, then on from there
            target = [*target[:1], (target[0] + 7) % END, *target[1:]]
            target += greedy(model, [*prompt, *target], 1)
        cases.append(asked(prompt, target))
        following = next_tokens(model, [*prompt, *target])[length - 1 : -1]
        expected.append([a == b for a, b in zip(following, target, strict=True)])
    assert {hit for hits in expected for hit in hits} == {True, False}
    assert list(ModelAnswerer(model, budget).follow(cases)) == expected


def test_a_shared_prefix_is_not_recomputed(model: lwm.Model) -> None:
    beginning = words(40, 5)
    prompts = [[*beginning, *words(30, seed)] for seed in (6, 7)]
    answerer = ModelAnswerer(model)

    def reused(prompt: Sequence[int]) -> int:
        before = 0 if answerer.engine is None else answerer.engine.scheduler.reused
        assert list(answerer.answer([asked(prompt)])) == [text(greedy(model, prompt))]
        assert answerer.engine is not None
        return answerer.engine.scheduler.reused - before

    assert reused(prompts[0]) == 0
    assert reused(prompts[1]) == len(beginning)
    answerer.restart()
    assert reused(prompts[1]) == 0


def test_follow_computes_a_prompt_once(model: lwm.Model) -> None:
    case = asked(words(60, 8), words(4, 8))
    answerer = ModelAnswerer(model)
    list(answerer.follow([case]))
    # After the first token of the target, the cache has all but the last token of the prefix.
    assert answerer.engine is not None
    assert answerer.engine.scheduler.reused == 60 + 61 + 62


def test_cases_beyond_the_context_are_refused(model: lwm.Model) -> None:
    with pytest.raises(CapacityError, match=r"518 tokens.*context of .*512.*--theta"):
        list(ModelAnswerer(model).answer([asked(words(512, 0))]))
