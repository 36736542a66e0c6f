"""Draw videos as jobs with OpenAI's client, which marks these methods as deprecated."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from running import running, vision_model

from lwm.generation.model import Model
from lwm.media.videos import read_video, write_video
from lwm.serving.drawing import Drawing
from lwm.serving.host import Host
from lwm.serving.schemas import VideoBody
from lwm.serving.video_jobs import FPS, VideoJobs
from lwm.serving.worker import Stopping

SETTINGS: Any = {"seed": 5, "top_k": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return vision_model(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos") / "store"


@pytest.fixture(scope="module")
def address(model: Model, directory: Path) -> Iterator[str]:
    host = Host("tiny", lambda: model, slots=2, context=0, queue=8)
    with running(host, videos=directory) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ended(address: str, identifier: str) -> dict[str, Any]:
    while True:
        job = httpx.get(f"{address}/v1/videos/{identifier}").json()
        if job["status"] in ("completed", "failed"):
            return job
        time.sleep(0.05)


def image() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (8, 8, 3), np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(image()).save(file, "PNG")
    return file.getvalue()


def frames_of(content: bytes) -> np.ndarray:
    return read_video(content, 8, fps=FPS)


def from_a_file(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Return a video as its file gives it back."""
    write_video(path, pixels, fps=FPS)
    return read_video(path, 8, fps=FPS)


def test_a_video_is_drawn_by_the_client(
    client: openai.OpenAI, address: str, reference: Model, tmp_path: Path
) -> None:
    with pytest.warns(DeprecationWarning, match="Sora"):
        job = client.videos.create(prompt="a cat", model="tiny", seconds="1", extra_body=SETTINGS)  # type: ignore[arg-type]
    assert job.status in ("queued", "in_progress")
    assert (job.seconds, job.size, job.object) == ("1", "8x8", "video")
    assert ended(address, job.id)["progress"] == 100
    with pytest.warns(DeprecationWarning, match="Sora"):
        done = client.videos.retrieve(job.id)
    with pytest.warns(DeprecationWarning, match="Sora"):
        content = client.videos.download_content(job.id).read()
    with pytest.warns(DeprecationWarning, match="Sora"):
        listed = [one.id for one in client.videos.list(limit=1)]
    assert done.completed_at is not None
    assert job.id in listed
    expected = from_a_file(reference.video("a cat", frames=4, **SETTINGS), tmp_path / "video.mp4")
    np.testing.assert_array_equal(frames_of(content), expected)
    with pytest.warns(DeprecationWarning, match="Sora"):
        assert client.videos.delete(job.id).deleted
    assert httpx.get(f"{address}/v1/videos/{job.id}").status_code == 404
    assert httpx.get(f"{address}/v1/videos/{job.id}/content").status_code == 404


@pytest.mark.parametrize("form", [False, True])
def test_a_video_begins_with_an_image(
    address: str, reference: Model, tmp_path: Path, form: bool
) -> None:
    fields = {"prompt": "a cat", "model": "tiny", "frames": 3, **SETTINGS}
    if form:
        files = {"input_reference": ("first.png", png(), "image/png")}
        answer = httpx.post(f"{address}/v1/videos", data=fields, files=files)
    else:
        url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
        body = {**fields, "input_reference": {"image_url": url}}
        answer = httpx.post(f"{address}/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    job = ended(address, answer.json()["id"])
    assert job["status"] == "completed", job
    content = httpx.get(f"{address}/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    before = {"type": "image", "image": png()}
    expected = reference.video("a cat", frames=3, before=before, **SETTINGS)
    expected = from_a_file(expected, tmp_path / "video.mp4")
    np.testing.assert_array_equal(frames_of(content.content), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "frames": 0}, "frames"),
        ({"prompt": "x", "frames": 900}, r"900 frames.*256"),
        ({"prompt": "x", "size": "720x1280"}, "720x1280"),
        ({"prompt": "x", "seconds": 1, "frames": 4}, "exclude"),
        ({"prompt": "x", "input_reference": {"image_url": "http://a.b/c.png"}}, "data: URL"),
        ({"prompt": "x", "input_reference": {"file_id": "file-1"}}, "data: URL"),
        ({"prompt": "x", "characters": [1]}, "characters is not supported"),
    ],
)
def test_wrong_requests_are_refused(address: str, fields: Any, message: str) -> None:
    answer = httpx.post(f"{address}/v1/videos", json={"model": "tiny", **fields})
    assert answer.status_code == 400, answer.text
    assert re.search(message, answer.json()["error"]["message"]), answer.text


