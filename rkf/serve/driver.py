"""The thread that runs all engines, and what it hands to the event loop: pieces of answers.

The event loop submits and cancels; the driver steps the engines, turns tokens into text and posts the pieces of a pass
together. A reader that falls behind stops its own answers alone, and is dropped after a while.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, NamedTuple, TypeVar

from rkf.errors import RkfError
from rkf.runtime.chooser import Chooser, TokenLogprob
from rkf.runtime.engine import Engine, Request
from rkf.runtime.generate import AnswerText
from rkf.serve.metrics import Metrics
from rkf.serve.refusals import Refused, log, refused

MOST_UNREAD = 256  # pieces of a reply
PATIENCE_S = 30.0  # for a reader with so many
_ALIVE_S = 15.0  # between signs of life, for proxies that close silent connections
T = TypeVar("T", bound="Task")


class Piece(NamedTuple):
    """What a pass adds to a task. tokens: how many; finish: "eos", "stop", "length", "read"; empty while it goes on."""

    task: Task
    text: str
    tokens: int = 0
    logprobs: Sequence[TokenLogprob] = ()
    finish: str = ""
    error: Refused | None = None


@dataclass(eq=False)
class Task:
    """One request of a reply: a text to be read. number: its place among them."""

    number: int
    engine: Engine
    request: Request
    arrived_at: float = field(default_factory=monotonic, kw_only=True)
    first_at: float = field(default=0.0, kw_only=True)

    def next_piece(self) -> Piece | None:
        """What its request has computed since the last call; None: nothing. Only the driver calls it."""
        try:
            tokens = self.request.take()
        except RkfError as error:
            return Piece(self, "", error=refused(error))
        return self._piece(tokens) if tokens or self.request.ended else None

    def _piece(self, tokens: Sequence[int]) -> Piece:
        return Piece(self, "", finish=self.request.finish)


@dataclass(eq=False)
class Answer(Task):
    """A request that is answered. prompt_logprobs: of the prompt's tokens from the second on, if they are asked for."""

    chooser: Chooser
    text: AnswerText
    told: int = 0  # of the chooser's logprobs
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def _piece(self, tokens: Sequence[int]) -> Piece:
        (text, used), finish = self.text.push(tokens), ""
        if self.text.stopped:
            self.engine.cut(self.request, len(tokens) - used)
            finish = "stop"
        elif self.request.finish:
            finish, text = self.request.finish, text + self.text.finish()
        logprobs = self.chooser.logprobs[self.told : self.told + used]
        self.told += used
        return Piece(self, text, used, logprobs, finish)


class Reply(Generic[T]):
    """All tasks of one HTTP response, and their pieces as they arrive. Made and read on the event loop."""

    def __init__(self, tasks: Sequence[T]) -> None:
        self.tasks = tasks
        self.posted = self.read = 0  # by the driver, by the reader
        self.read_at = monotonic()
        self._pieces: deque[Piece] = deque()
        self._news = asyncio.Event()

    def put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._news.set()

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """The pieces of all tasks, in order, until each has ended; None when nothing came for a while. Raises Refused
        at the first error.
        """
        open_tasks = len(self.tasks)
        while open_tasks:
            while not self._pieces:
                self._news.clear()
                try:
                    await asyncio.wait_for(self._news.wait(), _ALIVE_S)
                except TimeoutError:
                    yield None
            piece = self._pieces.popleft()
            self.read, self.read_at = self.read + 1, monotonic()
            if piece.error is not None:
                raise piece.error
            open_tasks -= piece.finish != ""
            yield piece


class Driver:
    """Runs engines on a thread of its own from `start` to `stop`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._replies: dict[Reply[Any], list[Task]] = {}  # to their tasks that have not ended
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rkf-engines", daemon=True)

    def start(self) -> None:
        """Called on the event loop that reads the replies."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and with an error what is left."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def submit(self, reply: Reply[Any]) -> None:
        """Start its tasks, whose requests must have passed `Engine.check`."""
        self._command(lambda: self._submit(reply))

    def cancel(self, reply: Reply[Any]) -> None:
        """End its tasks, if they have not ended."""
        self._command(lambda: self._cancel(reply))

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    # --- on the thread

    def _run(self) -> None:
        while not self._stopping:
            while self._commands:
                self._commands.popleft()()
            engines = dict.fromkeys(task.engine for tasks in self._replies.values() for task in tasks)
            moved = [engine for engine in engines if self._step(engine)]
            self._post(self._collected())
            if not moved:
                self._wake.wait(timeout=1.0 if self._replies else None)
                self._wake.clear()
        error = Refused(503, "the server is shutting down")
        self._post([(reply, Piece(reply.tasks[0], "", error=error)) for reply in self._replies])

    def _step(self, engine: Engine) -> bool:
        try:
            return engine.step()
        except Exception as error:  # noqa: BLE001 - the thread goes on for the others
            told = refused(error)
            failed = [reply for reply, tasks in self._replies.items() if tasks[0].engine is engine]
            self._post([(reply, Piece(reply.tasks[0], "", error=told)) for reply in failed])
            for reply in failed:
                self._cancel(reply)
            return True

    def _submit(self, reply: Reply[Any]) -> None:
        self._replies[reply] = list(reply.tasks)
        for task in reply.tasks:
            task.engine.submit(task.request)

    def _cancel(self, reply: Reply[Any]) -> None:
        for task in self._replies.pop(reply, ()):
            task.engine.cancel(task.request)
            self._metrics.answers.labels("cancelled").inc()

    def _collected(self) -> list[tuple[Reply[Any], Piece]]:
        """The new pieces of all replies whose readers keep up."""
        found, now = [], monotonic()
        for reply, tasks in list(self._replies.items()):
            if reply.posted - reply.read >= MOST_UNREAD:
                if now - reply.read_at > PATIENCE_S:
                    log.warning("a reply was dropped: nobody read it for %.0f s", PATIENCE_S)
                    error = Refused(408, "the answer was not read: the server gave it up")
                    found.append((reply, Piece(tasks[0], "", error=error)))
                    self._cancel(reply)
                continue
            for task in list(tasks):
                if (piece := task.next_piece()) is not None:
                    self._count(piece, now)
                    found.append((reply, piece))
                    reply.posted += 1
                    if piece.finish or piece.error:
                        tasks.remove(task)
            if not tasks:
                del self._replies[reply]
        return found

    def _post(self, pieces: Sequence[tuple[Reply[Any], Piece]]) -> None:
        def put() -> None:
            for reply, piece in pieces:
                reply.put(piece)

        if pieces:
            self._loop.call_soon_threadsafe(put)

    def _count(self, piece: Piece, now: float) -> None:
        task, metrics = piece.task, self._metrics
        if not task.first_at and task.request.tokens:
            task.first_at = now
            metrics.first_token_s.observe(now - task.arrived_at)
        if piece.finish or piece.error:
            metrics.answers.labels(piece.finish or "error").inc()
            metrics.prompt_tokens.inc(task.request.prompt_tokens)
            metrics.cached_tokens.inc(task.request.cached_tokens)
            metrics.tokens.inc(task.request.tokens)
            if task.request.tokens > 1:
                metrics.token_s.observe((now - task.first_at) / (task.request.tokens - 1))
