"""Names: one rule for what is recorded, loaded, counted and printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from metricfold import (
    JSONLSink,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsLogger,
    MetricTransform,
)
from metricfold._core.intake.checkpoint import _json, checksum
from metricfold.metric import is_name

GOOD = [
    "損失　全体",  # U+3000, the space of Chinese and Japanese text
    "👩‍🔬",  # a woman and a microscope, joined by U+200D
    "می‌خواهم",  # U+200C keeps two letters of a Persian word apart
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",  # a flag, spelled by characters that show nothing
    "❤️",
    "\U0001fae8",  # an emoji that this Python does not know yet, or does
    "a\xa0b",
    "\u200f\u05d0\u05d1\u05d2",  # Hebrew, with a mark that says so
    "a b",
]
BAD = [
    "a\nb",
    "a\rb",
    "\t",
    "\x00",
    "\x1b[31mred",
    "\x7f",
    "\x85",
    "a\u2028b",
    "a\u2029b",
    "\u202eevil",
    "\u2066a\u2069",
    "half of \ud83d",
    "\udc00",
]


def by_record(name: str) -> None:
    MetricsAggregator().record(name, 1.0)


def by_record_with_dataset(name: str) -> None:
    MetricsAggregator().record("loss", 1.0, dataset=name)


def by_update(name: str) -> None:
    MetricsAggregator().update([Metric("d", name, 1.0, "mean")])


def by_update_with_dataset(name: str) -> None:
    MetricsAggregator().update([Metric(name, "loss", 1.0, "mean")])


def by_batch(name: str) -> None:
    MetricBatch.from_metrics([Metric("d", name, 1.0, "mean")])


def by_prefix(name: str) -> None:
    MetricsAggregator().get_metrics_for_logging(name)


def by_derive(name: str) -> None:
    MetricsAggregator().derive(name, lambda metrics: metrics["loss"])


def by_timer(name: str) -> None:
    MetricsAggregator().timer(name)


def by_transform(name: str) -> None:
    class Nothing(MetricTransform):
        def _generate_metrics(self, sample: Any) -> list[Metric]:
            return []

    Nothing().set_dataset_name(name)


def by_log(name: str) -> None:
    with MetricsLogger([]) as logger:
        logger.log(1, {name: 1.0})


WAYS = [
    by_record,
    by_record_with_dataset,
    by_update,
    by_update_with_dataset,
    by_batch,
    by_prefix,
    by_derive,
    by_timer,
    by_transform,
    by_log,
]


@pytest.mark.parametrize("way", WAYS)
def test_every_call_takes_and_refuses_the_same_names(way: Callable[[str], None]) -> None:
    for name in GOOD:
        way(name)
    for name in BAD:
        with pytest.raises(ValueError, match="holds a line break or another unprintable character"):
            way(name)
    with pytest.raises(ValueError, match="is empty"):
        way("")


def test_names_of_any_script_come_through_a_log_and_a_checkpoint(tmp_path: Any) -> None:
    aggregator = MetricsAggregator()
    for name in GOOD:
        aggregator.record(name, 1.0, dataset=name)
    resumed = MetricsAggregator()
    resumed.load_state_dict(json.loads(json.dumps(aggregator.state_dict())))
    expected = {f"train_{name}/{name}": 1.0 for name in GOOD}
    assert resumed.get_metrics_for_logging("train") == expected
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        logger.log(1, aggregator, prefix="train")
    (line,) = (tmp_path / "run.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["metrics"].items() >= expected.items()


def renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a checkpoint that another program has written."""
    content = json.loads(state["payload"])["content"]
    content = json.loads(json.dumps(content).replace(json.dumps(old), json.dumps(new)))
    return {**state, "payload": _json({"checksum": checksum(content), "content": content})}


@pytest.mark.parametrize("name", [*BAD, ""])
def test_a_loaded_name_that_no_call_would_take_is_refused_and_changes_nothing(name: str) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("loss", 1.0, dataset="docs")
    aggregator.update([Metric("docs", "kind", "prose", "categorical_count")])
    state = aggregator.state_dict()
    for old in ("loss", "docs", "prose"):
        if not name and old == "docs":
            continue  # a metric of a step
        resumed = MetricsAggregator()
        resumed.record("x", 1.0)
        with pytest.raises(
            ValueError, match=r"payload is not what .* (is empty|holds a line|no list of names)"
        ):
            resumed.load_state_dict(renamed(state, old, name))
        assert resumed.get_metrics_for_logging("t") == {"t/x": 1.0}


def test_a_key_that_a_sink_makes_is_a_name_too(tmp_path: Any) -> None:
    sink = JSONLSink(tmp_path / "run.jsonl", key_format=lambda key: key + "\u202e")
    with pytest.raises(ValueError, match=r"what key_format makes of 'train/loss' .* holds a line"):
        sink._renamed({"train/loss": 1.0})


def test_the_rule_is_wider_than_isprintable_and_the_same_for_every_python() -> None:
    """`str.isprintable` was the rule: it refuses joined emoji, and what its Python does not know."""
    assert all(is_name(name) for name in GOOD)
    assert not all(name.isprintable() for name in GOOD)
    assert not any(name.isprintable() for name in BAD)