def test_a_broken_image_fails_the_job_with_a_sentence(address: str) -> None:
    files = {"input_reference": ("first.png", b"no image", "image/png")}
    fields = {"prompt": "a cat", "model": "tiny"}
    answer = httpx.post(f"{address}/v1/videos", data=fields, files=files)
    job = ended(address, answer.json()["id"])
    assert job["status"] == "failed"
    assert "image" in job["error"]["message"]
    content = httpx.get(f"{address}/v1/videos/{job['id']}/content")
    assert content.status_code == 404
    assert "has no content" in content.json()["error"]["message"]


def test_jobs_survive_a_restart_and_their_number_is_bounded(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host("tiny", lambda: model, slots=2, context=0, queue=8)
    with running(host, videos=tmp_path) as address:
        body = {"prompt": "a cat", "model": "tiny", "frames": 1}
        done = ended(address, httpx.post(f"{address}/v1/videos", json=body).json()["id"])
    # A server that was killed leaves jobs that run, and perhaps one that is half written.
    killed = json.loads((tmp_path / done["id"] / "job.json").read_text())
    killed |= {"id": f"video_{'0' * 24}", "status": "in_progress"}
    (tmp_path / killed["id"]).mkdir()
    (tmp_path / killed["id"] / "job.json").write_text(json.dumps(killed))
    (tmp_path / f"video_{'1' * 24}").mkdir()
    (tmp_path / f"video_{'1' * 24}" / "job.json").write_text('{"id": ')
    again = VideoJobs(host, tmp_path, most=2)
    assert {job.id: job.status for job in again.list()} == {
        done["id"]: "completed",
        killed["id"]: "failed",
    }
    assert again.content(done["id"]).stat().st_size > 0
    assert len(VideoJobs(host, tmp_path, most=1).list()) == 1
    monkeypatch.setattr(time, "time", lambda: done["expires_at"] + 1)
    assert VideoJobs(host, tmp_path).list() == []
    assert not (tmp_path / done["id"]).exists()


def test_a_job_that_runs_ends_in_the_time_that_it_is_given(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host("tiny", lambda: model, slots=2, context=0, queue=8)
    jobs = VideoJobs(host, tmp_path)
    host.worker.start()
    host.worker.loaded.wait()
    begun, draw = threading.Barrier(3), Drawing.frames

    def drawn(self: Drawing, *arguments: Any, **settings: Any) -> Any:
        begun.wait(20)
        host.worker.refuse()
        return draw(self, *arguments, **settings)

    monkeypatch.setattr(Drawing, "frames", drawn)
    # Both threads have a job whose first frame and later frames are two requests; one job waits.
    made = [jobs.create(VideoBody(prompt="a cat", model="tiny", frames=2), None) for _ in range(3)]
    begun.wait(20)
    jobs.close(grace=60.0)
    host.worker.close(grace=1.0)
    assert [job.status for job in jobs.list()] == ["completed", "completed", "queued"]
    again = VideoJobs(host, tmp_path)
    assert [again.get(job.id).status for job in made] == ["completed", "completed", "failed"]


def test_a_deleted_job_ends_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    cancelled = threading.Event()

    def wait(self: Drawing, *arguments: Any, **settings: Any) -> None:
        assert cancelled.wait(20)
        raise Stopping("the drawing was ended")

    monkeypatch.setattr(Drawing, "frames", wait)
    monkeypatch.setattr(Drawing, "cancel", lambda self: cancelled.set())
    body = {"prompt": "a cat", "model": "tiny"}
    job = httpx.post(f"{address}/v1/videos", json=body).json()
    assert httpx.delete(f"{address}/v1/videos/{job['id']}").json()["deleted"]
    assert cancelled.is_set()
    assert not (directory / job["id"]).exists()
