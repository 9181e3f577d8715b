"""A checkpoint of an aggregator: three plain keys, valid on any number of ranks.

    {"format": "metricfold", "version": 2, "payload": "{...}"}

    entries         how each key travels: the schema
    run, interval   vectors in its order, `lost` with what rounding has taken; what accumulates besides
    windows         recent values of each DISTRIBUTION, by rank that saved
    custom          states of handlers without lanes, of all ranks
    kinds           of keys that ranks hold in more than one way: in which order these were agreed on
    rules           what each rule over metrics remembers, by what it is
    reductions      how many the ranks have had in the run

Version 1 lacks `kinds` and `rules`. The payload is JSON text, so the state passes through `torch.load(weights_only=True)`, `json`,
`torch.distributed.checkpoint` (which restores only keys that the destination already has: these
three are always there) and Orbax alike. Arrays are base64 of little-endian float64, bit for bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, TypeAlias

import numpy as np

from metricfold._core.exchange.reducer import Reduced
from metricfold._core.fold.custom import (
    CustomResults,
    CustomStates,
    SavedState,
    check_saved_states,
    restored,
)
from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import show
from metricfold._core.fold.plain import unpack
from metricfold._core.fold.sample import (
    MOST_SAVED,
    FloatArray,
    Pool,
    Window,
    histogram_from,
    new_histogram,
)
from metricfold._core.intake.keys import Admission, KeyTable
from metricfold._core.reduce.announced import entries_from, entry_of_version_1
from metricfold._core.reduce.schema import Key, Schema
from metricfold._core.reduce.totals import NOBODY, Totals
from metricfold._core.sketch.weights import LARGEST_COUNT, concatenated, countable, weighable
from metricfold.metric import MetricState, escaped

__all__ = ["FORMAT", "VERSION", "Restored", "Saved", "checksum", "decode", "encode", "share"]

FORMAT = "metricfold"
VERSION = 2

Part: TypeAlias = "tuple[FloatArray, FloatArray | None]"
"""Values and weights."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds.

    Args:
        run: the run total.
        interval: what the open interval holds so far.
        windows: recent values of each DISTRIBUTION that has a window size, by rank that saved.
        custom: states of handlers without lanes, of all ranks, per view.
        reductions: how many the ranks have had in the run: ranks that go on from states of different
            reductions find out by it.
        rules: what each rule that looks for alerts remembers, in JSON types.
    """

    run: Totals
    interval: Totals
    windows: Mapping[Key, Sequence[Window]]
    custom: Mapping[str, list[SavedState]]
    reductions: int = 0
    rules: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, reduced: Reduced, *, interval_open: bool) -> Saved:
        """Return what a checkpoint holds after a reduction.

        Args:
            reduced: what came out of it.
            interval_open: whether its interval goes on.

        Raises:
            TypeError: a handler without lanes has a state that cannot be saved.
        """
        if reduced.custom.unsaved:
            raise TypeError(reduced.custom.unsaved)
        windows = {
            entry.key: reduced.recent.windows(entry.key)
            for entry in reduced.schema.distributions
            if entry.bounded
        }
        custom = reduced.custom.saved
        if interval_open:
            return cls(reduced.run, reduced.interval, windows, custom, reduced.reductions)
        windows = {key: [one.closed() for one in some] for key, some in windows.items()}
        custom = {"run": custom["run"], "interval": []}
        return cls(reduced.run, Totals.empty(reduced.schema), windows, custom, reduced.reductions)

    def fitted(self, keys: KeyTable) -> Saved:
        """Return the same with the SUM lanes that the handlers here have, where these go on from others."""
        schema = self.run.schema
        changed = [*filter(None, map(keys.fitted, schema))]
        if not changed:
            return self
        schema = schema.grown(changed)
        run, interval = (one.fitted(schema) for one in (self.run, self.interval))
        return replace(self, run=run, interval=interval)


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that an aggregator can go on from.

    Args:
        saved: what it holds.
        admission: the keys that are new with it.
        custom: the states of handlers without lanes, of all ranks, per view.
    """

    saved: Saved
    admission: Admission
    custom: Mapping[str, Sequence[MetricState]]

    @classmethod
    def of(cls, saved: Saved, keys: KeyTable) -> Restored:
        """Try out what a checkpoint holds; changes nothing.

        Raises:
            ValueError: a metric's handler is missing or is another one, or a state is such that later
                calls would fail on it.
        """
        saved = saved.fitted(keys)
        labels = [
            ((state["dataset"], state["name"]), state["type"])
            for states in saved.custom.values()
            for state in states
        ]
        admission = keys.check_saved(saved.run.schema.entries.values(), labels)
        new = {key: known.handler for key, known in admission.new.items()}
        handlers = {**keys.by_key(), **new}
        custom = {
            view: [_revived(state, handlers, keys) for state in states]
            for view, states in saved.custom.items()
        }
        found = cls(saved, admission, custom)
        for totals in (saved.run, saved.interval):
            for key, state in totals.states():
                try:
                    handlers[key].laned().finalize(state)
                except Exception as failure:
                    raise ValueError(
                        f"the state of {show(key)} is none that {type(handlers[key]).__name__} can "
                        f"finalise: {failure!r}. Load an earlier checkpoint"
                    ) from failure
        try:
            found._finalise_once(handlers, keys.by_label())
        except Exception as failure:
            raise ValueError(
                f"the states of custom handlers cannot go on from what was saved: {failure!r}. Load an "
                "earlier checkpoint, or register the handlers that saved it"
            ) from failure
        return found

    def inherit(self, states: CustomStates, rank: int, world_size: int) -> None:
        """Let `states` go on from one rank's share of those of all."""
        for view, some in self.custom.items():
            mine: dict[Key, list[MetricState]] = {}
            for one in some[rank::world_size]:
                mine.setdefault((one.dataset_name, one.metric_name), []).append(one)
            states.inherit(view, mine)

    def _finalise_once(
        self, handlers: Mapping[Key, AggregationHandler], of_type: Mapping[str, AggregationHandler]
    ) -> None:
        """Finalise and save the states of handlers without lanes, as later calls will; or raise."""
        states = CustomStates()
        self.inherit(states, 0, 1)
        results = CustomResults([states.results(handlers, of_type)])
        if results.unsaved:
            raise TypeError(results.unsaved)
        for view, totals in (("run", self.saved.run), ("interval", self.saved.interval)):
            for result in results.of(view):
                result.finalised(of_type.get(result.label), totals.seconds)


