"""Check mistakes a user can make: exit code 2, one line on standard error that names the mistake,
nothing on standard output, nothing written, no traceback."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from commands import Run
from random_llama import CONTEXT

PROMPT = ("--prompt", "the question", "--max-tokens", 3)


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command in an empty directory, and check that it is refused with a message."""
    monkeypatch.chdir(tmp_path)

    def command(message: str, *arguments: object) -> None:
        before = tree(tmp_path)
        ran = run(*arguments)
        assert ran.code == 2
        assert ran.out == ""
        assert re.fullmatch(r"lwm: [^\n]+\n", ran.err)
        assert re.search(message, ran.err)
        assert "Traceback" not in ran.err
        assert tree(tmp_path) == before

    return command  # type: ignore[return-value]


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "broken"
    directory.mkdir()
    for file in tiny.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


VERBS = [
    ("chat", "MODEL", *PROMPT),
    ("generate", "text", "MODEL", *PROMPT),
    ("convert", "MODEL", "out"),
    ("info", "MODEL"),
]


def put(verb: tuple[object, ...], model: object) -> list[object]:
    return [model if word == "MODEL" else word for word in verb]


@pytest.mark.parametrize("verb", VERBS, ids=["chat", "generate", "convert", "info"])
def test_models_that_do_not_exist(refused: Run, verb: tuple[object, ...]) -> None:
    refused("no model 'no-such-model'.*lwm info --list", *put(verb, "no-such-model"))
    refused("no model './missing.gguf'", *put(verb, "./missing.gguf"))
    refused("no model '/no/such/directory'", *put(verb, "/no/such/directory"))


@pytest.mark.parametrize("verb", VERBS, ids=["chat", "generate", "convert", "info"])
def test_safetensors_cut_short(refused: Run, broken: Path, verb: tuple[object, ...]) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(r"model.safetensors is broken or cut short", *put(verb, broken))


@pytest.mark.parametrize("verb", VERBS, ids=["chat", "generate", "convert", "info"])
def test_gguf_of_another_architecture(
    refused: Run, tmp_path: Path, verb: tuple[object, ...]
) -> None:
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused("architecture 'mamba'; supported are llama", *put(verb, file))
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    refused("broken or cut short", *put(verb, file))


def test_headers_that_claim_absurd_sizes(refused: Run, broken: Path, original: Path) -> None:
    absurd = struct.pack("<Q", 2**62)
    (broken / "model.safetensors").write_bytes(absurd + b"{}")
    refused("broken or cut short", "info", broken)
    (broken / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + absurd * 2)
    refused("broken or cut short", "info", broken / "m.gguf")
    (broken / "stream").write_bytes(b"\xdd\xff\xff\xff\xff")
    config = original / "text_config.json"
    refused("broken or cut short", "info", f"params::{broken / 'stream'}", "--config", config)
    data = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps(data | {"num_hidden_layers": 10**15}))
    refused("num_layers is 1000000000000000", "info", broken)


def test_tensors_that_are_missing_or_misshaped(refused: Run, broken: Path) -> None:
    file = broken / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.0.self_attn.o_proj.weight"
    safetensors.numpy.save_file({k: a for k, a in tensors.items() if k != name}, file)
    refused(f"'{name}' is missing", "chat", broken, *PROMPT)
    safetensors.numpy.save_file(tensors | {name: np.zeros((32, 31), np.float32)}, file)
    refused(rf"'{name}' has shape \[32, 31\].*\[32, 32\]", "convert", broken, "out")


def test_the_originals_checkpoint(refused: Run, original: Path, tmp_path: Path) -> None:
    stream = original / "text_streaming_params"
    config = original / "text_config.json"
    refused(r"add --config with a size \(debug", "info", f"params::{stream}")
    refused("'8b' is neither a size", "info", f"params::{stream}", "--config", "8b")
    refused("correct --config", "info", f"params::{stream}", "--config", "debug")
    refused("'weights::'", "info", f"weights::{stream}")
    refused("no such file", "info", "params::missing", "--config", config)
    refused("trainstate_params", "info", f"trainstate_params::{stream}", "--config", config)
    refused(
        '"vision_vocab_size": 64', "convert", f"params::{original / 'vision_streaming_params'}",
        "out", "--config", config,
    )  # fmt: skip
    cut = tmp_path / "cut"
    cut.write_bytes(stream.read_bytes()[:5000])
    refused("cut short", "convert", f"params::{cut}", "out", "--config", config)
    refused(r"names? --tokenizer|add --tokenizer", "chat", f"params::{stream}", "--config", config)


def test_settings_for_a_model_that_needs_none(refused: Run, tiny: Path) -> None:
    for verb in VERBS:
        refused("--config '7b' is only for the original's", *put(verb, tiny), "--config", "7b")


