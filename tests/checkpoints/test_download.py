"""Test downloads against a local stand-in for the hub: names, progress, and what an interruption
leaves behind."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from random_llama import save_random_llama

from lwm.checkpoints.download import download
from lwm.checkpoints.open import KNOWN_MODELS, open_checkpoint
from lwm.core.errors import CheckpointError

REVISION = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
NONE: Mapping[str, str] = {}


class Hub(ThreadingHTTPServer):
    """Serve a directory as the one revision of any repository; weights redirect, as on the hub."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.whole: int | None = None  # bytes after which the next connections break
        self.ranges: list[str | None] = []  # that requests for weights ask for

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/"):
            if "/tree/" in path:
                files = self.server.files.items()
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0"}
                    for name, data in files
                ]
                self.answer(200, json.dumps(listed).encode())
                return
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(
                200, json.dumps({"id": "o/n", "sha": REVISION, "siblings": siblings}).encode()
            )
        elif name not in self.server.files:
            self.answer(404, b"")
        elif name == WEIGHTS and not path.startswith("/storage/"):
            size = str(len(self.server.files[name]))
            location = f"{self.server.address}/storage/{name}"
            self.answer(302, b"", {"Location": location, "X-Linked-Size": size})
        else:
            self.send_file(name)

    def send_file(self, name: str) -> None:
        data, asked = self.server.files[name], self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if name == WEIGHTS and self.command == "GET":
            self.server.ranges.append(asked)
        if self.server.whole is None or name != WEIGHTS:
            ranged = (
                {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if asked else {}
            )
            self.answer(206 if asked else 200, data[first:], ranged)
        elif len(self.server.ranges) > 1:
            self.answer(403, b"")  # ends the library's own attempts
        else:
            self.answer(200, data, cut=self.server.whole)
            self.close_connection = True

    def answer(
        self, status: int, body: bytes, headers: Mapping[str, str] = NONE, cut: int | None = None
    ) -> None:
        self.send_response(status)
        etag = hashlib.sha256(self.server.files[WEIGHTS]).hexdigest()
        if "resolve" in self.path and WEIGHTS not in self.path:
            etag = hashlib.sha256(body).hexdigest()
        named = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "X-Linked-ETag": f'"{etag}"'}
        for name, value in {**named, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "model").mkdir()
    save_random_llama(tmp_path / "model")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with Hub(tmp_path / "model") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_released_model_is_downloaded_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lwm-text-chat-1m"
    checkpoint = open_checkpoint(name)
    assert (checkpoint.source, checkpoint.config.rope_theta) == (name, KNOWN_MODELS[name].theta)
    assert f"downloading {WEIGHTS} of LargeWorldModel" in capsys.readouterr().err
    assert open_checkpoint(name).config == checkpoint.config
    assert hub.ranges == [None]


def test_an_interrupted_download_continues(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 10)
    weights = hub.files[WEIGHTS]
    hub.whole = 50 << 10
    with pytest.raises(CheckpointError, match=r"o/n cannot be downloaded \(.*403.*try again"):
        download("o/n")
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in files if path.suffix == ".partial"] == [hub.whole]
    assert not [path for path in files if path.name == WEIGHTS]
    begun, hub.whole, hub.ranges = hub.whole, None, []
    directory = download("o/n")
    assert hub.ranges == [f"bytes={begun}-"]
    assert (directory / WEIGHTS).read_bytes() == weights
    assert not list((tmp_path / "home").rglob("*.partial"))


@pytest.mark.parametrize("model", ["lwm-text-128k", "hf:o/n"])
def test_without_network_one_sentence_says_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(model)
    message = str(raised.value)
    assert "check the name and the network" in message
    assert "name a directory that contains it" in message
    assert "\n" not in message
