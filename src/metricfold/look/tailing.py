"""The newest records of a run, a line each, while they come."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from metricfold.look.choosing import chosen, is_loss, main_statistic
from metricfold.look.place import LookError
from metricfold.look.reading import Key, RunFile, Update, read
from metricfold.look.text import Terminal, cut, figure
from metricfold.metric import escaped
from metricfold.sinks.drawing import clock

__all__ = ["tail"]

_EVERY = 0.5  # seconds between looks
_MOST = 12  # numbers of a line that nobody has asked for


def tail(
    path: str | os.PathLike[str],
    names: Sequence[str] = (),
    *,
    lines: int = 10,
    follow: bool = False,
    terminal: Terminal | None = None,
    every: float = _EVERY,
) -> Iterator[str]:
    """Yield the last records of a run as lines, and with `follow` each one that is added.

    Args:
        path: a run file or its folder; with `follow` it may still have to come.
        names: which metrics, as `metricfold show` takes them; without any the losses, and others as
            far as there is room.
        lines: how many of the records that are there.
        follow: go on for ever.
        terminal: what the lines are for; without one they are as long as they are.
        every: seconds between looks at the file.

    Raises:
        LookError: there is no such run or metric.
    """
    run = _opened(path, follow, every)
    teller = _Teller(run, names, terminal, patient=follow)
    yield from teller.told(max(run.records - lines, 0))
    gone = False
    while follow:
        time.sleep(every)
        before = run.last_step
        update: Update = run.update()
        if update.gone and not gone:
            yield f"-- {escaped(str(run.path))} is gone; waiting for a new one"
        gone = update.gone
        if update.reset:
            yield (
                f"-- the file was cut or begun anew after step {before}, and is now at step "
                f"{run.last_step}"
            )
            teller = _Teller(run, names, terminal, patient=follow)
            yield from teller.told(max(run.records - lines, 0))
        elif update.records:
            yield from teller.told(run.records - update.records)


def _opened(path: str | os.PathLike[str], follow: bool, every: float) -> RunFile:
    while True:
        try:
            return read(path)
        except LookError:
            if not follow or os.path.exists(path):  # noqa: PTH110 - it may be anything
                raise
        time.sleep(every)


class _Teller:
    def __init__(
        self, run: RunFile, names: Sequence[str], terminal: Terminal | None, *, patient: bool
    ) -> None:
        self.run, self.names, self.terminal = run, names, terminal
        self.patient = patient  # whether metrics may still have to come
        self._missing: set[str] = set()  # of which it has been said
        self._wanted: set[Key] | None = None
        self._known = 0

    def told(self, start: int) -> Iterator[str]:
        """Yield the lines of the records from one on."""
        if self.names and len(self.run.columns) != self._known:
            self._known = len(self.run.columns)
            self._wanted = set()
            for name in self.names:
                try:
                    self._wanted.update(chosen([self.run], [name]))
                except LookError as error:
                    if not self.patient:
                        raise
                    if name not in self._missing:
                        self._missing.add(name)
                        yield f"-- {error}; waiting for it"
        for number in range(start, self.run.records):
            step, when, prefix, values = self.run.record(number)
            line = self._line(step, when, prefix, values)
            if line is not None:
                yield line
            for alert in self.run.alerts_of(number):
                said = escaped(" ".join(str(alert.get("message", "")).split()))
                yield self._fit(
                    f"step {step:,}  ALERT ({alert.get('severity', 'warning')}): {said}", "alarm"
                )

    def _line(self, step: int, when: float, prefix: str, values: dict[Key, float]) -> str | None:
        if self._wanted is not None:
            keys = [key for key in values if key in self._wanted]
        else:
            keys = sorted(filter(main_statistic, values), key=_importance)[:_MOST]
        if not keys:
            return None
        parts = [f"step {step:,}", *filter(None, (clock(when), escaped(prefix)))]
        bad = False
        last = None
        for key in keys:
            value = values[key]
            bad = bad or value - value != 0
            name = f"{key.name} {key.statistic}".rstrip()
            label = f"{key.dataset} " if key.dataset else ""
            # A name that several datasets have is said once.
            shown = f"{label}{figure(value)}" if name == last else f"{name} {label}{figure(value)}"
            parts.append(escaped(shown))
            last = name
        return self._fit("  ".join(parts), "alarm" if bad else "")

    def _fit(self, text: str, style: str) -> str:
        if self.terminal is None:
            return text
        text = self.terminal.written(text)
        return self.terminal.paint(cut(text, self.terminal.width), style)


def _importance(key: Key) -> tuple[bool, str, bool]:
    first = key.name if not is_loss(key.name) else ""
    return (not is_loss(key.name), first, key.dataset != "")
