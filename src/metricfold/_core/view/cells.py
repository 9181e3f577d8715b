"""Cells: before anything is shown, a result whose metrics have axes becomes one of plain metrics.

    expert_tokens[layer=24,expert=64]        {name}              all cells in one
        by={"expert_tokens": "layer"}        {name}/layer_07     those of each layer in one

What shows results, rolls them up or derives from them knows plain metrics alone. Cells merge with one
another as states of ranks do; only then is anything divided or rooted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from metricfold._core.exchange.reducer import Reduced
from metricfold._core.fold.axes import Axes, united
from metricfold._core.fold.builtin import folds_as
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.kinds import kind_of_parts, parts_of
from metricfold._core.fold.names import show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT, NANS, ReducedState, ReducedStates, State
from metricfold._core.reduce.schema import Entry, Key, Schema
from metricfold._core.reduce.totals import NOBODY, IntArray, Rows, Totals

__all__ = ["By", "Folding", "array_of", "axes_by", "bad_cells", "check_by"]

By: TypeAlias = "str | Sequence[str] | Mapping[str, str | Sequence[str]]"
"""Axes that remain: of each metric by name, or of every metric that has them."""


def check_by(by: object) -> None:
    """Raise TypeError for what names no axes."""
    for names in by.values() if isinstance(by, Mapping) else [by]:
        given = [names] if isinstance(names, str) else names
        if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
            raise TypeError(
                f"by={by!r:.80}: name an axis, several, or for each metric its own, such as "
                "{'expert_tokens': 'layer'}"
            )


def axes_by(by: By, name: str, axes: Axes) -> tuple[int, ...]:
    """Return which of a metric's axes remain, as places among them; empty if none does."""
    wanted = by.get(name, ()) if isinstance(by, Mapping) else by
    names = [wanted] if isinstance(wanted, str) else [*wanted]
    there = [axis.name for axis in axes]
    if isinstance(by, Mapping):
        unknown = [one for one in names if one not in there]
        if unknown:
            raise ValueError(
                f"by= names the axis {unknown[0]!r} of metric {name!r}, which has {there}"
            )
    return tuple(there.index(one) for one in names if one in there)


class _Lanes(NamedTuple):
    """Lanes of cells, with whose the maxima are: shapes (..., cells, n), (..., cells, m)."""

    sums: FloatArray
    maxs: FloatArray
    owners: IntArray
    tied: IntArray

    def kept(self, axes: Axes, keep: Sequence[int]) -> _Lanes:
        """Return the lanes of what remains along some axes, all cells along the others in one."""
        shape = [axis.length for axis in axes]
        rest = [place for place in range(len(axes)) if place not in keep]
        left = math.prod(shape[place] for place in keep)

        others = math.prod(shape) // left

        def apart(lanes: Any) -> Any:
            before, width = lanes.shape[:-2], lanes.shape[-1]
            laid = lanes.reshape(*before, *shape, width)
            order = [
                *range(len(before)),
                *(len(before) + one for one in (*keep, *rest)),
                laid.ndim - 1,
            ]
            return laid.transpose(order).reshape(*before, left, others, width)

        sums, maxs, owners, tied = map(apart, self)
        top = maxs.max(axis=-2)
        same = (maxs == top[..., np.newaxis, :]) | np.isnan(maxs)
        owned = same & (owners != NOBODY)
        first = np.where(owned, owners, np.iinfo(np.int64).max).min(axis=-2, initial=2**62)
        return _Lanes(
            sums.sum(axis=-2),
            top,
            np.where(owned.any(axis=-2), first, NOBODY),
            np.where(owned, tied, 0).max(axis=-2, initial=0),
        )


class _Part(NamedTuple):
    """One metric with axes: what becomes of its cells.

    Args:
        entry: how it travelled.
        handler: its own.
        views: axes that remain, and the keys that their cells are then.
    """

    entry: Entry
    handler: LaneHandler
    views: Sequence[tuple[tuple[int, ...], Sequence[Key]]]


