"""What is in use copies to itself, and what cannot be copied says where it was found."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metricfold import (
    ConsoleSink,
    DefaultTrainingMetricTransform,
    JSONLSink,
    MetricBatch,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
    read_jsonl,
)


class Model:
    """Something that frameworks copy, with what hangs on it."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def sent(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))


WAYS: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, sent]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_logger_in_use_copies_to_itself(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    with MetricsLogger([JSONLSink(tmp_path / "log.jsonl")]) as logger:
        logger.log(1, {"loss": 1.0})
        assert copied(logger) is logger
        assert copy.deepcopy(Model(logger=logger, again=[logger])).logger is logger
        copied(logger).log(2, {"loss": 2.0})
    assert copied(logger) is logger
    assert [record.step for record in read_jsonl(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("copied", WAYS)
def test_a_logger_that_is_not_in_use_yet_is_copied_plainly(
    tmp_path: Path, copied: Callable[[Any], Any]
) -> None:
    sinks = [JSONLSink(tmp_path / "log.jsonl", select="*/loss"), ConsoleSink()]
    logger = MetricsLogger(sinks, queue_size=7)
    another = copied(logger)
    assert another is not logger
    logger.close()
    another.log(1, {"a/loss": 1.0, "a/other": 2.0})
    another.close()
    (record,) = read_jsonl(tmp_path / "log.jsonl")
    assert record.metrics == {"a/loss": 1.0}


def test_a_copied_logger_writes_everything_at_exit(tmp_path: Path) -> None:
    program = """
import copy, sys
from metricfold import JSONLSink, MetricsLogger
logger = copy.deepcopy(MetricsLogger([JSONLSink(sys.argv[1])]))
logger.log(1, {"loss": 1.0})
"""
    file = str(tmp_path / "log.jsonl")
    subprocess.run([sys.executable, "-c", program, file], timeout=60, check=True)
    assert [record.step for record in read_jsonl(file)] == [1]


def test_a_logger_in_use_is_not_sent_to_another_process(tmp_path: Path) -> None:
    with MetricsLogger([JSONLSink(tmp_path / "log.jsonl")]) as logger:
        logger.log(1, {"loss": 1.0})
        model = Model(logger=logger)
        with pytest.raises(TypeError, match="Make one in each process") as error:
            pickle.dumps(model)
        assert "This one is attribute 'logger' of a Model." in str(error.value)


@pytest.mark.parametrize("copied", WAYS)
def test_an_aggregator_says_where_it_was_found_when_it_is_copied(
    copied: Callable[[Any], Any],
) -> None:
    aggregator = MetricsAggregator()
    model = Model(inner=Model(metrics=aggregator))
    trainer = Model(all=[{"train": aggregator}])
    with pytest.raises(TypeError, match=r"Make one in each process, .*state_dict\(\)") as error:
        copied(aggregator)
    message = str(error.value)
    assert "attribute 'metrics' of a Model" in message
    assert "attribute 'all' of a Model" in message
    assert "keep it out of what is copied or sent" in message
    del model, trainer
    with pytest.raises(TypeError) as error:
        copied(aggregator)
    assert "This one" not in str(error.value)


def test_a_copied_timer_is_the_same_timer() -> None:
    aggregator = MetricsAggregator()
    model = Model(timer=aggregator.timer("forward"))
    with model.timer:
        twins = copy.deepcopy(model).timer, copy.copy(model.timer)
    for timer in twins:
        with timer:
            pass
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t")["t/forward_seconds"] > 0
    assert snapshot.timing("forward").share <= 1
    with pytest.raises(TypeError, match="a timer cannot be pickled"):
        pickle.dumps(model)


@pytest.mark.parametrize("copied", WAYS)
def test_what_samples_pass_through_is_copied_plainly(copied: Callable[[Any], Any]) -> None:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("docs")
    pipeline = copied(Model(transform=transform, collate=MetricsCollator(list_of)))
    batch = pipeline.collate([pipeline.transform({"tokens": [1] * n}) for n in (2, 3)])
    aggregator = MetricsAggregator()
    aggregator.update(copied(batch["metrics"]))
    assert isinstance(batch["metrics"], MetricBatch)
    snapshot = aggregator.reduce()
    assert copied(snapshot).as_dict("t") == snapshot.as_dict("t")
    assert snapshot.as_dict("t")["t_docs/tokens_seen"] == 5.0


def list_of(samples: list[Any]) -> dict[str, Any]:
    return {"samples": samples}
