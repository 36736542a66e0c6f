"""Draw videos as jobs that outlive the request: started, watched, fetched and deleted later.

Each job has a directory of its own below the store's: `job.json`, and `video.mp4` when complete.
The store is bounded in number and age; the oldest jobs that have ended go first.
"""

import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lwm.core.errors import LwmError
from lwm.core.files import new_file
from lwm.generation.vision_prompts import Part
from lwm.media.videos import write_video
from lwm.serving.drawing import Drawing
from lwm.serving.host import Host
from lwm.serving.schemas import VideoBody
from lwm.serving.worker import Busy

FPS = 4.0
"""Frames per second of the videos."""
_ID = re.compile(r"video_[0-9a-f]{24}")
_ENDED = ("completed", "failed")


class UnknownVideo(LwmError):
    """Signal that there is no job of an id."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe a job, in the fields of OpenAI's video object."""

    id: str
    model: str
    prompt: str
    seconds: str
    size: str
    created_at: int
    expires_at: int
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    completed_at: int | None = None
    error: dict[str, str] | None = None
    remixed_from_video_id: None = None


class VideoJobs:
    """Run and keep video jobs.

    Args:
        directory: of the store, made for the first job.
        most: jobs to keep, of which half may wait or run.
        age: seconds after which a job is deleted.
    """

    def __init__(
        self, host: Host, directory: Path, *, most: int = 200, age: int = 24 * 3600
    ) -> None:
        self._host, self._directory, self._most, self._age = host, directory, most, age
        self._lock = threading.RLock()
        self._drawings: dict[str, Drawing] = {}
        self._futures: set[Future[None]] = set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="video")
        self._jobs = {job.id: job for job in sorted(self._read(), key=lambda x: x.created_at)}
        for job in list(self._jobs.values()):
            if job.status not in _ENDED:
                self._fail(job, "server_error", "the server stopped before the video was complete")
        self._prune()

    def create(self, body: VideoBody, first: Part | None) -> Job:
        """Queue a job; raise Busy if too many wait."""
        side = self._host.model.codec.config.image_size
        now = int(time.time())
        job = Job(
            id=f"video_{secrets.token_hex(12)}",
            model=self._host.name,
            prompt=body.prompt,
            seconds=f"{body.frame_count / FPS:g}",
            size=f"{side}x{side}",
            created_at=now,
            expires_at=now + self._age,
        )
        with self._lock:
            self._prune()
            running = sum(one.status not in _ENDED for one in self._jobs.values())
            if running >= self._most // 2:
                raise Busy(f"{running} videos wait or are drawn already; try again later")
            self._save(job)
            self._drawings[job.id] = Drawing(self._host)
        future = self._threads.submit(self._run, job, body, first)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return job

    def get(self, identifier: str) -> Job:
        """Return a job; raise UnknownVideo if there is none."""
        with self._lock:
            self._prune()
            if identifier not in self._jobs:
                raise UnknownVideo(f"there is no video {identifier[:100]!r}")
            return self._jobs[identifier]

    def list(self) -> Sequence[Job]:
        """Return all jobs, the oldest first."""
        with self._lock:
            self._prune()
            return list(self._jobs.values())

    def content(self, identifier: str) -> Path:
        """Return the file of a complete video; raise UnknownVideo if it is not complete."""
        job = self.get(identifier)
        if job.status != "completed":
            raise UnknownVideo(f"the video {job.id} is {job.status}; it has no content")
        return self._directory / job.id / "video.mp4"

    def delete(self, identifier: str) -> None:
        """End and remove a job."""
        with self._lock:
            job = self.get(identifier)
            self._remove(job)

    def close(self, grace: float) -> None:
        """Let what is being drawn end for `grace` seconds; what waits does not start."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(set(self._futures), timeout=grace)
        with self._lock:
            for drawing in self._drawings.values():
                drawing.cancel()
        self._threads.shutdown(wait=True)

    def _run(self, job: Job, body: VideoBody, first: Part | None) -> None:
        def frame_done(video: int, frame: int, codes: Any) -> None:
            # The last percent is for writing the file.
            self._update(job.id, progress=min(99, 100 * (frame + 1) // body.frame_count))

        try:
            drawing = self._drawings[job.id]
            self._update(job.id, status="in_progress")
            frames = drawing.frames(
                body, frames=body.frame_count, before=first, frame_done=frame_done
            )[0]
            write_video(self._directory / job.id / "video.mp4", frames, fps=FPS)
            self._update(job.id, status="completed", progress=100, completed_at=int(time.time()))
        except LwmError as error:
            self._fail(job, "invalid_request_error", str(error))
        except Exception:
            self._fail(job, "server_error", "the server failed; its log says why")
            raise
        finally:
            self._drawings.pop(job.id, None)

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._update(job.id, status="failed", error={"code": code, "message": message})

    def _update(self, identifier: str, **changes: Any) -> None:
        with self._lock:
            if identifier in self._jobs:  # it may have been deleted
                self._save(replace(self._jobs[identifier], **changes))

    def _save(self, job: Job) -> None:
        directory = self._directory / job.id
        directory.mkdir(parents=True, exist_ok=True)
        with new_file(directory / "job.json", replace=True) as partial:
            partial.write_text(json.dumps(asdict(job)), encoding="utf-8")
        self._jobs[job.id] = job

    def _read(self) -> Sequence[Job]:
        jobs = []
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            try:
                job = Job(**json.loads((path / "job.json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue  # not a job, or one that was not written to its end
            if _ID.fullmatch(path.name) and job.id == path.name:
                jobs.append(job)
        return jobs

    def _prune(self) -> None:
        now = time.time()
        ended = [job for job in self._jobs.values() if job.status in _ENDED]
        surplus = len(self._jobs) - self._most
        for index, job in enumerate(ended):
            if job.expires_at < now or index < surplus:
                self._remove(job)

    def _remove(self, job: Job) -> None:
        del self._jobs[job.id]
        if (drawing := self._drawings.get(job.id)) is not None:
            drawing.cancel()
        shutil.rmtree(self._directory / job.id, ignore_errors=True)
