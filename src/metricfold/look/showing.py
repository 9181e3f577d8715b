"""A run on one page of text: how far it is, what went wrong, and its curves."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from metricfold.look.chart import chart, sparkline
from metricfold.look.choosing import Group, chosen, grouped, main_statistic, title
from metricfold.look.reading import Column, Key, RunFile, read
from metricfold.look.text import Terminal, ago, columns, cut, figure, moment, steps, width
from metricfold.metric import escaped

__all__ = ["not_finite", "show"]

_CHART = 12  # lines of a chart
_MOST_CHARTS = 6
_MOST_ROWS = 12  # of one metric
_FEW_ROWS = 3  # of metrics that are a crowd, such as one for each expert
_MOST_GROUPS = 40
_WARM_UP = 0.05  # of a run, which a sparkline leaves out
_LONG = 100  # logs from which on there is one


def show(
    run: RunFile | str | os.PathLike[str],
    names: Sequence[str] = (),
    *,
    terminal: Terminal | None = None,
    log: bool = False,
    since: int | None = None,
) -> str:
    """Return a run as text: its curves in Braille, sparklines, last and best values.

    Args:
        run: what `read` has returned, or a path.
        names: which metrics, as `metricfold show --help` explains; without any the loss is drawn and
            the others are listed.
        terminal: what the text is for.
        log: whether the vertical axes of charts are logarithmic.
        since: the first step to show.

    Raises:
        LookError: there is no such run or metric.
    """
    run = run if isinstance(run, RunFile) else read(run)
    terminal = terminal or Terminal()
    page = _Page(run, terminal, log=log, since=since)
    lines = page.head() + page.troubles()
    if not run.columns:
        lines.append("nothing is logged yet")
    elif names:
        lines += page.asked(grouped(chosen([run], names)))
    else:
        lines += page.overview()
    return "\n".join(terminal.written(line) for line in lines) + "\n"


def not_finite(column: Column) -> tuple[int, int, int, float] | None:
    """Return how many values are not finite, the last such step, how many came since, and that value."""
    bad = np.flatnonzero(~np.isfinite(column.values))
    if not bad.size:
        return None
    last = int(bad[-1])
    return len(bad), int(column.steps[last]), len(column) - 1 - last, float(column.values[last])


class _Page:
    def __init__(self, run: RunFile, terminal: Terminal, *, log: bool, since: int | None) -> None:
        self.run, self.terminal, self.log = run, terminal, log
        self.since = since

    def column(self, key: Key) -> Column:
        column = self.run.columns[key].ordered()
        if self.since is None:
            return column
        keep = column.steps >= self.since
        return Column(
            column.printed,
            column.aggregation,
            column.steps[keep],
            column.wall_times[keep],
            column.values[keep],
        )

    # -- The head

    def head(self) -> list[str]:
        run, header, paint = self.run, self.run.header, self.terminal.paint
        total = header.get("total_steps")
        parts = [paint(escaped(run.label), "bold")]
        at = f"step {steps(run.last_step)}"
        if isinstance(total, int) and run.last_step is not None and total > 0:
            at += f" of {total:,} ({100 * run.last_step / total:.0f} %)"
        parts.append(at)
        if run.last_time is not None:
            parts.append(f"{moment(run.last_time)} ({ago(time.time() - run.last_time)} ago)")
        parts.append(f"{run.records:,} records")
        if isinstance(ranks := header.get("world_size"), int) and ranks > 1:
            parts.append(f"{ranks} ranks")
        if len(run.headers) > 1:
            parts.append(f"{len(run.headers)} starts")
        if run.torn:
            parts.append(f"{run.torn} broken lines left out")
        return [*_wrapped(parts, self.terminal.width, " · "), ""]

    def troubles(self) -> list[str]:
        """Return what was not finite, and the alerts."""
        found: list[tuple[int, str]] = []
        bad = {
            key: said
            for key, column in self.run.columns.items()
            if not key.statistic and (said := not_finite(column)) is not None
        }
        for key, (count, last, since, value) in bad.items():
            # A total is as bad as one of its datasets.
            parts = [part for one, part in bad.items() if one[:3:2] == key[:3:2] and one.dataset]
            if not key.dataset and any(part[1] >= last for part in parts):
                continue
            then = f"finite in the {since:,} logs since" if since else "still so in its last log"
            often = "" if count == 1 else f"{count:,} times not finite, last "
            name = escaped(self.run.columns[key].printed)
            found.append((last, f"{name}: {often}{figure(value)} at step {last:,}; {then}"))
        alerts = self.run.alerts
        if alerts:
            newest = alerts[-1]
            message = escaped(" ".join(str(newest.get("message", newest)).split()))
            many = f"{len(alerts):,} alerts, the last" if len(alerts) > 1 else "alert"
            found.append((1 << 62, f"{many} at step {steps(newest['step'])}: {message}"))
        found.sort(key=lambda one: -one[0])
        lines = [
            self.terminal.paint(cut(f" !  {text}", self.terminal.width), "alarm")
            for _, text in found[:_MOST_CHARTS]
        ]
        if len(found) > _MOST_CHARTS:
            lines.append(f"    … and {len(found) - _MOST_CHARTS} more that were not finite")
        return [*lines, ""] if lines else []

    # -- Curves

    def overview(self) -> list[str]:
        groups = grouped(key for key in self.run.columns if main_statistic(key))
        groups = groups or grouped(self.run.columns)
        lines: list[str] = []
        first = next(iter(groups.items()))
        lines += self.chart(first[0], first[1][0])
        several = {group: keys for group, keys in groups.items() if len(keys) > 1}
        alone = {group: keys for group, keys in groups.items() if len(keys) == 1}
        shown = dict(list(several.items())[:_MOST_GROUPS])
        for group, keys in shown.items():
            lines += self.table(title(group), keys)
        by_prefix: dict[str, list[Key]] = {}
        for keys in alone.values():
            by_prefix.setdefault(keys[0].prefix, []).append(keys[0])
        for prefix, keys in by_prefix.items():
            if keys == [first[1][0]] and not several:
                continue
            most = _MOST_ROWS if len(keys) <= 3 * _MOST_ROWS else _FEW_ROWS
            lines += self.table(prefix or "metrics", keys, most)
        return lines[:-1] if lines and not lines[-1] else lines

    def asked(self, groups: dict[Group, list[Key]]) -> list[str]:
        lines: list[str] = []
        charts = 0
        for group, keys in groups.items():
            drawn = keys[:1] if not keys[0].dataset else keys
            for key in drawn:
                if charts < _MOST_CHARTS:
                    lines += self.chart(group, key)
                charts += 1
        for group, keys in groups.items():
            lines += self.table(title(group), keys, most=None)
        return lines[:-1]

    def chart(self, group: Group, key: Key) -> list[str]:
        column, terminal = self.column(key), self.terminal
        name = title(group) + (f" · {key.dataset}" if key.dataset else "")
        kind = " (logarithmic)" if self.log else ""
        drawn = chart(
            column.steps,
            column.values,
            terminal.width,
            _CHART,
            log=self.log,
            plain=terminal.ascii,
        )
        return [terminal.paint(cut(escaped(name), terminal.width), "bold") + kind, *drawn, ""]

    def table(self, name: str, keys: Sequence[Key], most: int | None = _MOST_ROWS) -> list[str]:
        """Return the lines of a table with a row for each key."""
        terminal = self.terminal
        shown = self._most_important(keys, most)
        found = [self.column(key) for key in shown]
        one_metric = len({key.name for key in shown}) == 1 and len(shown) > 1
        ways = [self.run.better(key) for key in shown]
        directed = any(ways)
        roomy = terminal.width >= 100
        heads = [escaped(name), "last", *(["best", "at step"] if directed or roomy else [])]
        if not directed:
            heads[2:] = ["least", "greatest"] if roomy else []
        rows = [heads]
        for key, column, way in zip(shown, found, ways, strict=True):
            label = (key.dataset or "all") if one_metric else _label(key)
            row = [escaped(label), figure(float(column.values[-1])) if len(column) else "–"]
            finite = np.flatnonzero(np.isfinite(column.values))
            values = column.values[finite]
            if directed:
                place = None
                if way and len(values):
                    place = int(values.argmin() if way == "lower" else values.argmax())
                row += (
                    ["–", "–"]
                    if place is None
                    else [figure(float(values[place])), steps(int(column.steps[finite[place]]))]
                )
            elif roomy:
                row += (
                    [figure(float(values.min())), figure(float(values.max()))]
                    if len(values)
                    else ["–", "–"]
                )
            rows.append(row)
        rest = terminal.width - sum(
            max(len(row[i]) for row in rows) + 2 for i in range(1, len(heads))
        )
        room = max(min(rest - 14, max(len(row[0]) for row in rows)), 8)
        for row in rows:
            row[0] = cut(row[0], room)
        lines = columns(rows)
        left = terminal.width - max(map(len, lines)) - 2
        begin = self._warm(found)
        if left >= 8:
            aligned = columns([[line, "."] for line in lines], left=(0, 1))
            lines = [line[:-1] for line in aligned]
            since = f"since step {begin:,}" if begin else "curve"
            lines[0] += since if left >= len(since) else "curve"
            for place, column in enumerate(found, start=1):
                keep = column.steps >= begin
                curve = sparkline(
                    column.steps[keep], column.values[keep], min(left, 40), plain=terminal.ascii
                )
                lines[place] += _alarmed(curve, terminal)
        for place, column in enumerate(found, start=1):
            if len(column) and not np.isfinite(column.values[-1]):
                lines[place] = terminal.paint(
                    lines[place].replace("\x1b[1;31m", "").replace("\x1b[0m", ""), "alarm"
                )
        lines[0] = terminal.paint(lines[0], "bold")
        if len(shown) < len(keys):
            more = len(keys) - len(shown)
            said = "all of them" if one_metric else f"such as {escaped(_label(keys[-1]))}"
            hint = escaped(keys[0].name) if one_metric else f"'{escaped(name)}/*'"
            lines.append(
                terminal.paint(
                    cut(f"… {more:,} more, {said} by: show … {hint}", terminal.width), "dim"
                )
            )
        return [*(line.rstrip() for line in lines), ""]

    def _most_important(self, keys: Sequence[Key], most: int | None) -> list[Key]:
        """Return so many keys, in their order: all datasets together, and what is not finite, first."""
        if most is None or len(keys) <= most + 1:
            return list(keys)
        bad = [key for key in keys if key.dataset and not_finite(self.run.columns[key])]
        first = [key for key in keys if not key.dataset] if keys[0].dataset == "" else []
        wanted = dict.fromkeys([*first[:1], *bad, *keys])
        kept = set(list(wanted)[:most])
        return [key for key in keys if key in kept]

    def _warm(self, found: Sequence[Column]) -> int:
        """Return the step from which on a sparkline shows anything of the end; 0: all is shown."""
        longest = max(found, key=len)
        if len(longest) < _LONG:
            return 0
        return int(longest.steps[int(len(longest) * _WARM_UP)])


def _label(key: Key) -> str:
    name = f"{key.name} {key.statistic}" if key.statistic else key.name
    return f"{key.dataset}/{name}" if key.dataset else name


def _alarmed(curve: str, terminal: Terminal) -> str:
    return curve.replace("!", terminal.paint("!", "alarm")) if terminal.colour else curve


def _wrapped(parts: Sequence[str], room: int, between: str) -> list[str]:
    """Return parts in as few lines as they fit into."""
    lines = [parts[0]]
    for part in parts[1:]:
        if width(lines[-1]) + len(between) + width(part) <= room:
            lines[-1] += between + part
        else:
            lines.append(part)
    return lines