def test_meshes_that_do_not_fit(refused: Run, tiny: Path) -> None:
    command = ("chat", tiny, *PROMPT, "--mesh")
    refused(r"heads \(4\).*3 parts", *command, "1,1,3,1")
    refused("8 devices but 4 are present", *command, "1,1,1,8")
    refused("the mesh '1,2' cannot be parsed", *command, "1,2")
    refused("the mesh 'one,1,1,1' cannot be parsed", *command, "one,1,1,1")
    refused(r"mesh sizes are \(0, 1, 1, 1\)", *command, "0,1,1,1")
    refused("3 does not divide the 4 devices", *command, "1,-1,3,1")


def test_prompts_that_do_not_fit(refused: Run, tiny: Path, tmp_path: Path) -> None:
    long = "the question " * 200
    (tmp_path / "book.txt").write_text(long, encoding="utf-8")
    both = rf"prompt has \d+ tokens and the context of \S+ is {CONTEXT}"
    refused(both, "chat", tiny, "--prompt", long)
    refused(both, "chat", tiny, "--prompt", "why?", "--document", tmp_path / "book.txt")
    refused(both, "generate", "text", tiny, "--prompt", long)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_empty_prompts(refused: Run, tiny: Path, prompt: str) -> None:
    refused("the prompt is empty", "chat", tiny, "--prompt", prompt)
    refused("the prompt is empty", "generate", "text", tiny, "--prompt", prompt)


def test_documents_that_cannot_be_read(refused: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "book.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "book.pdf").write_bytes(b"%PDF-1.4\nnothing")
    for name, message in {
        "book.bin": "is binary, not text",
        "empty.txt": "holds no text",
        "book.pdf": "the PDF .* cannot be read",
        "missing.txt": "cannot be read",
        "": "Is a directory",
    }.items():
        refused(message, "chat", tiny, "--document", tmp_path / name, *PROMPT)


def test_destinations_that_exist(refused: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    (tmp_path / "directory").mkdir()
    for name in ("file", "directory"):
        refused(f"the destination {name} exists", "convert", tiny, name)
    refused("cannot be written", "convert", tiny, "file/below")
    refused("the destination .* exists", "convert", tiny, tiny)


def test_text_needs_a_tokenizer(refused: Run, textless: Path, tmp_path: Path) -> None:
    for verb in VERBS[:2]:
        refused("has no tokenizer.*--tokenizer", *put(verb, textless))
    missing = ("--tokenizer", "missing.json")
    refused(r"tokenizer missing.json does not exist", "chat", textless, *PROMPT, *missing)
    (tmp_path / "junk.json").write_text("{}", encoding="utf-8")
    refused(r"junk.json is not a tokenizer", "chat", textless, *PROMPT, "--tokenizer", "junk.json")


def test_a_tokenizer_of_another_model(refused: Run, original: Path, tiny: Path) -> None:
    """Check a tokenizer of 300 tokens with a vocabulary of 96."""
    refused(
        r"token \d+, outside the model's vocabulary of 96.*tokenizer",
        "chat", f"params::{original / 'text_streaming_params'}",
        "--config", original / "text_config.json", "--tokenizer", tiny, *PROMPT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--temperature", "-0.5", "temperature is -0.5"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-k", "-1", "top_k is -1"),
        ("--top-p", "0", "top_p is 0"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--min-p", "2", "min_p is 2"),
        ("--repetition-penalty", "0", "repetition_penalty is 0"),
        ("--seed", "-1", "seed is -1"),
        ("--seed", "4294967296", "seed is 4294967296"),
        ("--max-tokens", "0", "max_tokens is 0"),
        ("--stop", "", "stop string is empty"),
    ],
)
def test_flags_out_of_range(refused: Run, tiny: Path, flag: str, value: str, message: str) -> None:
    refused(message, "generate", "text", tiny, "--prompt", "once", flag, value)
    refused(message, "chat", tiny, "--prompt", "once", flag, value)


def test_unknown_and_broken_templates(refused: Run, broken: Path) -> None:
    refused("no chat template 'alpaca'", "chat", broken, *PROMPT, "--template", "alpaca")
    (broken / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    refused("--template", "chat", broken, *PROMPT)


def test_a_verb_without_its_model(refused: Run) -> None:
    refused("no MODEL is given", "info")


def test_a_released_vision_language_model(refused: Run) -> None:
    refused(
        r"download LargeWorldModel/LWM-1M-Jax.*params::FILE with --config",
        "chat",
        "lwm-1m",
        *PROMPT,
    )


def test_vision_settings_that_do_not_apply(refused: Run, broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("--vision-codes.*need --add-vision", "convert", broken, out, "--vision-codes", 9)
    refused(r"vision.codes is 0", "convert", broken, out, "--add-vision", "--vision-codes", 0)
    refused("no such file", "convert", broken, out, "--add-vision", "--vqgan", tmp_path / "no")
    assert not out.exists()
