"""A state that anyone may have written is refused and changes nothing, or is good for use."""

from __future__ import annotations

import base64
import math
import random
from typing import Any

import numpy as np
import pytest
from campaign import checkpoints as forging
from campaign.table import Row, Trial

from metricfold import MetricsAggregator, merge_state_dicts
from metricfold._core.fold.kinds import parts_of

_BOUNDED = next(f for f in forging.GOLDEN if "narrow-2-bounded-open" in f.stem)
NOW = forging.Golden(_BOUNDED)
BOTH_VERSIONS = (NOW, forging.Golden(_BOUNDED, anew=True))
ALL = forging.Golden(next(f for f in forging.GOLDEN if "narrow-2-unbounded-open" in f.stem))


def of_type(tree: Any, label: str) -> Any:
    def type_of(entry: Any) -> str:
        return parts_of(entry["kind"]).label if "kind" in entry else entry["type"]

    return next(entry for entry in tree["entries"] if type_of(entry) == label)


def numbers(text: str, place: int, number: float) -> str:
    array = np.frombuffer(base64.b64decode(text)).copy()
    array[place] = number
    return base64.b64encode(array.tobytes()).decode()


def set_in(part: str, name: str, value: Any) -> Any:
    return lambda tree: tree[part].__setitem__(name, value)


def in_entry(label: str, **fields: Any) -> Any:
    return lambda tree: of_type(tree, label).update(fields)


def in_window(**fields: Any) -> Any:
    return lambda tree: tree["windows"][1][1][0].update(fields)


def with_count(number: float) -> Any:
    def change(tree: Any) -> None:
        tree["run"]["sums"] = numbers(tree["run"]["sums"], 0, number)

    return change


def twice(part: str) -> Any:
    return lambda tree: tree[part].append(tree[part][0])


FORGERIES = {
    "a name that turns a terminal red": in_entry("mean", key=["", "\x1b[31mred"]),
    "a name of two lines": in_entry("mean", key=["a\nb", "x"]),
    "half of a surrogate pair": in_entry("mean", key=["", "\ud800"]),
    "a category that cannot be printed": in_entry(
        "categorical_count", categories=["a", "\x1b", "c"]
    ),
    "a category twice": in_entry("categorical_count", categories=["__other__", "a", "a", "c"]),
    "no category for the others": in_entry("categorical_count", categories=["a", "b", "c", "d"]),
    "another number of lanes": in_entry("mean", sums=5),
    "lanes by the billion": in_entry("mean", sums=10**9),
    "a kind of more lanes": in_entry("mean", kind="mean/5+0"),
    "a kind of lanes by the billion": in_entry("mean", kind="mean/1000000000+0"),
    "a kind that is a mean's, written out": in_entry("mean", kind="mean/4+0"),
    "a kind of values that are kept": in_entry("mean", kind="mean/4+0/recent"),
    "no kind": in_entry("mean", kind=None),
    "lanes of a handler that has none": in_entry("handlers_of_users.MyTypes.RMS", maxs=3),
    "a mean that is a distribution": in_entry("mean", distributed=True),
    "flags that are numbers": in_entry("rate", per_rank=1),
    "a field that is unknown": in_entry("mean", colour="red"),
    "a suffix that cannot be printed": in_entry("mean", suffixes=["\x1b"]),
    "a key twice": twice("entries"),
    "windows twice": twice("windows"),
    "seconds that are text": set_in("run", "seconds", "12"),
    "seconds without end": set_in("run", "seconds", math.inf),
    "seconds of 400 digits": set_in("run", "seconds", 10**400),
    "seconds below 0": set_in("interval", "seconds", -1.0),
    "what is no base64": set_in("run", "sums", "!!!!"),
    "half a number": set_in("run", "maxs", "AAAA"),
    "a count below 0": with_count(-1.0),
    "a count that is NaN": with_count(math.nan),
    "half a count": with_count(0.5),
    "a window that is no number": in_window(values=base64.b64encode(b"\xff" * 8).decode()),
    "more fresh values than values": in_window(fresh=10**6),
    "half a fresh value": in_window(fresh=0.5),
    "a weight without end": in_window(
        values=base64.b64encode(np.ones(1).tobytes()).decode(),
        weights=base64.b64encode(np.full(1, np.inf).tobytes()).decode(),
        fresh=0,
    ),
    # Loaded until now, and then an error at the reduction that made a histogram of it.
    "a weight whose square is no number": in_window(
        values=base64.b64encode(np.ones(1).tobytes()).decode(),
        weights=base64.b64encode(np.full(1, 1e200).tobytes()).decode(),
        fresh=0,
    ),
    "states that are no list": set_in("custom", "run", {}),
    "a state that is none": set_in("custom", "run", [3]),
    "a state that its handler fails on": lambda tree: tree["custom"]["run"][0].update(
        metadata={"count": [], "squares": "x"}
    ),
    "no interval": lambda tree: tree.pop("interval"),
    "a part that is unknown": lambda tree: tree.update(more=[]),
    "memories of rules": lambda tree: tree.update(rules={"loss": [1.0]}),
    "kinds of a key that has one": lambda tree: tree.update(kinds=[["", "x", ["mean", "sum"]]]),
    "kinds that are none": lambda tree: tree.update(kinds={"x": 3}),
    "entries nested by the thousand": lambda tree: tree.update(entries=_nested(900)),
}


