"""Run a server on a thread, with a random vision-language model."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_vision_model
import uvicorn
from random_vqgan import save_random_vqgan

from lwm.generation.codec import load_vqgan
from lwm.generation.model import Model
from lwm.models.vqgan import VQGANConfig
from lwm.serving.app import Access, make_app
from lwm.serving.host import Host
from lwm.serving.video_jobs import VideoJobs

CODEC = VQGANConfig(
    image_size=8, hidden_channels=4, channel_multipliers=(1, 1, 1), residual_blocks=1,
    latent_channels=4, codebook_size=20, code_channels=4, norm_groups=2,
)  # fmt: skip


def vision_model(directory: Path) -> Model:
    model = tiny_vision_model.model()
    vqgan = directory / "vqgan"
    model.codec = load_vqgan(vqgan if vqgan.exists() else save_random_vqgan(vqgan, CODEC))
    return model


@contextmanager
def running(host: Host, access: Access = Access(), videos: Path = Path("unused")) -> Iterator[str]:
    """Serve until the block ends; the value is the server's address."""
    jobs = VideoJobs(host, videos)
    config = uvicorn.Config(
        make_app(host, access, jobs), port=0, log_level="warning", lifespan="off", ws="none"
    )
    server: Any = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    host.worker.start()
    thread.start()
    while not server.started or not host.worker.loaded.is_set():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        jobs.close(grace=5.0)
        host.worker.close(grace=5.0)