def _revived(
    state: SavedState, handlers: Mapping[Key, AggregationHandler], keys: KeyTable
) -> MetricState:
    key = (state["dataset"], state["name"])
    try:
        return restored(state, handlers[key], keys.type_of_label(state["type"]))
    except Exception as failure:
        raise ValueError(
            f"the state of {show(key)} cannot be restored by "
            f"{type(handlers[key]).__name__}.deserialize_metadata: {failure!r}"
        ) from failure


def encode(saved: Saved) -> dict[str, Any]:
    """Return `saved` as a state dict of plain types."""
    content = {
        "entries": json.loads(saved.run.schema.to_json()),
        "run": _encode_totals(saved.run),
        "interval": _encode_totals(saved.interval.moved(saved.run.schema)),
        "windows": [
            [list(key), [_encode_window(window) for window in _thinned(windows)]]
            for key, windows in saved.windows.items()
        ],
        "custom": saved.custom,
        "kinds": [],
        "rules": saved.rules,
        "reductions": saved.reductions,
    }
    payload = _json({"checksum": checksum(content), "content": content})
    return {"format": FORMAT, "version": VERSION, "payload": payload}


def decode(state: object) -> Saved:
    """Return what `state` holds.

    Raises:
        ValueError: the state is foreign, newer, truncated or damaged; the message says which.
    """
    if not isinstance(state, Mapping) or "format" not in state or "payload" not in state:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            "this is no state of a MetricsAggregator: it must have the keys 'format', 'version' "
            f"and 'payload', but it has {found}"
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"this state was written by {state['format']!r}, not by {FORMAT!r}: load the part of "
            "the checkpoint that MetricsAggregator.state_dict() returned"
        )
    try:
        version = index(state.get("version"))  # type: ignore[arg-type]  # Orbax gives an array back
    except TypeError:
        version = 0
    if not 1 <= version <= VERSION:
        raise ValueError(
            f"this state has version {state.get('version')!r}, and this metricfold reads versions 1 "
            f"to {VERSION}" + (": install a newer metricfold" if version > VERSION else "")
        )
    content = _checked_content(state["payload"])
    try:
        with np.errstate(all="ignore"):
            return _decoded(content if version > 1 else _as_version_2(content))
    except _NOT_WRITTEN as error:
        # Its checksum is right, so it was written like that.
        raise ValueError(
            f"the state's payload is not what MetricsAggregator.state_dict() writes "
            f"({type(error).__name__}: {escaped(str(error))[:_MOST_SAID]}): load an earlier checkpoint"
        ) from error


