"""Checkpoints that were damaged, or forged with a right checksum: refused, or loaded and good for use.

Golden checkpoints of every kind are changed anywhere in their structure. Right is a `ValueError` that
has changed nothing, or a state that is loaded and never raises later, on one rank and on two: at a
reduction, in a log, in a checkpoint of its own, merged with others.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler

from campaign.forks import divided
from campaign.table import Goal, Options, Row, Table, Trial, main
from metricfold import MetricsAggregator, merge_state_dicts
from metricfold._core.fold import plain
from metricfold._core.fold.kinds import kind_of_parts, parts_of
from metricfold._core.intake import checkpoint
from metricfold._core.sketch import earlier as earlier_histogram
from metricfold._core.sketch import plain as saved_histogram
from metricfold.communicator.threads import thread_world
from metricfold.metric import is_name

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "checkpoints").glob("*-*.json"))
TIMEOUT = 20.0
Route = tuple[Any, ...]


class Golden:
    """A golden checkpoint.

    Args:
        file: where it is.
        anew: whether it is written anew, in the newest version.

    Attributes:
        state: what `state_dict` returned.
        window: the window size of the aggregator that it is for.
        places: the path of each container in what it holds.
    """

    def __init__(self, file: Path, *, anew: bool = False) -> None:
        self.state = json.loads(file.read_text("utf-8"))
        if anew:
            self.state = checkpoint.encode(checkpoint.decode(self.state))
        self.window = None if "unbounded" in file.stem else 5
        self._text = json.dumps(json.loads(self.state["payload"])["content"])
        content = self.content()
        self.places = list(places(content))
        self.objects = [path for path in self.places if isinstance(at(content, path), dict)]
        self.histograms = [path for path in self.objects if "segments" in at(content, path)]

    def content(self) -> Any:
        """Return what it holds, to be changed."""
        return json.loads(self._text)


def places(node: Any, path: Route = ()) -> Iterator[Route]:
    """Yield the path of every container of a tree that is not empty."""
    if node:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for place, child in items:
        if isinstance(child, dict | list):
            yield from places(child, (*path, place))


def at(node: Any, path: Route) -> Any:
    """Return what is there; None if it is not there any more."""
    for place in path:
        try:
            node = node[place]
        except (LookupError, TypeError):
            return None
    return node


def new_aggregator(window: int | None, **options: Any) -> Any:
    aggregator = MetricsAggregator(window, **options)
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    return aggregator


# -- Forging -------------------------------------------------------------------------------------

WORDS = ["", "x", "\x1b[31m", "a\nb", "\ud800", "\u202e", "\x00", "NaN", "AAAA", "!!", "A" * 7]
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    1.5,
    -0.0,
    10**9,
    2**53,
    2**63,
    10**400,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
]


def junk(chance: random.Random) -> Any:
    """Return JSON that may stand anywhere."""
    plain = [None, True, False, [], {}, [[]], {"a": 1}, [0] * 9, *WORDS, *NUMBERS]
    return copy.deepcopy(chance.choice(plain))


def mutated(golden: Golden, chance: random.Random) -> Any:
    """Return a tree with something changed somewhere."""
    content = golden.content()
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        # As often near the top as deep inside: most places are numbers of histograms.
        node = at(content, chance.choice(chance.choice([golden.places, golden.objects])))
        if isinstance(node, dict | list) and node:
            _change(
                node,
                chance.choice(list(node) if isinstance(node, dict) else range(len(node))),
                chance,
            )
    return content


def _change(node: Any, place: Any, chance: random.Random) -> None:
    old, how = node[place], chance.randrange(7)
    if how == 0:
        del node[place]
    elif how == 1 and isinstance(node, list):
        node.insert(place, copy.deepcopy(old))
    elif how == 2 and isinstance(node, dict):
        node[chance.choice(WORDS)] = old
    elif how == 3 and isinstance(old, str):
        node[place] = _damaged_text(old, chance)
    elif how == 4 and isinstance(old, list) and old:
        chance.shuffle(old)
    elif how == 5 and type(old) in (int, float, bool):
        node[place] = chance.choice([old + 1, -old, old * 2, old + 0.5, str(old), not old, [old]])
    else:
        node[place] = junk(chance)


def _damaged_text(text: str, chance: random.Random) -> str:
    """Return another text; of numbers in base64, mostly one with other numbers."""
    with contextlib.suppress(ValueError):
        array = np.frombuffer(base64.b64decode(text, validate=True), "<f8").copy()
        if array.size and chance.random() < 0.8:
            array[chance.randrange(array.size)] = float(chance.choice(NUMBERS[:10] + NUMBERS[11:]))
            return base64.b64encode(array.tobytes()).decode()
    place = chance.randrange(len(text) + 1)
    return chance.choice(
        [text[:place], text[:place] + chance.choice(WORDS) + text[place:], text * 2]
    )


def forged(golden: Golden, content: Any) -> dict[str, Any]:
    """Return a state of that content with the checksum that it would have."""
    untouched = golden.content()
    genuine = [at(untouched, path) for path in golden.histograms]
    for histogram in _histograms(content):
        if histogram not in genuine:
            _sign(histogram)
    try:
        payload = json.dumps({"checksum": checkpoint.checksum(content), "content": content})
    except (ValueError, RecursionError):
        payload = "{}"
    return {**golden.state, "payload": payload}


def _histograms(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "segments" in node and "checksum" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _histograms(child)


def _sign(histogram: dict[str, Any]) -> None:
    """Give a histogram, of this version or of version 1, the checksum that it should have, if any."""
    module, name = (
        (earlier_histogram, "checksum")
        if histogram.get("version") == 1
        else (saved_histogram, "_checksum")
    )
    real = getattr(module, name)
    found: list[int] = []

    def noted(*args: Any) -> int:
        found.append(real(*args))
        return found[-1]

    setattr(module, name, noted)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            saved_histogram.from_dict(histogram)
    except Exception:
        pass
    finally:
        setattr(module, name, real)
    if found:
        histogram["checksum"] = found[-1]


# -- Lies that fit together ----------------------------------------------------------------------

VALUES = [
    *(0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-320, 5e-324, 1e16, 2.0**53, 2.0**53 + 2, 1e300, -1e300),
    *(1e308, math.nan, math.inf, -math.inf),
]


def _array(text: Any) -> Any:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f8").copy()
    except (ValueError, TypeError):
        return np.empty(0)


def _text(array: Any) -> str:
    return base64.b64encode(np.asarray(array, "<f8").tobytes()).decode("ascii")


def false_totals(golden: Golden, chance: random.Random) -> Any:
    """Return totals of the right sizes that say anything."""
    content = golden.content()
    for _ in range(chance.choice([1, 1, 2, 6])):
        view = content[chance.choice(["run", "interval"])]
        which = chance.choice(["sums", "sums", "maxs", "lost"])
        array = _array(view[which])
        if array.size:
            lanes = [
                chance.randrange(array.size) for _ in range(chance.choice([1, 1, 3, array.size]))
            ]
            how = chance.randrange(5)
            if how == 0:
                array[lanes] = chance.choice(VALUES)
            elif how == 1:
                array[lanes] *= chance.choice([-1.0, 2.0, 0.5, 1e200, 0.0])
            elif how == 2:
                array[lanes] += chance.choice([1.0, -1.0, 0.5, 1e-9])
            elif how == 3:
                chance.shuffle(lanes)
                array[sorted(lanes)] = array[lanes]
            else:
                array.view(np.uint64)[lanes] ^= np.uint64(1 << chance.randrange(64))
            view[which] = _text(array)
        if chance.random() < 0.1:
            view["seconds"] = chance.choice([*VALUES, *junk_of(chance, 2)])
    return content


def junk_of(chance: random.Random, count: int) -> list[Any]:
    return [junk(chance) for _ in range(count)]


NAMES = [
    *WORDS,
    "loss",
    "len",
    "len_stat_mean",
    "kind_count_a",
    "__other__",
    "x" * 100_000,
    "a/b",
    "d",
]


def false_names(golden: Golden, chance: random.Random) -> Any:
    """Return a state in which a key is called something else, wherever it stands."""
    content = golden.content()
    old = list(chance.choice(content["entries"])["key"])
    if chance.random() < 0.3:
        new = list(chance.choice(content["entries"])["key"])
    else:
        new = [chance.choice([old[0], *NAMES]), chance.choice([old[1], *NAMES])]
    if chance.random() < 0.1:
        new = chance.choice([[*new, "x"], new[:1], [7, new[1]], new[1], None])
    everywhere = chance.random() < 0.8
    for entry in content["entries"]:
        if entry["key"] == old:
            entry["key"] = new
    if everywhere and isinstance(new, list) and len(new) == 2:
        groups = [content["run"]["pools"], content["interval"]["pools"], content["windows"]]
        for pair in (pair for group in groups for pair in group):
            if pair[0] == old:
                pair[0] = new
        for state in (*content["custom"]["run"], *content["custom"]["interval"]):
            if [state["dataset"], state["name"]] == old:
                state["dataset"], state["name"] = new
    if chance.random() < 0.5:
        content["entries"].sort(key=lambda entry: json.dumps(entry["key"]))
    return content


def false_kinds(golden: Golden, chance: random.Random) -> Any:
    """Return a state of which a metric is said to be something else than it is."""
    content = golden.content()
    entry = chance.choice(content["entries"])
    other = chance.choice(content["entries"])
    how = chance.randrange(7)
    if how == 0:
        said = "kind" if "kind" in entry else "type"
        entry[said] = other[said]
    elif how == 1:
        entry |= {**other, "key": entry["key"]}
    elif how == 2:
        for field in ("sums", "maxs"):
            have_lanes(entry, field, lanes_of(other, field))
    elif how == 3:
        entry["suffixes"] = chance.choice(
            [other.get("suffixes"), ["_count_\0"], [""], ["\x1b"], [""] * 9, ["a"] * 100_000, []]
        )
    elif how == 4:
        categories = ["a", "b", "\x1b[2J", "", "__other__", "x" * 10_000, "\u202e", "c"]
        chance.shuffle(categories)
        entry["categories"] = categories[: chance.randrange(9)]
        entry["most"] = chance.choice([3, 0, -1, 1, 10**9, 2.5, None])
    elif how == 5:
        flags = ["per_rank", "distributed", "bounded", "drained", "weighted", "condensed", "full"]
        flag = chance.choice(flags)
        entry[flag] = not entry.get(flag, False)
    else:
        content["entries"].append({**entry, "key": chance.choice([entry["key"], ["", "new"]])})
    return content


def lanes_of(entry: Any, field: str) -> Any:
    """Return how many lanes an entry of either version says there are."""
    return getattr(parts_of(entry["kind"]), field) if "kind" in entry else entry[field]


def have_lanes(entry: Any, field: str, number: Any) -> None:
    if "kind" in entry:
        entry["kind"] = kind_of_parts(parts_of(entry["kind"])._replace(**{field: number}))
    else:
        entry[field] = number


def false_sizes(golden: Golden, chance: random.Random) -> Any:
    """Return a state with more, or fewer, lanes than the metric has; its totals fit, mostly."""
    content = golden.content()
    place = chance.randrange(len(content["entries"]))
    entry = content["entries"][place]
    field, vectors = chance.choice([("sums", ["sums", "lost"]), ("maxs", ["maxs"])])
    more = chance.choice([1, 1, 2, 5, -1, -1, 1000, 10**5])
    if chance.random() < 0.2:
        huge = [2**24, 2**40, 10**400, 1e30, -5, True]
        if chance.random() < 0.5:
            have_lanes(entry, field, chance.choice(huge))
        else:
            entry[chance.choice(["capacity", "most"])] = chance.choice(huge)
        return content
    end = sum(lanes_of(one, field) for one in content["entries"][: place + 1])
    have_lanes(entry, field, max(lanes_of(entry, field) + more, 0))
    for view in (content["run"], content["interval"]):
        for vector in vectors:
            array = _array(view[vector])
            filled = np.full(max(more, 0), chance.choice(VALUES[:6]))
            view[vector] = _text(np.concatenate([array[: end + min(more, 0)], filled, array[end:]]))
    return content


def false_values(golden: Golden, chance: random.Random) -> Any:
    """Return a state whose recent values, and those that accumulate, are none that were recorded."""
    content = golden.content()
    pools = [pair[1] for view in ("run", "interval") for pair in content[view]["pools"]]
    windows = [window for pair in content["windows"] for window in pair[1]]
    for _ in range(chance.choice([1, 1, 3])):
        one = chance.choice(pools + windows)
        count = chance.choice([0, 1, 2, 5, 40, 5000])
        values = [chance.choice(VALUES) for _ in range(count)]
        how = chance.randrange(6)
        if how == 0:
            one["values"] = _text(values)
        elif how == 1:
            one["weights"] = _text([abs(value) for value in values])
        elif how == 2:
            one["values"], one["weights"] = _text(range(count)), _text(values)
        elif how == 3:
            one["fresh"] = chance.choice([0, 1, count, -1, 10**9, True, 1.5])
        elif how == 4:
            one["older"] = copy.deepcopy(chance.choice(pools + windows)["older"])
        else:
            one |= {"values": _text(range(count)), "weights": None, "fresh": count, "older": None}
    if chance.random() < 0.2 and content["windows"]:
        pair = chance.choice(content["windows"])
        pair[1] = chance.choice([[], pair[1] * 2, pair[1] * 200, pair[1][::-1]])
    return content


def false_histograms(golden: Golden, chance: random.Random) -> Any:
    """Return a state with a histogram whose parts contradict each other, signed all the same."""
    content = golden.content()
    if not golden.histograms:
        return false_values(golden, chance)
    histogram = at(content, chance.choice(golden.histograms))
    for _ in range(chance.choice([1, 1, 2])):
        segment = chance.choice(
            histogram["segments"] or [{"index": [0], "m": 0, "sums": [[1.0]] * 3}]
        )
        how = chance.randrange(8)
        if how == 0:
            place = chance.randrange(len(segment["sums"][0]) or 1)
            row = chance.choice(segment["sums"])
            row[place : place + 1] = [chance.choice(VALUES)]
        elif how == 1:
            segment["index"] = chance.choice(
                [
                    segment["index"][::-1],
                    [one + 1 for one in segment["index"]],
                    segment["index"] * 2,
                ]
            )
        elif how == 2:
            segment["m"] = chance.choice([segment["m"] + 1, segment["m"] - 1, 0, 16, 40, -1, 2.5])
        elif how == 3:
            field = chance.choice(list(histogram["totals"]))
            histogram["totals"][field] = chance.choice(VALUES)
        elif how == 4:
            field = chance.choice(["minimum", "maximum"])
            histogram[field] = chance.choice([*VALUES, -histogram[field]])
        elif how == 5:
            histogram["dropped"] = chance.choice([1, 40, 4000, -1, 0.5, None])
            histogram["finest"] = chance.choice([histogram["finest"], 0, 16, 17, 99])
        elif how == 6:
            segments = histogram["segments"]
            histogram["segments"] = chance.choice(
                [segments[::-1], segments * 2, segments[:-1], [*segments, copy.deepcopy(segment)]]
            )
        else:
            other = at(golden.content(), chance.choice(golden.histograms))
            field = chance.choice(list(other))
            histogram[field] = other[field]
    return content


CONTAINERS = ["tuple", "deque", "dict", "Counter", "OrderedDict", "defaultdict", "array", "floats"]


def false_states(golden: Golden, chance: random.Random) -> Any:
    """Return states of custom handlers that hold what no handler saved."""
    content = golden.content()
    view = content["custom"][chance.choice(["run", "interval"])]
    if not view:
        view.append(
            {"dataset": "d", "name": "rms", "type": "lane rms", "value": 1.0, "metadata": {}}
        )
    state = chance.choice(view)

    def lie(depth: int = 0) -> Any:
        if depth > 2 or chance.random() < 0.4:
            return junk(chance)
        kind = chance.choice(CONTAINERS)
        made: dict[str, Any] = {
            plain._KIND: kind,
            "items": junk_of(chance, 2),
            "most": junk(chance),
        }
        made |= {
            "keys": [lie(depth + 1)],
            "of": chance.choice(["list", "int", "eval", "os.system"]),
        }
        made |= {"type": chance.choice(["<f8", "|O", "<U4", "V9", "f9", "<M8[s]", "<i8"])}
        made |= {"shape": chance.choice([[2], [10**12], [-1], [0], [[1]], "ab", [2**63]])}
        made["data"] = chance.choice([_text([1.0, 2.0]), "", "!!", 7])
        if chance.random() < 0.3:
            made["items"] = [lie(depth + 1)]
        return made

    how = chance.randrange(6)
    if how == 0:
        state["value"] = lie()
    elif how == 1 and isinstance(state["metadata"], dict) and state["metadata"]:
        state["metadata"][chance.choice(list(state["metadata"]))] = lie()
    elif how == 2:
        state["metadata"] = lie()
    elif how == 3:
        state["type"] = chance.choice(
            ["mean", "lane rms", "distribution", "a.B.C", "\x1b", 7, None]
        )
    elif how == 4:
        view.extend(copy.deepcopy(view) * chance.choice([1, 30]))
    else:
        state["dataset"], state["name"] = chance.choice(NAMES), chance.choice(NAMES)
    return content


def grafted(golden: Golden, chance: random.Random) -> Any:
    """Return a state of which a part is that of another checkpoint."""
    content, other = golden.content(), chance.choice(goldens()).content()
    for _ in range(chance.choice([1, 1, 2])):
        parts = ["entries", "run", "interval", "windows", "custom", "kinds", "rules", "views"]
        part = chance.choice([part for part in parts if part in other or part == "views"])
        if part == "views":
            content["run"], content["interval"] = content["interval"], content["run"]
        elif part in ("run", "interval") and chance.random() < 0.5:
            field = chance.choice(list(content[part]))
            content[part][field] = other[part][field]
        else:
            content[part] = other[part]
    return content


DEPTH = 50_000


def nested(golden: Golden, chance: random.Random) -> dict[str, Any]:
    """Return a state that nests deeper than any parser goes, with a right checksum or none."""
    deep = "[" * DEPTH + "]" * DEPTH
    place = chance.choice(["entries", "run", "windows", "custom", "checksum", "content"])
    payload = json.loads(golden.state["payload"])
    target = payload if place in payload else payload["content"]
    target[place] = "DEEP"
    return {**golden.state, "payload": json.dumps(payload).replace('"DEEP"', deep)}


def deep_state(golden: Golden, chance: random.Random) -> Any:
    """Return a state that nests as deep as a parser just goes."""
    content = golden.content()
    deep: Any = 1.0
    for _ in range(chance.choice([20, 100, 300, 900])):
        deep = chance.choice([[deep], {"a": deep}])
    node = at(content, chance.choice(golden.objects))
    node[chance.choice(list(node))] = deep
    return content


def odd_frame(golden: Golden, chance: random.Random) -> Any:
    """Return a state whose three keys are not what they should be."""
    state = dict(golden.state)
    how = chance.randrange(4)
    if how == 0:
        del state[chance.choice(list(state))]
    elif how == 1:
        return junk(chance)
    else:
        state[chance.choice(list(state))] = junk(chance)
    return state


# -- Judging -------------------------------------------------------------------------------------


def use(window: int | None, state: Any, alone: Any = None) -> None:
    """Do with a state all that a run, or what goes on from it, does; raises if anything does.

    Args:
        window: of the aggregators that load it.
        state: what is loaded.
        alone: an aggregator that has loaded it.
    """
    if alone is None:
        alone = new_aggregator(window, max_categories=3)
        alone.load_state_dict(state)
    again = alone.state_dict(sync=False)
    saved = _lived(alone)
    for one in (again, saved):
        new_aggregator(window).load_state_dict(one)
    merge_state_dicts([saved, again], parallel=True)
    merge_state_dicts([again, again], parallel=False)

    def live(rank: Any) -> None:
        aggregator = new_aggregator(window, communicator=rank, max_categories=3)
        aggregator.load_state_dict(state)
        _lived(aggregator)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(live, rank) for rank in thread_world(2, TIMEOUT)]:
            future.result(60.0)


def _lived(aggregator: Any) -> Any:
    """Go on with an aggregator that has loaded a state; returns the next one."""
    aggregator.record("of its own", 1.0)
    saved = aggregator.state_dict()
    snapshot = aggregator.reduce()
    for view in ("run", "interval"):
        for key, value in snapshot.as_dict("t", window=view, rollup=True).items():
            if not is_name(key) or not isinstance(value, float):
                raise AssertionError(f"{key!r} is {value!r}")
    for histogram in snapshot.histograms("t").values():
        if not np.isfinite(histogram.edges).all():
            raise AssertionError(f"{histogram!r}")
    return saved


class Judge:
    """Tries states on aggregators that hold something already, again and again where that stays."""

    def __init__(self) -> None:
        self._targets: dict[int | None, tuple[Any, Any]] = {}

    def _target(self, window: int | None) -> tuple[Any, Any]:
        if window not in self._targets:
            aggregator = new_aggregator(window)
            aggregator.record("before", 2.0, "sum")
            aggregator.record("lengths", 3.0, "distribution")
            aggregator.reduce()
            aggregator.record("before", 3.0, "sum")
            self._targets[window] = aggregator, aggregator.state_dict(sync=False)
        return self._targets[window]

    def judge(self, row: Row, trial: Trial, window: int | None, state: Any) -> None:
        """Count what came of one state."""
        aggregator, _ = self._target(window)
        try:
            aggregator.load_state_dict(state)
        except ValueError as error:
            row.became("refused")
            wrong = self._refused(row, trial, window, state, error)
        except BaseException as error:
            wrong = f"it raises {type(error).__name__}: {error}"
        else:
            row.became("loaded")
            del self._targets[window]
            try:
                if trial.number % 10 < 2:  # which is even and odd, so that each process has some
                    use(window, state, aggregator)
                else:
                    new_aggregator(window).load_state_dict(_lived(aggregator))
            except TimeoutError as error:
                row.has_hung(repr(error), trial)
                return
            except BaseException as error:
                wrong = f"it is loaded, and then {type(error).__name__}: {error}"
            else:
                wrong = ""
        if wrong:
            self._targets.pop(window, None)
            row.went_wrong(wrong[:300], trial)
        else:
            row.went_right()

    def _refused(
        self, row: Row, trial: Trial, window: int | None, state: Any, error: Exception
    ) -> str:
        aggregator, before = self._target(window)
        if not is_name(str(error)):
            return f"the error is not printable: {error!r}"
        if aggregator.state_dict(sync=False) != before:
            return "a refused state has changed something"
        if trial.number % 20 == 0:  # what is refused here is mostly refused there
            try:
                _merge(window, state)
            except BaseException as failure:
                return f"it is merged, and then {failure!r}"
        return ""


def _merge(window: int | None, state: Any) -> None:
    """Merge a state that cannot be loaded; what comes out is refused, or good for use.

    Merging knows no handlers, and leaves out what was known of open intervals.
    """
    for parallel in (True, False):
        try:
            merged = merge_state_dicts([state, state], parallel=parallel)
            new_aggregator(window).load_state_dict(merged)
        except ValueError:
            continue
        use(window, merged)


def _with_checksum(
    content_of: Callable[[Golden, random.Random], Any],
) -> Callable[[Golden, random.Random], Any]:
    return lambda golden, chance: forged(golden, content_of(golden, chance))


FORGERIES: dict[str, tuple[Callable[[Golden, random.Random], Any], int, int]] = {
    "something anywhere": (_with_checksum(mutated), 2_600, 40),
    "totals": (_with_checksum(false_totals), 1_300, 20),
    "names": (_with_checksum(false_names), 1_200, 20),
    "kinds of metrics": (_with_checksum(false_kinds), 1_200, 20),
    "sizes": (_with_checksum(false_sizes), 800, 15),
    "values": (_with_checksum(false_values), 1_200, 20),
    "histograms": (_with_checksum(false_histograms), 1_200, 20),
    "states of custom handlers": (_with_checksum(false_states), 1_000, 20),
    "parts of another checkpoint": (_with_checksum(grafted), 600, 20),
    "depth": (_with_checksum(deep_state), 200, 5),
    "depth beyond measure": (nested, 100, 5),
    "not the three keys": (odd_frame, 200, 10),
}
"""What lies, under a right checksum where there is one; how many, and how many in a few seconds."""
FORGED = 10_000
DAMAGED = 90_000


@functools.cache
def goldens() -> list[Golden]:
    return [Golden(file, anew=anew) for file in GOLDEN for anew in (False, True)]


def damaged(state: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a state of which a disk has lost or altered something."""
    payload = state["payload"]
    place = chance.randrange(len(payload))
    how = chance.randrange(4)
    if how == 0:
        payload = payload[:place]
    elif how == 1:
        payload = (
            payload[:place]
            + chr(ord(payload[place]) ^ 1 << chance.randrange(7))
            + payload[place + 1 :]
        )
    elif how == 2:
        payload = payload[:place] + "\0" * 64 + payload[place + 64 :]
    else:
        payload = payload[:place] + payload[place + chance.randrange(1, 99) :]
    return {**state, "payload": payload}


