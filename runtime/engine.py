"""Many requests on one model: which tokens each pass computes, for which sequences. Knows Backend; no text, no threads.

A request's tokens are the same bits alone, in a crowd, after preemption and from a cached beginning, because a
sequence's logits depend on its tokens alone (backend.py) and a draw on seed and position alone (sampling.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from sys import maxsize
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rkf.errors import ContextLengthError, RkfError, UsageError
from rkf.runtime.backend import Row, Wanted
from rkf.runtime.beginnings import WORTHWHILE, Beginning, Beginnings, Held
from rkf.runtime.memory_limit import default_memory_bytes

if TYPE_CHECKING:
    from rkf.runtime.backend import Backend, TokenSequence

F32 = NDArray[np.float32]
_OPENING = 16  # tokens at the end of a prompt; templates open an answer with up to ten
_CROWDED = 64  # prompt tokens of a pass that others wait for; 256 would stop their answers four times as long
_ALONE = 2  # answers that may guess
_SCORED = 64  # tokens of a pass that all have logits: 40 MB of them with a vocabulary of 152,000


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and its continuation, token by token.

    ids: the prompt, then the tokens that follow. choose: logits f32[vocab] after ids -> the next token; an RkfError of
    it ends this request alone. most: the length at which it ends, at the latest the context's. eos: tokens that end it.
    ahead: it waits while so many of its tokens are not taken. scores: gets (position, logits f32[vocab]) after each
    prompt token from the position `scored` on, except the last; `scored` moves on with it. guess: ids -> tokens that
    may follow; a wrong guess costs time and changes nothing. cached_tokens: of the prompt, not computed again.
    finish: "eos", "length", "read" or "cancelled"; empty until it ends. error: the RkfError that ended it.

    choose None: a text that is only read. `scores` gets hidden states, f32[width], and that of the last token too.
    """

    ids: list[int]
    choose: Callable[[F32, Sequence[int]], int] | None
    most: int = maxsize
    eos: Collection[int] = ()
    ahead: int = 1
    scores: Callable[[int, F32], None] | None = None
    scored: int = 0
    guess: Callable[[Sequence[int]], list[int]] | None = None
    finish: str = ""
    error: RkfError | None = None
    prompt_tokens: int = field(init=False)
    cached_tokens: int = field(init=False, default=0)
    taken: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = self.taken = len(self.ids)
        if self.choose is None:
            self.most = self.prompt_tokens

    @property
    def is_read(self) -> bool:
        """Whether the text gets hidden states and no continuation."""
        return self.choose is None

    @property
    def ended(self) -> bool:
        return self.finish != "" or self.error is not None

    @property
    def tokens(self) -> int:
        """The number of new tokens, one that ended it included."""
        return len(self.ids) - self.prompt_tokens

    def take(self) -> list[int]:
        """The new tokens since the last call, without one that ended it. Raises the error that ended it."""
        new = self.ids[self.taken :]
        self.taken = len(self.ids)
        if new and self.finish == "eos":
            del new[-1]
        if not new and self.error is not None:
            raise self.error
        return new

    @property
    def shareable(self) -> int:
        """The tokens that need not be computed for their logits."""
        return len(self.ids) - 1 if self.scores is None else min(self.scored, len(self.ids) - 1)

    @property
    def full(self) -> bool:
        """Whether it waits for its tokens to be taken."""
        return len(self.ids) - self.taken >= self.ahead


class _Running(Held):
    """A request with a sequence. guessed: tokens after its ids that this pass computes too."""

    def __init__(self, request: Request, begun: Beginning) -> None:
        super().__init__(begun.sequence, request.ids, request.prompt_tokens)
        self.request, self.guessed = request, list[int]()
        self.marks = _places_to_mark(begun, len(request.ids))

    @property
    def missing(self) -> int:
        """The tokens that must be computed before the next one can be chosen."""
        return len(self.ids) - self.sequence.length

    def wanted(self, start: int, end: int) -> list[int]:
        """The positions start … end - 1 after which logits are needed."""
        request = self.request
        if request.is_read:
            return [*range(max(start, request.scored), end)]
        found = [*range(len(self.ids) - 1, end)]
        if request.scores is not None:
            found = [*range(max(start, request.scored), min(end, self.coming - 1)), *found]
        return found

    def next_part(self, most: int) -> int:
        """The number of tokens for a pass of at most `most`: up to the next mark."""
        if self.request.scores is not None and not self.request.is_read:
            most = min(most, _SCORED)
        end = self.marks[0] if self.marks else len(self.ids)
        return min(most, end - self.sequence.length)


