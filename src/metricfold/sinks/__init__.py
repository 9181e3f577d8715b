"""Where metrics go: `MetricsLogger`, and one sink per backend.

    with MetricsLogger([ConsoleSink(), JSONLSink("run.jsonl"), TensorBoardSink("runs/1")]) as logger:
        for step, batch in enumerate(loader):
            ...
            if step % 50 == 0:
                logger.log(step, aggregator, prefix="train")  # on every rank; rank 0 writes

A backend's own package is imported when its sink first writes, so that the ranks that write nothing
and the users who want none of it never pay for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metricfold._core.runtime.published import publish
from metricfold.sinks.console import ConsoleSink
from metricfold.sinks.jsonl import JSONLSink, read_jsonl
from metricfold.sinks.logger import MetricsLogger, SinkError
from metricfold.sinks.record import KeysRefused, Meaning, Record, RecordRefused, Sink
from metricfold.sinks.selection import SelectiveSink
from metricfold.sinks.tensorboard import TensorBoardSink
from metricfold.sinks.wandb import WandbSink

if TYPE_CHECKING:
    from metricfold.sinks.comet import CometSink
    from metricfold.sinks.csv import CSVSink
    from metricfold.sinks.mlflow import MLflowSink
    from metricfold.sinks.otel import OTelSink
    from metricfold.sinks.parquet import ParquetSink
    from metricfold.sinks.prometheus import PrometheusSink
    from metricfold.sinks.trackio import TrackioSink

__all__ = [
    "CSVSink",
    "CometSink",
    "ConsoleSink",
    "JSONLSink",
    "KeysRefused",
    "MLflowSink",
    "Meaning",
    "MetricsLogger",
    "OTelSink",
    "ParquetSink",
    "PrometheusSink",
    "Record",
    "RecordRefused",
    "SelectiveSink",
    "Sink",
    "SinkError",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    "read_jsonl",
]
publish(globals())

# By module; each is loaded when it is asked for.
_LAZY = {
    "CSVSink": "csv",
    "CometSink": "comet",
    "MLflowSink": "mlflow",
    "OTelSink": "otel",
    "ParquetSink": "parquet",
    "PrometheusSink": "prometheus",
    "TrackioSink": "trackio",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    publish({"__name__": __name__, "__all__": [name], name: found})
    return found