_NOT_WRITTEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_MOST_SAID = 1000


def _as_version_2(content: Any) -> dict[str, Any]:
    """Return what version 1 holds as version 2 does."""
    # Of the first of that version reductions were not counted.
    usual = {"kinds": [], "rules": {}, "reductions": 0}
    return {**usual, **content, "entries": [entry_of_version_1(e) for e in content["entries"]]}


_PARTS = {"entries", "run", "interval", "windows", "custom", "kinds", "rules", "reductions"}


def _decoded(content: Any) -> Saved:
    if content.keys() != _PARTS:
        raise ValueError("it lacks a part, or has another")
    if content["kinds"] != []:
        raise ValueError("it holds kinds, which this version does not know")
    rules = content["rules"]
    memories = rules.values() if type(rules) is dict else (None,)
    if not all(type(one) is dict and type(unpack(one)) is dict for one in memories):
        raise ValueError("what its rules remember is no object")
    schema = Schema(entries_from(content["entries"], settled=True))
    saved = Saved(
        run=_decode_totals(schema, content["run"]),
        interval=_decode_totals(schema, content["interval"]),
        windows=_by_key(
            [key, [_decode_window(window) for window in _listed(windows)]]
            for key, windows in content["windows"]
        ),
        custom={view: content["custom"][view] for view in ("run", "interval")},
        reductions=content["reductions"],
        rules=rules,
    )
    if type(saved.reductions) is not int or not 0 <= saved.reductions < LARGEST_COUNT:
        raise ValueError("it counts reductions by what is no whole number")
    for states in saved.custom.values():
        check_saved_states(states)
    _check_fit(schema, saved)
    return saved


def _check_fit(schema: Schema, saved: Saved) -> None:
    """Refuse values of keys that the schema lacks or knows as something else."""
    recent = {entry.key for entry in schema.distributions if entry.bounded}
    accumulating = {entry.key for entry in schema.distributions if not entry.bounded}
    pools = saved.run.pools.keys() | saved.interval.pools.keys()
    custom = {entry.key: entry.type for entry in schema if entry.custom}
    if not (saved.windows.keys() <= recent and pools <= accumulating):
        raise ValueError("it holds values of a metric that is no such DISTRIBUTION")
    for states in saved.custom.values():
        for state in states:
            if custom.get((state["dataset"], state["name"])) != state["type"]:
                raise ValueError("it holds a state of a metric whose handler has none")


def share(windows: Sequence[Window], rank: int, world_size: int, limit: int) -> Window:
    """Return one rank's share of the windows that some number of ranks saved.

    Values are dealt out one by one, by age, so that each rank gets its part of the recent ones;
    those of the open interval stay the newest. What a histogram holds goes to the first rank.
    """
    parts: tuple[list[Part], list[Part]] = [], []
    for values, weights, fresh, _ in windows:
        begin = values.size - fresh
        for some, keep in zip(parts, (slice(begin), slice(begin, None)), strict=True):
            some.append((values[keep], None if weights is None else weights[keep]))
    older, newer = (_deal(some, rank, world_size) for some in parts)
    histograms = [window.older for window in windows if window.older is not None]
    histogram = new_histogram(histograms) if histograms and rank == 0 else None
    return Window(*concatenated([older, newer]), newer[0].size, histogram).limited(limit)


def _deal(parts: Sequence[Part], rank: int, world_size: int) -> Part:
    values, weights = concatenated(parts)
    # Oldest first; those of one age in the order of the ranks that saved them.
    ages = [np.arange(0), *(np.arange(-part.size, 0) for part, _ in parts)]
    order = np.argsort(np.concatenate(ages), kind="stable")
    mine = order[::-1][rank::world_size][::-1]
    return values[mine], None if weights is None else weights[mine]