class Engine:
    """Waiting and running requests of one model. `step` computes one pass; one thread calls all methods.

    context: maximum tokens of a sequence. parallel: maximum requests that run at once. memory_bytes: maximum memory of
    all sequences; if it runs out, beginnings kept for later go first, then the youngest requests wait and are computed
    again. None: running requests take what they need. kept: maximum sequences kept for requests with the same
    beginning, while all take at most `memory_bytes`, or half of the memory that is available now.

    takes_guesses: whether wrong guesses change nothing with this model; otherwise requests do not guess.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        context: int | None = None,
        parallel: int = 16,
        memory_bytes: int | None = None,
        kept: int = 4,
    ) -> None:
        longest = backend.metadata.context_length
        self.context = min(context or longest, longest)
        self._backend, self._parallel, self._memory_bytes = backend, parallel, memory_bytes
        self._kept_bytes = memory_bytes or default_memory_bytes()
        self._waiting: list[Request] = []
        self._running: list[_Running] = []  # the longest admitted first
        self._beginnings = Beginnings(backend, self.context, kept)
        # Where the length of a text chooses its ropes, guessed tokens would change the logits before them.
        ropes_stay = all(rope.long is None for rope in backend.metadata.program.ropes)
        self.takes_guesses = ropes_stay and backend.new_sequence(1).takes_back

    @property
    def waiting(self) -> int:
        """Requests that have no sequence."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return len(self._running)

    def check(self, request: Request) -> None:
        """UsageError: an empty prompt. ContextLengthError: one that leaves no room for an answer."""
        if not request.ids:
            raise UsageError("the prompt is empty: expected at least one token")
        if len(request.ids) + (request.most > len(request.ids)) > self.context:
            room = "" if request.is_read else " to leave room for an answer"
            length = f"the prompt has at least {len(request.ids)} tokens, the model's context {self.context}"
            raise ContextLengthError(f"{length}: shorten it{room}")

    def submit(self, request: Request) -> None:
        """Add a request; the errors are those of `check`."""
        self.check(request)
        if request.ended:
            return
        request.most = min(request.most, self.context)
        if request.most <= len(request.ids) and request.scores is None:
            request.finish = "length"
        else:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now. Nothing happens if it has ended."""
        if not request.ended:
            request.finish = "cancelled"
        self._drop_ended()

    def cut(self, request: Request, tokens: int) -> None:
        """End a request without its last `tokens`, which come after a stop string."""
        self.cancel(request)
        del request.ids[len(request.ids) - tokens :]

    def last_ended(self) -> Held | None:
        """The text that ended last, if its sequence is kept."""
        return self._beginnings.last()

    def keep(self, sequence: TokenSequence, ids: list[int]) -> None:
        """Keep a text from elsewhere, as if it had ended now."""
        self._beginnings.keep(sequence, ids)

    def step(self) -> bool:
        """Compute one pass. False: no request can go on. An error of the backend leaves all requests as they were."""
        self._admit()
        parts = self._parts()
        if self._memory_bytes is not None:
            self._make_room(parts)
        if not parts:
            return False
        try:
            for read in (False, True):
                if some := {running: n for running, n in parts.items() if running.request.is_read == read}:
                    self._compute(some, self._backend.hidden if read else self._backend.forward)
        except BaseException:  # such as Ctrl-C: states may be lost, and logits not used
            for running in self._running:
                sequence = running.sequence
                sequence.truncate(sequence.reusable(min(sequence.length, len(running.ids) - 1)))
            raise
        finally:
            self._drop_ended()
        return True

    # --- one pass

    def _parts(self) -> dict[_Running, int]:
        """The number of tokens that each running request computes in this pass.

        Answers get their next token. Prompts share the rest: the oldest gets half of it, so that it always gets on;
        then the shortest go first, so that they need not wait for long ones.
        """
        ready = [running for running in self._running if not running.request.full]
        for running in ready:
            running.guessed = []  # of a pass that was interrupted
        answers = [running for running in ready if running.missing == 1]
        prompts = [running for running in ready if running.missing > 1]
        if not prompts:
            self._guess(answers)
            return {running: 1 + len(running.guessed) for running in answers}
        parts = dict.fromkeys(answers, 1)
        room = max(self._backend.pass_tokens - len(parts), 1)
        if parts:
            room = min(room, _CROWDED)
        if len(prompts) > 1:
            oldest, *others = prompts
            parts[oldest] = oldest.next_part(max(room // 2, 1))
            room -= parts[oldest]
            prompts = [*sorted(others, key=lambda running: running.missing), oldest]
        for running in prompts:
            if room <= 0:
                break
            before = parts.get(running, 0)
            parts[running] = running.next_part(before + room)
            room -= parts[running] - before
        return parts

    def _guess(self, answers: Sequence[_Running]) -> None:
        """Let few answers guess: many together read the weights once anyway."""
        for running in answers:
            request = running.request
            if request.guess is None or len(answers) > _ALONE or not self.takes_guesses:
                continue
            guessed = request.guess(request.ids)[: max(request.most - len(request.ids) - 1, 0)]
            if not running.sequence.growth_bytes(1 + len(guessed)):  # a guess is worth no memory
                running.guessed = guessed

    def _compute(self, parts: dict[_Running, int], forward: Callable[[Sequence[Row], Wanted], F32]) -> None:
        """One call of the backend: `forward`, or `hidden` for texts that are only read."""
        rows, places, wanted, at = [], [], [], 0
        guessing = [running for running in parts if running.guessed]
        for running, count in parts.items():
            start = running.sequence.length
            tokens = [*running.ids[start : start + count], *running.guessed]
            running.guessed = []
            rows.append(Row(running.sequence, np.array(tokens, np.int64)))
            for position in running.wanted(start, start + count):
                wanted.append((running, position, tokens[position - start]))
                places.append(at + position - start)
            at += count
        last: Wanted = "last" if len(places) == len(rows) == at else np.array(places, np.int64)
        found = forward(rows, last)
        for running in parts:
            if running.marks and running.marks[0] == running.sequence.length:
                running.sequence.mark()
                del running.marks[0]
        for (running, position, token), row in zip(wanted, found, strict=True):
            if running.ids[position : position + 1] == [token]:  # otherwise a wrong guess, or what followed one
                _advance(running.request, position, row)
        for running in guessing:
            running.sequence.truncate(min(running.sequence.length, len(running.ids) - 1))

    # --- which requests have a sequence

    def _admit(self) -> None:
        """Give sequences to waiting requests, in order. One waits while another computes a beginning of it."""
        if not self._waiting:
            return
        for request in list(self._waiting):
            if request.full:
                continue
            if len(self._running) >= self._parallel and not self._preempt_full():
                return
            begun = self._beginnings.begin(request.ids, request.shareable, self._running)
            if begun is None:
                continue
            if not self._fits(begun.sequence, len(request.ids)):
                if begun.taken:
                    self._beginnings.keep(begun.sequence, request.ids)
                return
            if not request.tokens:
                request.cached_tokens = begun.sequence.length
            self._running.append(_Running(request, begun))
            self._waiting.remove(request)

    def _fits(self, sequence: TokenSequence, tokens: int) -> bool:
        """Whether there is memory to compute a prompt beside the running ones. Alone it always runs."""
        if self._memory_bytes is None or not self._running:
            return True

        def planned() -> int:
            needed = sum(running.sequence.growth_bytes(running.missing) for running in self._running)
            return needed + sequence.growth_bytes(tokens - sequence.length)

        return self._free(planned)

    def _free(self, needed: Callable[[], int]) -> bool:
        """Drop kept beginnings until the needed bytes are free; False: there are not enough. Pages that are shared no
        more need no copy, so each drop may lessen the need too.
        """
        while self._memory_bytes is not None and self._backend.held_bytes + needed() > self._memory_bytes:
            if not self._beginnings.drop_oldest():
                return False
        return True

    def _make_room(self, parts: dict[_Running, int]) -> None:
        """Preempt the youngest requests until there is memory for the others' parts."""
        while not self._free(lambda: sum(running.sequence.growth_bytes(n) for running, n in parts.items())):
            youngest = self._running[-1]
            if len(self._running) > 1:
                self._preempt(youngest)
            else:
                _end_without_memory(youngest.request)
                self._drop_ended()
            parts.pop(youngest, None)

    def _preempt_full(self) -> bool:
        """Take the place of a request whose tokens nobody takes; False: there is none."""
        full = next((running for running in self._running if running.request.full), None)
        if full is not None:
            self._preempt(full)
        return full is not None

    def _preempt(self, running: _Running) -> None:
        self._stop(running)
        self._waiting.insert(0, running.request)

    def _stop(self, running: _Running) -> None:
        """Take a request out of the running ones, and keep its sequence while memory lasts."""
        self._running.remove(running)
        self._beginnings.keep(running.sequence, running.ids)
        while self._backend.held_bytes > self._kept_bytes and self._beginnings.drop_oldest():
            continue

    def _drop_ended(self) -> None:
        for running in [running for running in self._running if running.request.ended]:
            self._stop(running)
        if self._waiting:
            self._waiting = [request for request in self._waiting if not request.ended]


