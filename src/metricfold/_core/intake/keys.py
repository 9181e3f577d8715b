"""Which keys an aggregator knows: one record of each, and who has claimed which printed name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from metricfold._core.fold import hints
from metricfold._core.fold.axes import described
from metricfold._core.fold.batch import MetricBatch
from metricfold._core.fold.builtin import SpreadMeanAggHandler, built_in_handlers, folds_as
from metricfold._core.fold.columns import Column, check_same_type, fold_metrics
from metricfold._core.fold.elements import ELEMENT_TYPES
from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.kinds import kind_of_parts, parts_of
from metricfold._core.fold.names import ANYTHING, Claimed, Claims, show
from metricfold._core.fold.state import quiet
from metricfold._core.reduce.schema import Entry, Key, Schema
from metricfold._core.view.derived import DerivedMetric
from metricfold._core.view.rollup import Plans
from metricfold.metric import TypeLike, resolve_type, type_label

if TYPE_CHECKING:
    from metricfold._core.reduce.agreement import Agreed

__all__ = ["INSTEAD", "Admission", "KeyRecord", "KeyTable"]

INSTEAD = "register yours for a type of its own (AggregationType.CUSTOM, your own Enum member or a string)"
"""What to do where a built-in handler is needed and another one is registered."""

_logger = logging.getLogger("metricfold")
_BUILT_IN: Mapping[TypeLike, type[AggregationHandler]] = {
    **{agg_type: type(handler) for agg_type, handler in built_in_handlers().items()},
    **ELEMENT_TYPES,
}


class Admission(NamedTuple):
    """Columns that may be taken in, and the keys that are new with them, with their names."""

    lanes: Sequence[Column]
    custom: Sequence[tuple[Column, AggregationHandler]]
    new: dict[Key, KeyRecord]
    claims: Claimed | None


@dataclass(slots=True, eq=False)
class KeyRecord:
    """What one rank knows of a key.

    Args:
        agg_type: its type, as it was registered.
        handler: the handler that it began with, which it keeps.
        usual: how keys of that type and handler travel: one entry for all, without a key.
        per_rank: whether each rank's values are wanted, whatever the route.
        drained: whether it is a DISTRIBUTION of which devices send histograms. Those hold no single
            values, so that the view of the run is about all values, whatever the window size.
        conflicting: whether the ranks have agreed on it otherwise than it is held here. Values have
            come in while a reduction was under way; the next one refuses them, on all ranks.
        admitted: the categories that are told apart, once there have been more than that.
    """

    agg_type: TypeLike
    handler: AggregationHandler
    usual: Entry
    per_rank: bool = False
    drained: bool = False
    conflicting: bool = False
    admitted: frozenset[str] | None = None

    @property
    def axes(self) -> str:
        """Along which it has cells, as `fold.axes.described` says."""
        return parts_of(self.usual.kind).axes


class KeyTable:
    """All that is known of keys, of types and of printed names.

    Attributes:
        records: of each key.
        handlers: what handles each type.
        derived: metrics that are computed from others, by the name that they print.
        plans: how what the keys print is computed.
    """

    def __init__(self, handlers: dict[TypeLike, AggregationHandler]) -> None:
        self.records: dict[Key, KeyRecord] = {}
        self.handlers = handlers
        self._of_label = {type_label(agg_type): agg_type for agg_type in handlers}
        # A text and a member of a StrEnum may be equal: then they are one type, called as it was
        # registered.
        self._registered = {agg_type: agg_type for agg_type in handlers}
        self.derived: dict[str, DerivedMetric] = {}
        self.plans = Plans()
        self._claims = Claims()
        self._agreed: Schema | None = None
        self._handled: tuple[list[object], Mapping[Key, AggregationHandler]] = [], {}
        # Thousands of keys are alike but for their names.
        self._usual: dict[tuple[int, TypeLike, str], tuple[AggregationHandler, Entry]] = {}
        # Types of agreed keys that lack a handler here, by their labels.
        self._unhandled: dict[str, list[Key]] = {}

    # -- Types

    def handler_of(self, key: Key, agg_type: TypeLike) -> AggregationHandler | None:
        """Return what folds values of a key: the handler that it began with, else its type's.

        Raises:
            ValueError: the type takes no values.
        """
        known = self.records.get(key)
        if known is not None and known.agg_type == agg_type:
            handler: AggregationHandler | None = known.handler
        else:
            handler = self.handlers.get(agg_type)
        if handler is not None and not handler.takes_values:
            raise ValueError(
                f"{show(key)} has the aggregation type {type_label(agg_type)!r}, which is about the "
                f"elements of tensors that a ModelWatch looks at: for values use one of {self._known()}"
            )
        return handler

    def register(self, agg_type: TypeLike, handler: AggregationHandler) -> None:
        """Let `handler` handle `agg_type` from now on."""
        if isinstance(agg_type, AggregationHandler):
            raise TypeError(
                "register_handler() takes the type first, and then its handler: write "
                f"register_handler({handler!r}, handler)"
            )
        agg_type = resolve_type(agg_type)
        if not isinstance(handler, AggregationHandler):
            raise TypeError(
                f"register_handler() takes an AggregationHandler, but {handler!r} is none: "
                "subclass AggregationHandler and pass an instance"
            )
        label = type_label(agg_type)
        in_use = [show(key) for key, one in self.records.items() if one.agg_type == agg_type]
        if in_use:
            called = agg_type
            if isinstance(agg_type, Enum):
                called = f"{type(agg_type).__name__}.{agg_type.name}"
            _logger.warning(
                "Replacing handler for %s: metrics that it already handles keep the old one (%s); "
                "metrics seen from now on take the new one",
                called,
                ", ".join(in_use[:5]) + (", ..." if len(in_use) > 5 else ""),
            )
        self.handlers[agg_type], self._of_label[label] = handler, agg_type
        self._registered.setdefault(agg_type, agg_type)
        if isinstance(agg_type, str):  # which a member of a StrEnum is, too
            self._of_label.setdefault(str.__str__(agg_type), agg_type)
        for key in self._unhandled.pop(label, ()):
            axes = "" if self._agreed is None else described(self._agreed.entries[key].axes)
            self.records[key] = self._record(agg_type, handler, axes)

    def by_label(self) -> dict[str, AggregationHandler]:
        """Return the handler of each type, by the type's label."""
        return {label: self.handlers[agg_type] for label, agg_type in self._of_label.items()}

    def _known(self) -> str:
        """Return the labels of the types that values may have."""
        known = self.by_label().items()
        return ", ".join(sorted(label for label, handler in known if handler.takes_values))

    def type_of_label(self, label: str) -> TypeLike:
        return self._of_label[label]

    def by_key(self) -> Mapping[Key, AggregationHandler]:
        """Return the handler of each key: the same mapping, until the records are others."""
        records = [*self.records, *self.records.values()]
        if records != self._handled[0]:
            handlers = map(attrgetter("handler"), self.records.values())
            self._handled = records, dict(zip(self.records, handlers, strict=True))
        return self._handled[1]

    # -- Taking columns in

    def columns_of(self, batch: MetricBatch) -> Sequence[Column]:
        """Return the columns of a batch that was folded elsewhere, as the handlers here need."""
        columns: list[Column] = []
        for column in batch.columns:
            if column.state is not None:
                handler = self.handler_of(column.key, column.agg_type)
                _check_built_in(column.key, column.agg_type, handler, "by MetricsCollator")
                assert handler is not None
                columns.append(replace(column, state=handler.laned().fitted(column.state)))
            elif column.metrics:
                with quiet():
                    columns += fold_metrics(column.metrics, self.handler_of, in_worker=False)
            else:
                columns.append(column)
        return columns

    def admit(self, columns: Sequence[Column]) -> Admission:
        """Check columns against what is known; changes nothing. Raises ValueError on a clash."""
        given = []
        for column in columns:
            if column.weightless and column.key not in self.records:
                self._handler_for(column.key, column.agg_type)
            else:
                given.append((column.key, column.agg_type, column.axes))
        admission = self.admit_keys(given)
        lanes = [column for column in columns if column.state is not None]
        if len(lanes) == len(columns):
            return admission._replace(lanes=lanes)
        # What counts and has no state has a handler without lanes.
        custom = []
        for column in columns:
            if column.state is None and not column.weightless:
                known = self.records.get(column.key) or admission.new[column.key]
                agg_type = known.agg_type
                if column.agg_type is not agg_type:  # and equal
                    column.agg_type = agg_type
                    column.metrics = [one._replace(agg_type=agg_type) for one in column.metrics]
                custom.append((column, known.handler))
        return admission._replace(lanes=lanes, custom=custom)

    def admit_keys(self, keys: Iterable[tuple[Key, TypeLike, str]]) -> Admission:
        """Check keys of which values may come; changes nothing. Raises ValueError on a clash.

        Args:
            keys: each with its aggregation and its axes, as `fold.axes.described` says.
        """
        new: dict[Key, KeyRecord] = {}
        for key, agg_type, axes in keys:
            known = self.records.get(key) or new.get(key)
            if known is None:
                handler = self._handler_for(key, agg_type)
                new[key] = self._record(self._registered[agg_type], handler, axes)
                continue
            if known.agg_type is not agg_type:
                check_same_type(key, known.agg_type, agg_type)
            if known.axes != axes:
                _refuse_axes(key, known.axes, axes)
        claims = None
        if new:
            claims = self._claims.check((key, one.usual.suffixes) for key, one in new.items())
        return Admission((), (), new, claims)

    def admit_drained(self, keys: Iterable[tuple[Key, TypeLike, str]]) -> Admission:
        """Check keys that a device has folded; changes nothing. Raises ValueError on a clash."""
        keys = list(keys)
        admission = self.admit_keys(keys)
        for key, agg_type, _ in keys:
            known = self.records.get(key) or admission.new[key]
            _check_built_in(key, agg_type, known.handler, "on a device")
            # Where recent values are known already, what a device has folded is part of the interval, as
            # those of it are that are no longer recent.
            if key in admission.new:
                admission.new[key] = self._drained(known)
        return admission

    def _handler_for(self, key: Key, agg_type: TypeLike) -> AggregationHandler:
        handler = self.handlers.get(agg_type)
        if handler is None:
            raise ValueError(
                f"{show(key)} has the aggregation type {type_label(agg_type)!r}, for which no "
                "handler is registered: call register_handler() first, or use one of "
                f"{self._known()}{hints.for_label(type_label(agg_type))}"
            )
        return handler

    def commit(self, admission: Admission) -> None:
        """Take over what `admit` found new."""
        if admission.claims is None:
            return
        # Names that are claimed may be claimed again, if an interrupt comes before their keys are known.
        self._claims.commit(admission.claims)
        self.records.update(admission.new)

    def _record(self, agg_type: TypeLike, handler: AggregationHandler, axes: str = "") -> KeyRecord:
        known, usual = self._usual.get((id(handler), agg_type, axes), (None, None))
        if known is not handler or usual is None:
            usual = _usual_entry(handler, type_label(agg_type), axes)
            self._usual[id(handler), agg_type, axes] = handler, usual
        return KeyRecord(agg_type, handler, usual)

    def _drained(self, known: KeyRecord) -> KeyRecord:
        """Return the record of a key that devices send: a DISTRIBUTION is then about all values."""
        if not known.handler.has_sample:
            return known
        handler = known.handler.laned()
        drained = self._record(
            known.agg_type, handler.unbounded() if handler.is_bounded else handler
        )
        drained.drained = True
        return drained

    def derive(self, name: str, metric: DerivedMetric) -> None:
        self._claims.derive(name)
        self.derived[name] = metric

    # -- What the ranks agree on

    def entry(self, key: Key) -> Entry:
        """Return how `key` travels, as far as its handler decides it."""
        known = self.records[key]
        usual = known.usual
        return usual._replace(
            key=key,
            per_rank=known.per_rank and not usual.custom,
            drained=usual.distributed and known.drained,
        )

    def those(self, trait: str) -> set[Key]:
        """Return the keys whose records have a trait; in such a loop, too."""
        return {*compress(self.records, map(attrgetter(trait), self.records.values()))}

    def adopt(self, agreed: Agreed, losers: Mapping[Key, Key | None]) -> str:
        """Take over what the ranks have agreed on; returns what this rank cannot do with it.

        Args:
            agreed: the keys, and which of them are new.
            losers: keys that this rank brought, and that the others hold otherwise, with the key
                under which what it holds goes on, if there is one.
        """
        for key, name in losers.items():
            own = self.records.pop(key)
            if name is not None:
                own.conflicting = False
                self.records.setdefault(name, own)
        changed = agreed.changed
        if losers or not self._claim_new(agreed):
            changed = list(agreed.schema)
            self._claim_anew(agreed.schema)
        for entry in changed:
            if entry.key not in self.records:
                self._take_over(entry)
            known = self.records.get(entry.key)
            if known is not None and self.entry(entry.key).joins_on_devices(entry):
                per_rank, anew = known.per_rank, self.handlers[known.agg_type]
                known = (
                    self._record(known.agg_type, anew) if entry.bounded else self._drained(known)
                )
                known.per_rank, self.records[entry.key] = per_rank, known
            if known is not None:
                known.conflicting = known.conflicting or entry.kind != known.usual.kind
                known.admitted = frozenset(entry.categories) if entry.full else None
        self._agreed = agreed.schema
        return self.trouble()

    def _claim_new(self, agreed: Agreed) -> bool:
        """Claim the names of keys that are new; returns whether that is all there is to claim."""
        if self._agreed is None and not agreed.before.entries:
            self._agreed = agreed.before
        if self._agreed is not agreed.before:
            return False
        unknown = []
        for entry in agreed.changed:
            if entry.key not in agreed.before:
                known = self.records.get(entry.key)
                if known is None:
                    unknown.append((entry.key, entry.suffixes))
                elif known.conflicting or entry.suffixes != known.usual.suffixes:
                    return False
        try:
            self._claims.add(unknown)
        except ValueError:
            return False
        return True

    def _claim_anew(self, schema: Schema) -> None:
        """Let what the ranks have agreed on come first, then what is known here alone."""
        self._claims = Claims()
        self._claims.add((entry.key, entry.suffixes) for entry in schema)
        for key, known in self.records.items():
            known.conflicting, known.admitted = False, None
            if key not in schema:
                try:
                    self._claims.add([(key, known.usual.suffixes)])
                except ValueError:
                    known.conflicting = True
        for name in list(self.derived):
            try:
                self._claims.derive(name)
            except ValueError as error:
                _logger.warning("the derived metric %r is given up: %s", name, error)
                del self.derived[name]

    def _take_over(self, entry: Entry) -> None:
        agg_type = self._of_label.get(entry.type)
        if agg_type is None:
            self._unhandled.setdefault(entry.type, []).append(entry.key)
            return
        known = self._record(agg_type, self.handlers[agg_type], described(entry.axes))
        self.records[entry.key] = self._drained(known) if entry.drained else known

    def trouble(self) -> str:
        """Return why this rank cannot take part in a reduction, or nothing."""
        return "; ".join(
            f"{show(key)} has the aggregation type {label!r}, for which no handler is registered "
            "here: call register_handler() on every rank"
            for label, keys in self._unhandled.items()
            for key in keys
        )

    def check_saved(
        self, entries: Collection[Entry], custom_types: Collection[tuple[Key, str]]
    ) -> Admission:
        """Check the keys of a checkpoint; changes nothing. Raises ValueError if one cannot be."""
        axes = {one.key: described(one.axes) for one in entries}
        keys: list[tuple[Key, TypeLike, str]] = []
        for key, label in dict.fromkeys([*((one.key, one.type) for one in entries), *custom_types]):
            if label not in self._of_label:
                raise ValueError(
                    f"the state holds {show(key)} of type {label!r}, for which no handler is "
                    "registered: call register_handler() before load_state_dict()"
                )
            keys.append((key, self._of_label[label], axes.get(key, "")))
        admission = self.admit_keys(keys)
        for entry in entries:
            if entry.drained and entry.key in admission.new:
                admission.new[entry.key] = self._drained(admission.new[entry.key])
            known = self.records.get(entry.key) or admission.new[entry.key]
            handler = known.handler
            usual = _usual_entry(handler, entry.type, described(entry.axes))
            if entry.lanes != usual.lanes:
                raise ValueError(
                    f"the state holds {show(entry.key)} with {entry.lanes}, but {type(handler).__name__} "
                    f"has {usual.lanes}: register the handler that saved it"
                )
            if usual.distributed and entry.bounded != usual.bounded:
                size = handler.laned().sample_limit if usual.bounded else None
                saved = "a window size" if entry.bounded else "dist_window_size=None"
                raise ValueError(
                    f"the state holds {show(entry.key)} with {saved}, but this aggregator has "
                    f"dist_window_size={size}: recent values cannot stand for all, "
                    "nor all for recent ones; make the aggregator as the one that saved"
                )
            if entry.kind != usual.kind:
                raise ValueError(
                    f"the state holds {show(entry.key)} as what {type(handler).__name__} does not keep: "
                    "register the handler that saved it"
                )
        return admission

    def fitted(self, entry: Entry) -> Entry | None:
        """Return how a saved key travels here, if with more or fewer lanes than it was saved with."""
        label = self._of_label.get(entry.type)
        known = self.records.get(entry.key)
        handler = self.handlers.get(label) if known is None else known.handler  # type: ignore[arg-type]
        if handler is None or not handler.has_lanes or not entry.sums:
            return None
        usual = _usual_entry(handler, entry.type, described(entry.axes))
        if usual.sums == entry.sums or not handler.laned().goes_on_from(entry.sums):
            return None
        return entry._replace(kind=usual.kind, suffixes=usual.suffixes)

    def commit_saved(self, entries: Iterable[Entry], admission: Admission) -> None:
        self.commit(admission)
        for entry in entries:
            if entry.drained:
                self.records[entry.key].drained = True


