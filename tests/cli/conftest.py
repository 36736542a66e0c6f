"""What the command-line tests share: a runner, and a tiny model with a tokenizer."""

import json
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
import tokenizers
import torch
from commands import CONTEXT, Ran, Run
from tokenizers import models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from lwm.cli.main import main


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Runs `lwm` in this process, with standard input if given."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "unused"))
    for module, hook in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # put back after the test

    def command(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["lwm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a random Llama of four heads, and a byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = byte_level  # type: ignore[assignment]
    backend.decoder = ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the question and the answer, once upon a time"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,  # a few more than the tokenizer has, as padded vocabularies do
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def textless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its tokenizer."""
    directory = tmp_path_factory.mktemp("textless")
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((tiny / name).read_bytes())
    return directory


@pytest.fixture(scope="session")
def original() -> Path:
    """A directory of the original's own files."""
    return Path(__file__).resolve().parents[1] / "fixtures" / "original" / "unrolled"
