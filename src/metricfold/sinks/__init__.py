"""Where metrics go: `MetricsLogger`, and one sink per backend.

    with MetricsLogger([ConsoleSink(), JSONLSink("run.jsonl"), TensorBoardSink("runs/1")]) as logger:
        for step, batch in enumerate(loader):
            ...
            if step % 50 == 0:
                logger.log(step, aggregator, prefix="train")  # on every rank; rank 0 writes

A backend's own package is imported when its sink first writes, so that the ranks that write nothing
and the users who want none of it never pay for it.
"""

from metricfold._core.runtime.published import publish
from metricfold.sinks.console import ConsoleSink
from metricfold.sinks.jsonl import JSONLSink, read_jsonl
from metricfold.sinks.logger import MetricsLogger, SinkError
from metricfold.sinks.record import Record, RecordRefused, Sink
from metricfold.sinks.selection import SelectiveSink
from metricfold.sinks.tensorboard import TensorBoardSink
from metricfold.sinks.wandb import WandbSink

__all__ = [
    "ConsoleSink",
    "JSONLSink",
    "MetricsLogger",
    "Record",
    "RecordRefused",
    "SelectiveSink",
    "Sink",
    "SinkError",
    "TensorBoardSink",
    "WandbSink",
    "read_jsonl",
]
publish(globals())
