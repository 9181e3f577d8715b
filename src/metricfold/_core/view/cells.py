"""Cells: before anything is shown, a result whose metrics have axes becomes one of plain metrics.

    expert_tokens[layer=24,expert=64]        {name}              all cells in one
        by={"expert_tokens": "layer"}        {name}/layer_07     those of each layer in one
        by={"expert_tokens": "rank"}         {name}/rank_3       what each rank had of the interval

What shows results, rolls them up or derives from them knows plain metrics alone. Cells merge with one
another as states of ranks do; only then is anything divided or rooted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import compress, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from metricfold._core.exchange.reducer import Reduced
from metricfold._core.fold.axes import RANK, Axes, Axis, united
from metricfold._core.fold.builtin import folds_as
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.kinds import kind_of_parts, parts_of
from metricfold._core.fold.names import show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT, NANS, ReducedState, ReducedStates, State, quiet
from metricfold._core.reduce.schema import Entry, IndexArray, Key, Schema
from metricfold._core.reduce.totals import NOBODY, IntArray, Rows, Totals
from metricfold._core.view.windows import View

__all__ = [
    "By",
    "Cells",
    "Folding",
    "Found",
    "cells_along",
    "check_axes",
    "check_by",
    "not_by_rank",
]

By: TypeAlias = "str | Sequence[str] | Mapping[str, str | Sequence[str]]"
"""Axes that remain: of each metric by name, or of every metric that has them."""

Found: TypeAlias = "tuple[FloatArray, Axes]"
"""Results of cells, NaN where there is none, and the axes along which they stand."""


def check_by(by: object) -> By:
    """Return `by`, which cannot change any more.

    Raises:
        TypeError: it names no axes.
        ValueError: it names one twice.
    """
    of_name = by if isinstance(by, Mapping) else {"": by}
    for name in of_name:
        if not isinstance(name, str):
            raise TypeError(f"by={by!r:.80}: {name!r} is no name of a metric")
    known = {name: check_axes(names, by) for name, names in of_name.items()}
    return known if isinstance(by, Mapping) else known[""]


def check_axes(names: object, by: object = None) -> tuple[str, ...]:
    """Return the names of axes, of one metric; errors as `check_by`, of which it may be a part."""
    by = names if by is None else by
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise TypeError(
            f"by={by!r:.80}: name an axis, several, or for each metric its own, such as "
            "{'expert_tokens': 'layer'}"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"by={by!r:.80} names an axis twice")
    return tuple(given)


class _Lanes(NamedTuple):
    """Lanes of cells, with whose the maxima are: shapes (..., cells, n), (..., cells, m)."""

    sums: FloatArray
    maxs: FloatArray
    owners: IntArray
    tied: IntArray

    def of_ranks(self) -> _Lanes:
        """Return lanes of each rank, shapes (ranks, cells, n), as those of so many cells more."""
        flat: list[Any] = [one.reshape(one.shape[0] * one.shape[1], one.shape[2]) for one in self]
        return _Lanes(*flat)

    def kept(self, axes: Axes, keep: Sequence[int]) -> _Lanes:
        """Return the lanes of what remains along some axes, all cells along the others in one."""
        shape = [axis.length for axis in axes]
        rest = [place for place in range(len(axes)) if place not in keep]
        left, others = (math.prod(shape[place] for place in some) for some in (keep, rest))

        def apart(lanes: Any) -> Any:
            before, width = lanes.shape[:-2], lanes.shape[-1]
            laid = lanes.reshape(*before, *shape, width)
            first = len(before)
            order = [*range(first), *(first + one for one in (*keep, *rest)), laid.ndim - 1]
            return laid.transpose(order).reshape(*before, left, others, width)

        sums, maxs, owners, tied = map(apart, self)
        top = maxs.max(axis=-2, initial=-np.inf)
        same = (maxs == top[..., np.newaxis, :]) | np.isnan(maxs)
        owned = same & (owners != NOBODY)
        first = np.where(owned, owners, np.iinfo(np.int64).max).min(axis=-2, initial=2**62)
        with quiet():
            # Along the last axis, and so pairwise: rounding hardly grows with their number.
            added = np.ascontiguousarray(sums.swapaxes(-1, -2)).sum(axis=-1)
        return _Lanes(
            added,
            top,
            np.where(owned.any(axis=-2), first, NOBODY),
            np.where(owned, tied, 0).max(axis=-2, initial=0),
        )


class _View(NamedTuple):
    """What is shown of a metric's cells.

    Args:
        axes: of the metric, before which that of the ranks may stand.
        keep: which of these remain, in the order in which they are named.
        keys: what the cells that remain are then, in C order.
    """

    axes: Axes
    keep: tuple[int, ...]
    keys: tuple[Key, ...]

    @property
    def by_rank(self) -> bool:
        return self.axes[:1] != () and self.axes[0].name == RANK

    def ranks(self) -> IntArray:
        """Return the rank of each of its cells."""
        shape = [self.axes[place].length for place in self.keep]
        found: IntArray = np.indices(shape)[self.keep.index(0)].reshape(-1).astype(np.int64)
        return found


class _Part(NamedTuple):
    """One metric whose cells, or ranks, are shown: its entry, its handler, and as what."""

    entry: Entry
    handler: LaneHandler
    views: tuple[_View, ...]


class Folding:
    """How results of a schema become such of plain metrics.

    Args:
        schema: the agreed one.
        of_key: the handler of each key.
        by: which axes remain.
        world_size: the number of ranks.

    Attributes:
        schema: the plain one.
        of_key: the handler of each of its keys.
        wrong: what `by` asks for and cannot be, in words.
        unmatched: what it names that is not there: metrics, or axes that none has.
    """

    def __init__(
        self, schema: Schema, of_key: Mapping[Key, AggregationHandler], by: By, world_size: int
    ) -> None:
        self.whole, self.by, self.handled, self.world_size = schema, by, of_key, world_size
        self.of_key = dict(of_key)
        self.wrong: list[str] = []
        self._parts: list[_Part] = []
        entries: list[Entry] = []
        for entry in schema:
            views = self._views(entry) if entry.key in of_key and not entry.custom else ()
            if not entry.axes or not views:
                entries.append(entry)
            if not views:
                continue
            plain = _plain(entry)
            for view in views:
                entries += [plain._replace(key=key) for key in view.keys]
                self.of_key.update(dict.fromkeys(view.keys, of_key[entry.key]))
            self._parts.append(_Part(entry, of_key[entry.key].laned(), views))
        self.schema = Schema(entries)
        there = {axis.name for entry in schema for axis in entry.axes} | {RANK}
        if isinstance(by, Mapping):
            there = {entry.key[1] for entry in schema}
        self.unmatched = [name for name in by if name not in there]
        self._ways = [_Way(schema, self.schema, self._parts)]

    def _views(self, entry: Entry) -> tuple[_View, ...]:
        """Return what is shown of a metric besides itself, or in its place if it has cells."""
        views = [_View(entry.axes, (), (entry.key,))] if entry.axes else []
        name = entry.key[1]
        asked = isinstance(self.by, Mapping)
        wanted: Any = self.by.get(name, ()) if isinstance(self.by, Mapping) else self.by
        rank = Axis(RANK, self.world_size)
        axes = (rank, *entry.axes) if RANK in wanted and _may_be_by_rank(entry) else entry.axes
        there = [axis.name for axis in axes]
        unknown = [one for one in wanted if one not in there]
        if asked and unknown:
            self.wrong.append(
                f"by= names the axis {unknown[0]!r} of {show(entry.key)}, which has "
                + (", ".join(map(repr, there)) or "none")
            )
        keep = tuple(there.index(one) for one in wanted if one in there)
        # Without all that is asked for it would be another number under the name of a cell.
        if keep and not (asked and unknown):
            view = _View(axes, keep, tuple(_keys(entry.key, [axes[place] for place in keep])))
            if taken := [key for key in view.keys if key in self.whole]:
                self.wrong.append(
                    f"by= would print {show(taken[0])}, which is a metric of its own: give that "
                    "another name"
                )
            else:
                views.append(view)
        return tuple(views)

    def said(self, rows: Rows) -> list[str]:
        """Return what `by` asks for and cannot be of a result, in words."""
        unknown = [
            not_by_rank(part.entry.key)
            for part in self._parts
            if any(view.by_rank for view in part.views) and part.entry.key not in rows.schema
        ]
        return [*self.wrong, *(unknown if isinstance(self.by, Mapping) else ())]

    def reduced(self, reduced: Reduced) -> Reduced:
        """Return a result of plain metrics."""
        whole, schema = self._ways[0], reduced.rows.schema
        own_way = self._ways[-1]  # another thread may look at another result
        if own_way.source is not schema:
            plain = Schema(self._known(schema)) if schema is not self.whole else self.schema
            own_way = _Way(schema, plain, self._parts)
            self._ways[1:] = [own_way]
        interval, rows = whole.totals(reduced.interval), own_way.rows(reduced.rows)
        # What is each rank's own.
        for part in self._parts:
            for view in part.views:
                if view.by_rank and part.entry.key in schema:
                    own, of_interval = own_way.places(view), whole.places(view)
                    ranks = view.ranks()[:, np.newaxis]
                    interval.sums[of_interval[0]] = rows.sums[ranks, own[0]]
                    interval.maxs[of_interval[1]] = rows.maxs[ranks, own[1]]
                    having = interval.sums[of_interval[0]][:, [COUNT]] != 0
                    interval.owners[of_interval[1]] = np.where(having, ranks, NOBODY)
                    interval.tied[of_interval[1]] = having
        run = whole.totals(reduced.run)
        return replace(reduced, schema=self.schema, run=run, interval=interval, rows=rows)

    def _known(self, schema: Schema) -> Iterator[Entry]:
        """Yield the plain entries of what a part of the schema has."""
        shown = {part.entry.key: part.views for part in self._parts}
        for entry in schema:
            if not entry.axes or entry.key not in shown:
                yield entry
            for view in shown.get(entry.key, ()):
                yield from (self.schema.entries[key] for key in view.keys)


class _Way:
    """Where lanes go.

    Args:
        source: the lanes that are given, of all keys or of some.
        target: the plain ones.
        parts: metrics that are shown otherwise.
    """

    def __init__(self, source: Schema, target: Schema, parts: Sequence[_Part]) -> None:
        self.source, self.target = source, target
        self._parts = [part for part in parts if part.entry.key in source]
        cells = {part.entry.key for part in parts if part.entry.axes}
        same = Schema(entry for entry in source if entry.key not in cells)
        self._from, self._to = source.lanes_from(same), target.lanes_from(same)
        self._places = {
            view.keys: (
                _places([target.sums[key] for key in view.keys]),
                _places([target.maxs[key] for key in view.keys]),
            )
            for part in self._parts
            for view in part.views
        }

    def places(self, view: _View) -> tuple[IndexArray, IndexArray]:
        """Return where the SUM and the MAX lanes of each key of a view are."""
        return self._places[view.keys]

    def totals(self, totals: Totals) -> Totals:
        """Return totals of plain metrics; what is each rank's own is not there."""
        plain = Totals.empty(self.target)
        (sums, maxs), (to_sums, to_maxs) = self._from, self._to
        plain.sums[to_sums], plain.lost[to_sums] = totals.sums[sums], totals.lost[sums]
        for mine, whole in zip(_maxima(plain), _maxima(totals), strict=True):
            mine[to_maxs] = whole[maxs]
        for part in self._parts:
            own, tops = self.source.sums[part.entry.key], self.source.maxs[part.entry.key]
            exact = totals.sums[own] + totals.lost[own]
            lanes = _lanes(part, exact, *(one[tops] for one in _maxima(totals)))
            for view in part.views:
                if view.by_rank:
                    continue
                found, (at, top) = lanes.kept(view.axes, view.keep), self._places[view.keys]
                plain.sums[at] = found.sums
                for mine, one in zip(_maxima(plain), found[1:], strict=True):
                    mine[top] = one
        return replace(plain, seconds=totals.seconds, pools=totals.pools)

    def rows(self, rows: Rows) -> Rows:
        """Return what each rank had of plain metrics."""
        (sums, maxs), (to_sums, to_maxs) = self._from, self._to
        plain = Rows(
            self.target,
            np.zeros((len(rows.sums), self.target.sum_width)),
            np.full((len(rows.sums), self.target.max_width), -np.inf),
        )
        plain.sums[:, to_sums], plain.maxs[:, to_maxs] = rows.sums[:, sums], rows.maxs[:, maxs]
        for part in self._parts:
            own, tops = self.source.sums[part.entry.key], self.source.maxs[part.entry.key]
            maxima = rows.maxs[:, tops]
            nobody = np.full(maxima.shape, NOBODY)
            lanes = _lanes(part, rows.sums[:, own], maxima, nobody, nobody)
            for view in part.views:
                at, top = self._places[view.keys]
                if view.by_rank:
                    ranks = view.ranks()[:, np.newaxis]
                    found = lanes.of_ranks().kept(view.axes, view.keep)
                    plain.sums[ranks, at], plain.maxs[ranks, top] = found.sums, found.maxs
                else:
                    found = lanes.kept(view.axes, view.keep)
                    plain.sums[:, at], plain.maxs[:, top] = found.sums, found.maxs
        return plain