def _nested(depth: int) -> Any:
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_state_is_refused_and_changes_nothing(name: str) -> None:
    """Until now some were loaded and raised at the next reduction, or printed what they liked."""
    for number, golden in enumerate(BOTH_VERSIONS):
        tree = golden.content()
        FORGERIES[name](tree)
        row = judged(number, golden.window, forging.forged(golden, tree))
        assert row.well(), row.notes
        assert row.came == {"refused": 1}


def judged(number: int, window: int | None, state: Any) -> Row:
    row = Row("forged", injected=1)
    forging.Judge().judge(row, Trial(number, random.Random(0)), window, state)
    return row


@pytest.mark.parametrize(
    "change",
    [
        lambda sketch: sketch.update(max_buckets=10**12),
        lambda sketch: sketch.update(max_buckets=320),
        lambda sketch: sketch.update(finest=40),
        lambda sketch: sketch.update(finest=-1),
        lambda sketch: sketch.update(dropped=10**6),
        lambda sketch: sketch.update(minimum=9.0, maximum=1.0),
        lambda sketch: sketch["totals"].update(count=0.5),
        lambda sketch: sketch["totals"].update(count=-1.0),
        lambda sketch: sketch.update(segments=[]),
        lambda sketch: sketch["segments"][0].update(m=60),
        lambda sketch: sketch["segments"][0].update(m=-5),
        lambda sketch: sketch["segments"][0]["sums"][0].__setitem__(0, -3.0),
        lambda sketch: sketch["segments"][0]["sums"][0].__setitem__(0, math.inf),
        lambda sketch: sketch["segments"][0]["index"].__setitem__(0, 2**62),
        lambda sketch: sketch["segments"][0]["index"].__setitem__(0, 0),
    ],
)
def test_a_sketch_that_would_raise_later_is_refused_at_load(change: Any) -> None:
    tree = ALL.content()
    sketch = next(iter(forging._histograms(tree)))
    change(sketch)
    row = judged(0, ALL.window, forging.forged(ALL, tree))
    assert row.well(), row.notes
    assert row.came == {"refused": 1}


def test_a_state_nested_by_the_ten_thousand_is_refused_with_a_value_error() -> None:
    """Until now a RecursionError got through where the checksum was asked for."""
    for number in range(12):
        state = forging.nested(NOW, random.Random(number))
        row = judged(number, NOW.window, state)
        assert row.came == {"refused": 1}
        assert row.well(), row.notes
        with pytest.raises(ValueError, match=r"states\[1\]"):
            merge_state_dicts([NOW.state, state], parallel=True)


@pytest.mark.filterwarnings("ignore")  # that metrics of one name do not add up is right to say
@pytest.mark.parametrize("kind", forging.FORGERIES)
def test_whatever_a_state_says_it_is_refused_or_good_for_use(kind: str) -> None:
    forge, _, count = forging.FORGERIES[kind]
    judge, row = forging.Judge(), Row(kind)
    for number in range(count):
        trial = Trial(number, random.Random(f"{kind}/{number}"))
        golden = trial.random.choice(forging.goldens())
        judge.judge(row, trial, golden.window, forge(golden, trial.random))
    assert row.well(), row.notes
    assert row.right == count


def test_names_in_an_error_about_a_state_are_spelled_out() -> None:
    tree = NOW.content()
    tree["run"]["\x1b[31m"] = 1
    tree["entries"][0]["\x1b[31m\u202e"] = 1
    with pytest.raises(ValueError, match="unknown here") as caught:
        MetricsAggregator().load_state_dict(forging.forged(NOW, tree))
    assert str(caught.value).isprintable()
