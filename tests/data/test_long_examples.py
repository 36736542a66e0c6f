"""Check that examples longer than a row are truncated or skipped as a whole, and counted."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import assert_same, ids, loader, take, tokenizer, write_lines

from lwm.core.errors import InputError
from lwm.data.examples.conversations import ConversationEncoder
from lwm.data.examples.examples import Example, TooLong
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.loader import Loader
from lwm.data.rows import long_examples
from lwm.data.sources.array_record import write_array_record
from lwm.models.vision_tokens import VisionVocabulary

TEMPLATE = "chatml"
LENGTH = 128


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHAT = [
    system("Be brief."),
    *turn("Who was Ruth?", "A Moabite."),
    *turn("And Boaz, of whom we read in the second chapter?", "Her husband."),
    *turn("Where?", "In Bethlehem, a town."),
]


def encoder() -> ConversationEncoder:
    return ConversationEncoder(tokenizer=tokenizer(), key="messages", template=TEMPLATE)


def encoded(messages: list[dict[str, Any]]) -> list[int]:
    example = encoder()({"messages": messages}, 1)
    assert example is not None
    return example.tokens.tolist()


def truncated(messages: list[dict[str, Any]], longest: int) -> Example:
    example = encoder().truncated({"messages": messages}, 1, longest)
    assert example.truncated
    assert len(example) <= longest
    return example


@pytest.mark.parametrize("first", [1, 0])
def test_a_chat_keeps_its_system_message_and_its_last_whole_turns(first: int) -> None:
    start, turns = CHAT[:first], [CHAT[i : i + 2] for i in (1, 3, 5)]

    def joined(turns: list[list[dict[str, str]]]) -> list[dict[str, str]]:
        return [*start, *chain.from_iterable(turns)]

    whole = joined(turns)
    for dropped in (1, 2):
        expected = encoded(joined(turns[dropped:]))
        before = encoded(joined(turns[dropped - 1 :]))
        for longest in (len(expected), len(before) - 1):
            assert truncated(whole, longest).tokens.tolist() == expected
    more = [*whole, {"role": "user", "content": "never answered " * 50}]
    assert truncated(more, len(expected)).tokens.tolist() == expected


def test_a_turn_of_tools_is_not_divided() -> None:
    call = {"role": "assistant", "content": "call"}
    result = {"role": "tool", "content": "42"}
    last = [CHAT[1], call, result, {"role": "assistant", "content": "It is 42."}]
    expected = encoded([CHAT[0], *last])
    assert truncated([*CHAT, *last], len(expected) + 5).tokens.tolist() == expected


@settings(max_examples=20, deadline=None)
@given(length=st.integers(150, 250), content=st.text(max_size=30))
def test_a_long_question_keeps_its_end_and_its_whole_answer(length: int, content: str) -> None:
    ending = f"{content * 20} {'a word ' * 40} and so, who was Ruth?"
    example = truncated([CHAT[0], *turn(ending, "A Moabite.")], length)
    text = tokenizer().backend.decode(example.tokens.tolist(), skip_special_tokens=False)
    head, _, rest = text.partition("<|im_start|>user\n")
    question, _, answer = rest.partition("<|im_end|>\n<|im_start|>assistant\n")
    assert head == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert ending.endswith(question.lstrip())
    assert question.strip()
    assert answer.startswith("A Moabite.<|im_end|>")
    trained = example.tokens[example.weights > 0].tolist()
    assert tokenizer().decode(trained).startswith("A Moabite.")
    assert len(example) > length - 16


@pytest.mark.parametrize(
    "messages",
    [
        [*CHAT, *turn("Who?", "a very long answer " * 20)],
        [system("a long system message " * 20), *CHAT[1:]],
        [system("Answer."), {"role": "assistant", "content": "without a question " * 20}],
    ],
)
def test_what_no_truncation_fits_is_skipped(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TooLong):
        encoder().truncated({"messages": messages}, 1, LENGTH)


def test_fields_lose_the_beginning_of_the_longest_text_without_loss() -> None:
    fields = FieldsEncoder(tokenizer=tokenizer(), fields="[question],[context],answer")
    record = {"question": "Who?", "context": "word " * 100 + "Ruth gleaned.", "answer": "Ruth"}
    example = fields.truncated(record, 1, 40)
    text = tokenizer().decode(example.tokens.tolist())
    assert 34 < len(example) <= 40
    assert example.truncated
    assert text.startswith("Who?")
    assert text.endswith("Ruth gleaned.Ruth")
    assert example.tokens[0] == tokenizer().bos_id
    assert example.tokens[example.weights > 0].tolist() == [*ids("Ruth"), *tokenizer().eos]
    with pytest.raises(TooLong):
        fields.truncated({**record, "answer": "word " * 100}, 1, 40)
    both = FieldsEncoder(tokenizer=tokenizer(), fields="context,answer")
    with pytest.raises(TooLong):
        both.truncated(record, 1, 40)


def test_only_plain_texts_go_on_in_the_next_row() -> None:
    def plain(fields: str) -> bool:
        vision = VisionVocabulary(codes=16, codes_per_frame=4)
        example = FieldsEncoder(tokenizer=tokenizer(), fields=fields, vision=vision)(
            {"a": "x", "b": "y", "vision": [0] * 4}, 1
        )
        assert example is not None
        return example.plain

    assert [plain(fields) for fields in ("a", "a+b", "<|bos|>,a")] == [True] * 3
    divided = ("[a],b", "a,b", "vision", "[a],vision", "vision,a")
    assert [plain(fields) for fields in divided] == [False] * 5


def chats(path: Path, count: int = 24) -> Path:
    """Write chats of which every third is short, every third has a long answer."""
    kinds = [
        lambda i: turn(f"short {i}?", f"yes {i}"),
        lambda i: turn(f"question {i} " * 30, f"yes {i}"),
        lambda i: turn(f"question {i}", f"yes {i} " * 30),
    ]
    return write_lines(path, [{"messages": kinds[i % 3](i)} for i in range(count)])


def open_chats(path: Path, **settings: Any) -> Loader:
    chosen: dict[str, Any] = {"packing": "pack", "sequence_length": LENGTH, "template": TEMPLATE}
    return loader(path, messages="messages", **(chosen | settings))


def segments(batches: list[dict[str, np.ndarray]]) -> Iterator[str]:
    for batch in batches:
        for tokens, numbers in zip(batch["tokens"], batch["segments"], strict=True):
            for number in sorted({*numbers.tolist()} - {-1}):
                yield tokenizer().backend.decode(tokens[numbers == number].tolist())


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize(("too_long", "share"), [("truncate", 2), ("skip", 1)])
def test_rows_hold_whole_examples(tmp_path: Path, packing: str, too_long: str, share: int) -> None:
    path = chats(tmp_path / "a.jsonl")
    batches = open_chats(path, packing=packing, too_long=too_long)
    texts = list(segments(take(batches, 12)))
    assert len({text[-20:] for text in texts}) == share * 8
    for text in texts:
        assert text.startswith("<|im_start|>user")
        assert "<|im_start|>assistant\nyes" in text
    counts = batches.counts
    assert counts["too_long"] == pytest.approx(counts["examples"] * 2 / 3, rel=0.1)
    assert counts["truncated"] == pytest.approx(counts["examples"] * (share - 1) / 3, rel=0.1)


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_a_resumed_run_has_the_same_rows_and_counts(tmp_path: Path, packing: str) -> None:
    path = chats(tmp_path / "a.jsonl")
    whole = open_chats(path, packing=packing)
    rows, states, counts = [], [], []
    for _ in range(8):
        states.append(whole.get_state())
        rows += take(whole, 1)
        counts.append(whole.counts)
    for number in (1, 2, 5):
        resumed = open_chats(path, packing=packing)
        resumed.set_state(states[number])
        assert_same(take(resumed, 8 - number), rows[number:])
        assert resumed.counts == counts[-1]
    with pytest.raises(InputError, match="saved with too_long truncate and this run has skip"):
        open_chats(path, packing=packing, too_long="skip").set_state(states[1])


def test_long_examples_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chats(tmp_path / "a.jsonl")

    def sentence(**settings: Any) -> str | None:
        return open_chats(path, **settings).describe_long_examples()

    remedy = "; raise --sequence-length, or choose by --data.too-long"
    assert sentence() == (
        "16 of 24 examples are longer than a row of 128 tokens: 8 are truncated, 8 are skipped"
        + remedy
    )
    skipped = f"16 of 24 examples are longer than a row of 128 tokens and are skipped{remedy}"
    assert sentence(too_long="skip") == skipped
    assert sentence(sequence_length=1000) is None
    longer = "16 of 24 examples are longer than a row of 128 tokens"
    assert longer in str(sentence(packing="concatenate"))
    monkeypatch.setattr(long_examples, "_SAMPLED_EXAMPLES", 6)
    assert "4 of 6 sampled examples" in str(sentence(shuffle=False, too_long="skip"))
    texts = write_lines(tmp_path / "b.jsonl", [{"text": "word " * 100}] * 5)
    assert loader(texts, packing="pack").describe_long_examples() is None
    assert take(loader(texts, packing="pad"), 20)[0]["weights"].all()


def test_stored_tokens_are_skipped_unless_they_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    asked = Example.of_text(list(range(40)), [0.0] * 20 + [1.0] * 20)
    text = Example.of_text(list(range(100, 140)), [0.0] + [1.0] * 39)
    write_array_record(path, [asked, text])
    batches = loader(path, packing="pad", shuffle=False, batch_size=1)
    assert [row["tokens"][0, 0] for row in take(batches, 4)] == [100, 132, 100, 132]
    assert batches.counts == {"examples": 4, "too_long": 2, "truncated": 0, "broken": 0}


def test_data_without_an_example_that_fits_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)
    with pytest.raises(
        InputError, match=r"first 3 examples of .* longer than a row of 128 tokens"
    ):
        open_chats(path, too_long="skip")
    assert take(open_chats(path), 1)
