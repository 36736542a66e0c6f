"""List further kinds of files: what the package writes itself, questions, and other variants."""

import gzip
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import av
import gguf
import grain
import jax
import numpy as np
import pillow_heif
from file_kinds import (
    Read,
    Write,
    converse,
    finish_gguf,
    images,
    json_lines,
    read_checkpoint,
    read_data,
    read_documents,
    read_images,
    read_videos,
    sentencepieces,
    shared_tokenizer,
)
from PIL import Image
from pypdf import PdfWriter
from reportlab.pdfgen.canvas import Canvas

from lwm.core import params
from lwm.core.config import from_dict, to_dict
from lwm.curation import book_questions, tokenize
from lwm.curation.captions import CaptionedFile
from lwm.curation.long_chat import chat_examples
from lwm.data.text.tokenizer import read_tokenizer
from lwm.data.text.vision_texts import training_line
from lwm.evaluation.report.compare import compare_runs
from lwm.evaluation.report.page import title_of
from lwm.evaluation.report.scores import length_table, points_of
from lwm.evaluation.results import Results, read_results
from lwm.evaluation.tasks.ruler_qa import document_task, read_questions
from lwm.models.llama import LlamaConfig, llama_params
from lwm.training.checkpointing import CheckpointConfig, Checkpoints
from lwm.training.metrics import Metrics, TrackingConfig
from lwm.training.training import Tally

CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=4, max_sequence_length=32,
)  # fmt: skip


def write_text(name: str, text: str, encoding: str = "utf-8") -> Write:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(text.encode(encoding))

    return write


def write_lines(name: str, lines: list[Any]) -> Write:
    return write_text(name, "".join(json.dumps(line) + "\n" for line in lines))


def write_json(name: str, value: Any) -> Write:
    return write_lines(name, [value])


def numbers() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def write_run(directory: Path, state: Any = None) -> None:
    if state is None:
        specs = llama_params(CONFIG, stacked=True)
        state = {"weights": params.initialize(specs, jax.random.key(0), np.float32)}
    checkpoints, data = Checkpoints(directory / "run", CheckpointConfig()), numbers()
    next(data)
    facts = {"model": to_dict(CONFIG), "lora": None, "init": "", "tally": {"tokens": 5}}
    checkpoints.save(3, state, data, facts, 2.0)
    checkpoints.wait()
    checkpoints.close()
    write_json("run/run.json", facts)(directory)


STATE = {"weights": np.zeros(4), "step": np.array(3)}


def resume_run(directory: Path) -> None:
    copy = directory.with_name("copy")  # torn checkpoints are renamed
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory / "run", copy)
    checkpoints = Checkpoints(copy, CheckpointConfig())
    try:
        restored = checkpoints.restore(STATE, numbers(), lambda facts: None)
        assert restored is not None
        from_dict(Tally, restored[2].get("tally", {}), "the checkpoint")
    finally:
        checkpoints.close()


METRICS = [
    {"step": step, "split": split, "loss": 2.0 / step, "seconds": 0.1}
    for step in (1, 2, 3, 4)
    for split in ("train", "evaluation")
]


def read_metrics(directory: Path) -> None:
    file = directory / "metrics.jsonl"
    before = file.read_bytes()
    metrics = Metrics(directory, TrackingConfig(), after=3, settings={})
    if Random(before).random() < 0.1:
        metrics.close()  # plots, which takes time
    else:
        metrics.write({"step": 4, "split": "train", "loss": 1.0})


CHUNKS = [
    {"fingerprint": f"f{i}", "chunk": i, "question": "Who?", "answer": "He.", "refused": ["no"]}
    for i in range(4)
]


def read_chunks(directory: Path) -> None:
    file = directory / "out.jsonl.chunks.jsonl"
    records = book_questions._read_records(file, [f"f{i}" for i in range(4)])
    Counter(reason for record in records for reason in record.refused)
    texts = ["Some text is here. "] * len(records)
    tokenizer = shared_tokenizer(directory)
    list(chat_examples(texts, records, tokenizer, length=400, seed=0))


OUTCOMES = [{"run": "x"}, [[[[1, 2], [3, 4]], None]], [[[], "it is broken"]], [[[[1, 2]], None]]]


def read_outcomes(directory: Path) -> None:
    files = [CaptionedFile(path=Path(f"{i}.png"), source=f"{i}.png") for i in range(3)]
    for file, outcome in tokenize._outcomes(files, directory / "out.partial"):
        if outcome.fault is None:
            training_line(np.array(outcome.codes, np.int32), "a caption", file.source)
        else:
            outcome.fault.strip()


ROWS = {
    "results": [
        {"context_length": length, "depth_percent": depth, "seed": 1, "correct": depth > 40,
         "score": 1.0, "answer": "x", "response": "y", "question": "q"}
        for length in (10, 20) for depth in (0.0, 50.0)
    ],
    "needles": [
        {"context_length": length, "depth_percent": [0.0, 50.0], "seed": 1, "score": 0.5,
         "correct": [True, False], "answer": ["x", "y"], "response": "y"}
        for length in (10, 20)
    ],
    "suite": [
        {"task": task, "context_length": length, "seed": 1, "score": 0.5, "response": "y"}
        for length in (10, 20) for task in ("a", "b")
    ],
    "perplexity": [
        {"theta": 1e4, "length": length, "row": row, "bucket_from": low, "bucket_to": low + 8,
         "nll": 8.0, "tokens": 8}
        for length in (8, 16) for row in (0, 1) for low in range(0, length, 8)
    ],
}  # fmt: skip


