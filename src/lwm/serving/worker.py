"""Run an engine on one thread of its own, for requests that come from others.

Requests join and leave between two steps. Tokens go to a callback of each request, on the engine's
thread; the callback must return at once.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, Literal

from lwm.core.errors import LwmError
from lwm.core.progress import Advance
from lwm.engine.engine import Engine
from lwm.engine.request import Request, Token


class Busy(LwmError):
    """Signal that the queue of waiting requests is full."""


class Stopping(LwmError):
    """Signal that the server does not take requests: it is loading, or shutting down."""


Deliver = Callable[[Token | Exception], None]
"""Take a token of a request, or the error that ends it."""


class Ticket:
    """Represent a submitted request; `cancel` frees its slot within a step."""

    def __init__(self, worker: "EngineWorker", deliver: Deliver) -> None:
        self._worker, self.deliver = worker, deliver
        self.number: int | None = None
        self.done = False

    def cancel(self) -> None:
        """End the request, from any thread; do nothing if it has ended."""
        if not self.done:
            self._worker.run(lambda engine: self._worker.drop(self))


class Observer:
    """Watch what a worker does; its methods run on the engine's thread."""

    def submitted(self, number: int, prompt: int) -> None:
        """Note that a request with so many tokens of prompt was queued."""

    def stepped(self, engine: Engine, tokens: Sequence[Token]) -> None:
        """Note the tokens of a step."""

    def dropped(self, engine: Engine, number: int) -> None:
        """Note that a request ended before its last token."""


class EngineWorker:
    """Own the thread that steps an engine.

    Args:
        make_engine: loads the model and makes the engine, on the thread.
        limit: requests that may wait for a slot.

    Attributes:
        failure: why the model could not be loaded; None if it could.
        observer: watches every request and step.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, limit: int) -> None:
        self._make_engine, self._limit = make_engine, limit
        self.observer = Observer()
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.loaded = threading.Event()
        self.failure: BaseException | None = None

    def start(self, failed: Callable[[], None] = lambda: None) -> None:
        """Start to load the model; `failed` is called if that fails."""
        self._failed = failed
        self._thread.start()

    def refuse(self) -> None:
        """Take no more requests; those that run go on."""
        self._closing = True

    @property
    def state(self) -> Literal["loading", "ready", "shutting down"]:
        """Return whether the worker takes requests."""
        if self._closing:
            return "shutting down"
        return "ready" if self.loaded.is_set() and self.failure is None else "loading"

    @property
    def idle(self) -> bool:
        """Return whether no request waits or runs."""
        return not self._tickets

    def require_ready(self) -> None:
        """Raise Stopping unless the worker takes requests."""
        if self.state != "ready":
            raise Stopping(f"the server is {self.state}; try again later")

    def submit(self, requests: Sequence[Request], deliver: Sequence[Deliver]) -> list[Ticket]:
        """Queue requests, all or none, from any thread; errors go to the callbacks.

        What was accepted before `refuse` may still submit its parts. Raises Stopping before the
        model is loaded and after `close`.
        """
        if self._ended or self.failure is not None or not self.loaded.is_set():
            raise Stopping(f"the server is {self.state}; try again later")
        tickets = [Ticket(self, one) for one in deliver]
        self.run(lambda engine: self._submit(engine, requests, tickets))
        return tickets

    def run(self, command: Callable[[Engine], None]) -> None:
        """Call a function on the engine's thread, between two steps."""
        self._commands.put(command)

    def drop(self, ticket: Ticket) -> None:
        """Forget a ticket and end its request; on the engine's thread."""
        ticket.done = True
        if ticket.number is not None and self._tickets.pop(ticket.number, None):
            self._engine.cancel(ticket.number)
            self.observer.dropped(self._engine, ticket.number)

    def close(self, grace: float) -> None:
        """Take no more requests, let running ones finish for `grace` seconds, end the thread."""
        self.refuse()
        deadline = time.monotonic() + grace
        while self._tickets and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._ended = True
        self.run(self._stop)
        self._thread.join(timeout=10)

    def _stop(self, engine: Engine) -> None:
        for ticket in list(self._tickets.values()):
            self._fail(ticket, Stopping("the server is shutting down; try again later"))
        raise SystemExit

    def _submit(self, engine: Engine, requests: Sequence[Request], tickets: list[Ticket]) -> None:
        if any(ticket.done for ticket in tickets):  # the client left already
            return
        waiting = engine.scheduler.waiting
        try:
            # What starts at once does not wait.
            if waiting and waiting + len(requests) > self._limit:
                raise Busy(
                    f"{waiting} requests wait and the queue holds {self._limit}; try again later"
                )
            for request, ticket in zip(requests, tickets, strict=True):
                ticket.number = engine.submit(request)
                self._tickets[ticket.number] = ticket
                self.observer.submitted(ticket.number, len(request.prompt))
        except Exception as error:
            for ticket in tickets:
                self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.done:
            self.drop(ticket)
            ticket.deliver(error)

    def _run(self) -> None:
        try:
            self._engine = self._make_engine()
        except BaseException as error:
            self.failure = error
            self._failed()
            return
        finally:
            self.loaded.set()
        while True:
            try:
                self._take_commands()
            except SystemExit:
                return
            if self._engine.scheduler.idle:
                continue
            try:
                tokens = self._engine.step()
            except Exception as error:  # the cache is lost; requests may hold what caused it
                for ticket in list(self._tickets.values()):
                    self._fail(ticket, error)
                continue
            for token in tokens:
                self._deliver(token)
            self.observer.stepped(self._engine, tokens)

    def _take_commands(self) -> None:
        if self._engine.scheduler.idle:
            self._commands.get()(self._engine)
        while not self._commands.empty():
            self._commands.get()(self._engine)

    def _deliver(self, token: Token) -> None:
        ticket = self._tickets.get(token.request)
        if ticket is None:
            return
        if token.finish is not None:
            ticket.done = True
            del self._tickets[token.request]
        ticket.deliver(token)


class RemoteEngine:
    """Give code that drives an engine itself, on another thread, the worker's engine instead.

    It has the two methods that `generation.frames` uses.
    """

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._events: queue.SimpleQueue[tuple[int, Token | Exception]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._cancelled = False

    def with_room(self, require: Callable[[int, int], None]) -> Callable[..., Any]:
        """Return what `frames.EngineFor` is, with a check of prompt and answer."""

        def engine_for(prompt: int, max_tokens: int, slots: int) -> RemoteEngine:
            require(prompt, max_tokens)
            return self

        return engine_for

    def cancel(self) -> None:
        """End what runs, from any thread; the one that follows it gets an error."""
        self._cancelled = True
        for ticket in list(self._tickets.values()):
            ticket.cancel()
        self._events.put((-1, Stopping("the drawing was ended")))

    def submit(self, request: Request) -> int:
        """Queue a request, and return a number for `follow`."""
        if self._cancelled:
            raise Stopping("the drawing was ended")
        number = len(self._tickets)
        deliver: Any = lambda event: self._events.put((number, event))  # noqa: E731
        (self._tickets[number],) = self._worker.submit([request], [deliver])
        return number

    def follow(
        self, requests: Sequence[int], advance: Advance | None = None
    ) -> Generator[Token, None, None]:
        """Iterate over the tokens of submitted requests; closing the iterator ends them."""
        running = set(requests)
        try:
            while running:
                number, event = self._events.get()
                if isinstance(event, Exception):
                    raise event
                if event.finish is not None:
                    running.discard(number)
                yield replace(event, request=number)
        finally:
            for number in requests:
                self._tickets[number].cancel()
