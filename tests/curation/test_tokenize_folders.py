"""Check the training data made of images and videos, and that batches, engines and interruptions
do not change it."""

import gzip
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_vqgan import save_random_vqgan
from tiny_vision_model import tokenizer

from lwm.core.errors import ConfigError, InputError
from lwm.curation.captions import CaptionedFile, captioned_files
from lwm.curation.tokenize import (
    EncodeGroups,
    FrameSettings,
    Group,
    Outcome,
    TokenizeSummary,
    encode_group,
    encode_locally,
    groups_of,
    journal_file,
    require_destination,
    tokenize_files,
)
from lwm.curation.tokenize_ray import encode_on_ray
from lwm.data.config import DataConfig
from lwm.data.loader import Loader
from lwm.data.text.templates import ORIGINAL
from lwm.data.text.vision_texts import description_request
from lwm.generation.codec import VqganCodec, load_vqgan
from lwm.generation.vision_prompts import chat_tokens, codes_from_part, generation_prompt
from lwm.media.images import read_image, to_unit, write_image
from lwm.media.videos import read_video, write_video
from lwm.models.llama import LlamaConfig
from lwm.models.vision_tokens import VisionVocabulary
from lwm.models.vqgan import VQGANConfig

SIZES = VQGANConfig(
    image_size=8, hidden_channels=4, channel_multipliers=(1, 2, 2), residual_blocks=2,
    latent_channels=4, codebook_size=16, code_channels=3, norm_groups=2,
)  # fmt: skip
VISION = VisionVocabulary(size=18, codes=16, codes_per_frame=4)
WORLD = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=16, max_sequence_length=1024, vision=VISION,
)  # fmt: skip
ALL = FrameSettings(fps=None, batch_size=4)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_vqgan(tmp_path_factory.mktemp("vqgan") / "tiny", SIZES)