def write_results(rows: list[dict[str, Any]]) -> Write:
    def write(directory: Path) -> None:
        settings = {
            "evaluation": "perplexity",
            "model": "m",
            "theta": 1e4,
            "text": "abc",
            "shortest": 8,
        }
        write_json("settings.json", settings)(directory)
        write_lines("results.jsonl", rows)(directory)

    return write


def read_rows(directory: Path) -> None:
    str(compare_runs([directory]).table)
    settings, rows = read_results(directory)
    title_of(settings)
    if "context_length" in rows[0]:
        Results(directory, settings, ("context_length", "seed"))
        str(length_table(points_of(rows), "length"))


SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "a b c", "qas": [
    {"question": "q?", "answers": [{"text": "a", "answer_start": 0}], "is_impossible": False},
]}]}]}  # fmt: skip
HOTPOT = [{"question": "q?", "answer": "a", "context": [["t", ["a b.", "c d."]], ["u", ["e."]]]}]


def read_question_file(directory: Path) -> None:
    question = document_task(read_questions(directory / "questions.json")).make(Random(0), 100)
    question.context(question.most or 1)


def write_byte_level(directory: Path) -> None:
    """Write a GGUF file with a byte-level tokenizer, 4-bit weights and factors of frequencies."""
    backend = json.loads(shared_tokenizer(directory).backend.to_str())["model"]
    texts = sorted(backend["vocab"], key=backend["vocab"].__getitem__)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    values = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "bos_token_id": 0, "eos_token_id": 1,
        "token_list": texts, "token_types": [3, 3, *[1] * (len(texts) - 2)],
        "token_merges": [" ".join(rule) for rule in backend["merges"]],
        "chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    kernels = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 32,
               "ffn_up": 32, "ffn_down": 32}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(texts), 32), "output_norm": (32,), "rope_freqs": (4,),
        "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        **{f"blk.0.{name}": (out, 32) for name, out in kernels.items()},
    }  # fmt: skip
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ones(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    finish_gguf(writer)


def write_encrypted_pdf(directory: Path) -> None:
    page = io.BytesIO()
    canvas = Canvas(page)
    canvas.drawString(72, 720, "The needle lies here.")
    canvas.save()
    writer = PdfWriter(clone_from=page)
    writer.encrypt(user_password="", owner_password="owner", algorithm="AES-256")
    writer.write(directory / "a.pdf")


def write_tables(directory: Path) -> None:
    row = "<w:tr><w:tc><w:p><w:r><w:t>a</w:t><w:br/></w:r></w:p></w:tc><w:tc><w:p/></w:tc></w:tr>"
    with ZipFile(directory / "a.docx", "w", ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", f"<w:d xmlns:w='w'><w:tbl>{row * 20}</w:tbl></w:d>")


def write_heic(directory: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(directory / "a.heic", quality=50)


def encoded(kind: str) -> Write:
    """Return a writer of MPEG-4 part 2 in any container."""

    def write(directory: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
        with av.open(directory / f"a.{kind}", "w") as movie:
            stream = movie.add_stream("mpeg4", rate=5, options={"g": "2"})
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
            for frame in pixels:
                movie.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            movie.mux(stream.encode())

    return write


_XML = (
    "<?xml version='1.0' encoding='koi8-r'?><html><table><tr><td>Привет</td></tr></table></html>"
)

KINDS: dict[str, tuple[Write, Read]] = {
    "run": (write_run, lambda path: read_checkpoint(str(path / "run"))),
    "resumed run": (lambda path: write_run(path, STATE), resume_run),
    "metrics": (write_lines("metrics.jsonl", METRICS), read_metrics),
    "chunks of a book": (write_lines("out.jsonl.chunks.jsonl", CHUNKS), read_chunks),
    "outcomes of files": (write_lines("out.partial", OUTCOMES), read_outcomes),
    **{f"{name} rows": (write_results(rows), read_rows) for name, rows in ROWS.items()},
    "SQuAD": (write_json("questions.json", SQUAD), read_question_file),
    "HotpotQA": (write_json("questions.json", HOTPOT), read_question_file),
    "gzip": (json_lines("data.jsonl.gz", gzip.compress), read_data),
    "unigram": (sentencepieces("unigram", 40), lambda path: converse(read_tokenizer(path))),
    "gguf byte level": (write_byte_level, lambda path: read_checkpoint(str(path / "model.gguf"))),
    "encrypted pdf": (write_encrypted_pdf, read_documents),
    "docx tables": (write_tables, read_documents),
    "utf-16": (write_text("a.txt", "Où êtes-vous ?\n" * 9, "utf-16"), read_documents),
    "cp1252": (write_text("a.txt", "Où êtes-vous ?\n" * 9, "cp1252"), read_documents),
    "xml": (write_text("a.xml", _XML, "koi8-r"), read_documents),
    "heic": (write_heic, read_images),
    "progressive jpeg": (images("jpg", progressive=True), read_images),
    "lzw tiff": (images("tif", compression="tiff_lzw"), read_images),
    **{f"video {kind}": (encoded(kind), read_videos) for kind in ("mkv", "avi", "ts", "mov")},
}