def _advance(request: Request, position: int, found: F32) -> None:
    """Use the logits, or the hidden state, after the token at `position`."""
    if request.ended:
        return
    try:
        if request.is_read or position < request.prompt_tokens - 1:
            if request.scores is not None:
                request.scores(position, found)
                request.scored = position + 1
            if request.is_read and position == request.prompt_tokens - 1:
                request.finish = "read"
            return
        if request.choose is not None and len(request.ids) < request.most:
            token = request.choose(found, request.ids)
            request.ids.append(token)
            if token in request.eos:
                request.finish = "eos"
                return
        if len(request.ids) >= request.most:
            request.finish = "length"
    except RkfError as error:
        request.error = error


def _end_without_memory(request: Request) -> None:
    if request.tokens:
        request.finish = "length"
    else:
        request.error = ContextLengthError(
            f"the prompt has {request.prompt_tokens} tokens, for which there is no memory: shorten it"
        )


def _places_to_mark(begun: Beginning, end: int) -> list[int]:
    """The lengths that later prompts are likely to go back to, of the tokens to come up to `end`.

    One is where this prompt leaves the closest other text: more may share that beginning, such as a system prompt. The
    other is shortly before the end, because the next turn's template may write the answer's beginning differently
    (without the tokens that open a model's thoughts).
    """
    if begun.sequence.rewinds:
        return []
    known, near_end = begun.sequence.length, end - _OPENING
    places = [begun.shared] if near_end - begun.shared >= WORTHWHILE else []
    return [place for place in [*places, near_end] if place - known >= WORTHWHILE]
