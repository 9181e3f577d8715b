"""Calls that may get stuck in C++, each with a deadline.

    thread = SideThread("metricfold-store")
    thread.ask(store.get, "key", seconds=3.0)

What is stuck cannot be ended from Python: whoever knows what holds it up, such as a socket, cuts that
off. A thread that comes back from C++ while the interpreter is torn down aborts the process.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from metricfold.processes import start_thread

__all__ = ["NotAskedError", "SideThread", "StuckError"]


class SideThread:
    """Calls what may not come back in time, one thing after the other, on a thread of its own.

    Attributes:
        ended: whether it calls nothing more.
    """

    def __init__(self, name: str) -> None:
        self._line = _Line()
        # It holds the line alone, so that it keeps nobody alive who asks.
        self._thread = start_thread(_answer, self._line, name=name)
        weakref.finalize(self, self._line.questions.put, None).atexit = False

    def ask(self, call: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """Return ``call(*args)``.

        Raises:
            StuckError: the call has not returned in time.
            TimeoutError: its turn has not come in time, and it will not be called.
            NotAskedError: the thread has ended before its turn.
            Exception: what the call raises.
        """
        question = _Question(call, args)
        with self._line.lock:
            if self._line.ended:
                raise NotAskedError
            self._line.questions.put(question)
        try:
            value, error = question.answer.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            question.given_up = True
            raise (StuckError if self._line.under_way is question else TimeoutError) from None
        except BaseException:  # an interrupt: nobody waits for the answer any more
            question.given_up = True
            raise
        if error is not None:
            raise error
        return value

    @property
    def busy(self) -> bool:
        return self._line.under_way is not None

    @property
    def ended(self) -> bool:
        return self._line.ended

    def end(self) -> None:
        """Call nothing more; a call that is under way goes on."""
        with self._line.lock:
            self._line.ended = True
            self._line.questions.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


class StuckError(TimeoutError):
    """A call has begun, and not returned in time."""


class NotAskedError(RuntimeError):
    """The thread that was asked has ended."""


class _Question:
    __slots__ = ("answer", "args", "call", "given_up")

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.call = call
        self.args = args
        self.answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.given_up = False


class _Line:
    """What waits to be called."""

    __slots__ = ("ended", "lock", "questions", "under_way")

    def __init__(self) -> None:
        self.questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self.lock = threading.Lock()  # nothing is put after the end
        self.under_way: _Question | None = None
        self.ended = False


def _answer(line: _Line) -> None:
    while (question := line.questions.get()) is not None:
        line.under_way = (
            question  # before the look at `given_up`, which is set before a look at this
        )
        value: Any = None
        error: BaseException | None = NotAskedError() if line.ended else None
        if error is None and not question.given_up:
            try:
                value = question.call(*question.args)
            except BaseException as raised:  # noqa: BLE001 - it is raised where it was asked
                error = raised
        line.under_way = None
        question.answer.put((value, error))
        del question, value, error  # hold nothing while waiting for the next one
