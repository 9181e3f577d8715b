"""Who keeps the others waiting in an exchange, and what all ranks are told of it.

A rank that waits writes *notes* into the job's store, and goes on writing, so that others see that it
is alive. After a failure each writes how it has ended, and one calls the roll for all; its verdict goes
to the store, and is everybody's. Nobody is named after one look, for a rank may have come just now, or
note slowly. README.md says who is.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol, TypeAlias

from metricfold._core.runtime.processes import start_thread
from metricfold.communicator.base import MissingRanksError
from metricfold.communicator.tree import first_sent

__all__ = [
    "ANSWER",
    "BEAT",
    "EVERYWHERE",
    "LATE",
    "Board",
    "Place",
    "RollCall",
    "Words",
    "first_line",
]

_logger = logging.getLogger("metricfold")

BEAT = 0.5
"""Seconds: who waits longer says so, and goes on saying it."""
ANSWER = 3.0
"""Seconds for which the store is waited for where nothing else gives a deadline."""
LATE = 0.25
"""Seconds: who met broken connections that soon came after the others had given up."""
EVERYWHERE = (-1, -1)
"""Where a rank waits in a gather: for all, in no round."""
_END = 4.5
"""Seconds after the timeout at which a rank says at the latest that the store does not answer."""
_FIRST_WAIT = 10.0
"""Seconds until a warning names who is missing."""
_IDLE = 2
"""Beats without an exchange after which the thread that notes ends; the next one starts another."""
_SAID = {
    "closed": "had closed its aggregator",
    "ended": "has ended",
    "waits": "has stopped, or is cut off: it was in the call, and has given no sign of life since",
}


class Board(Protocol):
    """Where ranks leave notes for each other: the job's store, or JAX's coordinator."""

    where: str

    @property
    def slow_at(self) -> float: ...  # when, on the monotonic clock, it last answered late

    def set(self, key: str, value: str, *, seconds: float) -> None: ...

    def get(self, key: str, *, seconds: float) -> bytes | None: ...

    def set_first(self, key: str, value: str, *, seconds: float) -> bytes: ...


class Words(NamedTuple):
    """How messages speak of ranks."""

    rank: str  # "rank" or "process"
    alone: str  # the condition that makes a call on one of them only
    recovery: str  # what to do once they are out of step

    @property
    def _plural(self) -> str:
        return "es" if self.rank.endswith("s") else "s"

    @property
    def ranks(self) -> str:
        return f"{self.rank}({self._plural})"

    def cause(self, how: str) -> str:
        """Return what most likely keeps a rank away, by how it was noticed."""
        unequal = (
            "fewer batches than the others had: give all of them the same number of steps, such as by "
            "drop_last"
        )
        if how.startswith("it left"):
            return (
                f"The {self.rank}'s own output tells what it was. A {self.rank} that is out of step "
                "would abort the others, so nobody goes on"
            )
        if how.startswith("the connection"):
            return (
                f"Most likely that {self.rank} has ended, or closed its aggregator, while others went "
                f"on: by an exception or an exit, which its own output shows, or after {unequal}"
            )
        return (
            f"The usual cause is a call on some {self.rank}{self._plural} only, such as inside "
            f"`{self.alone}`; every {self.rank} must call reduce(), logger.log(), "
            f"get_metrics_for_logging() and state_dict(). Another is a {self.rank} that has left its "
            f"loop after {unequal}. A third is an aggregator that only some have made: those without a "
            "name= pair by the order in which they are made"
        )


class _Sign(NamedTuple):
    """What a rank has let the others see of itself."""

    call: int
    state: str  # "waits", "here", "broke", "gave up", "done", "closed" or "ended"
    beat: float  # of one that waits: how often it has said so; else the seconds it had waited
    partner: int = -1  # the rank that it waits for; -1 in a gather, of which gloo does not tell
    round: int = -1


class Place(NamedTuple):
    """Where a rank runs, as it says once it has come for the first time: the same for all of a host."""

    host: str
    address: str = ""  # by which it reaches the store: hosts that are copies may have one name


_Signs: TypeAlias = Mapping[int, _Sign | None]


@dataclass(eq=False)
class RollCall:
    """One rank's part in it."""

    name: str  # of the aggregator
    rank: int
    ranks: Sequence[int]  # by which messages call each: its number in the whole job
    seconds: float  # the timeout of an exchange
    words: Words
    board: Board = field(init=False)
    call: int = 0  # how many exchanges this rank has begun
    passed: int = 0  # how many of them it is through with
    at: tuple[int, int] | None = None  # for which rank it waits, and in which round of a tree
    _began: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _noting: bool = False
    _over: bool = False
    _is_here: bool = False

    @property
    def patience(self) -> float:
        """Seconds until a warning."""
        return min(_FIRST_WAIT, self.seconds / 2)

    @property
    def waited(self) -> float:
        """For how many seconds this rank has been in the exchange."""
        return time.monotonic() - self._began

    # -- Notes

    def begin(self) -> None:
        self.call += 1
        self.at = None

    def watch(self) -> None:
        """Let it be noted from now on that this rank waits.

        The thread that notes outlives the exchange: starting one costs as much as a small exchange.
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
        self.passed, self.at = self.call, None
        if self._is_here:
            self._is_here = False
            with suppress(RuntimeError):  # the store is gone, as the next exchange will notice
                self._note("end", _Sign(self.call, "done", 0.0))

    def leave(self, state: str) -> None:
        """Let the others see that this rank takes part in nothing any more."""
        self._over = True
        if self.call and len(self.ranks) > 1:
            self._note("end", _Sign(self.call, state, 0.0))

    def note_place(self, address: str, seconds: float) -> None:
        place = Place(socket.gethostname(), address)
        self.board.set(f"met/{self.rank}", json.dumps(place), seconds=seconds)

    def note_here(self) -> None:
        self._is_here = True
        self._note("at", _Sign(self.call, "here", 0.0))

    def _keep_noting(self) -> None:
        with suppress(RuntimeError):  # the store is gone: who waits will hear
            noted = warned = beats = idle = 0
            while not self._is_needless(idle):
                time.sleep(BEAT)
                call, at, waited = self.call, self.at, self.waited
                if noted and self.passed >= noted and not self._over:
                    self._note("end", _Sign(noted, "done", 0.0))
                    noted = 0
                if at is None or self.passed >= call:
                    idle += 1
                elif waited >= BEAT / 2 and not self._over:
                    idle, beats = 0, beats + 1 if noted == call else 1
                    noted = call
                    # A rank that gave up its notes while the store is away for a moment would be named.
                    left = max(self.seconds - waited, 0.0) + ANSWER
                    self._note("at", _Sign(call, "waits", beats, *at), left)
                    if warned < call and waited >= self.patience - BEAT:
                        warned = call
                        self._warn_of_absent(call, left)
        self._noting = False

    def _is_needless(self, idle: int) -> bool:
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

    def _note(self, place: str, sign: _Sign, seconds: float = ANSWER) -> None:
        self.board.set(f"{place}/{self.rank}", json.dumps(sign), seconds=seconds)

    # -- Reading the notes

    def _sign(self, rank: int, call: int, seconds: float = ANSWER) -> _Sign | None:
        """Return what `rank` has let see of itself in `call`, since, or in one that holds it up.

        None: it was not there. Some ranks may be through with an exchange, and in the next, while
        others still wait for one that has stopped.
        """
        done = -1
        for key in ("end", "at"):
            if (text := self.board.get(f"{key}/{rank}", seconds=seconds)) is None:
                continue
            sign = _Sign(*json.loads(text))
            if sign.call >= call or (sign.state != "done" and sign.call > done):
                return sign
            done = sign.call
        return None

    def _signs(self, call: int, seconds: float = ANSWER) -> _Signs:
        others = [rank for rank in range(len(self.ranks)) if rank != self.rank]
        return {rank: self._sign(rank, call, seconds) for rank in others}

    def absent(self) -> list[int]:
        """Return the ranks that have left no sign in this exchange, and are waited for."""
        signs = self._signs(self.call)
        absent = {rank: sign for rank, sign in signs.items() if sign is None}
        return list(self._waited_for(absent, self.call, signs))

    def _waited_for(self, suspects: _Signs, call: int, *looks: _Signs) -> _Signs:
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
                and sign.round == first_sent(sign.partner, len(self.ranks))
                for sign in signs
            )
        return suspects if nothing_sent else {r: s for r, s in suspects.items() if r in waited}

    def place(self, rank: int, seconds: float = ANSWER) -> Place | None:
        """Return where `rank` runs; None if it has not come yet."""
        said = self.board.get(f"met/{rank}", seconds=seconds)
        return None if said is None else Place(*json.loads(said))

    def _hosts(self, missing: Collection[int]) -> tuple[dict[int, str], list[str]]:
        """Return the hosts of those missing, and which hosts have no other ranks; nothing if all have one.

        Who is asked first are those missing: of a large job far away not all can be asked in time.
        """
        found: dict[int, Place] = {}
        until, everyone = time.monotonic() + ANSWER, range(len(self.ranks))
        # Where the store is gone, or a coordinator: names are not worth an error.
        with suppress(Exception):
            for rank in (*missing, *(rank for rank in everyone if rank not in missing)):
                if (place := self.place(rank)) is not None:
                    found[rank] = place
                if time.monotonic() > until:
                    break
        places = set(found.values())
        if len(places) < 2:
            return {}, []
        alike = len({place.host for place in places}) < len(places)
        names = {
            place: f"{place.host} at {place.address}" if alike else place.host for place in places
        }
        of_missing = {rank: names[found[rank]] for rank in missing if rank in found}
        others = {names[place] for rank, place in found.items() if rank not in of_missing}
        whole = set(of_missing.values()) - others if len(found) == len(self.ranks) else set()
        return of_missing, sorted(whole)

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
        left = min(max(self.seconds + _END - self.waited, 1.0), ANSWER)
        self._note("end", self._ended("gave up" if timed_out else "broke", self.waited), left)
        self.raise_if_poisoned()
        # One rank calls the roll for all.
        caller = int(self.board.set_first("caller", str(self.rank), seconds=ANSWER))
        until = time.monotonic() + 7 * BEAT
        while caller != self.rank and time.monotonic() < until:
            time.sleep(BEAT / 5)
            self.raise_if_poisoned()
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

    def named(self, missing: Mapping[int, str], how: str) -> MissingRanksError:
        """Give those up that are missing by all that the store says."""
        if self.board.slow_at < time.monotonic() - 2 * ANSWER:
            return self.given_up(missing, how)
        # They may have given the store up, and what they had to say with it.
        return self.given_up({}, _untold(f"{how}; {self.board.where} has answered late"))

    def given_up(self, missing: Mapping[int, str], how: str) -> MissingRanksError:
        """Record the verdict, the first rank's for all, and return it as an error."""
        hosts, whole = self._hosts(missing) if missing else ({}, [])
        said = {
            "missing": list(missing.items()),
            "how": how,
            "hosts": list(hosts.items()),
            "whole": whole,
        }
        verdict = json.dumps(said)
        return self._from_verdict(self.board.set_first("poison", verdict, seconds=ANSWER))

    def abandon(self, why: str) -> None:
        """Tell the others that this rank has left in the middle of a reduction."""
        self._over = True
        self.given_up({self.rank: ""}, f"it left a reduction in the middle: {why}")

    def raise_if_poisoned(self, seconds: float = ANSWER) -> None:
        if (said := self.board.get("poison", seconds=seconds)) is not None:
            raise self._from_verdict(said)

    def did_not_come(self) -> str:
        return f"they did not come within {self.seconds:g} s"

    def _from_verdict(self, verdict: bytes | str) -> MissingRanksError:
        content = json.loads(verdict)
        missing, how = dict(content["missing"]), content["how"]
        words = self.words
        if not missing:
            return MissingRanksError(f"aggregator {self.name!r}: {how}. {words.recovery}")
        hosts = dict(content["hosts"])
        listed = []
        for host, ranks in groupby(missing, hosts.get):
            listed.append(", ".join(str(self.ranks[rank]) for rank in ranks))
            listed[-1] += f" (on {host})" if host else ""
        who = ", ".join(listed)
        cause = words.cause(how)
        for rank, said in missing.items():
            how += f"; {words.rank} {self.ranks[rank]} {said}" if said else ""
        if content["whole"] and not how.startswith("it left"):
            gone = " and ".join(content["whole"])
            cause = (
                f"No {words.rank} of {gone} is there: look first whether {gone} and the network to it are "
                f"up. {cause}"
            )
        return MissingRanksError(
            f"aggregator {self.name!r}: missing from a collective call: {words.ranks} {who} of "
            f"{len(self.ranks)}; {how}. {cause}. {words.recovery}",
            [self.ranks[rank] for rank in missing],
            {self.ranks[rank]: host for rank, host in hosts.items()},
        )

    def judged(self, how: str, find: Callable[[], MissingRanksError]) -> MissingRanksError:
        """Return what `find` finds out of the store, or that nobody can be named where it is gone."""
        try:
            return find()
        except MissingRanksError as known:
            return known
        except Exception as gone:  # noqa: BLE001 - a coordinator's may be any
            text = first_line(gone)
            where = self.board.where
            told = text if where in text else f"{where} does not answer ({text})"
            return self.nobody_named(f"{how}; {told}")

    def nobody_named(self, how: str) -> MissingRanksError:
        return MissingRanksError(f"aggregator {self.name!r}: {_untold(how)}. {self.words.recovery}")

    def warn(self, missing: Mapping[int, object]) -> None:
        """Say that this rank has waited for some time, and for whom."""
        if missing:
            _logger.warning(
                "aggregator %r: %s %d has waited %.0f s in a collective call for %s %s; giving up "
                "after %.0f s",
                self.name,
                self.words.rank,
                self.ranks[self.rank],
                self.patience,
                self.words.ranks,
                ", ".join(str(self.ranks[rank]) for rank in missing),
                self.seconds,
            )


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _untold(how: str) -> str:
    return (
        f"a collective call failed, and who is missing cannot be told: {how}. Most likely the process "
        "or host that serves the store has stopped or ended, or has too much to do, or the network to it "
        "is down"
    )