def _places(slices: Sequence[slice]) -> IndexArray:
    """Return all places of lanes that are equally many, shape (k, n)."""
    starts = np.array([lanes.start for lanes in slices], dtype=np.intp)
    width = slices[0].stop - slices[0].start if slices else 0
    found: IndexArray = np.add.outer(starts, np.arange(width))
    return found


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


def _may_be_by_rank(entry: Entry) -> bool:
    """Return whether the lanes of a metric are all that it is, so that a rank's own make a result."""
    return not (entry.custom or entry.distributed or parts_of(entry.kind).counts)


def _keys(key: Key, axes: Sequence[Axis]) -> Iterable[Key]:
    """Yield the key of each cell along the axes that remain."""
    dataset, name = key
    for cell in cells_along(axes):
        yield dataset, "/".join([name, *cell])


def cells_along(axes: Sequence[Axis]) -> Iterable[tuple[str, ...]]:
    """Yield what each cell is called along each axis, such as ``layer_07``."""
    return product(*([f"{axis.name}_{one}" for one in axis.names()] for axis in axes))


def not_by_rank(key: Key) -> str:
    """Return what to say of a metric that is not known per rank."""
    return (
        f"{show(key)} is not known per rank: so many ranks merge their values on the way. "
        "Record it with per_rank=True"
    )


