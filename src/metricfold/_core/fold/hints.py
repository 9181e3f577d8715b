"""What a caller who gave something else most likely meant: the last part of an error's message.

    update() takes a list of Metric or a MetricBatch, not dict; take the metrics out of the batch
    first, update(batch.pop('metrics'))

Each function returns what to write instead of what was refused, or nothing where it is anybody's
guess. They run in errors alone, and read nothing that lies on a device.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date, timedelta
from decimal import Decimal
from numbers import Real

import numpy as np

from metricfold._core.device import arrays
from metricfold._core.runtime.staging import NO_NUMBER, is_traced
from metricfold.metric import METRICS, AggregationType, Metric

_COLLATE = "give the DataLoader collate_fn=MetricsCollator(your_collate_fn)"
_DRAIN = "drain an accumulator first, accumulator = aggregator.drain(accumulator)"
_UNPACK = "unpack packed metrics first, metrics = packed.unpack()"
_LOG = "logger.log(step, aggregator, prefix='train')"


# -- Whole calls ---------------------------------------------------------------------------------


def for_metrics(given: object) -> str:
    """Return what to write instead of ``aggregator.update(given)``."""
    if isinstance(given, Metric):
        return "; write update([metric])"
    if first := _first(given):
        return f"; {first}"
    listed = given if isinstance(given, list | tuple) and given else ()
    batch = listed[0] if listed else given
    if isinstance(batch, Mapping):
        if METRICS in batch:
            where = "batch[0]" if listed else "batch"
            return f"; take the metrics out of the batch first, update({where}.pop('metrics'))"
        if batch and all(map(_is_number, batch.values())):
            return "; record the numbers of a step by aggregator.record_all({...})"
        return f"; a batch without an entry 'metrics' brings none: {_COLLATE}"
    if given is None:
        return f"; {_COLLATE}, whose batches always have an entry 'metrics'"
    if isinstance(batch, int) if listed else "int" in str(getattr(given, "dtype", "")):
        return f"; integers are what with_metrics() puts into the rows of a dataset: {_COLLATE}, which makes metrics of them"
    if listed and all(map(_is_batch, listed)):
        return "; update with one MetricBatch at a time"
    if listed and all(isinstance(one, list) for one in listed):
        return "; put the lists of several samples into one, as MetricsCollator does"
    if isinstance(given, Iterator):
        return "; write update(list(metrics))"
    return ""


def for_source(given: object) -> str:
    """Return what to write instead of ``logger.log(step, given)``."""
    if first := _first(given):
        return f"; {first}" + f", and then {_LOG}" * (first == _DRAIN)
    listed = given if isinstance(given, list | tuple) and not isinstance(given, Metric) else [given]
    if listed and all(isinstance(one, Metric) or _is_batch(one) for one in listed):
        return f"; let an aggregator take metrics in, aggregator.update(metrics), and then {_LOG}"
    if _is_number(given) or arrays.backend_of(given) is not None:
        return f"; give the number a name, aggregator.record('loss', value), and then {_LOG}"
    if hasattr(given, "add_done_callback"):
        return "; give the Snapshot that it has, future.result(), on every rank"
    return ""


def for_step(given: object) -> str:
    """Return what to write instead of ``logger.log(given, ...)``."""
    if isinstance(given, Mapping) or hasattr(given, "reduce_async") or hasattr(given, "as_dict"):
        return "; the step comes first, logger.log(step, source)"
    if hasattr(given, "__int__") or (isinstance(given, str) and given.strip().isdecimal()):
        return "; write int(step)"
    return ""


def for_agg(name: object, value: object, agg: object) -> str:
    """Return what to write instead of ``record(name, value, agg)`` whose `agg` is no type."""
    if _is_number(agg) and isinstance(value, str):
        return (
            f"; the metric's name comes first, and then its value: if {name!r} is the dataset, "
            f"write record({value!r}, {agg!r}, dataset={name!r})"
        )
    if _is_number(agg):
        return f"; if it is the weight, write weight={agg!r}"
    return ""


# -- Parts of them -------------------------------------------------------------------------------


def for_metric(metric: Metric) -> str:
    """Return that value and type of a metric have changed places, if they seem to."""
    value, agg = metric.value, metric.agg_type
    if isinstance(value, AggregationType) or (isinstance(value, str) and _types_like(value)):
        return (
            f"; value and agg_type seem to have changed places: write Metric({metric[0]!r}, "
            f"{metric[1]!r}, {agg!r}, {value if isinstance(value, AggregationType) else repr(value)})"
        )
    return ""


def for_stacked(name: object) -> str:
    """Return what has happened to a metric whose name is a list of names; nothing if it is not."""
    if not isinstance(name, list | tuple | np.ndarray):
        return ""
    return (
        "; a collate function, such as torch's default_collate, has stacked the metrics of several "
        f"samples into one Metric whose fields are lists: {_COLLATE}, and "
        "update(batch.pop('metrics'))"
    )


def for_number(name: str, value: object) -> str:
    """Return what to write instead of `value` in a dict of numbers."""
    if np.ma.is_masked(value):
        return "what is masked has no value: leave the key out"
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if is_traced(value):
        return NO_NUMBER
    backend = arrays.backend_of(value)
    if backend is not None and getattr(value, "ndim", 1) == 0:
        return (
            f"it may lie on a device that would have to be waited for. aggregator.record({name!r}, "
            f"value) does not wait, and {_LOG} has it then; value.item() waits"
        )
    if first := _first(value):
        return first + f", and then {_LOG}" * (first == _DRAIN)
    if isinstance(value, Mapping):
        first = next((key for key in value if isinstance(key, str)), "name")
        return f"give each of its numbers a key of its own, such as {f'{name}/{first}'!r}"
    if value is None:
        return "leave the key out where there is no number"
    if isinstance(value, np.timedelta64 | timedelta):
        return "give its seconds"
    if isinstance(value, np.datetime64 | date):
        return "give the seconds since some moment"
    if isinstance(value, str | bytes):
        return (
            "write float(text) if it is one. How often each text came is counted by "
            f"aggregator.record({name!r}, text, 'categorical_count')"
        )
    if math.prod(getattr(value, "shape", (0,))) == 1:
        return "write value.item()"
    if backend is not None or isinstance(value, Sequence | np.ndarray):
        return (
            "give one number of it, such as its mean. How its values spread is shown by "
            f"aggregator.record({name!r}, array, 'distribution', each=True)"
        )
    if isinstance(value, complex):
        return "give its real part or abs() of it"
    if isinstance(value, Collection):
        return "give one number of it, such as len() of it"
    return "convert it with float()" if hasattr(value, "__float__") else "leave the key out"


def for_value(value: object) -> str:
    """Return what to write instead of a `value` that is recorded."""
    if first := _first(value):
        return f"; {first}"
    if isinstance(value, Mapping):
        return "; give each of its numbers a metric of its own"
    if value is None:
        return "; record nothing where there is no number"
    if isinstance(value, str):
        return "; texts are counted by the type 'categorical_count'"
    if _is_like_an_array(value):
        return (
            "; give one number of it, such as its mean, or count each: record(name, np.asarray(...), "
            "each=True)"
        )
    return ""


def for_weight(weight: object) -> str:
    """Return what to write instead of a `weight`."""
    if weight is None:
        return "; leave it out where each counts once"
    if _is_like_an_array(weight):
        return "; give np.asarray(...) of the weights of an array, one for each element"
    return ""


def for_label(label: str) -> str:
    """Return which built-in type was meant by `label`; nothing if none looks like it."""
    likely = _types_like(label)
    if not likely:
        return ""
    more = ", which reports percentiles, mean and std" if likely == ["distribution"] else ""
    return f"; did you mean {' or '.join(map(repr, likely))}{more}?"


_TYPES = [member.value for member in AggregationType if member is not AggregationType.CUSTOM]
_SYNONYMS = {
    r"avg|average|weighted_?(mean|average)": ["mean"],
    r"total|add": ["sum"],
    r"maximum|largest|highest": ["max"],
    r"minimum|smallest|lowest": ["min"],
    r"p\d+(\.\d+)?|median|quantiles?|percentiles?|hist|histogram|dist|std|stddev|variance|var": [
        "distribution"
    ],
    r"cat|category|categories|categorical|label": ["categorical_count"],
    r"count|counter": ["sum", "categorical_count"],
    r"throughput|per_second|speed": ["rate"],
    r"latest|current|newest|gauge": ["last"],
}


def _types_like(label: str) -> list[str]:
    plain = label.lower().strip().removeprefix("aggregationtype.").replace("-", "_")
    if plain in _TYPES:
        return [plain]
    for pattern, types in _SYNONYMS.items():
        if re.fullmatch(pattern, plain):
            return types
    return difflib.get_close_matches(plain, _TYPES, n=1, cutoff=0.75)


def _is_number(value: object) -> bool:
    return isinstance(value, Real | Decimal | np.bool_)


def _is_like_an_array(value: object) -> bool:
    """Return whether NumPy makes an array of `value` that is none yet, such as of a pandas Series."""
    known = isinstance(value, np.ndarray | np.generic) or arrays.backend_of(value) is not None
    return not known and (isinstance(value, list | tuple) or hasattr(value, "__array__"))


def _is_batch(value: object) -> bool:
    from metricfold._core.fold.batch import MetricBatch  # noqa: PLC0415 - which speaks by this module

    return isinstance(value, MetricBatch)


def _first(value: object) -> str:
    """Return what to do first with an accumulator, or with packed metrics; nothing with all else."""
    if callable(getattr(value, "start_read", None)):
        return _DRAIN
    jax = sys.modules.get("metricfold.jax")  # which is not imported for that
    return _UNPACK if jax is not None and isinstance(value, jax.PackedMetrics) else ""