def run(options: Options, table: Table) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("metricfold").setLevel(logging.CRITICAL)
    goldens()
    divided(options, table, attacked, patience=60.0)
    damage, *forgeries = (row.judged() for row in table.rows)
    table.goals.append(Goal("forged checkpoints", sum(forgeries), FORGED))
    table.goals.append(Goal("checkpoints, damaged or forged", damage + sum(forgeries), 100_000))


def attacked(options: Options, table: Table) -> None:
    """Try this process's share."""
    _damage(options, table)
    for name, (forge, full, quick) in reversed(FORGERIES.items()):
        row = table.row(f"forged: {name}")
        judge = Judge()
        for trial in options.trials(row, full=full, quick=quick, least=full):
            golden = trial.random.choice(goldens())
            judge.judge(row, trial, golden.window, forge(golden, trial.random))


def _damage(options: Options, table: Table) -> None:
    row = table.row("damaged")
    aggregators = {window: new_aggregator(window) for window in (5, None)}
    befores = {window: one.state_dict(sync=False) for window, one in aggregators.items()}
    for trial in options.trials(row, full=DAMAGED, quick=100, least=DAMAGED):
        golden = trial.random.choice(goldens())
        window, state = golden.window, golden.state
        worse = damaged(state, trial.random)
        try:
            aggregators[window].load_state_dict(worse)
        except ValueError:
            if aggregators[window].state_dict(sync=False) == befores[window]:
                row.went_right()
                continue
            row.went_wrong("a refused state has changed something", trial)
        except BaseException as error:
            row.went_wrong(f"{type(error).__name__}: {error}"[:300], trial)
        else:
            # JSON says some things in several ways.
            if json.loads(worse["payload"]) == json.loads(state["payload"]):
                row.went_right()
            else:
                row.went_wrong("it was loaded", trial)
        aggregators[window] = new_aggregator(window)


if __name__ == "__main__":
    main(run, __doc__)
