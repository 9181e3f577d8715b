"""The rules of an aggregator: they look at what a reduction has merged, and find the same on all ranks.

Every rank holds the same merged state, so a rule over it says the same everywhere, without a
collective of its own. Rules run once for each reduction that closes an interval, on its thread. What
they remember from one to the next is part of a checkpoint.

What only one rank can see, a *local* rule finds there: that rank's next header tells the others.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from metricfold._core.fold.plain import NotPlainError, pack, unpack
from metricfold._core.reduce.schema import digest
from metricfold._core.runtime.listing import shortened
from metricfold._core.view.alert import Alert, Alerts
from metricfold._core.view.snapshot import Snapshot

__all__ = ["Chosen", "Memory", "Rule", "Rules"]

_log = logging.getLogger("metricfold")

_RANKS = 2**26
"""More ranks than there are; a number of the header says which rule has found something, and where."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MOST = 50
"""So many alerts of one rule are told one by one."""
_PATIENCE = 3
"""A pattern that has matched nothing in so many intervals is likely misspelled."""

Memory: TypeAlias = dict[str, Any]
"""What a rule remembers: plain data (`fold.plain`), for it is part of checkpoints."""

Found: TypeAlias = Alert | str | Iterable[Alert | str] | None
Rule: TypeAlias = Callable[[Snapshot, Memory], Found]
"""Returns what it finds in a snapshot; may keep in the memory what it needs to know at the next."""


