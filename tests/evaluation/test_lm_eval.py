"""Compare a checkpoint through our adapter and through lm-eval's `hf` model: log-likelihoods,
rolling ones, answers, and whole tasks over local data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from random_llama import CONTEXT, save_random_llama

from lwm.core.errors import CapacityError, ConfigError
from lwm.evaluation import lm_eval as adapter
from lwm.evaluation.lm_eval import LwmHarness

WORDS = tuple(
    "the question and the answer once upon a time there was a man in the land".split()  # noqa: SIM905
)
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_random_llama(directory)
    return directory


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> LwmHarness:
    return LwmHarness(pretrained=str(checkpoint), batch_size="auto")


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Any:
    hf: Any = HFLM
    return hf(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4)


def text(length: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_log_likelihoods_equal_hf(ours: LwmHarness, peer: Any) -> None:
    pairs = [
        ("the question and the", " answer"),
        ("the question and the ", "answer"),  # the space belongs to what follows
        ("", "once upon a time"),
        (text(10, 0), " " + text(3, 1)),
        (text(300, 2), " " + text(5, 3)),  # truncated on the left
        *((text(20, 4), f" {word}") for word in WORDS[:6]),
    ]
    scores = ours.loglikelihood(asked("loglikelihood", *pairs))
    expected = peer.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose(
        [total for total, _ in scores], [total for total, _ in expected], atol=TOLERANCE
    )
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    best = int(ours.model.logits([ours.tok_encode("the question")]).text[0, -1].argmax())
    scored = ours._loglikelihood_tokens([(None, ours.tok_encode("the question"), [best])] * 8)
    assert [greedy for _, greedy in scored] == [True] * 8


def test_rolling_log_likelihoods_equal_hf(ours: LwmHarness, peer: Any) -> None:
    texts = [(text(length, length),) for length in (1, 40, 400)]
    totals = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    expected = peer.loglikelihood_rolling(
        asked("loglikelihood_rolling", *texts), disable_tqdm=True
    )
    np.testing.assert_allclose(totals, expected, atol=TOLERANCE)


def answers(model: Any, *requests: tuple[str, dict[str, Any]]) -> list[str]:
    return model.generate_until(asked("generate_until", *requests), disable_tqdm=True)


def test_answers_equal_hf(ours: LwmHarness, peer: Any) -> None:
    plain = answers(peer, (text(9, 0), {"max_gen_toks": 20}))[0]
    assert len(plain) > 6
    requests = [
        (text(9, 0), {"until": [plain[4:6]], "max_gen_toks": 20}),
        (text(300, 1), {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}),
        (text(4, 2), {"until": "zzz", "max_gen_toks": 12, "temperature": 0.0}),
    ]
    texts = answers(ours, *requests)
    assert texts == answers(peer, *requests)
    assert texts[0] == plain[: plain.index(plain[4:6])]


LAMBADA = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
GENERATION = """
task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def test_tasks_over_local_data_equal_hf(
    checkpoint: Path, peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip
    texts = [text(8, seed) for seed in range(4)]
    known = answers(peer, *((line, {"max_gen_toks": 8}) for line in texts[:2]))
    targets = [*known, "no", "no"]  # half are right
    data = tmp_path / "data.jsonl"
    lines = [{"text": t, "target": target} for t, target in zip(texts, targets, strict=True)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "last_word.yaml").write_text(LAMBADA.format(data=data), encoding="utf-8")
    (tasks / "continued.yaml").write_text(GENERATION.format(data=data), encoding="utf-8")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    evaluate: Any = lm_eval.simple_evaluate

    def scores(model: Any, **settings: Any) -> dict[str, dict[str, float]]:
        result = evaluate(
            model=model, tasks=["last_word", "continued"], task_manager=manager,
            bootstrap_iters=0, **settings,
        )  # fmt: skip
        return result["results"]

    adapter.register()
    metrics_of, expected = (
        scores("lwm", model_args={"pretrained": str(checkpoint)}, device="cuda:0"),
        scores(peer),
    )
    for task, metrics in {
        "last_word": ("perplexity,none", "acc,none"), "continued": ("exact_match,none",),
    }.items():  # fmt: skip
        for metric in metrics:
            np.testing.assert_allclose(
                metrics_of[task][metric], expected[task][metric], rtol=TOLERANCE, err_msg=metric
            )
    assert metrics_of["continued"]["exact_match,none"] == 0.5


def test_settings_apply_to_the_model(checkpoint: Path, ours: LwmHarness, peer: Any) -> None:
    pair = asked("loglikelihood", (text(30, 0), " answer"))
    sharded = LwmHarness(pretrained=str(checkpoint), mesh=[1, 1, 2, 2])
    np.testing.assert_allclose(
        sharded.loglikelihood(pair)[0][0],
        peer.loglikelihood(pair, disable_tqdm=True)[0][0],
        atol=TOLERANCE,
    )
    assert ours.max_length == CONTEXT
    assert LwmHarness(pretrained=str(checkpoint), max_length=8).max_length == 8
    other = LwmHarness(
        pretrained=str(checkpoint), theta=20, max_length=2 * CONTEXT, dtype="bfloat16"
    )
    assert other.max_length == 2 * CONTEXT
    assert (other.model.config.rope_theta, other.model.dtype) == (20.0, "bfloat16")
    messages = [{"role": "user", "content": "why?"}]
    assert ours.apply_chat_template(messages) == (
        "<s>You are a helpful assistant. USER: why? ASSISTANT:"
    )


@pytest.mark.parametrize(("size", "most"), [(1, 1), (4, 4), (3, 4), ("auto", 64)])
def test_batches_have_few_shapes(ours: LwmHarness, size: int | str, most: int) -> None:
    lengths = dict(enumerate(np.random.default_rng(0).integers(2, 129, 200).tolist()))
    settings = LwmHarness.__new__(LwmHarness)
    settings._rows, settings._max_rows = adapter._batch_rows(size), 64
    batches = list(settings._batches(lengths))
    assert sorted(number for batch, _ in batches for number in batch) == sorted(lengths)
    assert all(len(batch) <= rows <= most for batch, rows in batches)
    assert len({rows for _, rows in batches}) <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_length": CONTEXT + 1}, f"max_length is {CONTEXT + 1}.*{CONTEXT}.*theta"),
    ],
)
def test_wrong_settings_are_refused(
    checkpoint: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, CapacityError), match=message):
        LwmHarness(pretrained=str(checkpoint), **settings)