class Folding:
    """How results of a schema become such of plain metrics.

    Args:
        schema: the agreed one.
        of_key: the handler of each key.
        by: which axes remain.

    Attributes:
        schema: the plain one.
        of_key: the handler of each of its keys.
    """

    def __init__(
        self, schema: Schema, of_key: Mapping[Key, AggregationHandler], by: By = ()
    ) -> None:
        self.whole, self.by, self.handled = schema, by, of_key
        self.of_key = dict(of_key)
        self._parts: list[_Part] = []
        entries: list[Entry] = []
        for entry in schema:
            if not entry.axes or entry.key not in of_key:
                entries.append(entry)
                continue
            plain = _plain(entry)
            views: list[tuple[tuple[int, ...], Sequence[Key]]] = [((), [entry.key])]
            keep = axes_by(by, entry.key[1], entry.axes)
            if keep:
                views.append((keep, [*_keys(entry, keep)]))
            for _, keys in views:
                entries += [plain._replace(key=key) for key in keys]
                self.of_key.update(dict.fromkeys(keys, of_key[entry.key]))
            self._parts.append(_Part(entry, of_key[entry.key].laned(), views))
        self.schema = Schema(entries)
        same = {part.entry.key for part in self._parts}
        self._same = Schema(entry for entry in schema if entry.key not in same)
        self._from, self._to = schema.lanes_from(self._same), self.schema.lanes_from(self._same)

    def reduced(self, reduced: Reduced) -> Reduced:
        """Return a result of plain metrics."""
        return replace(
            reduced,
            schema=self.schema,
            run=self.totals(reduced.run),
            interval=self.totals(reduced.interval),
            rows=self.rows(reduced.rows),
        )

    def totals(self, totals: Totals) -> Totals:
        """Return totals of plain metrics."""
        plain = Totals.empty(self.schema)
        (sums, maxs), (to_sums, to_maxs) = self._from, self._to
        exact = totals.exact_sums()
        plain.sums[to_sums], plain.lost[to_sums] = totals.sums[sums], totals.lost[sums]
        for mine, whole in zip(_maxima(plain), _maxima(totals), strict=True):
            mine[to_maxs] = whole[maxs]
        for part in self._parts:
            own, tops = self.whole.sums[part.entry.key], self.whole.maxs[part.entry.key]
            lanes = _lanes(part, exact[own], *(one[tops] for one in _maxima(totals)))
            for keep, keys in part.views:
                for key, *found in zip(keys, *lanes.kept(part.entry.axes, keep), strict=True):
                    plain.sums[self.schema.sums[key]] = found[0]
                    for mine, one in zip(_maxima(plain), found[1:], strict=True):
                        mine[self.schema.maxs[key]] = one
        return replace(plain, seconds=totals.seconds, pools=totals.pools)

    def rows(self, rows: Rows) -> Rows:
        """Return what each rank had of plain metrics, as far as it is known."""
        known = [part for part in self._parts if part.entry.key in rows.schema]
        keys = {key for part in known for _, some in part.views for key in some}
        keys |= {entry.key for entry in self._same if entry.key in rows.schema}
        schema = Schema(entry for entry in self.schema if entry.key in keys)
        plain = Rows(
            schema,
            np.zeros((len(rows.sums), schema.sum_width)),
            np.full((len(rows.sums), schema.max_width), -np.inf),
        )
        same = Schema(entry for entry in self._same if entry.key in rows.schema)
        (sums, maxs), (to_sums, to_maxs) = rows.schema.lanes_from(same), schema.lanes_from(same)
        plain.sums[:, to_sums], plain.maxs[:, to_maxs] = rows.sums[:, sums], rows.maxs[:, maxs]
        for part in known:
            own, tops = rows.schema.sums[part.entry.key], rows.schema.maxs[part.entry.key]
            maxima = rows.maxs[:, tops]
            nobody = np.full(maxima.shape, NOBODY)
            lanes = _lanes(part, rows.sums[:, own], maxima, nobody, nobody)
            for keep, some in part.views:
                found = lanes.kept(part.entry.axes, keep)
                for place, key in enumerate(some):
                    plain.sums[:, schema.sums[key]] = found.sums[:, place]
                    plain.maxs[:, schema.maxs[key]] = found.maxs[:, place]
        return plain


def _maxima(totals: Totals) -> tuple[Any, ...]:
    """Return what totals say of maxima."""
    return totals.maxs, totals.owners, totals.tied


def _lanes(part: _Part, sums: FloatArray, *maxima: Any) -> _Lanes:
    """Return a key's lanes by cell, settled."""
    entry = part.entry
    sums = sums.reshape(*sums.shape[:-1], entry.cells, entry.sums)
    maxs, owners, tied = (one.reshape(*one.shape[:-1], entry.cells, entry.maxs) for one in maxima)
    return _Lanes(*part.handler.settled(sums, maxs), owners, tied)


