"""Check the page: in a browser that Playwright drives, and what it must refuse."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lwm.media.images import write_image
from lwm.media.videos import write_video

SIZES = {"laptop": (1440, 900), "phone": (390, 844)}
TESTS = Path(__file__).resolve().parents[1]


@contextmanager
def serving(
    directory: Path, *, step: float = 0.0, most_bytes: int = 1 << 20, key: str = ""
) -> Iterator[str]:
    """Run a server with a page until the block ends; the value is its address."""
    command = [
        sys.executable, str(TESTS / "serving" / "page_server.py"), str(directory), str(step),
        str(most_bytes), *([key] if key else []),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server"), most_bytes=100_000) as address:
        yield address


def measured(address: str, name: str) -> int:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith(name))


def slots_in_use(address: str) -> int:
    return measured(address, "lwm_slots_in_use")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask_page(address: str, function: str, data: list[Any], session: str) -> str:
    """Call a function of the page as its scripts do; return the events up to the last."""
    page = httpx.get(f"{address}/config").json()
    index = next(d["id"] for d in page["dependencies"] if d["api_name"] == function)
    body = {"data": data, "fn_index": index, "session_hash": session}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    lines: list[str] = []
    with httpx.stream(
        "GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}, timeout=20
    ) as events:
        for line in events.iter_lines():  # there are heartbeats after the last event
            lines.append(line)
            if "process_completed" in line or "unexpected_error" in line:
                break
    return "\n".join(lines)


def test_the_page_is_behind_the_key_and_closed_to_other_sites(tmp_path: Path) -> None:
    with serving(tmp_path, key="secret") as address:
        refused = httpx.get(address)
        assert refused.status_code == 401
        assert "Basic" in refused.headers["www-authenticate"]  # so that a browser asks
        assert httpx.get(address, auth=("any", "wrong")).status_code == 401
        assert httpx.get(address, headers={"authorization": "Basic %"}).status_code == 401
        known: Any = {"auth": ("any", "secret")}
        assert httpx.get(address, **known).status_code == 200
        assert httpx.get(address, headers={"host": "evil.example"}, **known).status_code == 400
        for path in ("/gradio_api/upload", "/v1/videos"):

            def post(origin: str, url: str = address + path) -> int:
                form = {"files": ("a.txt", b"text")}
                headers = {"origin": origin}
                return httpx.post(url, files=form, headers=headers, **known).status_code

            assert post("http://evil.example") == post("null") == post("http://[") == 403
            assert post(address) != 403


def test_uploads_are_bounded_and_other_files_are_out_of_reach(
    address: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody may read this")
    url = f"{address}/gradio_api/upload"
    assert httpx.post(url, files={"files": ("a.txt", b" " * 100_000)}).status_code == 413
    (uploaded,) = httpx.post(url, files={"files": ("a.txt", b"text")}).json()
    assert httpx.get(f"{address}/gradio_api/file={uploaded}").text == "text"
    read = httpx.get(f"{address}/gradio_api/file={secret}")
    assert read.status_code >= 400
    assert "nobody" not in read.text
    assert httpx.get(f"{address}/gradio_api/proxy=http://127.0.0.1:1/").status_code >= 400
    # A file as the page's scripts name it, first one that was uploaded.
    for path, right in ((uploaded, True), (str(secret), False), (f"{address}/health", False)):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        message = {"text": "What is it?", "files": [file]}
        events = ask_page(address, "answer", [message, [], "", 0, 1, 4, 1], session=path)
        assert ('"success":true' in events.splitlines()[-1]) == right, events
        assert "nobody" not in events


def test_paths_that_are_not_of_the_page_are_those_of_the_api(address: str) -> None:
    assert "is not an endpoint" in httpx.get(f"{address}/v1/nothing").json()["error"]["message"]
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny"
    assert "<html" in httpx.get(address).text


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open a page of a size, of which every error and every foreign address fails the test."""
    from playwright.sync_api import sync_playwright

    program = shutil.which(os.environ["CHROMIUM"])
    assert program, f"there is no browser {os.environ['CHROMIUM']}; install Chromium"
    width, height = SIZES[request.param]
    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.set_default_timeout(60_000)
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.on(
            "console", lambda line: faults.append(line.text) if line.type == "error" else None
        )
        opened.on("request", lambda one: faults.append(one.url) if foreign(one.url) else None)
        yield opened
        pictures = os.environ.get("SCREENSHOTS")
        if pictures and not opened.is_closed():
            opened.screenshot(path=f"{pictures}/page-{request.param}.png")
        browser.close()
    assert not faults


