"""Check who may ask, how much, and that clients that leave free their slots."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from random_llama import save_random_llama
from running import running, vision_model

from lwm.engine.engine import Engine
from lwm.generation.load import load
from lwm.generation.model import Model
from lwm.serving import guard
from lwm.serving.app import Access
from lwm.serving.host import Host
from lwm.serving.worker import Stopping

BODY = {"model": "tiny", "prompt": "Once", "max_tokens": 200, "temperature": 1.5, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def host(model: Model) -> Host:
    return Host("tiny", lambda: model, slots=1, context=0, queue=1)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_keys_and_hosts_are_checked(host: Host) -> None:
    access = Access(keys=["first", "second"], hosts=["example.org"])
    with running(host, access) as address:

        def ask(path: str = "/v1/models", **headers: str) -> int:
            return httpx.get(f"{address}{path}", headers=headers).status_code

        assert ask() == ask("/metrics") == ask(authorization="Bearer third") == 401
        assert ask(authorization="Basic first") == ask(authorization="first") == 401
        assert ask(authorization="Bearer first") == ask(authorization="bearer second") == 200
        assert ask("/health") == 200  # for those who watch the server
        key = {"authorization": "Bearer first"}
        assert ask(**key, host="example.org") == ask(**key, host="localhost:99") == 200
        assert ask(**key, host="evil.example") == ask(**key, host="[") == 400
        assert httpx.options(f"{address}/v1/models", headers=key).status_code == 405


def test_only_json_of_a_bounded_size_is_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_TIMEOUT", 0.5)
    with running(host, Access(most_bytes=1000)) as address:

        def post(content: Any, kind: str = "application/json") -> int:
            headers = {"content-type": kind}
            return httpx.post(
                f"{address}/v1/completions", content=content, headers=headers
            ).status_code

        form = "application/x-www-form-urlencoded"
        assert post(json.dumps(BODY), form) == post(json.dumps(BODY), "text/plain") == 415
        assert post(b" " * 1001) == 413
        assert post(b" " * 100 for _ in range(11)) == 413  # without a length in advance
        assert post(json.dumps({**BODY, "max_tokens": 1})) == 200
        # A sender that stops in the middle of a body, and one that leaves there.
        port = int(address.rpartition(":")[2])
        start = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(start)
            assert b" 408 " in slow.recv(1000)
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(start)
        assert post(json.dumps({**BODY, "max_tokens": 1})) == 200


def engine_of(host: Host) -> Engine:
    return host.worker._engine


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(
    host: Host, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with running(host) as address:
        engine = engine_of(host)
        step = engine.step

        def slowly() -> Any:
            time.sleep(0.03)
            return step()

        monkeypatch.setattr(engine, "step", slowly)
        body = json.dumps({**BODY, "stream": stream}).encode()
        port = int(address.rpartition(":")[2])
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: application/json\r\n\r\n"
        ).encode()
        answer: list[Any] = []

        def ask() -> None:
            answer.append(httpx.post(f"{address}/v1/completions", json=BODY, timeout=60))

        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(head + body)
            until(lambda: bool(engine.scheduler.active))
            (first,) = engine.scheduler.active
            waiting = threading.Thread(target=ask)
            waiting.start()
            until(lambda: engine.scheduler.waiting == 1)
            full = httpx.post(f"{address}/v1/completions", json=BODY)
            assert full.status_code == 429
            assert "the queue holds 1" in full.json()["error"]["message"]
        until(lambda: first not in engine.scheduler.active)
        monkeypatch.setattr(engine, "step", step)
        waiting.join(30)
        assert answer[0].status_code == 200
        assert answer[0].json()["usage"]["completion_tokens"] > 1
        until(lambda: engine.scheduler.idle)
        assert "lwm_slots_in_use 0.0" in httpx.get(f"{address}/metrics").text


def test_an_engine_that_fails_answers_and_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(host) as address:
        engine = engine_of(host)

        def fail() -> Any:
            monkeypatch.undo()
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine, "step", fail)
        first = httpx.post(f"{address}/v1/completions", json=BODY, timeout=60)
        assert first.status_code == 500
        assert "device" not in first.text
        assert httpx.post(f"{address}/v1/completions", json=BODY, timeout=60).status_code == 200


def test_a_server_that_loads_or_stops_says_so(model: Model) -> None:
    go = threading.Event()

    def load() -> Model:
        go.wait(20)
        return model

    host = Host("tiny", load, slots=1, context=0, queue=1)
    with pytest.raises(Stopping, match="loading"):
        host.worker.require_ready()
    host.worker.start()
    assert host.worker.state == "loading"
    go.set()
    until(lambda: host.worker.state == "ready")
    host.worker.close(grace=1.0)
    with pytest.raises(Stopping, match="shutting down"):
        host.worker.submit([], [])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    save_random_llama(path)
    return path


def test_a_text_model_does_not_draw(directory: Path) -> None:
    host = Host("tiny", lambda: load(str(directory)), slots=1, context=0, queue=1)
    with running(host) as address:
        for path in ("images/generations", "videos"):
            body = {"model": "tiny", "prompt": "a cat"}
            answer = httpx.post(f"{address}/v1/{path}", json=body)
            assert answer.status_code == 400
            assert "this is a text model" in answer.json()["error"]["message"]
        url = "data:image/png;base64,AAAA"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked)
        assert answer.status_code == 400
        assert "reads text only" in answer.json()["error"]["message"]


@pytest.fixture
def served(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "lwm", "serve", str(directory), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "serving tiny at" in line
    yield process, line.split()[3]
    process.kill()
    process.wait()
    process.stderr.close()


def test_a_command_serves_and_ends_in_order(served: tuple[subprocess.Popen[str], str]) -> None:
    process, address = served
    until(lambda: httpx.get(f"{address}/health").status_code == 200)
    body = {"model": "tiny", "prompt": "the question", "max_tokens": 60, "stream": True}
    page = f"{address}/gradio_api/heartbeat/1"  # a page that stays open
    with (
        httpx.stream("GET", page, timeout=60),
        httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_prompts_are_logged_only_if_asked_for(model: Model) -> None:
    logged: list[str] = []
    host = Host("tiny", lambda: model, slots=1, context=0, queue=1, log_prompt=logged.append)
    with running(host) as address:
        message = {"role": "user", "content": "the\nanswer"}
        asked = {"model": "tiny", "messages": [message], "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 200
        long = {**BODY, "prompt": "the " * 2000}
        assert httpx.post(f"{address}/v1/completions", json=long).status_code == 400
    assert json.loads(logged[0]) == [message]
    assert "\n" not in logged[0]
    assert len(logged[1]) == 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model",), "there is no model"),
        (("{model}", "--slots", "0"), "--slots is 0; it must be at least 1"),
        (("{model}", "--port", "70000"), "--port is 70000"),
        (("{model}", "--api-key-file", "nothing.txt"), "nothing.txt cannot be read"),
        (("{model}", "--grace", "nan"), "--grace is nan"),
    ],
)
def test_wrong_options_are_refused(
    directory: Path, arguments: tuple[str, ...], message: str, capsys: Any, monkeypatch: Any
) -> None:
    from lwm.cli.main import main
    from lwm.core import interrupts

    monkeypatch.setattr(interrupts, "install", lambda: None)
    words = [str(directory) if word == "{model}" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["lwm", "serve", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
