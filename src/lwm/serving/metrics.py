"""Measure what the server does, in the format of Prometheus."""

import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lwm.engine.engine import Engine
from lwm.engine.request import Token
from lwm.serving.host import Host
from lwm.serving.worker import Observer

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Observer):
    """Count requests, tokens and times."""

    def __init__(self, host: Host) -> None:
        self._registry = CollectorRegistry()
        options: Any = {"registry": self._registry}
        self._requests = Counter("lwm_requests", "Requests", ["endpoint", "outcome"], **options)
        self._prompt = Counter("lwm_prompt_tokens", "Tokens of prompts", **options)
        self._answer = Counter("lwm_answer_tokens", "Tokens of answers", **options)
        self._reused = Counter("lwm_reused_tokens", "Prompt tokens that were cached", **options)
        self._first = Histogram(
            "lwm_time_to_first_token_seconds", "From submission", buckets=_SECONDS, **options
        )
        self._between = Histogram(
            "lwm_time_between_tokens_seconds", "Within an answer", buckets=_SECONDS, **options
        )
        self._waiting = Gauge("lwm_queue_length", "Requests that wait for a slot", **options)
        self._slots = Gauge("lwm_slots_in_use", "Slots in use", **options)
        self._last: dict[int, float] = {}
        self._counted_reuse = 0
        host.worker.observer = self

    def text(self) -> bytes:
        """Return all measurements."""
        return generate_latest(self._registry)

    def measured(self, app: Any) -> Any:
        """Wrap an ASGI application to count its responses."""

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return

            async def counted(message: Any) -> None:
                if message["type"] == "http.response.start":
                    route = scope.get("route")
                    endpoint = getattr(route, "path", "other")
                    self._requests.labels(endpoint, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, counted)

        return wrapped

    def submitted(self, number: int, prompt: int) -> None:
        self._prompt.inc(prompt)
        self._last[number] = -time.monotonic()

    def stepped(self, engine: Engine, tokens: Sequence[Token]) -> None:
        now = time.monotonic()
        for token in tokens:
            last = self._last.get(token.request)
            if last is None:
                continue
            if last < 0:
                self._first.observe(now + last)
            else:
                self._between.observe(now - last)
            self._last[token.request] = now
            self._answer.inc(token.token is not None)
            if token.finish is not None:
                del self._last[token.request]
        self._count_slots(engine)

    def dropped(self, engine: Engine, number: int) -> None:
        self._last.pop(number, None)
        self._count_slots(engine)

    def _count_slots(self, engine: Engine) -> None:
        scheduler = engine.scheduler
        self._waiting.set(scheduler.waiting)
        self._slots.set(sum(len(one.slots) for one in scheduler.active.values()))
        self._reused.inc(scheduler.reused - self._counted_reuse)
        self._counted_reuse = scheduler.reused