class Cells:
    """The results of each cell of metrics that have axes.

    Args:
        reduced: of all metrics, as they travelled.
        of_key: the handler of each.
    """

    def __init__(self, reduced: Reduced, of_key: Mapping[Key, AggregationHandler]) -> None:
        self.reduced, self.of_key = reduced, of_key
        self._found: dict[tuple[Any, ...], Found | None] = {}

    @cached_property
    def there(self) -> list[Key]:
        """The metrics that have axes, with whatever values."""
        schema = self.reduced.schema
        return [entry.key for entry in schema if entry.axes and entry.key in self.of_key]

    def names(self) -> str:
        """Return the names of all metrics, for messages."""
        return ", ".join(sorted({key[1] for key in self.of_key}))

    def having(self, key: Key, view: View) -> bool:
        """Return whether any cell has a value."""
        totals = self._totals(view)
        entry = totals.schema.entries[key]
        counts = totals.sums[totals.schema.sums[key]][COUNT :: entry.sums]
        return bool(counts.any())

    def of(self, keys: Sequence[Key], view: View) -> Found | None:
        """Return the results of cells that several metrics have together, computed once.

        None: none has a value, or they differ in their axes. Nobody may change what is returned.
        """
        asked = (*keys, view)
        if asked not in self._found:
            entries = [self.reduced.schema.entries[key] for key in keys]
            alike = len({entry.kind for entry in entries}) == 1 and entries[0].axes
            there = [key for key in keys if alike and self.having(key, view)]
            found = self.array(there, view, None) if there else None
            if found is not None:
                found[0].flags.writeable = False
            self._found[asked] = found
        return self._found[asked]

    def array(self, keys: Sequence[Key], view: View, by: Sequence[str] | None) -> Found:
        """Return the results of cells.

        Args:
            keys: whose cells are taken together.
            view: what they speak about.
            by: which axes remain, in this order; None: all that the metric has.

        Raises:
            ValueError: there is no such axis, or ranks' own values are not known.
        """
        entries = [self.reduced.schema.entries[key] for key in keys]
        ranked = by is not None and RANK in by
        axes = self._axes(entries, ranked=ranked)
        names = [axis.name for axis in axes][0 if ranked else 1 :]
        for name in by or ():
            if name not in names:
                raise ValueError(
                    f"{show(keys[0])} has the axes {', '.join(names) or 'none'}, but not {name!r}"
                )
        wanted = names if by is None else by
        kept = tuple(next(axis for axis in axes if axis.name == name) for name in wanted)
        lanes = self._lanes(entries, view, axes, ranked=ranked).kept(
            axes, [axes.index(axis) for axis in kept]
        )
        values = self._results(entries[0], view, lanes)
        return values.reshape([axis.length for axis in kept]), kept

    def bad(self, key: Key) -> list[str]:
        """Return what cells of the interval are called that are not finite, or had NaN left out."""
        entry = self.reduced.schema.entries[key]
        axes = self._axes([entry], ranked=False)
        lanes = self._lanes([entry], "interval", axes, ranked=False)
        values = self._results(entry, "interval", lanes)
        bad = (lanes.sums[:, COUNT] != 0) & (~np.isfinite(values) | (lanes.sums[:, NANS] != 0))
        cells = product(*([f"{axis.name} {one}" for one in axis.names()] for axis in entry.axes))
        return [" ".join(cell) for cell in compress(cells, bad.tolist())]

    def _lanes(self, entries: Sequence[Entry], view: View, axes: Axes, *, ranked: bool) -> _Lanes:
        """Return the lanes of cells that several metrics have together, settled."""
        whole = self._own(entries[0], view, ranked=ranked)
        for entry in entries[1:]:
            whole.merge(self._own(entry, view, ranked=ranked))
        handler = self.of_key[entries[0].key].laned()
        sums, maxs = handler.settled(*whole.laid_out(axes))
        nobody = np.full(maxs.shape, NOBODY)
        return _Lanes(sums, maxs, nobody, nobody)

    def _results(self, entry: Entry, view: View, lanes: _Lanes) -> FloatArray:
        handler, seconds = self.of_key[entry.key].laned(), self._totals(view).seconds
        with quiet():
            return _results(handler, entry, lanes, seconds)

    def _totals(self, view: View) -> Totals:
        return self.reduced.run if view == "run" else self.reduced.interval

    def _axes(self, entries: Sequence[Entry], *, ranked: bool) -> Axes:
        """Return the axes of all of these together, behind that of the ranks; merged, they are one."""
        first = entries[0]
        axes: Axes = first.axes
        for entry in entries[1:]:
            if entry.kind != first.kind:
                raise ValueError(
                    f"{show(first.key)} is {first.described}, but {show(entry.key)} is "
                    f"{entry.described}: their cells are not the same, so ask for one dataset"
                )
            axes = united(axes, entry.axes)
        if len(entries) > 1 and first.latest:
            raise ValueError(
                f"{show(first.key)} is a LAST, of which there is no total: ask for one dataset"
            )
        return Axis(RANK, self.reduced.world_size if ranked else 1), *axes

    def _own(self, entry: Entry, view: View, *, ranked: bool) -> State:
        """Return the cells of one metric, merged over the ranks, or those that each rank has."""
        key, rows, totals = entry.key, self.reduced.rows, self._totals(view)
        if not ranked:
            at, top = totals.schema.sums[key], totals.schema.maxs[key]
            sums, maxs = (
                (totals.sums[at] + totals.lost[at])[np.newaxis],
                totals.maxs[np.newaxis, top],
            )
        elif key in rows.schema:
            sums, maxs = rows.sums[:, rows.schema.sums[key]], rows.maxs[:, rows.schema.maxs[key]]
        else:
            raise ValueError(not_by_rank(key))
        if entry.categories:  # whose lanes say nothing of a rank's result
            sums = sums[:, : entry.sums]
        count = len(sums) * entry.cells
        sums, maxs = sums.reshape(count, entry.sums), maxs.reshape(count, entry.maxs)
        return State.of_cells(
            sums, maxs, (Axis(RANK, len(rows.sums) if ranked else 1), *entry.axes)
        )


def _results(handler: LaneHandler, entry: Entry, lanes: _Lanes, seconds: float) -> FloatArray:
    """Return the result of each cell; NaN where there is none, but 0 of a SUM that others have."""
    counts = lanes.sums[:, COUNT]
    none = 0.0 if handler.is_total and counts.any() else np.nan
    if folds_as(handler) is not None and _may_be_by_rank(entry):
        states = ReducedStates(lanes.sums, lanes.maxs, np.full(len(lanes.sums), seconds))
        values, there = handler.finalize_all(states)
        return np.where(counts == 0, none, np.where(there[:, 0], values[:, 0], np.nan))
    found = np.full(len(counts), none)
    for place in np.flatnonzero(counts).tolist():
        state = ReducedState(
            tuple(lanes.sums[place].tolist()), tuple(lanes.maxs[place].tolist()), seconds
        )
        found[place] = handler.finalize_lanes(state).get("", np.nan)
    return found