def write(panel: Any, text: str) -> None:
    """Write a message, again until the page's scripts have taken notice."""

    def noticed() -> bool:
        panel.get_by_placeholder("Ask something").fill(text)
        return panel.locator(".submit-button").is_enabled()

    until(noticed)


def foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@pytest.mark.browser
def test_a_person_chats_draws_and_continues(address: str, page: Any, tmp_path: Path) -> None:
    picture, video = tmp_path / "picture.png", tmp_path / "video.mp4"
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    write_image(picture, pixels[0])
    write_video(video, pixels, fps=4.0)
    page.goto(address)
    panel = page.get_by_role("tabpanel").filter(visible=True)
    write(panel, "What do you see?")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"]  # nothing to scroll sideways
    # An answer to a picture and a video, and once more.
    panel.get_by_role("button", name="Settings").click()
    panel.get_by_label("Most tokens").fill("6")
    panel.locator("input[type=file]").first.set_input_files([picture, video])
    panel.locator(".thumbnail-item").nth(1).wait_for()
    panel.get_by_placeholder("Ask something").press("Enter")
    retry = panel.get_by_label("Retry")
    retry.wait_for()
    answered = measured(address, "lwm_answer_tokens_total")
    retry.click()
    until(lambda: measured(address, "lwm_answer_tokens_total") > answered)
    # A drawing, a video that continues a file, and what cannot be done.
    page.get_by_role("tab", name="Image").click()
    panel.get_by_label("Image of").fill("a cat")
    panel.get_by_role("button", name="Draw").click()
    drawn = panel.locator(".drawn img").first
    drawn.wait_for()
    assert drawn.evaluate("image => image.naturalWidth") == 8
    page.get_by_role("tab", name="Video").click()
    panel.get_by_label("Video of").fill("a cat")
    panel.get_by_label("number input").fill("4")
    panel.locator("input[type=file]").first.set_input_files(video)
    panel.locator(".file-preview").wait_for()
    panel.get_by_role("button", name="Draw").click()
    played = panel.locator("video")
    played.wait_for()
    until(lambda: played.evaluate("video => video.duration || 0") >= 1)
    panel.get_by_label("number input").fill("1")
    panel.get_by_role("button", name="Draw").click()
    page.get_by_text("frames is 1 and there are 2 already").wait_for()


@pytest.mark.browser
def test_answers_and_drawings_stop(page: Any, tmp_path: Path) -> None:
    with serving(tmp_path, step=0.05) as address:
        page.goto(address)
        panel = page.get_by_role("tabpanel").filter(visible=True)
        write(panel, "Tell a story")
        panel.locator(".submit-button").click()
        answer = panel.locator(".bot.message").first
        answer.wait_for()
        before = len(answer.inner_text())
        until(lambda: len(answer.inner_text()) > before)  # it streams
        assert slots_in_use(address) == 1
        panel.locator(".stop-button").first.click()
        until(lambda: slots_in_use(address) == 0)
        kept = answer.inner_text()
        time.sleep(0.3)
        assert answer.inner_text() == kept
        page.get_by_role("tab", name="Video").click()
        panel.get_by_label("Video of").fill("a cat")
        panel.get_by_role("button", name="Draw").click()
        until(lambda: slots_in_use(address) > 0)
        panel.get_by_role("button", name="Stop").click()
        until(lambda: slots_in_use(address) == 0)
        page.close()  # before its server is gone