@pytest.fixture(scope="module")
def codec(vqgan: Path) -> VqganCodec:
    return load_vqgan(vqgan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make eight images, two videos and two broken files, all with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(8):
        pixels = draw.integers(0, 256, (12, 9, 3), np.uint8)
        write_image(folder / f"{number}.png", pixels)
    for number in (2, 5):
        write_video(folder / f"{number}v.mp4", draw.integers(0, 256, (7, 16, 16, 3), np.uint8))
    whole = (folder / "2v.mp4").read_bytes()
    (folder / "3x.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "4x.jpg").write_bytes(b"no picture")
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text(f"thing {file.stem}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> tuple[CaptionedFile, ...]:
    return captioned_files([folder]).files


def run(
    files: Sequence[CaptionedFile],
    codec: VqganCodec,
    out: Path,
    engine: EncodeGroups | None = None,
    **settings: Any,
) -> TokenizeSummary:
    return tokenize_files(files, codec, out, ALL, engine or encode_locally(codec, ALL), **settings)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(files: Any, codec: VqganCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the result of a run without interruptions."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    summary = run(files, codec, out)
    assert (len(files), summary.frames, summary.examples) == (12, 22, 10)
    first, second = summary.faults
    assert "3x.mp4" in first
    assert "4x.jpg" in second
    return out


def test_lines_hold_the_codes_of_their_files_in_order(
    whole: Path, folder: Path, codec: VqganCodec
) -> None:
    lines = lines_of(whole)
    names = ["0.png", "1.png", "2.png", "2v.mp4", "3.png", "4.png", "5.png", "5v.mp4", "6.png"]
    assert [line["source"] for line in lines] == [*names, "7.png"]
    assert not journal_file(whole).exists()
    assert [path.name for path in whole.parent.iterdir()] == ["out.jsonl"]
    for line in lines:
        file = folder / line["source"]
        moving = file.suffix == ".mp4"
        pixels = read_video(file, 8) if moving else read_image(file, 8)[None]
        assert len(pixels) == (7 if moving else 1)
        assert line["vision"] == codec.encode(to_unit(pixels)).ravel().tolist()
        assert line["caption"] == f"thing {file.stem}"
        assert (" a video of" in line["drawing"]) == moving


def examples(path: Path, way: int, **settings: Any) -> Loader:
    config = DataConfig(
        path=str(path),
        fields_from_example="fields",
        fields_index=way,
        packing="pad",
        shuffle=False,
        prefetch=0,
        **settings,
    )
    return Loader(
        config,
        tokenizer(),
        sequence_length=255,
        batch_size=1,
        rows=None,
        split="train",
        vocab_size=WORLD.vocab_size,
        vision=VISION,
    )


def row(batch: dict[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """Return the ids of a row of one example, and the ids with loss weight."""
    targets = batch["targets"][0]
    ids = [int(batch["tokens"][0][0]), *targets.tolist()]
    last = int(np.flatnonzero(batch["weights"][0])[-1])
    return ids[: last + 2], targets[batch["weights"][0] > 0].tolist()


def test_training_examples_begin_with_the_prompts_of_generation(whole: Path) -> None:
    """Check that images follow a prompt that requests one, and captions a chat with one."""
    drawing, telling = examples(whole, 0), examples(whole, 1)
    for line in lines_of(whole):
        codes = np.array(line["vision"]).reshape(-1, 4)
        kind = "a video" if len(codes) > 1 else "an image"
        prompt = generation_prompt(tokenizer(), line["caption"], kind)
        ids, learned = row(next(drawing))
        assert ids[: len(prompt)] == prompt
        shown = ids[len(prompt) :]
        ends = [300 + 16] * (len(codes) - 1) + [300 + 17]
        framed = [n for frame, end in zip(codes, ends, strict=True) for n in (*(frame + 300), end)]
        closing = tokenizer().encode("</vision>", specials=False)
        assert shown == [*framed, *closing, 1]
        assert learned == [*tokenizer().encode("<vision>", specials=False), *shown]

        content = [
            {"type": "text", "text": description_request(kind)},
            {"type": "codes", "codes": codes},
        ]
        messages = [{"role": "user", "content": content}]
        prompt = chat_tokens(ORIGINAL, messages, tokenizer(), WORLD, codes_from_part)
        ids, learned = row(next(telling))
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :] == learned
        assert learned == [*tokenizer().encode(line["caption"], specials=False), 1]


def test_prompts_begin_as_training_does_for_any_tokenizer() -> None:
    """Check a tokenizer that adds a space at the start of a text but not after a token."""
    backend = tokenizer().backend.from_str(tokenizer().backend.to_str())
    settings = json.loads(backend.to_str())
    settings["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    settings["model"]["vocab"]["▁"] = max(settings["model"]["vocab"].values()) + 1
    first = type(tokenizer())(backend=backend.from_str(json.dumps(settings)), bos="<s>", eos=(1,))
    plain = first.encode("You are", specials=False)
    assert first.encode_controlled("<s>You are") != [0, *plain]
    assert generation_prompt(first, "x", "an image")[: len(plain) + 1] == [0, *plain]


def test_array_records_equal_the_encoded_lines(
    files: Any, codec: VqganCodec, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.array_record"
    run(files, codec, out, tokenizer=tokenizer())
    ready = examples(out, -1)
    ways = [examples(whole, way) for way in (0, 1)]
    for _ in range(10):
        for way in ways:
            left, right = next(ready), next(way)
            for name in left:
                np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_compressed_lines_are_the_same_lines(
    files: Any, codec: VqganCodec, whole: Path, tmp_path: Path
) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        run(files, codec, tmp_path / name)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == whole.read_bytes()
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


class Killed(BaseException):
    """Stand for a process that dies between two groups."""


def interrupted(codec: VqganCodec, after: int) -> EncodeGroups:
    def encode(groups: Sequence[Group]) -> Iterator[list[Outcome]]:
        for number, outcomes in enumerate(encode_locally(codec, ALL)(groups)):
            if number == after:
                raise Killed
            yield outcomes

    return encode


@pytest.mark.parametrize("incomplete", [b"", b"[[[[1,2", b'{"ru'])
def test_an_interrupted_run_resumes(
    files: Any, codec: VqganCodec, whole: Path, tmp_path: Path, incomplete: bytes
) -> None:
    out = tmp_path / "out.jsonl"
    if incomplete.startswith(b"{"):
        journal_file(out).write_bytes(incomplete)
    for after in (2, 1):
        with pytest.raises(Killed):
            run(files, codec, out, interrupted(codec, after))
        assert not out.exists()
        if incomplete.startswith(b"["):
            with journal_file(out).open("ab") as file:
                file.write(incomplete)
    computed: list[int] = []

    def rest(groups: Sequence[Group]) -> Iterator[list[Outcome]]:
        computed.append(len(groups))
        return encode_locally(codec, ALL)(groups)

    run(files, codec, out, rest)
    assert computed == [len(groups_of(files, ALL)) - 3]
    assert out.read_bytes() == whole.read_bytes()


def test_the_journal_of_another_run_is_refused(
    files: Any, codec: VqganCodec, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(files, codec, out, interrupted(codec, 1))
    with pytest.raises(InputError, match=r"out.jsonl.partial was begun with other files"):
        run(files[1:], codec, out)


def test_groups_depend_on_names_only() -> None:
    def sizes(settings: FrameSettings, *names: str) -> list[int]:
        files = [CaptionedFile(path=Path(name), source=name) for name in names]
        return [len(group) for group in groups_of(files, settings)]

    batch = FrameSettings(batch_size=3)
    assert sizes(batch, *["a.png"] * 7) == [3, 3, 1]
    assert sizes(batch, "a.png", "b.mp4", "c.png", "d.png") == [2, 2]
    assert sizes(FrameSettings(batch_size=4, max_frames=2), *["a.mp4"] * 5) == [2, 2, 1]
    assert sizes(batch) == []


def test_frames_of_several_files_share_batches(
    files: Any, codec: VqganCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    encode = codec.encode

    def counted(pixels: np.ndarray, **settings: Any) -> np.ndarray:
        batches.append(len(pixels))
        return encode(pixels, **settings)

    monkeypatch.setattr(codec, "encode", counted)
    paths = [file.path for file in files]
    outcomes = encode_group(codec, paths, FrameSettings(fps=None, max_frames=5, batch_size=4))
    assert set(batches[:-1]) == {4}
    assert [len(outcome.codes) for outcome in outcomes] == [1, 1, 1, 5, 1, 0, 1, 0, 1, 5, 1, 1]


def test_a_file_with_several_captions_gives_several_lines(
    files: Any, codec: VqganCodec, tmp_path: Path
) -> None:
    several = [
        CaptionedFile(path=files[0].path, source="a", captions=("one", "two")),
        CaptionedFile(path=files[1].path, source="b"),
    ]
    summary = run(several, codec, tmp_path / "out.jsonl")
    assert (summary.examples, summary.frames) == (3, 2)
    one, two, bare = lines_of(tmp_path / "out.jsonl")
    assert (one["caption"], two["caption"]) == ("one", "two")
    assert one["vision"] == two["vision"]
    assert (bare["caption"], bare["fields"]) == ("", ["vision"])


def test_a_run_without_readable_files_leaves_no_file(
    files: Any, codec: VqganCodec, tmp_path: Path
) -> None:
    broken = [file for file in files if "x" in file.source]
    with pytest.raises(InputError, match=r"none of 2 files can be read: .*3x.mp4"):
        run(broken, codec, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_and_destinations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        FrameSettings(batch_size=0)
    with pytest.raises(InputError, match="max_frames is 0"):
        FrameSettings(max_frames=0)
    with pytest.raises(InputError, match=r"must end in .jsonl, .jsonl.gz or .array_record"):
        require_destination(tmp_path / "a.json", None)
    with pytest.raises(InputError, match="gone does not exist"):
        require_destination(tmp_path / "gone" / "a.jsonl", None)
    with pytest.raises(ConfigError, match=r"--tokenizer, or write .jsonl"):
        require_destination(tmp_path / "a.array_record", None)
    with pytest.raises(ConfigError, match="leave --tokenizer out"):
        require_destination(tmp_path / "a.jsonl", tmp_path)


def test_ray_must_be_installed(vqgan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"install lwm\[ray\], or take --engine local"):
        encode_on_ray(vqgan, None, ALL)


ENGINES = ["here", *(["ray"] if importlib.util.find_spec("ray") else [])]
"""Ray is an optional dependency; where it is installed, it must give the same results."""


@pytest.mark.filterwarnings("ignore")  # Ray's own warnings
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_give_equal_files(
    engine: str, files: Any, vqgan: Path, codec: VqganCodec, whole: Path, tmp_path: Path
) -> None:
    compute = (
        encode_locally(codec, ALL) if engine == "here" else encode_on_ray(vqgan, None, ALL, 2)
    )
    run(files, codec, tmp_path / "out.jsonl", compute)
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()
