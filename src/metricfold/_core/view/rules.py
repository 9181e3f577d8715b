"""The rules of an aggregator: they look at what a reduction has merged, and find the same on all ranks.

Every rank holds the same merged state, so a rule over it says the same everywhere, without a
collective of its own. Rules run once for each reduction that closes an interval, on its thread. What
they remember from one to the next is part of a checkpoint.

What only one rank can see, a *local* rule finds there: that rank's next header tells the others.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from metricfold._core.reduce.schema import digest
from metricfold._core.runtime.listing import shortened
from metricfold._core.view.alert import Alert, Alerts
from metricfold._core.view.snapshot import Snapshot

__all__ = ["Memory", "Rule", "Rules"]

_log = logging.getLogger("metricfold")

_RANKS = 2**26
"""More ranks than there are; a number of the header says which rule has found something, and where."""
_PATIENCE = 3
"""A pattern that has matched nothing in so many intervals is likely misspelled."""

Memory: TypeAlias = dict[str, Any]
"""What a rule remembers: as JSON has it, for it is part of checkpoints."""

Found: TypeAlias = Alert | str | Iterable[Alert | str] | None
Rule: TypeAlias = Callable[[Snapshot, Memory], Found]
"""Returns what it finds in a snapshot; may keep in the memory what it needs to know at the next."""


class Rules:
    """The rules of one aggregator, and what they remember.

    Attributes:
        local_found: what this rank is to tell the others in its next header; 0: nothing.
        lock: held while they run, and while what they remember is saved.
    """

    def __init__(self) -> None:
        self._rules: dict[str, Rule] = {}
        self._local: list[str] = []
        self._memories: dict[str, Memory] = {}
        self._unmatched: dict[str, int] = {}
        self._failed: set[str] = set()
        self._before: int | None = None
        self.local_found = 0.0
        self.lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._rules)

    def add(self, rules: Iterable[Rule], *, local: bool) -> None:
        """Add rules, all or none; raises TypeError or ValueError for what is none."""
        new: dict[str, Rule] = {}
        for rule in rules:
            if isinstance(rule, type) or not callable(rule):
                made = f", such as {rule.__name__}(...)" if isinstance(rule, type) else ""
                raise TypeError(
                    f"alert_on() takes rules{made}, or functions of (snapshot, memory), not {rule!r}"
                )
            name = _identity(rule)
            if name in self._rules or name in new:
                raise ValueError(
                    f"there is a rule {name} already: each is known, on all ranks and in checkpoints, "
                    "by what it is and how it is set"
                )
            new[name] = rule
        self._rules.update(new)
        self._local += new if local else ()

    def hash(self) -> int:
        """Return what must be the same on all ranks; 0 without rules."""
        if not self._rules:
            return 0
        described = [(name, name in self._local) for name in sorted(self._rules)]
        return digest(json.dumps(described).encode())

    # -- Running them

    def look(self, snapshot: Snapshot, step: int | None, rank: int, elsewhere: float) -> Alerts:
        """Return what the rules find, and what local ones have found the time before.

        Args:
            snapshot: the merged result, without what is derived from it.
            step: of the reduction.
            rank: this one.
            elsewhere: the largest `local_found` of all ranks in this reduction.
        """
        found = [*self._heard(elsewhere)]
        self.local_found, self._before = 0.0, step
        for name, rule in self._rules.items():
            self._look_for(name, getattr(rule, "pattern", None), snapshot)
            alerts = [
                replace(one, rule=one.rule or name, step=step)
                for one in self._asked(name, rule, snapshot)
            ]
            if name in self._local:
                self._note(name, alerts, rank)
            else:
                found += alerts
        return Alerts(found)

    def _look_for(self, name: str, pattern: object, snapshot: Snapshot) -> None:
        """Warn of a pattern that matches nothing, once it has had time to."""
        seen = self._unmatched.get(name, 0)
        if not isinstance(pattern, str) or seen > _PATIENCE or snapshot.empty:
            return
        self._unmatched[name] = _PATIENCE + 1 if snapshot.names(pattern) else seen + 1
        if seen == _PATIENCE and not snapshot.names(pattern):
            there = shortened([f"{dataset or ''}/{name}" for dataset, name in snapshot.names()])
            _log.warning(
                "%s has matched nothing so far: patterns match '{dataset}/{name}', or '/{name}' "
                "without a dataset. There are: %s",
                name,
                there,
            )

    def _asked(self, name: str, rule: Rule, snapshot: Snapshot) -> list[Alert]:
        try:
            found = rule(snapshot, self._memories.setdefault(name, {}))
            if found is None:
                return []
            some = [found] if isinstance(found, Alert | str) else list(found)
            return [Alert(one) if isinstance(one, str) else _checked(one) for one in some]
        except Exception as error:  # noqa: BLE001 - the user's rule
            if name not in self._failed:
                self._failed.add(name)
                _log.warning("the rule %s failed, and says nothing: %r", name, error)
            return []

    def _note(self, name: str, alerts: list[Alert], rank: int) -> None:
        """Keep what a local rule has found for the next header, and say here what it was."""
        for alert in alerts:
            _log.warning("%s: %s", name, alert.message)
        if alerts:
            severe = any(alert.severity == "severe" for alert in alerts)
            place = (1 + 2 * self._local.index(name) + severe) * _RANKS + _RANKS - 1 - rank
            self.local_found = max(self.local_found, float(place))

    def _heard(self, elsewhere: float) -> Iterable[Alert]:
        """Yield what local rules have found on whatever rank."""
        number, left = divmod(int(elsewhere), _RANKS)
        place, severe = divmod(number - 1, 2)
        if 0 <= place < len(self._local):
            name, rank = self._local[place], _RANKS - 1 - left
            message = f"{name} found something on rank {rank}, whose own log says what"
            yield Alert(
                message, "severe" if severe else "warning", rank=rank, rule=name, step=self._before
            )

    # -- What a checkpoint holds

    def saved(self) -> dict[str, Memory]:
        """Return what the rules remember; raises TypeError if JSON cannot hold it."""
        for name, memory in self._memories.items():
            try:
                json.dumps(memory, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"what the rule {name} remembers cannot be saved: {error}. Keep plain finite "
                    "numbers, texts, lists and dicts in its memory"
                ) from None
        return {name: memory for name, memory in self._memories.items() if memory}

    def restore(self, memories: Mapping[str, Memory]) -> None:
        """Go on with what a checkpoint held; that of rules that are yet to be added waits for them."""
        self._memories = json.loads(json.dumps(memories))
        self.local_found = 0.0


def _checked(alert: object) -> Alert:
    if not isinstance(alert, Alert):
        raise TypeError(f"a rule returns Alerts, texts or None, not {alert!r}")
    return alert


def _identity(rule: Rule) -> str:
    """Return what tells a rule from others, and is the same in every process."""
    text = repr(rule)
    if " at 0x" not in text:
        return text
    named = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{named.__module__}.{named.__qualname__}"
