"""Who keeps the others waiting in an exchange, and what all ranks are told of it.

Exchanges that go well write nothing anywhere. A rank that waits longer than half a second notes in the
job's store which rank it waits for, and goes on noting, so that others see that it is alive. Once an
exchange has failed, a rank notes how it ended there; then one of them calls the roll for all:

    no note of this exchange, or that the rank has closed or ended    missing
    a note that is not renewed                                        stopped in the exchange: missing
    it met closed connections at once, after a timeout of the others  too late: missing

Nobody is named after one look, for a rank may have come just now, or note slowly. And of those missing
from a tree only those are named for which a rank says twice that it waits: a rank that is through writes
nothing either, and nobody waits for it. But where one has sent nothing to anyone, nobody can be through,
and all are named. Whom a rank waits for in a gather, gloo does not tell; there all are named.

The first verdict goes to the store, and is everybody's.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from metricfold._core.runtime.processes import start_thread
from metricfold.communicator.base import MissingRanksError, likely_cause
from metricfold.communicator.tree import first_sent

__all__ = ["ANSWER", "BEAT", "EVERYWHERE", "LATE", "Board", "RollCall", "Words", "first_line"]

_logger = logging.getLogger("metricfold")

BEAT = 0.5
"""A rank that waits longer than so many seconds says so, and goes on saying it."""
ANSWER = 3.0
"""For so many seconds the store is waited for where nothing else gives a deadline."""
LATE = 0.25
"""A rank that met broken connections within so many seconds came after the others had given up."""
EVERYWHERE = (-1, -1)
"""Where a rank waits in a gather: for all, in no round."""
_END = 4.5
"""A rank says so many seconds after the timeout at the latest that the store does not answer."""
_FIRST_WAIT = 10.0
"""After so many seconds a warning names who is missing."""
_IDLE = 2
"""The thread that notes ends after so many beats without an exchange; the next one starts another."""
_SAID = {
    "closed": "had closed its aggregator",
    "ended": "has ended",
    "waits": "has stopped: it was in the call, and has given no sign of life since",
}


class Board(Protocol):
    """Where ranks leave notes for each other: the job's store, or JAX's coordinator."""

    where: str

    @property
    def slow_at(self) -> float:
        """When, on the monotonic clock, it last answered late."""

    def set(self, key: str, value: str, *, seconds: float) -> None: ...

    def get(self, key: str, *, seconds: float) -> bytes | None: ...

    def set_first(self, key: str, value: str, *, seconds: float) -> bytes: ...


class Words(NamedTuple):
    """How messages speak of ranks.

    Args:
        rank: "rank" or "process".
        alone: the condition that makes a call on one of them only.
        recovery: what to do once they are out of step.
    """

    rank: str
    alone: str
    recovery: str

    @property
    def ranks(self) -> str:
        return self.rank + ("(es)" if self.rank.endswith("s") else "(s)")


class _Sign(NamedTuple):
    """What a rank has let the others see of itself.

    Args:
        call: in which exchange.
        state: ``"waits"``, ``"here"``, ``"broke"``, ``"gave up"``, ``"done"``, ``"closed"`` or
            ``"ended"``.
        beat: of one that waits: how often it has said so. Else the seconds it had waited.
        partner: the rank that it waits for; -1 in a gather, of which gloo does not tell.
        round: in which round.
    """

    call: int
    state: str
    beat: float
    partner: int = -1
    round: int = -1


class RollCall:
    """One rank's part in it.

    Args:
        board: where notes are left.
        name: of the aggregator.
        rank: this rank.
        ranks: what messages call each rank: its number in the whole job.
        seconds: the timeout of an exchange.
        words: how messages speak of ranks.

    Attributes:
        call: how many exchanges this rank has begun.
        passed: how many of them it is through with.
        at: which rank it waits for, and in which round of a tree; None where it does not wait.
    """

    def __init__(
        self,
        board: Board,
        name: str,
        rank: int,
        ranks: Sequence[int],
        seconds: float,
        words: Words,
    ) -> None:
        self._board, self._words = board, words
        self._name, self._rank, self._ranks = name, rank, ranks
        self._seconds = seconds
        self.call = self.passed = 0
        self.at: tuple[int, int] | None = None
        self._began = 0.0
        self._lock = threading.Lock()
        self._noting = self._over = self._is_here = False

    @property
    def patience(self) -> float:
        """Seconds until a warning."""
        return min(_FIRST_WAIT, self._seconds / 2)

    @property
    def waited(self) -> float:
        """For how many seconds this rank has been in the exchange."""
        return time.monotonic() - self._began

    # -- Notes

    def begin(self) -> None:
        """Begin an exchange."""
        self.call += 1
        self.at = None

    def watch(self) -> None:
        """Let it be noted from now on, on a thread of its own, that this rank waits.

        That thread outlives the exchange, since starting one costs as much as a small exchange.
        """
        self._began = time.monotonic()
        with self._lock:
            if self._noting:
                return
            self._noting = True
        try:
            start_thread(self._keep_noting, name="metricfold-waits")
        except RuntimeError:  # no thread to be had: nobody hears that this rank waits
            self._noting = False

    def finish(self) -> None:
        """Be through with the exchange."""
        self.passed, self.at = self.call, None
        if self._is_here:
            self._is_here = False
            with suppress(RuntimeError):  # the store is gone, as the next exchange will notice
                self._sign_off(_Sign(self.call, "done", 0.0))

    def leave(self, state: str) -> None:
        """Let the others see that this rank takes part in nothing any more."""
        self._over = True
        if self.call and len(self._ranks) > 1:
            self._sign_off(_Sign(self.call, state, 0.0))

    def note_here(self) -> None:
        """Let the others see that this rank has come to the exchange."""
        self._is_here = True
        note = json.dumps(_Sign(self.call, "here", 0.0))
        self._board.set(f"at/{self._rank}", note, seconds=ANSWER)

    def _keep_noting(self) -> None:
        with suppress(RuntimeError):  # the store is gone: who waits will hear
            noted = warned = beats = idle = 0
            while not self._is_needless(idle):
                time.sleep(BEAT)
                call, at, waited = self.call, self.at, self.waited
                if noted and self.passed >= noted and not self._over:
                    self._sign_off(_Sign(noted, "done", 0.0))
                    noted = 0
                if at is None or self.passed >= call:
                    idle += 1
                elif waited >= BEAT / 2 and not self._over:
                    idle, beats = 0, beats + 1 if noted == call else 1
                    noted = call
                    # A rank that gave up its notes while the store is away for a moment would be named.
                    left = max(self._seconds - waited, 0.0) + ANSWER
                    note = _Sign(call, "waits", beats, *at)
                    self._board.set(f"at/{self._rank}", json.dumps(note), seconds=left)
                    if warned < call and waited >= self.patience - BEAT:
                        warned = call
                        self._warn_of_absent(call, left)
        self._noting = False

    def _is_needless(self, idle: int) -> bool:
        """Whether the thread that notes is to end."""
        with self._lock:
            if self._over or (idle > _IDLE and self.passed == self.call):
                self._noting = False
                return True
            return False

    def _warn_of_absent(self, call: int, seconds: float) -> None:
        first = self._signs(call, seconds)
        time.sleep(BEAT)
        if self.call == call and self.passed < call:
            second = self._signs(call, seconds)
            absent = {rank: sign for rank, sign in second.items() if sign is None is first[rank]}
            self.warn(self._waited_for(absent, call, first, second))

    def _ended(self, state: str, waited: float) -> _Sign:
        return _Sign(self.call, state, waited, *(self.at or EVERYWHERE))

    def _sign_off(self, sign: _Sign, seconds: float = ANSWER) -> None:
        """Let the others see how this rank's exchange has ended."""
        self._board.set(f"end/{self._rank}", json.dumps(sign), seconds=seconds)

    # -- Reading the notes

    def _sign(self, rank: int, call: int, seconds: float = ANSWER) -> _Sign | None:
        """Return what `rank` has let see of itself in `call`, since, or in one that holds it up.

        None: it was not there. Some ranks may be through with an exchange, and in the next, while
        others still wait for one that has stopped.
        """
        done = -1
        for key in ("end", "at"):
            if (text := self._board.get(f"{key}/{rank}", seconds=seconds)) is None:
                continue
            sign = _Sign(*json.loads(text))
            if sign.call >= call or (sign.state != "done" and sign.call > done):
                return sign
            done = sign.call
        return None

    def _signs(self, call: int, seconds: float = ANSWER) -> dict[int, _Sign | None]:
        others = [rank for rank in range(len(self._ranks)) if rank != self._rank]
        return {rank: self._sign(rank, call, seconds) for rank in others}

    def absent(self) -> list[int]:
        """Return the ranks that have left no sign in this exchange, and are waited for."""
        signs = self._signs(self.call)
        absent = {rank: sign for rank, sign in signs.items() if sign is None}
        return list(self._waited_for(absent, self.call, signs))

    def _waited_for(
        self,
        suspects: Mapping[int, _Sign | None],
        call: int,
        *looks: Mapping[int, _Sign | None],
    ) -> Mapping[int, _Sign | None]:
        """Return those of the suspects for which somebody waits, in every look.

        All of them in a gather, and where one has sent nothing to anyone: then nobody is through.
        """
        mine = self._ended("waits", 0.0)
        if mine.partner < 0:
            return suspects
        waited = set(suspects)
        nothing_sent = False
        for look in looks:
            signs = [s for s in (*look.values(), mine) if s is not None and s.call <= call]
            waited &= {sign.partner for sign in signs}
            nothing_sent = any(
                sign.partner in waited
                and sign.call == call
                and sign.round == first_sent(sign.partner, len(self._ranks))
                for sign in signs
            )
        return suspects if nothing_sent else {r: s for r, s in suspects.items() if r in waited}

    # -- The verdict

    def verdict(
        self, how: str, *, timed_out: bool, broken: set[int] | None = None
    ) -> MissingRanksError | None:
        """Find out, after an exchange has failed, who is missing; None if nobody is.

        Args:
            how: it was noticed.
            timed_out: whether by a timeout; else by a connection that broke.
            broken: the ranks to which nothing can be sent any more; None if that is not known.
        """
        self._over = True
        left = min(max(self._seconds + _END - self.waited, 1.0), ANSWER)
        self._sign_off(self._ended("gave up" if timed_out else "broke", self.waited), left)
        if (known := self._verdict_of_another()) is not None:
            return known
        missing = self._missing(timed_out=timed_out, broken=broken)
        return self.named(missing, how) if missing else None

    def _missing(self, *, timed_out: bool, broken: set[int] | None) -> dict[int, str]:
        """Return who is missing from this exchange, and what they have said of themselves."""

        def missing(before: _Sign | None, now: _Sign | None) -> bool:
            if now is None or now.state in ("closed", "ended"):
                return True
            if now.state == "waits":
                return now == before
            return timed_out and before is None and now.state == "broke" and now.beat < LATE

        before = first = self._signs(self.call)
        time.sleep(2 * BEAT)
        now = self._signs(self.call)
        found = {rank: sign for rank, sign in now.items() if missing(before[rank], sign)}
        if any(sign is not None and sign.state == "waits" for sign in found.values()):
            time.sleep(3 * BEAT)
            before, now = now, self._signs(self.call)
            found = {rank: now[rank] for rank in found if missing(before[rank], now[rank])}
        if not timed_out and broken is not None:
            # A rank whose connection is whole is only slow to come.
            found = {r: sign for r, sign in found.items() if r in broken or sign is not None}
        named = self._waited_for(found, self.call, first, now)
        if not timed_out and not named:
            named = found  # they broke what others were to receive
        return {rank: _SAID.get(sign.state, "") if sign else "" for rank, sign in named.items()}

    def _verdict_of_another(self) -> MissingRanksError | None:
        """Let one rank call the roll for all; returns its verdict, or None if this rank is the one."""
        if (said := self._board.get("poison", seconds=ANSWER)) is not None:
            return self._from_verdict(said)
        caller = self._board.set_first("caller", str(self._rank), seconds=ANSWER)
        if int(caller) == self._rank:
            return None
        until = time.monotonic() + 7 * BEAT
        while time.monotonic() < until:
            if (said := self._board.get("poison", seconds=ANSWER)) is not None:
                return self._from_verdict(said)
            time.sleep(BEAT / 5)
        return None

    def named(self, missing: Mapping[int, str], how: str) -> MissingRanksError:
        """Give those up that are missing by all that the store says."""
        if self._board.slow_at < time.monotonic() - 2 * ANSWER:
            return self.given_up(missing, how)
        # They may have given the store up, and what they had to say with it.
        return self.given_up({}, self._untold(f"{how}; {self._board.where} has answered late"))

    def given_up(self, missing: Mapping[int, str], how: str) -> MissingRanksError:
        """Record the verdict, the first rank's for all, and return it as an error."""
        verdict = json.dumps({"missing": list(missing.items()), "how": how})
        return self._from_verdict(self._board.set_first("poison", verdict, seconds=ANSWER))

    def abandon(self, why: str) -> None:
        """Tell the others that this rank has left in the middle of a reduction."""
        self._over = True
        self.given_up({self._rank: ""}, f"it left a reduction in the middle: {why}")

    def raise_if_poisoned(self, seconds: float = ANSWER) -> None:
        if (said := self._board.get("poison", seconds=seconds)) is not None:
            raise self._from_verdict(said)

    def did_not_come(self) -> str:
        return f"they did not come within {self._seconds:g} s"

    def _from_verdict(self, verdict: bytes | str) -> MissingRanksError:
        content = json.loads(verdict)
        missing, how = dict(content["missing"]), content["how"]
        words = self._words
        if not missing:
            return MissingRanksError(f"aggregator {self._name!r}: {how}. {words.recovery}")
        who = ", ".join(str(self._ranks[rank]) for rank in missing)
        for rank, said in missing.items():
            how += f"; {words.rank} {self._ranks[rank]} {said}" if said else ""
        cause = likely_cause(how, words.rank, words.alone)
        return MissingRanksError(
            f"aggregator {self._name!r}: missing from a collective call: {words.ranks} {who} of "
            f"{len(self._ranks)}; {how}. {cause}. {words.recovery}",
            [self._ranks[rank] for rank in missing],
        )

    def nobody_named(self, how: str) -> MissingRanksError:
        """Return the error where the store cannot be asked."""
        return MissingRanksError(
            f"aggregator {self._name!r}: {self._untold(how)}. {self._words.recovery}"
        )

    @staticmethod
    def _untold(how: str) -> str:
        return (
            f"a collective call failed, and who is missing cannot be told: {how}. Most likely the "
            "process or host that serves the store has stopped or ended, or has too much to do"
        )

    def warn(self, missing: Mapping[int, object]) -> None:
        """Say that this rank has waited for some time, and for whom."""
        if missing:
            _logger.warning(
                "aggregator %r: %s %d has waited %.0f s in a collective call for %s %s; giving up "
                "after %.0f s",
                self._name,
                self._words.rank,
                self._ranks[self._rank],
                self.patience,
                self._words.ranks,
                ", ".join(str(self._ranks[rank]) for rank in missing),
                self._seconds,
            )


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
