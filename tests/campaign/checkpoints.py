"""Checkpoints that were damaged, or forged with a right checksum: refused, or loaded and good for use.

Golden checkpoints of every kind are changed anywhere in their structure. Right is a `ValueError` that
has changed nothing, or a state that is loaded and never raises later, on one rank and on two: at a
reduction, in a log, in a checkpoint of its own, merged with others.
"""

from __future__ import annotations

import base64
import contextlib
import copy
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

from campaign.table import Options, Row, Table, Trial, main
from metricfold import MetricsAggregator, merge_state_dicts
from metricfold.checkpoint import checksum
from metricfold.communicator.threads import thread_world
from metricfold.metric import is_name

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "checkpoints").glob("*-*.json"))
TIMEOUT = 20.0


def golden(file: Path) -> tuple[dict[str, Any], int | None]:
    """Return a golden state, and the window size of the aggregator that it is for."""
    return json.loads(file.read_text("utf-8")), None if "unbounded" in file.stem else 5


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


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a tree with every place in it."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for place, child in items:
        yield node, place
        if isinstance(child, dict | list):
            yield from places(child)


def mutated(content: Any, chance: random.Random) -> Any:
    """Return a tree with something changed somewhere."""
    content = copy.deepcopy(content)
    everywhere = list(places(content))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        # As often near the top as deep inside: most places are numbers of histograms.
        few = chance.random() < 0.5
        chosen = [one for one in everywhere if not few or isinstance(one[0], dict)]
        node, place = chance.choice(chosen)
        if isinstance(node, list) and place >= len(node):
            continue
        if isinstance(node, dict) and place not in node:
            continue
        _change(node, place, chance)
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


def forged(state: dict[str, Any], content: Any) -> dict[str, Any]:
    """Return a state of that content with the checksum that it would have."""
    for histogram in _histograms(content):
        _sign(histogram)
    try:
        payload = json.dumps({"checksum": checksum(content), "content": content})
    except (ValueError, RecursionError):
        payload = "{}"
    return {**state, "payload": payload}


def _histograms(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "segments" in node and "checksum" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _histograms(child)


def _sign(histogram: dict[str, Any]) -> None:
    """Give a histogram the checksum that it should have, if it has any."""
    from metricfold.histogram import plain

    real = plain._checksum
    found: list[int] = []

    def noted(*args: Any) -> int:
        found.append(real(*args))
        return found[-1]

    plain._checksum = noted
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            plain.from_dict(histogram)
    except Exception:
        pass
    finally:
        plain._checksum = real
    if found:
        histogram["checksum"] = found[-1]


DEPTH = 50_000


def nested(state: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a state that nests deeper than any parser goes, with a right checksum or none."""
    deep = "[" * DEPTH + "]" * DEPTH
    place = chance.choice(["entries", "run", "windows", "custom", "checksum", "content"])
    payload = json.loads(state["payload"])
    target = payload if place in payload else payload["content"]
    target[place] = "DEEP"
    return {**state, "payload": json.dumps(payload).replace('"DEEP"', deep)}


def odd_frame(state: dict[str, Any], chance: random.Random) -> Any:
    """Return a state whose three keys are not what they should be."""
    state = dict(state)
    how = chance.randrange(4)
    if how == 0:
        del state[chance.choice(list(state))]
    elif how == 1:
        return junk(chance)
    else:
        state[chance.choice(list(state))] = junk(chance)
    return state


# -- Judging -------------------------------------------------------------------------------------


def use(window: int | None, state: Any) -> None:
    """Do with a loaded state all that a run does; raises if anything does."""
    for size in (1, 2):
        ranks = thread_world(size, TIMEOUT)

        def live(rank: Any) -> None:
            aggregator = new_aggregator(window, communicator=rank, max_categories=3)
            aggregator.load_state_dict(state)
            again = aggregator.state_dict(sync=False)
            aggregator.record("of its own", 1.0)
            saved = aggregator.state_dict()
            snapshot = aggregator.reduce()
            for view in ("run", "interval"):
                logged = snapshot.as_dict("t", window=view, rollup=True)
                for key, value in logged.items():
                    if not is_name(key) or not isinstance(value, float):
                        raise AssertionError(f"{key!r} is {value!r}")
            snapshot.histograms("t")
            new_aggregator(window).load_state_dict(again)
            new_aggregator(window).load_state_dict(saved)
            merge_state_dicts([saved, again], parallel=True)
            merge_state_dicts([again, again], parallel=False)

        with ThreadPoolExecutor(size) as pool:
            for future in [pool.submit(live, rank) for rank in ranks]:
                future.result(60.0)


def judge(row: Row, trial: Trial, window: int | None, state: Any) -> str:
    """Count what came of one state; returns "refused", "loaded", or nothing."""
    aggregator = new_aggregator(window)
    aggregator.record("before", 2.0, "sum")
    aggregator.record("lengths", 3.0, "distribution")
    aggregator.reduce()
    aggregator.record("before", 3.0, "sum")
    before = aggregator.state_dict(sync=False)
    try:
        aggregator.load_state_dict(state)
    except ValueError as error:
        if not _printable(str(error)):
            row.went_wrong(f"the error is not printable: {error!r}", trial)
        elif aggregator.state_dict(sync=False) != before:
            row.went_wrong("a refused state has changed something", trial)
        elif aggregator.get_metrics_for_logging("t")["t/before"] != 5.0:
            row.has_lost("values that came before a refused state", trial)
        else:
            try:
                if trial.number % 8 == 0:  # what is refused here is mostly refused there
                    _merge(window, state)
            except BaseException as failure:
                row.went_wrong(f"it is merged, and then {failure!r}"[:300], trial)
            else:
                row.went_right()
        return "refused"
    except BaseException as error:
        row.went_wrong(f"it raises {type(error).__name__}: {error}"[:300], trial)
        return ""
    try:
        use(window, state)
    except TimeoutError as error:
        row.has_hung(repr(error), trial)
    except BaseException as error:
        row.went_wrong(f"it is loaded, and then {type(error).__name__}: {error}"[:300], trial)
    else:
        row.went_right()
    return "loaded"


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


def _printable(text: str) -> bool:
    return is_name(text)


FORGERIES: dict[str, Callable[[dict[str, Any], random.Random], Any]] = {
    "something changed, checksum right": lambda state, chance: forged(
        state, mutated(json.loads(state["payload"])["content"], chance)
    ),
    "nested beyond measure": nested,
    "not the three keys": odd_frame,
}


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
    states = [golden(file) for file in GOLDEN]
    _damage(options, table, states)
    for name, forge in reversed(FORGERIES.items()):
        row = table.row(f"forged: {name}")
        many = "checksum" in name
        came: dict[str, int] = {}
        for trial in options.trials(row, full=11_000 if many else 400, quick=200 if many else 10):
            state, window = trial.random.choice(states)
            what = judge(row, trial, window, forge(state, trial.random))
            came[what] = came.get(what, 0) + 1
        row.figures = ", ".join(f"{count} {what}" for what, count in sorted(came.items()) if what)


def _damage(
    options: Options, table: Table, states: list[tuple[dict[str, Any], int | None]]
) -> None:
    row = table.row("damaged")
    aggregators = {window: new_aggregator(window) for window in (5, None)}
    befores = {window: one.state_dict(sync=False) for window, one in aggregators.items()}
    for trial in options.trials(row, full=100_000, quick=100):
        state, window = trial.random.choice(states)
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
