"""Serve a model to OpenAI's clients and at a web page: `lwm serve`."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from lwm.cli.flags import Load, LoadFlags, ModelName
from lwm.core.errors import ConfigError, InputError
from lwm.core.progress import say


def serve(
    model: ModelName,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 4,
    context: int = 0,
    queue: int = 64,
    api_key_file: Path | None = None,
    grace: float = 30.0,
    videos: Path = Path("runs/videos"),
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    max_body: Annotated[int, tyro.conf.arg(metavar="MEBIBYTES")] = 64,
    log_prompts: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    load: Load = LoadFlags(),
) -> None:
    """Serve a model over HTTP, for OpenAI's clients and for people at a web page.

    Args:
        host: Address to listen on; 0.0.0.0 is every one of this machine.
        port: Port to listen on.
        name: Id of the model in the API; defaults to its base name.
        slots: Requests that run at a time; a guided image takes two.
        context: Longest prompt and answer together in tokens; 0 is the model's, at most 8192.
        queue: Requests that may wait for a slot.
        api_key_file: File of keys, one a line, of which clients must send one.
        grace: Seconds that running requests have to finish after SIGTERM.
        videos: Directory that keeps videos, for a day.
        allow_host: Further name by which clients address this server.
        allow_origin: Site whose pages may ask from a browser.
        max_body: Largest body of a request.
        log_prompts: Write what is asked to standard error, to 2,000 characters; otherwise prompts
            are not logged.
    """
    for flag, value, least in (
        ("--slots", slots, 1), ("--context", context, 0), ("--queue", queue, 0),
        ("--grace", grace, 0), ("--max-body", max_body, 1),
    ):  # fmt: skip
        if not value >= least:
            raise ConfigError(f"{flag} is {value}; it must be at least {least}")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; it must be from 0 to 65535")
    keys = [] if api_key_file is None else _read_keys(api_key_file)
    try:
        import uvicorn

        from lwm.serving.app import Access, make_app
        from lwm.serving.page import make_page
        from lwm.serving.video_jobs import VideoJobs
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}; install the extra with 'pip install lwm[serve]'"
        ) from error
    from lwm.checkpoints.open import open_checkpoint
    from lwm.serving.host import Host

    opened = open_checkpoint(model, config=load.config)  # refused before the port is opened
    served = Host(
        name or _base_name(model), lambda: load.load(model), slots=slots, context=context,
        queue=queue, log_prompt=(lambda text: say(f"asked: {text}")) if log_prompts else None,
    )  # fmt: skip
    # A server that is open to other machines is addressed by names that are not known here.
    hosts = (host, *allow_host) if host in ("127.0.0.1", "localhost", "::1") else allow_host
    access = Access(keys=keys, hosts=hosts, origins=allow_origin, most_bytes=max_body << 20)
    jobs = VideoJobs(served, videos)
    page = make_page(served, draws=opened.config.vision is not None, most_bytes=access.most_bytes)
    config = uvicorn.Config(
        make_app(served, access, jobs, page), host=host, port=port, access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(grace)), timeout_keep_alive=30, ws="none",
        lifespan="on", server_header=False,
    )  # fmt: skip

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """End in order at a signal; uvicorn's own would raise it again afterwards."""
            before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                address = self.servers[0].sockets[0].getsockname()
                say(f"serving {served.name} at http://{host}:{address[1]} (the model is loading)")

        async def shutdown(self, sockets: Any = None) -> None:
            nonlocal deadline
            deadline = time.monotonic() + grace
            served.worker.refuse()
            leaving = asyncio.create_task(self._leave_pages())
            await super().shutdown(sockets)
            leaving.cancel()
            if self.force_exit:
                await self.lifespan.shutdown()  # which uvicorn leaves out

        async def _leave_pages(self) -> None:
            """End the connections of open pages, which last, once nothing else is left."""
            while served.requests or not served.worker.idle:
                await asyncio.sleep(0.05)
            self.force_exit = True

    deadline = 0.0
    server = Server(config)
    served.worker.start(failed=lambda: setattr(server, "should_exit", True))
    server.run()
    jobs.close(grace=max(0.0, deadline - time.monotonic()))
    served.worker.close(grace=1.0)
    failure = served.worker.failure
    if failure is not None:
        raise failure
    if not server.started:
        raise InputError(f"{host}:{port} cannot be listened on; is another server running there?")


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _base_name(model: str) -> str:
    """Return the id of a model: its base name, never a path."""
    return Path(model.rpartition("::")[2].rpartition(":")[2]).name or "model"


def _read_keys(path: Path) -> list[str]:
    try:
        keys = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the keys in {path} cannot be read: {error}") from error
    keys = [key for key in keys if key]
    if not keys:
        raise InputError(f"{path} has no key; write one a line")
    return keys
