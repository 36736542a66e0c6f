"""List every kind of file that the package reads: how to write a valid one, and what reads it."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gguf
import numpy as np
import pyarrow as pa
import sentencepiece
import zstandard
from flax_files import small_model, write_map, write_stream
from PIL import Image
from pyarrow import parquet
from random_llama import save_random_llama
from random_vqgan import save_random_vqgan
from reportlab.pdfgen.canvas import Canvas

import lwm
from lwm.checkpoints.formats.vqgan import read_vqgan
from lwm.checkpoints.open import open_checkpoint
from lwm.checkpoints.write import write_checkpoint
from lwm.core.config import from_dict, read_json
from lwm.curation.captions import captioned_files
from lwm.data.examples.conversations import ConversationEncoder
from lwm.data.examples.examples import Broken
from lwm.data.examples.fields import FieldsEncoder
from lwm.data.sources.array_record import write_array_record
from lwm.data.sources.opening import open_records
from lwm.data.text.documents import read_document
from lwm.data.text.templates import choose_template, render, with_turn_end
from lwm.data.text.tokenizer import Tokenizer, checkpoint_tokenizer, read_tokenizer
from lwm.evaluation.results import read_results
from lwm.generation.model import Model
from lwm.generation.session import load_session, save_session
from lwm.media.images import read_image
from lwm.media.videos import read_video, write_video
from lwm.models.llama import LlamaConfig
from lwm.models.vqgan import VQGANConfig

ORIGINAL = Path(__file__).parents[1] / "fixtures" / "original" / "unrolled"
VQGAN = VQGANConfig(
    image_size=8, hidden_channels=4, channel_multipliers=(1,), residual_blocks=1,
    latent_channels=4, codebook_size=8, code_channels=2, norm_groups=2,
)  # fmt: skip
SETTINGS = {
    "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_sequence_length": 64,
}  # fmt: skip

Write = Callable[[Path], None]
Read = Callable[[Path], None]

_load_once = cache(lwm.load)
_read_once = cache(read_tokenizer)


def written_once(directory: Path) -> Path:
    """Return a model directory that all kinds share."""
    model = directory.parents[1] / "shared-model"  # beside the directories of the tests
    if not model.is_dir():
        model.mkdir()
        save_random_llama(model)
    return model


def shared_model(directory: Path) -> Model:
    return _load_once(written_once(directory))


def shared_tokenizer(directory: Path) -> Tokenizer:
    return _read_once(written_once(directory))


def converse(tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        ids = tokenizer.encode("Hello, the question </s>")
        tokenizer.decode(ids)
        template = choose_template("auto", tokenizer)
        with_turn_end(tokenizer, template)
        render(template, [{"role": "user", "content": "Hello"}], tokenizer)


def read_checkpoint(model: str, config: Path | None = None) -> None:
    checkpoint = open_checkpoint(model, config=None if config is None else str(config))
    for _ in checkpoint.read():
        pass
    if checkpoint.quantized_names():
        read = checkpoint.quantized_reader()
        for name in checkpoint.quantized_names():
            read(name)
    converse(checkpoint_tokenizer(checkpoint.vocabulary))


def write_sharded(directory: Path) -> None:
    source = open_checkpoint(str(written_once(directory)))
    destination = directory / "sharded"
    write_checkpoint(
        source, destination, form="huggingface", dtype="bfloat16",
        save_tokenizer=lambda _: None, part_bytes=20_000,
    )  # fmt: skip


def write_ours(directory: Path) -> None:
    source = open_checkpoint(str(written_once(directory)))
    tokenizer = checkpoint_tokenizer(source.vocabulary)
    assert tokenizer is not None
    write_checkpoint(
        source, directory / "ours", form="lwm", dtype="float32", save_tokenizer=tokenizer.save
    )


def finish_gguf(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(directory: Path) -> None:
    writer = gguf.GGUFWriter(directory / "model.gguf", "qwen2")
    numbers = {
        "context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 32,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 2.0,
        "rope_scaling_orig_ctx_len": 32, "tokenizer_model": "llama", "bos_token_id": 1,
        "eos_token_id": 2, "add_bos_token": True, "chat_template": "{{ messages[0].content }}",
        "token_list": ["<unk>", "<s>", "</s>", *(f"▁{chr(97 + i)}" for i in range(29))],
        "token_scores": [float(-i) for i in range(32)],
        "token_types": [2, 3, 3, *[1] * 29],
    }  # fmt: skip
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {
        "token_embd": (32, 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (32, 64),
        "blk.0.ffn_up": (32, 64), "blk.0.ffn_down": (64, 32),
    }  # fmt: skip
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ones(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name, size in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
        writer.add_tensor(f"blk.0.{name}.bias", np.ones(size, np.float32))
    finish_gguf(writer)


def write_original(directory: Path) -> None:
    arrays = small_model()
    write_stream(directory / "stream", arrays)
    write_map(directory / "map", arrays)
    (directory / "config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")


def read_original(directory: Path) -> None:
    for kind, name in (("params", "stream"), ("flax_params", "map")):
        read_checkpoint(f"{kind}::{directory / name}", directory / "config.json")


def write_vqgan_directory(directory: Path) -> None:
    save_random_vqgan(directory / "vqgan", VQGAN)


def write_vqgan_pickle(directory: Path) -> None:
    scan = ORIGINAL.parent / "scan"
    for name, copy in (("vqgan.pickle", "vqgan"), ("vqgan_config.json", "config.json")):
        (directory / copy).write_bytes((scan / name).read_bytes())


def write_tokenizer(directory: Path) -> None:
    model = written_once(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((model / name).read_bytes())
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] | trim }}{% endfor %}"
    settings = read_json(directory / "tokenizer_config.json") | {
        "bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": template}],
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    named = {"pad_token": "</s>", "unk_token": {"content": "<s>"}}
    (directory / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")


def sentencepieces(kind: str, size: int) -> Write:
    """Return a writer of a sentencepiece model of a kind, with at most so many pieces."""

    def write(directory: Path) -> None:
        text = directory.parent / "sentences.txt"
        text.write_text("the question and the answer\nonce upon a time\n" * 20, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(directory / "tokenizer"), vocab_size=size,
            model_type=kind, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
        (directory / "tokenizer.vocab").unlink()

    return write


def write_template(directory: Path) -> None:
    write_tokenizer(directory)
    for file in directory.glob("*_*.json"):
        file.unlink()
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if loop.first and message.role == 'system' %}"
        "{{ raise_exception('no') }}{% endif %}<|{{ message['role'] }}|>\n"
        "{{- message.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% set n = [1, 2, 3] | length %}{{ 'x' * n ~ strftime_now('%Y') }}",
        encoding="utf-8",
    )


RECORDS: list[dict[str, Any]] = [
    {"question": f"What is {i}?", "answer": f"It is {i}.", "messages": [
        {"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i}"}]}
    for i in range(4)
]  # fmt: skip


def json_lines(name: str, compress: Callable[[bytes], bytes] = bytes) -> Write:
    def write(directory: Path) -> None:
        text = "".join(json.dumps(record) + "\n" for record in RECORDS)
        (directory / name).write_bytes(compress(text.encode()))

    return write


def write_parquet(directory: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(RECORDS), directory / "data.parquet")


def write_records(directory: Path) -> None:
    encode = FieldsEncoder(tokenizer=shared_tokenizer(directory), fields="[question],answer")
    examples = [encode(record, 1) for record in RECORDS]
    write_array_record(directory / "data.array_record", [one for one in examples if one])


def read_data(directory: Path) -> None:
    tokenizer = shared_tokenizer(directory)
    fields = FieldsEncoder(tokenizer=tokenizer, fields="[question],answer")
    chat = ConversationEncoder(tokenizer=tokenizer, key="messages", template="chatml")
    source = open_records(str(next(directory.iterdir())))
    for index in range(min(len(source), 100)):
        for encode in (fields, chat):
            try:
                record = source.read(index)
                if isinstance(record, Mapping):
                    encode(record, 1)
            except Broken:  # is reported by the loader
                pass


def write_text_file(directory: Path) -> None:
    (directory / "a.txt").write_bytes("Où êtes-vous ? — Здесь.\n".encode() * 40)


def write_html(directory: Path) -> None:
    page = "<html><head><meta charset=koi8-r><title>x</title></head><body><p>Привет<br>мир</p>"
    (directory / "a.html").write_bytes(page.encode("koi8-r"))


def write_pdf(directory: Path) -> None:
    canvas = Canvas(str(directory / "a.pdf"))
    canvas.drawString(72, 720, "The needle lies in San Francisco.")
    canvas.save()


def write_word(directory: Path) -> None:
    with ZipFile(directory / "a.docx", "w") as archive:
        archive.writestr(
            "word/document.xml",
            "<w:document xmlns:w='w'><w:body><w:p><w:r><w:t>Hello</w:t></w:r></w:p></w:body>"
            "</w:document>",
        )


def write_epub(directory: Path) -> None:
    with ZipFile(directory / "a.epub", "w") as archive:
        archive.writestr("META-INF/container.xml", "<c><rootfile full-path='a.opf'/></c>")
        archive.writestr(
            "a.opf", "<p><item id='a' href='a.html'/><spine><itemref idref='a'/></spine></p>"
        )
        archive.writestr("a.html", "<html><p>Hello</p></html>")


def read_documents(directory: Path) -> None:
    for file in directory.iterdir():
        read_document(file)


def images(kind: str, **options: Any) -> Write:
    def write(directory: Path) -> None:
        corners = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((24, 16)).save(directory / f"a.{kind}", **options)

    return write


def read_images(directory: Path) -> None:
    for file in directory.iterdir():
        read_image(file, 16)


def videos(name: str) -> Write:
    def write(directory: Path) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
        write_video(directory / name, frames, fps=5.0)

    return write


def read_videos(directory: Path) -> None:
    for file in directory.iterdir():
        read_video(file, 16, max_frames=3)


def write_saved_session(directory: Path) -> None:
    model = shared_model(directory)
    list(model.chat([{"role": "user", "content": "Hello"}], stream=True, max_tokens=3))
    save_session(directory / "session", model, [{"role": "user", "content": "Hello"}])


def write_manifests(directory: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(directory / name)
    (directory / "a.txt").write_text("a caption", encoding="utf-8")
    (directory / "captions.csv").write_text("file,caption\na.png,red\nb.png,blue\n", "utf-8")
    lines = '{"file": "a.png", "caption": "red"}\n{"file": "b.png", "caption": "blue"}\n'
    (directory / "captions.jsonl").write_text(lines, encoding="utf-8")


def read_manifests(directory: Path) -> None:
    for name in ("captions.csv", "captions.jsonl"):
        captioned_files([directory], directory / name)


def write_results(directory: Path) -> None:
    settings = {"evaluation": "needle", "model": "m", "versions": {"lwm": "0"}}
    (directory / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    rows = [{"length": 10, "depth": 0.5, "correct": True, "answer": "x"}] * 3
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "results.jsonl").write_text(lines, encoding="utf-8")


def write_settings(directory: Path) -> None:
    write_ours(directory)
    config = read_json(directory / "ours" / "config.json")["model"]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    data = config | {"rope_scaling": rope, "biases": ["query", "key", "value"]}
    for file in (directory / "ours").iterdir():
        file.unlink()
    (directory / "ours" / "config.json").write_text(json.dumps(data), encoding="utf-8")


def read_settings(directory: Path) -> None:
    file = directory / "ours" / "config.json"
    from_dict(LlamaConfig, read_json(file), str(file))


KINDS: dict[str, tuple[Write, Read]] = {
    "Hugging Face": (save_random_llama, lambda path: read_checkpoint(str(path))),
    "shards": (write_sharded, lambda path: read_checkpoint(str(path / "sharded"))),
    "lwm": (write_ours, lambda path: read_checkpoint(str(path / "ours"))),
    "settings": (write_settings, read_settings),
    "gguf": (write_gguf, lambda path: read_checkpoint(str(path / "model.gguf"))),
    "original": (write_original, read_original),
    "vqgan": (write_vqgan_directory, lambda path: _read(read_vqgan, path / "vqgan")),
    "vqgan pickle": (
        write_vqgan_pickle,
        lambda path: _read(read_vqgan, path / "vqgan", path / "config.json"),
    ),
    "tokenizer": (write_tokenizer, lambda path: converse(read_tokenizer(path))),
    "template": (write_template, lambda path: converse(read_tokenizer(path))),
    "sentencepiece": (sentencepieces("bpe", 48), lambda path: converse(read_tokenizer(path))),
    "json lines": (json_lines("data.jsonl"), read_data),
    "zstandard": (json_lines("data.jsonl.zst", zstandard.compress), read_data),
    "parquet": (write_parquet, read_data),
    "array record": (write_records, read_data),
    "text": (write_text_file, read_documents),
    "html": (write_html, read_documents),
    "pdf": (write_pdf, read_documents),
    "docx": (write_word, read_documents),
    "epub": (write_epub, read_documents),
    **{kind: (images(kind), read_images) for kind in ("png", "jpeg", "webp", "gif", "bmp")},
    **{kind: (images(kind), read_images) for kind in ("tiff", "avif")},
    **{f"video {kind}": (videos(f"a.{kind}"), read_videos) for kind in ("mp4", "webm", "gif")},
    "session": (
        write_saved_session,
        lambda path: _read(load_session, path / "session", shared_model(path)),
    ),
    "captions": (write_manifests, read_manifests),
    "results": (write_results, lambda path: _read(read_results, path)),
}
"""The kinds by name. A function that reads takes the directory that the other one has filled."""


def _read(function: Callable[..., Any], *arguments: Any) -> None:
    function(*arguments)
