"""Prometheus and OpenTelemetry: the real clients; what they show is read back."""

from __future__ import annotations

import json
import math
import urllib.request

import pytest

from metricfold import MetricsAggregator
from metricfold.sinks import KeysRefused, MetricsLogger, OTelSink, PrometheusSink, Record

prometheus_client = pytest.importorskip("prometheus_client")
sdk = pytest.importorskip("opentelemetry.sdk.metrics")


def served(sink, accept="text/plain"):
    """Return the values of a sink's page by name and labels."""
    from prometheus_client.openmetrics.parser import (
        text_string_to_metric_families as of_openmetrics,
    )
    from prometheus_client.parser import text_string_to_metric_families as of_text

    request = urllib.request.Request(
        f"http://127.0.0.1:{sink.port}/metrics", headers={"Accept": accept}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    parse = of_openmetrics if "openmetrics" in accept else of_text
    return values(sample for family in parse(text) for sample in family.samples)


def values(samples):
    return {
        (one.name, *sorted(text for text in one.labels.values() if text)): one.value
        for one in samples
    }


def local(**how):
    return PrometheusSink(0, address="127.0.0.1", **how)


@pytest.fixture
def sink():
    sink = local()
    yield sink
    sink.close()


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_the_page_shows_the_newest_values_by_dataset_and_statistic(sink, accept):
    aggregator = MetricsAggregator()
    with MetricsLogger([sink]) as logger:
        for step in (1, 2):
            aggregator.record("loss", step / 4, dataset="code_a/b")
            aggregator.record("len", 8.0, "distribution", dataset="web")
            aggregator.record("tokens_total", 5.0, "sum")
            logger.log(step, aggregator, prefix="train", extra={"lr": 0.1})
        logger.log(2, {"accuracy": math.nan}, prefix="val")
        assert logger.flush()
        found = served(sink, accept)
    assert found["metricfold_loss", "code_a/b", "train"] == 0.5
    assert found["metricfold_len", "p50", "train", "web"] == 8.0
    assert found["metricfold_len", "p50", "train"] == 8.0, "the total over datasets"
    assert found["metricfold_tokens_total", "train"] == 10.0
    assert found["metricfold_lr", "train"] == 0.1
    assert math.isnan(found["metricfold_accuracy", "val"])
    assert found["metricfold_step", "train"] == found["metricfold_step", "val"] == 2
    assert found["metricfold_time_seconds", "train"] > 1.7e9


HOSTILE = 'a"b\\c{d="e"},\u8a9e'


def test_names_of_datasets_of_all_kinds_come_back(sink):
    aggregator = MetricsAggregator()
    aggregator.record("loss", 0.5, dataset=HOSTILE)
    with MetricsLogger([sink]) as logger:
        logger.log(1, aggregator, prefix="train")
        logger.flush()
        assert served(sink)["metricfold_loss", HOSTILE, "train"] == 0.5


def test_two_names_that_would_become_one_are_not_mixed(sink, caplog):
    with MetricsLogger([sink]) as logger:
        for step in (1, 2):
            logger.log(step, {"a-b": 1.0, "a_b": 2.0, "step": 9.0, "n" * 201: 1.0})
        logger.flush()
        found = served(sink)
    assert found["metricfold_a_b",] == 1.0
    assert found["metricfold_step",] == 2
    assert "2 written, 0 skipped, 0 lost" in caplog.text
    assert "2 x without 'a_b', steps 1 to 2: ValueError(\"its name becomes 'a_b'" in caplog.text
    assert "2 x without 'step'" in caplog.text


def test_two_keys_of_one_metric_are_not_mixed(sink):
    """`extra=` may name what a total over datasets is called here."""
    aggregator = MetricsAggregator()
    aggregator.record("loss", 0.5)
    with MetricsLogger([sink]) as logger:
        logger.log(1, aggregator, prefix="train", extra={"loss": 9.0})
        assert not logger.flush()
        assert served(sink)["metricfold_loss", "train"] == 0.5


def test_a_logger_made_again_shows_its_metrics_and_nothing_is_a_duplicate():
    """client_python#468, turbinia#774: in one registry the second metric of a name is an error."""
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    for step in (1, 2):
        with MetricsLogger([PrometheusSink(registry=registry)]) as logger:
            logger.log(step, {"loss": step / 4}, prefix="train")
            assert logger.flush()
            found = values(one for family in registry.collect() for one in family.samples)
        assert found["metricfold_loss", "train"] == step / 4
    assert list(registry.collect()) == []


def test_the_port_is_free_when_the_logger_is_closed(sink):
    sink.write(Record(1, 1.0, {"loss": 1.0}))
    port = sink.port
    sink.close()
    again = PrometheusSink(port, address="127.0.0.1")
    again.write(Record(2, 1.0, {"loss": 2.0}))
    try:
        assert served(again)["metricfold_loss",] == 2.0
    finally:
        again.close()


def test_a_port_that_is_taken_is_waited_for(sink):
    sink.write(Record(1, 1.0, {"loss": 1.0}))
    with pytest.raises(OSError, match="in use"):
        PrometheusSink(sink.port, address="127.0.0.1").write(Record(1, 1.0, {"loss": 1.0}))


def exported(reader):
    data = json.loads(reader.get_metrics_data().to_json())
    (resource,) = data["resource_metrics"]
    (scope,) = resource["scope_metrics"]
    return {
        (metric["name"], *sorted(point["attributes"].values())): point["value"]
        for metric in scope["metrics"]
        for point in metric["data"]["data_points"]
    }


def test_opentelemetry_gets_the_newest_values_by_dataset_and_statistic(caplog):
    """What is not finite its SDK drops (opentelemetry-python #5330), and shows the value before."""
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader, aggregator = InMemoryMetricReader(), MetricsAggregator()
    provider = sdk.MeterProvider([reader])
    with MetricsLogger([OTelSink(provider)]) as logger:
        for step in (1, 2):
            aggregator.record("loss", step / 4, dataset="code_a/b")
            aggregator.record("len", 8.0, "distribution", dataset="web")
            logger.log(step, aggregator, prefix="train")
        logger.log(2, {"a-b": 1.0, "a_b": 2.0, "odd": math.nan})
        logger.flush()
        found = exported(reader)
    provider.shutdown()
    assert found["metricfold.loss", "code_a/b", "train"] == 0.5
    assert found["metricfold.len", "p50", "train", "web"] == 8.0
    assert found["metricfold.a_b",] == 1.0
    assert found["metricfold.step", "train"] == 2
    assert "1 x without 'a_b', step 2" in caplog.text
    assert "1 x without 'odd', step 2: ValueError('OpenTelemetry takes finite" in caplog.text


def test_each_log_is_exported_though_a_gauge_keeps_one_value():
    """The SDK exports once a minute by itself."""
    from opentelemetry.sdk.metrics.export import (
        ConsoleMetricExporter,
        PeriodicExportingMetricReader,
    )

    lines: list[str] = []

    class Out:
        write = staticmethod(lines.append)
        flush = staticmethod(lambda: None)

    reader = PeriodicExportingMetricReader(ConsoleMetricExporter(out=Out()))
    provider = sdk.MeterProvider([reader])
    with MetricsLogger([OTelSink(provider)]) as logger:
        for step in (1, 2):
            logger.log(step, {"loss": step / 4})
            assert logger.flush()
    provider.shutdown()
    points = [
        point["value"]
        for text in lines
        for metric in json.loads(text)["resource_metrics"][0]["scope_metrics"][0]["metrics"]
        if metric["name"] == "metricfold.loss"
        for point in metric["data"]["data_points"]
    ]
    assert points[:2] == [0.25, 0.5]


def test_without_a_provider_nothing_is_exported_and_that_is_said(caplog):
    with MetricsLogger([OTelSink()]) as logger:
        logger.log(1, {"loss": 1.0})
    assert "OpenTelemetry has no provider, so that nothing would be exported" in caplog.text


def test_what_is_left_out_is_said_for_the_whole_record(sink):
    with pytest.raises(KeysRefused, match="left out are 'step'"):
        sink.write(Record(1, 1.0, {"step": 1.0, "loss": 2.0}))
