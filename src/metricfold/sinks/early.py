"""What a mistake makes empty, or sends backwards, is said once and early.

Nothing fails in these cases, and nothing is written, or not where it is looked for. So whoever makes
such a mistake would learn of it at the end of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from metricfold.sinks.loud import mention

__all__ = ["Watch", "said_unmatched"]

_RECORDS = 20  # so many without a single key are no chance, whatever the globs


class Watch:
    """Looks at what is logged, for all sinks."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}  # step by prefix
        self._backwards: set[str] = set()  # prefixes of which it has been said
        self._empty: set[str] = set()  # prefixes of aggregators that have had nothing to say
        self._settled: set[str] = set()  # those that have, or of which it has been said

    def step(self, step: int, prefix: str) -> None:
        """Take note of a step, and say so if it goes back."""
        newest = self._newest.get(prefix, -1)
        self._newest[prefix] = max(step, newest)
        if step >= newest or prefix in self._backwards:
            return
        self._backwards.add(prefix)
        mention(
            f"step {step} is logged after step {newest}, {_with(prefix)}, and is shown beside what "
            "was there: after loading a checkpoint call logger.rewind(step) first, and give what "
            "counts its own steps, such as a validation by epochs, a prefix of its own"
        )

    def rewind(self, step: int) -> None:
        """Take note that training goes on after `step`."""
        self._newest = {prefix: min(newest, step) for prefix, newest in self._newest.items()}

    def aggregated(self, step: int, prefix: str, metrics: Mapping[str, float]) -> None:
        """Say so if an aggregator has had nothing to say so far."""
        if metrics:
            self._settled.add(prefix)
        if prefix in self._settled:
            return
        # The first log may come before the first batch, at step 0.
        if step > 0 or prefix in self._empty:
            self._settled.add(prefix)
            mention(
                f"no metric has come in so far: the record of step {step}, {_with(prefix)}, is empty. "
                "Call aggregator.update(batch.pop('metrics')) or aggregator.record(name, value) on "
                "the aggregator that is logged, and drain accumulators into it: "
                "accumulator = aggregator.drain(accumulator)"
            )
        self._empty.add(prefix)


def said_unmatched(
    sink: object, patterns: Sequence[str], keys: Iterable[str], records: int
) -> bool:
    """Say that so many `records` of a sink had no key that its globs select, if that is a mistake."""
    keys = sorted(keys)
    near = (
        f". A glob is over whole keys, and upper and lower case differ: for {key!r} write "
        f"{_widened(pattern, key)!r}"
        for pattern in patterns
        for key in keys
        if fnmatchcase(key.lower(), f"*{pattern.lower()}*")
    )
    why = next(near, None)
    if why is None and records < _RECORDS:
        return False
    why = why or f" of {records} records, such as {', '.join(map(repr, keys[:3]))}"
    mention(
        f"{sink!r} has nothing to write so far: select={list(patterns)!r} matches none of the keys{why}"
    )
    return True


def _widened(pattern: str, key: str) -> str:
    """Return a glob that does match, as near to `pattern` as can be."""
    candidates = (f"*/{pattern}", f"{pattern}*", f"*{pattern}*")
    return next((one for one in candidates if fnmatchcase(key, one)), key)


def _with(prefix: str) -> str:
    return f"with prefix={prefix!r}" if prefix else "without a prefix"
