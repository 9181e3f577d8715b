"""A comparison as a page of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from metricfold.look.choosing import title
from metricfold.look.comparing import Comparison, Row
from metricfold.look.text import Terminal, columns, cut, figure, steps
from metricfold.metric import escaped

__all__ = ["as_text"]

_MOST_ALSO = 6
_MOST_NAMED = 3
_STYLES = {"better": "green", "worse": "red", "+": "", "-": "", "=": "", "?": "dim"}
_LABEL = 14


def as_text(found: Comparison, terminal: Terminal | None = None) -> str:
    """Return what `metricfold compare` prints."""
    terminal = terminal or Terminal()
    lines = []
    for name, label, last, records in zip(
        "AB", (found.a, found.b), found.steps, found.records, strict=True
    ):
        said = f"  {escaped(label)} · step {steps(last)} · {records:,} records"
        lines.append(terminal.paint(name, "bold") + cut(said, terminal.width - 1))
    lines.append("")
    for group, rows in groupby(found.rows, key=lambda row: (row.prefix, row.name, row.statistic)):
        lines += [*_table(title(group), list(rows), terminal), ""]
    if not found.rows:
        lines += ["A and B have no metric in common of which it is known which way is better", ""]
    lines += _notes(found, terminal)
    return "\n".join(terminal.written(line).rstrip() for line in lines) + "\n"


def _table(name: str, rows: Sequence[Row], terminal: Terminal) -> list[str]:
    directed = any(row.best_a is not None for row in rows)
    head = [escaped(name), "A", "B", "B − A", "± 95 %", ""]
    beside = ["area", "apart since", "crossed at"]
    bests = ["A best", "B best"] if directed else []
    cells = [head + bests + beside]
    cells += [
        [
            escaped(row.dataset or "all"),
            figure(row.a),
            figure(row.b),
            _signed(row.difference),
            _error(row.error),
            row.verdict,
            *([figure(row.best_a), figure(row.best_b)] if directed else []),
            _signed(row.area),
            steps(row.apart_since),
            steps(row.crossed_at),
        ]
        for row in rows
    ]
    # What matters least goes first where there is no room.
    for name_of_column in ("A best", "B best", "area", "crossed at", "apart since"):
        if max(map(len, columns(cells, left=(0, 5)))) <= terminal.width:
            break
        if name_of_column in cells[0]:
            place = cells[0].index(name_of_column)
            cells = [[*line[:place], *line[place + 1 :]] for line in cells]
    spare = terminal.width - max(map(len, columns(cells, left=(0, 5))))
    if spare < 0:
        room = max(8, max(len(line[0]) for line in cells) + spare)
        cells = [[cut(line[0], room), *line[1:]] for line in cells]
    for line, row in zip(cells[1:], rows, strict=True):
        line[5] = terminal.paint(line[5], _STYLES[row.verdict])
    lines = columns(cells, left=(0, 5))
    lines[0] = terminal.paint(lines[0], "bold")
    return lines


def _error(value: float | None) -> str:
    if value is None or not 1e-4 <= value < 100:
        return figure(value, 3)
    return f"{value:#.2g}".rstrip(".")


def _signed(value: float) -> str:
    if value == 0 or value != value:  # noqa: PLR0124 - NaN
        return figure(value)
    digits = 3 if abs(value) < 1 else 4
    text = figure(abs(value), digits)
    return ("−" if value < 0 else "+") + text


def _notes(found: Comparison, terminal: Terminal) -> list[str]:
    notes: list[tuple[str, str, str]] = []
    if not found.in_common:
        notes.append(("differ", "in all: they have no step of the same metric in common", ""))
    elif found.first_difference is None:
        notes.append(
            ("equal", "every value of every step that both have is the same, to the bit", "")
        )
    else:
        step, key = found.first_difference
        notes.append(("differ", f"first at step {step:,}, in {escaped(key)}", ""))
    short = {row.last_step for row in found.rows if row.last_step is not None}
    ends = {one for one in found.steps if one is not None}
    if short and len(ends) == 2 and max(short) < max(ends):
        longer = "A" if found.steps[0] == max(ends) else "B"
        notes.append(
            ("compared", f"up to step {max(short):,}; {longer} goes on to step {max(ends):,}", "")
        )
    if found.data is None:
        notes.append(("data", "not known: neither counts tokens or samples", "dim"))
    elif found.data:
        notes.append(("data", "as many tokens and samples in both at every step", ""))
    else:
        assert found.data_differs is not None
        step, key = found.data_differs
        notes.append(("data", f"not the same from step {step:,} on, in {escaped(key)}", ""))
    if found.settings is None:
        notes.append(("settings", "not recorded: MetricsLogger(config=…) does", "dim"))
    elif not found.settings:
        notes.append(("settings", "the same", ""))
    else:
        pairs = [
            f"{escaped(name)} {_setting(a)} → {_setting(b)}"
            for name, (a, b) in found.settings.items()
        ]
        notes.append(("settings", " · ".join(pairs), ""))
    for run, bad in zip("AB", found.not_finite, strict=True):
        if bad:
            named = [
                f"{escaped(key)} at step {step:,}" for key, step in [*bad.items()][:_MOST_NAMED]
            ]
            more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
            notes.append(("not finite", f"{run}: {', '.join(named)}{more}", "alarm"))
    for run, only in zip("AB", found.only, strict=True):
        if only:
            more = f" and {len(only) - _MOST_NAMED:,} more" if len(only) > _MOST_NAMED else ""
            notes.append((f"only in {run}", ", ".join(map(escaped, only[:_MOST_NAMED])) + more, ""))
    for row in found.also[:_MOST_ALSO]:
        said = f"{escaped(row.key)} {figure(row.a)} → {figure(row.b)}"
        notes.append(("also" if row is found.also[0] else "", said, ""))
    if len(found.also) > _MOST_ALSO:
        notes.append(
            ("", f"… and {len(found.also) - _MOST_ALSO:,} more metrics, by more than 1 %", "dim")
        )
    lines = []
    for label, said, style in notes:
        first, *rest = _broken(said, terminal.width - _LABEL)
        lines.append(terminal.paint(f"{label:<{_LABEL}}", "bold") + terminal.paint(first, style))
        lines += [" " * _LABEL + terminal.paint(line, style) for line in rest]
    return lines


def _setting(value: object) -> str:
    if value is None:
        return "–"
    return escaped(cut(" ".join(str(value).split()), 40)) if value != "" else "''"


def _broken(text: str, room: int) -> list[str]:
    """Return `text` in lines that fit."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [cut(line, room) for line in lines]
