"""Serve a random vision-language model with its page, as a process of its own.

Gradio warns of its own dependencies and leaves event loops open, which the suite would not allow.

usage: python page_server.py DIRECTORY SECONDS_PER_STEP MOST_BYTES [KEY]
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from running import vision_model

from lwm.engine.request import Request
from lwm.generation.model import Model
from lwm.serving.app import Access, make_app
from lwm.serving.host import Host
from lwm.serving.page import make_page
from lwm.serving.video_jobs import VideoJobs


class SlowHost(Host):
    """Take a while for each step, and answer at length, so that a test can stop what runs."""

    def text_requests(self, *arguments: Any, **options: Any) -> list[Request]:
        requests = super().text_requests(*arguments, **options)
        return [replace(request, stop_tokens=()) for request in requests]

    def _make_engine(self) -> Any:
        engine = super()._make_engine()
        step = engine.step

        def slowly() -> Any:
            time.sleep(float(sys.argv[2]))
            return step()

        engine.step = slowly
        return engine


def main() -> None:
    directory, most_bytes, keys = Path(sys.argv[1]), int(sys.argv[3]), sys.argv[4:]
    model: Model = vision_model(directory)
    host = SlowHost("tiny", lambda: model, slots=2, context=0, queue=4)
    access = Access(keys=keys, hosts=["example.org"], most_bytes=most_bytes)
    page = make_page(host, draws=True, most_bytes=most_bytes)
    app = make_app(host, access, VideoJobs(host, directory / "videos"), page)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            host.worker.start()
            host.worker.loaded.wait()
            await super().startup(sockets)
            port = self.servers[0].sockets[0].getsockname()[1]
            sys.stdout.write(f"http://127.0.0.1:{port}\n")
            sys.stdout.flush()

    Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on", ws="none")).run()


if __name__ == "__main__":
    main()