def _thinned(windows: Sequence[Window]) -> Sequence[Window]:
    """Thin the windows evenly, so that all together hold at most `MOST_SAVED`."""
    most = max(MOST_SAVED // max(len(windows), 1), 1)
    if all(window.values.size <= most for window in windows):
        return windows
    # Values of the open interval must not get fewer: they go on in a histogram.
    open_interval = Pool.joined([window.interval() for window in windows])
    first, *others = (window.thinned(most).closed() for window in windows)
    return [first._replace(older=open_interval.condensed()), *others]


def _encode_totals(totals: Totals) -> dict[str, Any]:
    return {
        "sums": _to_text(totals.sums),
        "lost": _to_text(totals.lost),
        "maxs": _to_text(totals.maxs),
        "seconds": totals.seconds,
        "pools": [
            [list(key), _encode_window(Window(pool.values, pool.weights, 0, pool.histogram))]
            for key, pool in totals.pools.items()
        ],
    }


def _decode_totals(schema: Schema, content: Mapping[str, Any]) -> Totals:
    totals = Totals(
        schema,
        _to_array(content["sums"]),
        _to_array(content["lost"]),
        _to_array(content["maxs"]),
        # Ranks of another job would say nothing here.
        np.full(schema.max_width, NOBODY, dtype=np.int64),
        np.zeros(schema.max_width, dtype=np.int64),
        _number(content["seconds"]),
        _by_key([key, _decode_pool(pool)] for key, pool in content["pools"]),
    )
    widths = (totals.sums.size, totals.lost.size, totals.maxs.size)
    if widths != (schema.sum_width, schema.sum_width, schema.max_width):
        raise ValueError("its totals do not fit its keys")
    if not 0.0 <= totals.seconds < math.inf:
        raise ValueError(f"its wall time is {totals.seconds!r} seconds")
    counts = totals.sums[schema.counting] + totals.lost[schema.counting]
    if not countable(counts).all():
        raise ValueError("it counts values by what are no whole numbers")
    if not np.isfinite(totals.lost).all():
        raise ValueError("what rounding took from its sums is not finite")
    return totals


def _by_key(pairs: Iterable[list[Any]]) -> dict[Key, Any]:
    """Return what belongs to each key; refuses one that is there twice, or is none."""
    found: dict[Key, Any] = {}
    for key, content in pairs:
        dataset, name = _listed(key)
        if (dataset, name) in found:
            raise ValueError("it holds values of a metric twice")
        found[dataset, name] = content
    return found


def _listed(value: object) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"{type(value).__name__} stands where a list should")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{type(value).__name__} stands where a number should")
    return float(value)  # type: ignore[arg-type]


def _decode_pool(content: Mapping[str, Any]) -> Pool:
    window = _decode_window(content)
    if window.fresh or (window.older is not None and window.values.size):
        raise ValueError("it holds values that accumulate both one by one and in a histogram")
    return Pool(window.values, window.weights, window.older)


def _encode_window(window: Window) -> dict[str, Any]:
    return {
        "values": _to_text(window.values),
        "weights": None if window.weights is None else _to_text(window.weights),
        "fresh": window.fresh,
        "older": None if window.older is None else window.older.to_dict(),
    }


def _decode_window(content: Mapping[str, Any]) -> Window:
    weights, older = content["weights"], content["older"]
    window = Window(
        _to_array(content["values"]),
        None if weights is None else _to_array(weights),
        index(content["fresh"]),
        None if older is None else histogram_from(older),
    )
    fitting = window.weights is None or (
        window.weights.size == window.values.size and bool(weighable(window.weights).all())
    )
    if not (
        fitting
        and type(content["fresh"]) is int
        and np.isfinite(window.values).all()
        and 0 <= window.fresh <= window.values.size
    ):
        raise ValueError("it holds values that are no numbers, or weights that do not fit them")
    return window


def _to_text(array: FloatArray) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode("ascii")


def _to_array(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)


def _checked_content(payload: object) -> Any:
    if not isinstance(payload, str):
        raise ValueError(
            f"the state's payload is {type(payload).__name__}, not text: it is damaged"
        )
    try:
        parsed = json.loads(payload)
        if parsed["checksum"] == checksum(parsed["content"]):
            return parsed["content"]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(
        "the state's payload is truncated or damaged (its checksum differs): load an earlier "
        "checkpoint"
    )


def _json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), sort_keys=True)


def checksum(content: object) -> str:
    """Return what tells whether `content` is what was written: not by whom."""
    return hashlib.blake2b(_json(content).encode(), digest_size=8).hexdigest()