@dataclass(frozen=True)
class Chosen:
    """The rules that a reduction runs: those that there were when it began, and ranks agreed on.

    Args:
        rules: each by what it is; in the order of these names, which is the same on every rank.
        local: the names of those that look at what ranks may see differently.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    local: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> int:
        """What must be the same on all ranks; 0 without rules."""
        if not self.rules:
            return 0
        return digest(json.dumps([(name, name in self.local) for name in self.rules]).encode())


class _Finding(NamedTuple):
    """What a local rule has found, for the other ranks to hear of.

    Args:
        severe: whether training should not go on.
        name: of the rule.
    """

    severe: bool
    name: str


class Rules:
    """The rules of one aggregator, and what they remember.

    Attributes:
        chosen: which there are; adding some replaces it, for a reduction under way has its own.
        lock: held while they run, and while what they remember is saved.
    """

    def __init__(self) -> None:
        self.chosen = Chosen()
        self._memories: dict[str, Memory] = {}
        self._unmatched: dict[str, int] = {}
        self._failed: set[str] = set()
        self._before: int | None = None
        # What the other ranks have yet to hear of, and whether it has had to wait: a reduction tells
        # of one finding, the most urgent of all ranks.
        self._untold: dict[_Finding, bool] = {}
        self._thread: int | None = None  # that runs a rule
        self.lock = threading.RLock()

    def add(self, rules: Iterable[Rule], *, local: bool) -> None:
        """Add rules, all or none; raises TypeError or ValueError for what is none."""
        chosen = self.chosen
        new: dict[str, Rule] = {}
        for rule in rules:
            if isinstance(rule, type) or not callable(rule):
                made = f", such as {rule.__name__}(...)" if isinstance(rule, type) else ""
                raise TypeError(
                    f"alert_on() takes rules{made}, or functions of (snapshot, memory), not {rule!r}"
                )
            name = _identity(rule)
            if name in chosen.rules or name in new:
                raise ValueError(
                    f"there is a rule {name} already: each is known, on all ranks and in checkpoints, "
                    "by what it is and how it is set. Functions need names of their own"
                )
            new[name] = rule
        together = {**chosen.rules, **new}
        all_local = sorted({*chosen.local, *(new if local else ())})
        self.chosen = Chosen({name: together[name] for name in sorted(together)}, (*all_local,))

    def to_tell(self, chosen: Chosen, rank: int) -> float:
        """Return what this rank has to tell the others in its next header; 0: nothing."""
        return max(
            (_number(one, waits, chosen, rank) for one, waits in self._untold.items()), default=0.0
        )

    # -- Running them

    def look(
        self, chosen: Chosen, snapshot: Snapshot, step: int | None, rank: int, heard: float
    ) -> Alerts:
        """Return what the rules find, and what local ones have found the time before.

        Args:
            chosen: the rules, as they were when the reduction began.
            snapshot: the merged result, without what is derived from it.
            step: of the reduction.
            rank: this one.
            heard: the largest of what all ranks had to tell (`to_tell`) in this reduction.
        """
        found = [*self._heard(chosen, heard, rank)]
        self._before = step
        for name, rule in chosen.rules.items():
            self._look_for(name, getattr(rule, "pattern", None), snapshot, rank)
            alerts = [
                replace(one, rule=one.rule or name, step=step)
                for one in self._asked(name, rule, snapshot)
            ]
            if name not in chosen.local:
                found += alerts
                continue
            for alert in alerts:
                _log.warning("%s: %s", name, alert.message)
                self._untold.setdefault(_Finding(alert.severity == "severe", name), False)
        return Alerts(found)

    def _look_for(self, name: str, pattern: object, snapshot: Snapshot, rank: int) -> None:
        """Warn of a pattern that matches nothing, once it has had time to; on the first rank."""
        seen = self._unmatched.get(name, 0)
        if rank or not isinstance(pattern, str) or seen > _PATIENCE or snapshot.empty:
            return
        matched = bool(snapshot.names(pattern))
        self._unmatched[name] = _PATIENCE + 1 if matched else seen + 1
        if seen == _PATIENCE and not matched:
            there = shortened([f"{dataset or ''}/{name}" for dataset, name in snapshot.names()])
            _log.warning(
                "%s has matched nothing so far: patterns match '{dataset}/{name}', or '/{name}' "
                "without a dataset. There are: %s",
                name,
                there,
            )

    def _asked(self, name: str, rule: Rule, snapshot: Snapshot) -> list[Alert]:
        """Return what a rule finds; what it had found before it failed counts."""
        alerts: list[Alert] = []
        try:
            self._thread = threading.get_ident()
            found = rule(snapshot, self._memories.setdefault(name, {}))
            some = [found] if isinstance(found, Alert | str) else found
            for one in () if some is None else some:
                alerts.append(Alert(one) if isinstance(one, str) else _checked(one))  # noqa: PERF401
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the user's rule, and the result is there
            if name not in self._failed:
                self._failed.add(name)
                _log.warning("the rule %s failed, and says no more: %r", name, error)
        finally:
            self._thread = None
        if len(alerts) <= _MOST:
            return alerts
        # Where all is NaN, a backend that takes each alert by itself would have thousands at each log.
        rest = Alerts(alerts[_MOST:])
        return [
            *alerts[:_MOST],
            Alert(f"{name} has found {len(rest)} more", "severe" if rest.severe else "warning"),
        ]

    def refuse_within(self, call: str) -> None:
        """Raise RuntimeError in a rule, which would wait for the reduction that runs it."""
        if self._thread == threading.get_ident():
            raise RuntimeError(
                f"{call}() was called by a rule, within a reduction: a rule has the snapshot, and "
                "state_dict(sync=False)"
            )

    def _heard(self, chosen: Chosen, heard: float, rank: int) -> Iterator[Alert]:
        """Yield what a local rule has found on whatever rank; all others wait for the next time."""
        if heard:
            finding, waited, where = _told(heard, chosen)
            if where == rank:
                self._untold.pop(finding, None)
            name = finding.name
            yield Alert(
                f"{name} found something on rank {where}, whose own log says what",
                "severe" if finding.severe else "warning",
                rank=where,
                rule=name,
                step=None if waited else self._before,
            )
        self._untold = dict.fromkeys(self._untold, True)

    # -- What a checkpoint holds

    def saved(self) -> dict[str, Memory]:
        """Return what the rules remember, as JSON has it; what local ones do is their rank's own.

        Raises:
            TypeError: one remembers what is no plain data.
        """
        found: dict[str, Memory] = {}
        for name, memory in self._memories.items():
            if not memory or name in self.chosen.local:
                continue
            try:
                found[name] = pack(memory)
            except NotPlainError as error:
                raise TypeError(
                    f"what the rule {name} remembers cannot be saved: {error}"
                ) from None
        return found

    def restore(self, memories: Mapping[str, Memory]) -> None:
        """Go on with what a checkpoint held; that of rules that are yet to be added waits for them."""
        self._memories = {name: unpack(memory) for name, memory in memories.items()}
        self._untold = {}


def _number(finding: _Finding, waits: bool, chosen: Chosen, rank: int) -> float:
    """Return a finding as a number: of several the largest travels, what is severe before the rest."""
    urgency = 2 * finding.severe + waits
    place = urgency * len(chosen.local) + chosen.local.index(finding.name)
    return float((place + 1) * _RANKS + _RANKS - 1 - rank)


def _told(number: float, chosen: Chosen) -> tuple[_Finding, bool, int]:
    """Return the finding, whether it has waited, and the rank that a number stands for."""
    place, left = divmod(int(number), _RANKS)
    urgency, index = divmod(place - 1, len(chosen.local))
    severe, waited = divmod(urgency, 2)
    return _Finding(bool(severe), chosen.local[index]), bool(waited), _RANKS - 1 - left


def _checked(alert: object) -> Alert:
    if not isinstance(alert, Alert):
        raise TypeError(f"a rule returns Alerts, texts or None, not {alert!r}")
    return alert


def _identity(rule: Rule) -> str:
    """Return what tells a rule from others, and is the same in every process."""
    text = repr(rule)
    if _ADDRESS.search(text) is None:
        return text
    named = rule if hasattr(rule, "__qualname__") else type(rule)
    if named is not rule and getattr(type(rule), "__repr__", None) is not object.__repr__:
        return _ADDRESS.sub("", text)  # such as of a functools.partial
    # The main module goes by another name in processes that `multiprocessing` has started.
    module = "__main__" if named.__module__ == "__mp_main__" else named.__module__
    return f"{module}.{named.__qualname__}"
