"""Prometheus: a page with the newest values, for a server that comes to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from metricfold.sinks.labelled import Labelled
from metricfold.sinks.record import KeysRefused, Record
from metricfold.sinks.selection import SelectiveSink, require

__all__ = ["PrometheusSink"]

_LABELS = ("prefix", "dataset", "statistic")


class PrometheusSink(SelectiveSink):
    """Shows the newest scalars as gauges such as ``metricfold_loss{prefix="train",dataset="code"}``.

    ``metricfold_step`` and ``metricfold_time_seconds``, by prefix, say when they were logged. A total
    over datasets has no ``dataset``. Of two names that Prometheus cannot tell apart (``a-b`` and
    ``a_b``) the second is left out and counted.

    Args:
        port: where the page is served at the first record, under ``/metrics``.
        address: of the network interface; ``"127.0.0.1"`` for this machine alone.
        registry: what shows the metrics in place of a page of their own, such as
            `prometheus_client.REGISTRY`.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`; names are those of metrics, and of keys of which no aggregator
            knows the metric.

    Raises:
        ImportError: the ``prometheus_client`` package is not installed.
    """

    arrays = False

    def __init__(
        self,
        port: int = 9464,
        *,
        address: str = "0.0.0.0",  # noqa: S104 - as a server elsewhere needs it
        registry: Any = None,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        require("prometheus_client", sink="PrometheusSink", extra="prometheus")
        self.port, self._address, self._registry = port, address, registry
        self._labelled = Labelled()
        self._shown: dict[str, dict[tuple[str, ...], float]] = {}  # by name and labels
        self._undo: Callable[[], object] | None = None

    def __repr__(self) -> str:
        return (
            f"PrometheusSink({self.port})"
            if self._registry is None
            else "PrometheusSink(registry=)"
        )

    def close(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def rewind(self, step: int) -> None:
        """Do nothing: what is logged next takes the place of what is shown."""

    def collect(self) -> Iterator[Any]:
        """Yield what is shown, on a thread of the server."""
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

        for name, values in self._shown.items():
            family = GaugeMetricFamily(
                f"metricfold_{name}", f"{name} of a training", labels=_LABELS
            )
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family

    def _write(self, record: Record) -> None:
        if self._undo is None:
            self._undo = self._served()
        series, refused = self._labelled.of(record)
        shown = {name: dict(values) for name, values in self._shown.items()}
        for _, name, labels, value in series:
            shown.setdefault(name, {})[tuple(labels.get(one, "") for one in _LABELS)] = value
        self._shown = shown  # at once: somebody may be reading
        if refused:
            raise KeysRefused(refused)

    def _served(self) -> Callable[[], object]:
        """Show the metrics from now on; return what ends that."""
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415

        if self._registry is not None:
            registry: Any = self._registry
            registry.register(self)
            return lambda: registry.unregister(self)
        # Of its own: in the one of the process, metrics of a second logger would be duplicates.
        registry = CollectorRegistry()
        registry.register(self)
        server, thread = start_http_server(self.port, self._address, registry)
        self.port = server.server_port

        def end() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return end