def _check_built_in(
    key: Key, agg_type: TypeLike, handler: AggregationHandler | None, where: str
) -> None:
    """Raise ValueError if what was folded elsewhere is not folded alike here."""
    folded = folds_as(handler)
    if folded is not _BUILT_IN[agg_type] and folded is not SpreadMeanAggHandler:
        raise ValueError(
            f"{show(key)} was folded {where}, which knows the built-in handlers only, but this "
            f"aggregator has another handler for {type_label(agg_type)!r}: {INSTEAD}"
        )


def _usual_entry(handler: AggregationHandler, label: str, axes: str = "") -> Entry:
    """Return how keys of a handler travel: an entry without a key, and without the labels of axes."""
    if not handler.has_lanes:
        # What it will call its results is known only when it finalises.
        return Entry(("", ""), handler.kind_of(label))
    lanes = handler.laned()
    kind, suffixes = lanes.kind_of(label), lanes.suffixes()
    if axes:
        kind = kind_of_parts(parts_of(kind)._replace(axes=axes))
        names = [axis.partition("=")[0] for axis in axes.split(",")]
        suffixes = (*suffixes, *(f"/{name}_{ANYTHING}" for name in names))
    return Entry(("", ""), kind, suffixes, most=lanes.most_categories)


def _refuse_axes(key: Key, known: str, given: str) -> NoReturn:
    before, now = (f"the axes {axes}" if axes else "no axes" for axes in (known, given))
    raise ValueError(
        f"{show(key)} has {before}, so it cannot take a value with {now}: declare the same axes each "
        "time, or give one of them another name"
    )