def test_impossible_requests_are_refused(ours: LwmHarness) -> None:
    for settings, message in (
        ({"max_gen_toks": CONTEXT}, f"asks for {CONTEXT} tokens and the context .* is {CONTEXT}"),
        ({"num_beams": 4, "max_gen_toks": 4}, "'num_beams'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours.generate_until(asked("generate_until", ("once", settings)))
    with pytest.raises(CapacityError, match="a continuation has"):
        ours.loglikelihood(asked("loglikelihood", ("once", " " + text(400, 0))))


def test_the_command_registers_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    arguments = ["run", "--model", "lwm", "--model_args", "pretrained=nowhere", "--tasks", "x"]
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: LwmHarness(pretrained="no-such-model")
    )
    with pytest.raises(SystemExit) as stopped:
        adapter.run_lm_eval(arguments)
    assert stopped.value.code == 2
    assert "there is no model 'no-such-model'" in capsys.readouterr().err
    assert get_model("lwm") is LwmHarness


def test_truncated_prompts_are_counted(
    ours: LwmHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = text(300, 2), text(5, 3)
    ours.generate_until(
        asked("generate_until", *((one, {"max_gen_toks": 2}) for one in (long, short, long)))
    )
    report = f"2 of 3 prompts exceed the context of {CONTEXT} tokens and are truncated"
    assert capsys.readouterr().err.count(report) == 1


def test_only_the_template_writes_control_tokens(checkpoint: Path) -> None:
    """Check that the same text is a control token in a rendered template, and text elsewhere."""
    harness = LwmHarness(pretrained=str(checkpoint))
    end = harness.tokenizer.eos_text
    assert harness.eot_token_id not in harness.tok_encode(f"once{end} upon")
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    harness.tokenizer = replace(harness.tokenizer, chat_template=template)
    rendered = harness.apply_chat_template([{"role": "user", "content": f"once{end} upon"}])
    context, continuation = harness._encode_pair(rendered, f" a{end} time")
    assert context.count(harness.eot_token_id) == 1
    assert harness.eot_token_id not in continuation
