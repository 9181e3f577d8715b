"""`merge_state_dicts`: the states of separate jobs become one, as if one job had seen all.

    states = ray.get([actor.state.remote() for actor in actors])     # each: aggregator.state_dict()
    aggregator.load_state_dict(merge_state_dicts(states, parallel=True))

Ranks of one job reduce; this is for those that are no ranks of one job: actors that send to a
controller, shards of an evaluation that run as jobs of their own, parts of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from metricfold._core.fold.names import Claims, Key, show
from metricfold._core.fold.sample import MOST_SAVED, Window
from metricfold._core.fold.state import quiet
from metricfold._core.intake.checkpoint import Saved, decode, encode, share
from metricfold._core.reduce.schema import Entry, Schema
from metricfold._core.reduce.totals import Totals
from metricfold._core.sketch.weights import concatenated

__all__ = ["merge_state_dicts"]

_logger = logging.getLogger("metricfold")


def merge_state_dicts(states: Iterable[Mapping[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """Return the state of a run that saw all that the runs of `states` saw; each counts once.

    Merges may be nested: the merge of merged states is that of all. What each job recorded last,
    the open interval, is part of the run that comes out; the interval itself begins anew, and nobody
    owns the maxima. Where categories are more than `max_categories` of the aggregator that loads
    them, the first in alphabetical order are told apart.

    Args:
        states: what `MetricsAggregator.state_dict` returned in each job, one of each: it is the same
            on all ranks of a job. One that is given twice counts twice, with a warning.
        parallel: whether the jobs ran side by side. True: wall time, which a RATE divides by, is that
            of the longest, and each job's recent values are those of ranks of their own. False: the
            jobs ran one after the other, in the order given: times add up, and the recent values of
            the last are the newest; what the rules of the last remember goes on. Side by side
            rules begin anew.

    Raises:
        ValueError: there is no state; one is foreign, newer, truncated or damaged; or two hold one
            metric in different ways, or metrics that would print the same name. The message says
            which states, counted from 0.
        TypeError: `states` is a single state, or `parallel` is not a bool.

    >>> from metricfold import MetricsAggregator
    >>> states = []
    >>> for rewards in ([1.0, 2.0], [3.0, 4.0, 5.0]):  # in jobs of their own
    ...     job = MetricsAggregator()
    ...     for reward in rewards:
    ...         job.record("reward", reward)
    ...     states.append(job.state_dict())
    >>> aggregator = MetricsAggregator()
    >>> aggregator.load_state_dict(merge_state_dicts(states, parallel=True))
    >>> aggregator.get_metrics_for_logging("eval")
    {'eval/reward': 3.0}
    """
    if not isinstance(parallel, bool):
        raise TypeError(
            f"parallel={parallel!r}: say True if the jobs ran side by side, False if one after the "
            "other"
        )
    saved = _decoded(states)
    schema = _united([one.run.schema for one in saved])
    with quiet():
        run = saved[0].run.moved(schema)
        for one in saved[1:]:
            run = run.plus(one.run.moved(schema))
    if parallel:
        run = replace(run, seconds=max(one.run.seconds for one in saved))
    windows: dict[Key, list[Window]] = {}
    for one in saved:
        for key, recent in one.windows.items():
            closed = [window.closed() for window in recent]
            # In a sequence of jobs only what is older and what is newer matters, not which rank had it.
            closed = closed if parallel else [share(closed, 0, 1, MOST_SAVED)]
            windows.setdefault(key, []).extend(closed)
    if not parallel:
        for key, parts in windows.items():
            one_after_the_other = concatenated([(part.values, part.weights) for part in parts])
            windows[key] = [Window(*one_after_the_other).limited(MOST_SAVED)]
    custom = {
        "run": [state for one in saved for state in one.custom["run"]],
        "interval": [],
    }
    # What rules remember is of one sequence of intervals: that of jobs side by side is none.
    rules = {} if parallel else saved[-1].rules
    return encode(Saved(run, Totals.empty(schema), windows, custom, rules=rules))


def _decoded(states: Iterable[Mapping[str, Any]]) -> list[Saved]:
    if isinstance(states, Mapping | str | bytes):
        raise TypeError(
            "merge_state_dicts() takes a list of states, and this is a single one: give "
            "[state, another, ...]"
        )
    saved: list[Saved] = []
    first: dict[str, int] = {}
    for place, state in enumerate(states):
        try:
            saved.append(decode(state))
        except ValueError as error:
            raise ValueError(f"states[{place}]: {error}") from error
        same = first.setdefault(state["payload"], place)
        if same < place and saved[-1].run.schema.entries:
            _logger.warning(
                "states[%d] is the same as states[%d], and counts again: every rank of a job returns "
                "the state of the whole job, so give one of each job",
                place,
                same,
            )
    if not saved:
        raise ValueError(
            "there is no state to merge: give what state_dict() returned in at least one job"
        )
    return saved


def _united(schemas: Sequence[Schema]) -> Schema:
    """Return a schema with room for all; raises ValueError if one key or name is of two kinds."""
    united: dict[Key, Entry] = {}
    first: dict[Key, int] = {}
    claims = Claims()
    for place, schema in enumerate(schemas):
        for entry in schema:
            known = united.get(entry.key)
            if known is None:
                try:
                    claims.add([(entry.key, entry.suffixes)])
                except ValueError as error:
                    raise ValueError(f"states[{place}]: {error}") from error
                united[entry.key], first[entry.key] = entry, place
            elif known.kind == entry.kind:
                united[entry.key] = known.united(entry)
            else:
                raise ValueError(
                    f"{show(entry.key)} is of kind {known.described} in states[{first[entry.key]}], but "
                    f"of kind {entry.described} in states[{place}]: they cannot be merged; give one of "
                    "them another name, or leave that state out"
                )
    return Schema(united.values())
