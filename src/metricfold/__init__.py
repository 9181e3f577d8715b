"""metricfold folds training metrics over samples, datasets, devices and ranks."""

from typing import TYPE_CHECKING, Any

from metricfold._core.fold.builtin import (
    CategoricalCountAggHandler,
    DistributionAggHandler,
    LastAggHandler,
    MaxAggHandler,
    MeanAggHandler,
    MinAggHandler,
    RateAggHandler,
    SumAggHandler,
)
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.intake.aggregator import MetricsAggregator
from metricfold._core.intake.merging import merge_state_dicts
from metricfold._core.runtime.published import publish
from metricfold._core.view.snapshot import Snapshot
from metricfold.alerts import Alert, Alerts, NonFinite, ReplicasDiffer, Spike, Straggler
from metricfold.communicator import MissingRanksError
from metricfold.data import MetricBatch, MetricsCollator
from metricfold.data.transform import DefaultTrainingMetricTransform, MetricTransform
from metricfold.metric import AggregationType, Metric, MetricState
from metricfold.run import Run
from metricfold.sinks import (
    ConsoleSink,
    JSONLSink,
    MetricsLogger,
    TensorBoardSink,
    WandbSink,
    read_jsonl,
)

if TYPE_CHECKING:
    from metricfold._core.sketch import LogLinearHistogram

__version__ = "0.2.0"

__all__ = [
    "AggregationHandler",
    "AggregationType",
    "Alert",
    "Alerts",
    "CategoricalCountAggHandler",
    "ConsoleSink",
    "DefaultTrainingMetricTransform",
    "DistributionAggHandler",
    "JSONLSink",
    "LaneHandler",
    "LastAggHandler",
    "LogLinearHistogram",
    "MaxAggHandler",
    "MeanAggHandler",
    "Metric",
    "MetricBatch",
    "MetricState",
    "MetricTransform",
    "MetricsAggregator",
    "MetricsCollator",
    "MetricsLogger",
    "MinAggHandler",
    "MissingRanksError",
    "NonFinite",
    "RateAggHandler",
    "ReplicasDiffer",
    "Run",
    "Snapshot",
    "Spike",
    "Straggler",
    "SumAggHandler",
    "TensorBoardSink",
    "WandbSink",
    "merge_state_dicts",
    "read_jsonl",
]
publish(globals())


def __getattr__(name: str) -> Any:
    if name != "LogLinearHistogram":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from metricfold.histogram import LogLinearHistogram  # noqa: PLC0415 - loaded when asked for

    return LogLinearHistogram
