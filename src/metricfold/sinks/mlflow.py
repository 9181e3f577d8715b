"""MLflow: into the run that is active where the sink is made, or else into a run of its own.

MLflow's active run belongs to a thread, and sinks write on another one: the run is noted when the sink
is made, and metrics go to it by its id.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from metricfold.sinks.alert_text import key_of, text_of
from metricfold.sinks.config import flattened
from metricfold.sinks.keywise import KeywiseSink
from metricfold.sinks.loud import mention
from metricfold.sinks.record import Record
from metricfold.sinks.selection import check_one, require

__all__ = ["MLflowSink"]

_REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")
_MOST_PARAMS = 100  # in one call
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000  # 8,000 from MLflow 2.17 on


class MLflowSink(KeywiseSink):
    """Logs scalars to an MLflow run; the configuration as its parameters, alerts as its tags.

    The newest alert about a metric is the tag ``alert.{prefix}.{dataset}/{name}``. MLflow has no
    histograms. A name that it refuses (``tokens@32``) is left out and counted; `key_format` can
    give it another.

    Args:
        run_id: the run to log to. By default the one that is active in the thread that makes the
            sink, and when there is none, a new one. A run that you started is yours to end, after
            the logger is closed.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        start: arguments for `mlflow.start_run` of a new run, such as ``run_name="a"``.

    Raises:
        ImportError: neither ``mlflow`` nor ``mlflow-skinny`` is installed.
        TypeError: both `run_id` and `start` are given.
    """

    arrays = False
    most = 1000

    def __init__(
        self,
        run_id: str | None = None,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        **start: Any,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        check_one("MLflowSink", "run_id", run_id, start, "mlflow.start_run")
        require("mlflow", sink="MLflowSink", extra="mlflow")
        # One who has started a run has imported it; ranks that write nothing need not.
        mlflow = sys.modules.get("mlflow")
        active = None if mlflow is None or run_id is not None or start else mlflow.active_run()
        self.run_id = run_id if active is None else active.info.run_id
        self._uri = None if mlflow is None else mlflow.get_tracking_uri()
        self._start = start
        self._owned = False
        self._client: Any = None
        self._paths: _Paths | None = None  # in a file store

    def __repr__(self) -> str:
        return f"MLflowSink({self.run_id!r})" if self.run_id is not None else "MLflowSink()"

    def close(self) -> None:
        """End the run if this sink started it."""
        if self._owned:
            import mlflow  # noqa: PLC0415

            mlflow.end_run()  # that of this thread
            self.run_id, self._owned = None, False
        self._client = None

    def _is_new(self) -> bool:
        return self.run_id is None and "MLFLOW_RUN_ID" not in os.environ

    def _write(self, record: Record) -> None:
        if self._client is None:
            self._client = self._connected()
        super()._write(record)

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415

        if self._paths is not None:
            self._paths.check(values)
        milliseconds = round(record.wall_time * 1000)
        metrics = [Metric(key, one, milliseconds, record.step) for key, one in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        if self._paths is not None:
            self._paths.add(values)

    def _beside(self, record: Record) -> Iterator[Callable[[], object]]:
        from mlflow.entities import Param  # noqa: PLC0415

        config = flattened((record.run or {}).get("config") or {})
        params = [Param(key, str(one)[:_LONGEST_PARAM]) for key, one in config.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            yield partial(self._log_params, params[start : start + _MOST_PARAMS])
        for alert in record.alerts:
            text = f"{alert['severity']}, {text_of(alert, record)}"
            yield partial(
                self._client.set_tag, self.run_id, key_of(alert, record), text[:_LONGEST_TAG]
            )

    def _log_params(self, params: list[Any]) -> None:
        """Log parameters, each by itself if MLflow does not take all of them, such as other values."""
        log = partial(self._client.log_batch, self.run_id, synchronous=True)
        try:
            log(params=params)
        except Exception as error:
            if len(params) == 1 or not self._is_refusal(error):
                raise
            for param in params:
                self._attempt(partial(self._log_params, [param]))

    def _is_refusal(self, error: BaseException) -> bool | None:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        if isinstance(error, MlflowException):
            # Its file store says so of whatever has happened meanwhile.
            cannot_be = isinstance(error.__context__, NotADirectoryError | IsADirectoryError)
            return error.error_code in _REFUSALS or cannot_be
        return super()._is_refusal(error)

    def _connected(self) -> Any:
        """Return a client, once there is a run."""
        import mlflow  # noqa: PLC0415
        from mlflow.utils.uri import is_local_uri  # noqa: PLC0415

        if self.run_id is None:
            # In this thread, whose active run is no other's business.
            self.run_id = mlflow.start_run(**self._start).info.run_id
            self._owned = True
            if not self._start:
                mention(
                    f"no MLflow run was active where MLflowSink() was made: it logs to a new one, "
                    f"{self.run_id}. To log to yours, make the sink after mlflow.start_run() and in the "
                    "same thread, or give it run_id="
                )
        client = mlflow.MlflowClient(tracking_uri=self._uri)
        if is_local_uri(client.tracking_uri):
            self._paths = _Paths()
        return client


class _Paths:
    """The names of metrics in MLflow's file store, where each is the path of a file.

    It stops in the middle of a batch, of which it has written a part, at one that is a folder of others.
    """

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def check(self, keys: Iterable[str]) -> None:
        """Raise a ValueError if a name would have to be a file and a folder at once."""
        files = {*keys}
        folders = {folder for key in files for folder in _folders(key)}
        clashes = (files | self._files) & (folders | self._folders)
        if clashes:
            key = min(clashes)
            raise ValueError(
                f"MLflow's file store cannot hold both {key!r} and names that begin with '{key}/': give "
                "one of them another by key_format=, or let MLflow use a database"
            )

    def add(self, keys: Iterable[str]) -> None:
        """Take note of names that it has."""
        self._files.update(keys)
        self._folders.update(folder for key in keys for folder in _folders(key))


def _folders(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
