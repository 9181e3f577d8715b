"""The clock of one rank: how much of its time counts.

It starts with the first value that comes in, since loading a model is not part of a training's rate,
and stands still during a pause, such as an evaluation. What intervals, shares and rates call seconds
is read from it; how long one use of a timer took is not.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

__all__ = ["Clock", "Pause"]


class Begun(Protocol):
    """Takes over the seconds that a reduction is about."""

    seconds: float


class Clock:
    """Shows the seconds that count; they never go back.

    Attributes:
        hand: whether it runs, and then the moment at which it would have shown 0, else what it
            shows. It is replaced as one, so that reading needs no lock.
    """

    __slots__ = ("_interval_began", "_lock", "_pauses", "_started", "hand")

    def __init__(self) -> None:
        # Reentrant, for a signal handler may use a timer while this thread pauses.
        self._lock = threading.RLock()
        self._started = False
        self._pauses = 0
        self.hand = (False, 0.0)
        self._interval_began = 0.0

    @property
    def running(self) -> bool:
        """Whether time counts at present. While it does, `start` has nothing to do."""
        return self.hand[0]

    def at(self, moment: float) -> float:
        """Return what it shows at `moment`, which is `time.perf_counter()` or a little before."""
        running, place = self.hand
        return moment - place if running else place

    def now(self) -> float:
        return self.at(time.perf_counter())

    @property
    def interval(self) -> float:
        """The seconds of the interval so far."""
        return max(self.now() - self._interval_began, 0.0)

    def begin(self) -> None:
        """Let time count from now on, if it does not."""
        if not self.running:
            self.start(time.perf_counter())

    def start(self, moment: float) -> None:
        """Let time count from `moment` on, or, during a pause, from its end on."""
        with self._lock:
            self._started = True
            self._turn(moment)

    def restart(self) -> None:
        """Stand still until `start` is called, and begin a new interval."""
        with self._lock:
            self._started = False
            self._turn(time.perf_counter())
            self._interval_began = self.now()

    def pause(self) -> None:
        """Let no time count until `go_on` has been called as often."""
        with self._lock:
            self._pauses += 1
            self._turn(time.perf_counter())

    def go_on(self) -> None:
        with self._lock:
            self._pauses -= 1
            self._turn(time.perf_counter())

    def _turn(self, moment: float) -> None:
        running = self._started and not self._pauses
        if running is not self.running:
            shown = self.at(moment)
            self.hand = (True, moment - shown) if running else (False, shown)

    def cut(self, shown: float, begun: Begun) -> None:
        """Begin a new interval where `shown` was what it showed, and hand over the old one's seconds."""
        seconds = max(shown - self._interval_began, 0.0)
        # No signal comes in between these.
        begun.seconds, self._interval_began = seconds, shown

    def restore(self, seconds: float) -> None:
        """Put back what a failed reduction has cut off."""
        self._interval_began -= seconds

    def leave_parent_behind(self) -> None:
        """In a forked child: a new lock, for the old one may be held by a thread that is not here."""
        self._lock = threading.RLock()


class Pause:
    """A block whose time does not count; blocks may be nested, and overlap on several threads."""

    __slots__ = ("_clock",)

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._clock.pause()

    def __exit__(self, *raised: object) -> None:
        self._clock.go_on()
