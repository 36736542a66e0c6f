"""Check `lwm train` and `lwm data inspect`: recipes, settings, refusals."""

import json
from pathlib import Path

import pytest
from commands import Run

from lwm.cli.train import configure


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n}?"},
                {"role": "assistant", "content": f"the number {n}"},
            ]
        }
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_the_recipes_are_listed_with_a_line_each(run: Run):
    shown = run("train", "--list")
    assert shown.code == 0
    for name in ("debug", "book", "chat", "text-32k", "text-128k", "text-256k", "text-1m"):
        assert name in shown.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("text-31k",), "text-32k"),
        (("--steps", "3"), "recipe must come first"),
        (("book", "--stepps", "3"), "--steps"),
        (("book", "--steps", "three"), "three"),
        (("book", "--steps", "0"), "steps is 0"),
        (("book", "--compute.remat", "some"), "attention"),
        (("book", "--model.num-kv-heads", "2"), "model.num_heads"),
    ],
)
def test_wrong_recipes_and_settings_are_reported_with_a_remedy(
    run: Run, arguments, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refused = run("train", *arguments)
    assert refused.code == 2
    assert words in refused.err
    assert "Traceback" not in refused.err
    assert refused.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_chat_recipe_with_adapters_gives_a_model(
    run: Run, tiny: Path, chats: Path, tmp_path: Path
):
    """Check the chat recipe on a MODEL, and its result as a MODEL."""
    settings = [
        "--init", tiny, "--data.path", chats, "--out", tmp_path / "run", "--steps", "2",
        "--sequence-length", "64", "--batch-size", "1", "--mesh", "1,1,1,1", "--lora.rank", "2",
    ]  # fmt: skip
    trained = run("train", "chat", *settings)
    assert trained.code == 0, trained.err
    assert trained.out.strip() == str(tmp_path / "run")
    assert "2 of 2" in trained.err
    said = run("chat", tmp_path / "run", "--prompt", "what is 3?", "--max-tokens", "3")
    assert said.code == 0, said.err
    merged = run("convert", tmp_path / "run", tmp_path / "merged")
    assert merged.code == 0, merged.err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_rows_are_shown_with_their_loss(run: Run, tiny: Path, chats: Path):
    shown = run(
        "data", "inspect", "chat", "--init", tiny, "--data.path", chats, "--sequence-length", "64",
        "--rows", "1", "--mesh", "1,1,1,1",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    with_loss = [line for line in shown.out.splitlines() if line.strip().startswith("loss")]
    hidden = [line for line in shown.out.splitlines() if line.strip().startswith("no loss")]
    assert with_loss
    assert all("the number" in line for line in with_loss)
    assert any("what is" in line for line in hidden)
    assert "40 examples" in shown.out


def test_fields_replace_messages():
    assert configure("chat", ["--data.fields", "[q],a"]).data.messages == ""
    assert configure("chat", []).data.messages == "messages"
