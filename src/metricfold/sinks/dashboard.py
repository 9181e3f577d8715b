"""What TensorBoard shows besides charts of single series: the losses of all datasets in one, and settings.

Made of TensorBoard's own protobufs, for the calls of its package that make them import TensorFlow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metricfold.sinks.board import rank
from metricfold.sinks.config import flattened
from metricfold.sinks.record import Meaning, Record

__all__ = ["Layout", "ended", "settings", "text"]

_MOST_CHARTS = 50


class Layout:
    """Which charts hold several series: every metric that datasets have, the loss first."""

    def __init__(self) -> None:
        # (prefix, name) -> its series
        self._lines: dict[tuple[str, str], dict[str, None]] = {}
        self._ranks: dict[tuple[str, str], int] = {}
        # (prefix, dataset, name) -> its percentiles
        self._bands: dict[tuple[str, str, str], dict[str, str]] = {}

    def take(self, record: Record) -> bool:
        """Take in what keys of a record stand for; returns whether there is anything new to show."""
        before = self._size()
        for key, meaning in record.keys.items():
            if key in record.metrics:
                self._add(record.prefix, key, meaning)
        return self._size() != before

    def _size(self) -> int:
        return sum(map(len, self._lines.values())) + sum(map(len, self._bands.values()))

    def _add(self, prefix: str, key: str, meaning: Meaning) -> None:
        if meaning.aggregation == "distribution":
            if meaning.statistic in ("p05", "p50", "p95"):
                of = (prefix, meaning.dataset, meaning.name)
                self._bands.setdefault(of, {})[meaning.statistic] = key
        elif not meaning.statistic:
            self._lines.setdefault((prefix, meaning.name), {})[key] = None
            self._ranks.setdefault((prefix, meaning.name), rank(meaning))

    def value(self) -> Any:
        """Return the layout as a value of a summary; None if no chart has several series."""
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata  # noqa: PLC0415

        by_prefix: dict[str, list[Any]] = {}
        for of in sorted(self._lines, key=lambda one: self._ranks[one]):
            tags = [f"^{re.escape(key)}$" for key in self._lines[of]]
            if len(tags) > 1:
                chart = layout_pb2.Chart(
                    title=f"{of[1]} of every dataset",
                    multiline=layout_pb2.MultilineChartContent(tag=tags),
                )
                by_prefix.setdefault(of[0], []).append(chart)
        for (prefix, dataset, name), keys in self._bands.items():
            if len(keys) == 3:
                series = layout_pb2.MarginChartContent.Series(
                    value=keys["p50"], lower=keys["p05"], upper=keys["p95"]
                )
                chart = layout_pb2.Chart(
                    title=f"{name}{f' of {dataset}' if dataset else ''}: p05, p50, p95",
                    margin=layout_pb2.MarginChartContent(series=[series]),
                )
                by_prefix.setdefault(prefix, []).append(chart)
        if not by_prefix:
            return None
        categories = [
            layout_pb2.Category(title=prefix or "metrics", chart=charts[:_MOST_CHARTS])
            for prefix, charts in by_prefix.items()
        ]
        layout = layout_pb2.Layout(category=categories)
        return _text_value(
            metadata.CONFIG_SUMMARY_TAG, [layout.SerializeToString()], metadata.PLUGIN_NAME, []
        )


def text(tag: str, rows: Iterable[str]) -> Any:
    """Return a value that shows texts in Markdown, a row for each."""
    written = [row.encode("utf-8", "backslashreplace") for row in rows]
    return _text_value(tag, written, "text", [len(written)])


def _text_value(tag: str, texts: Sequence[bytes], plugin: str, shape: Sequence[int]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # noqa: PLC0415
    from tensorboard.compat.proto.tensor_pb2 import TensorProto  # noqa: PLC0415
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # noqa: PLC0415
    from tensorboard.compat.proto.types_pb2 import DT_STRING  # noqa: PLC0415

    tensor = TensorProto(
        dtype=DT_STRING,
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape]),
        string_val=texts,
    )
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


def settings(run: Mapping[str, Any], wall_time: float, keys: Iterable[str]) -> list[Any]:
    """Return values that show what is known of a run: as a text, and as the hyperparameters of a session.

    Args:
        run: what is known.
        wall_time: when it begins.
        keys: of what it is judged by.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2  # noqa: PLC0415

    config = flattened(run.get("config") or {})
    about = {name: value for name, value in run.items() if name not in ("config", "better")}
    rows = "\n".join(
        f"| {_cell(name)} | {_cell(value)} |" for name, value in (*about.items(), *config.items())
    )
    found = [text("run", [f"| setting | value |\n|---|---|\n{rows}"])]
    if not config:
        return found
    start = plugin_data_pb2.SessionStartInfo(
        group_name=str(run.get("name", "")), start_time_secs=wall_time
    )
    infos = []
    for name, value in config.items():
        kind = _hyperparameter(start.hparams[name], value)
        infos.append(api_pb2.HParamInfo(name=name, type=kind))
    judged = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=key)) for key in keys]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=judged)
    return [
        *found,
        _hparams_value(metadata.EXPERIMENT_TAG, experiment=experiment),
        _hparams_value(metadata.SESSION_START_INFO_TAG, session_start_info=start),
    ]


def ended(wall_time: float) -> Any:
    """Return a value that ends the session."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2  # noqa: PLC0415

    success = api_pb2.Status.Value("STATUS_SUCCESS")
    info = plugin_data_pb2.SessionEndInfo(status=success, end_time_secs=wall_time)
    return _hparams_value(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _hparams_value(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # noqa: PLC0415
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2  # noqa: PLC0415

    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
    )
    return Summary.Value(
        tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=metadata.NULL_TENSOR
    )


def _hyperparameter(into: Any, value: Any) -> Any:
    """Set a protobuf value; returns its type."""
    from tensorboard.plugins.hparams import api_pb2  # noqa: PLC0415

    if isinstance(value, bool):
        into.bool_value = value
        return api_pb2.DATA_TYPE_BOOL
    if isinstance(value, int | float) and math.isfinite(value):
        into.number_value = value
        return api_pb2.DATA_TYPE_FLOAT64
    into.string_value = str(value)
    return api_pb2.DATA_TYPE_STRING


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