def _plain(entry: Entry) -> Entry:
    """Return the entry of one cell."""
    kind = kind_of_parts(parts_of(entry.kind)._replace(axes=""))
    suffixes = tuple(one for one in entry.suffixes if not one.startswith("/"))
    return entry._replace(kind=kind, axes=(), suffixes=suffixes)


def _keys(entry: Entry, keep: Sequence[int]) -> Iterable[Key]:
    """Yield the key of each cell along the axes that remain."""
    dataset, name = entry.key
    axes = [entry.axes[place] for place in keep]
    for names in product(*(axis.names() for axis in axes)):
        ends = [f"{axis.name}_{one}" for axis, one in zip(axes, names, strict=True)]
        yield dataset, "/".join([name, *ends])


def array_of(
    totals: Totals, keys: Sequence[Key], handler: LaneHandler, by: Sequence[str] | None
) -> tuple[FloatArray, tuple[tuple[str, ...], ...]]:
    """Return the results of a metric's cells, NaN where there are none, and what they are called.

    Args:
        totals: of the view.
        keys: whose cells are taken together.
        handler: of all of them.
        by: which axes remain, in this order; None: all.

    Raises:
        ValueError: there is no such axis.
    """
    entries = [totals.schema.entries[key] for key in keys]
    axes = entries[0].axes
    for entry in entries[1:]:
        axes = united(axes, entry.axes)
    names = [axis.name for axis in axes]
    for name in by or ():
        if name not in names:
            raise ValueError(
                f"{show(keys[0])} has the axes {', '.join(names) or 'none'}, but not {name!r}"
            )
    exact = totals.exact_sums()
    whole: State | None = None
    for entry in entries:
        sums = exact[totals.schema.sums[entry.key]].reshape(entry.cells, entry.sums)
        maxs = totals.maxs[totals.schema.maxs[entry.key]].reshape(entry.cells, entry.maxs)
        own = State.of_cells(sums, maxs, entry.axes)
        if whole is None:
            whole = own
        else:
            whole.merge(own)
    assert whole is not None
    all_sums, all_maxs = handler.settled(*whole.laid_out(axes))
    nobody = np.full(all_maxs.shape, NOBODY)
    keep = range(len(axes)) if by is None else [names.index(name) for name in by]
    lanes = _Lanes(all_sums, all_maxs, nobody, nobody).kept(axes, [*keep])
    values = _results(handler, lanes, totals.seconds)
    kept = [axes[place] for place in keep]
    return values.reshape([axis.length for axis in kept]), tuple(axis.names() for axis in kept)


def bad_cells(totals: Totals, key: Key, handler: LaneHandler) -> list[str]:
    """Return what the cells are called that are not finite, or had NaN left out."""
    axes = totals.schema.entries[key].axes
    part = _Part(totals.schema.entries[key], handler, ())
    own, tops = totals.schema.sums[key], totals.schema.maxs[key]
    lanes = _lanes(part, totals.exact_sums()[own], *(one[tops] for one in _maxima(totals)))
    values = _results(handler, lanes, totals.seconds)
    bad = (lanes.sums[:, COUNT] != 0) & (~np.isfinite(values) | (lanes.sums[:, NANS] != 0))
    labels = [axis.names() for axis in axes]
    shape = [axis.length for axis in axes]
    return [
        " ".join(
            f"{axis.name} {names[place]}"
            for axis, names, place in zip(axes, labels, places, strict=True)
        )
        for places in zip(*np.unravel_index(np.flatnonzero(bad), shape), strict=True)
    ]


def _results(handler: LaneHandler, lanes: _Lanes, seconds: float) -> FloatArray:
    """Return the result of each cell, NaN where there is none."""
    if folds_as(handler) is not None:
        states = ReducedStates(lanes.sums, lanes.maxs, np.full(len(lanes.sums), seconds))
        values, there = handler.finalize_all(states)
        having = there[:, 0] & (lanes.sums[:, COUNT] != 0)
        return np.where(having, values[:, 0], np.nan)
    found = np.full(len(lanes.sums), np.nan)
    for place in np.flatnonzero(lanes.sums[:, COUNT]).tolist():
        state = ReducedState(
            tuple(lanes.sums[place].tolist()), tuple(lanes.maxs[place].tolist()), seconds
        )
        found[place] = handler.finalize(state).get("", np.nan)
    return found
