"""Any one-element JAX array is a value, and nothing reads it before the log."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from jax_devices import on_devices

from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator

MEAN, DISTRIBUTION = AggregationType.MEAN, AggregationType.DISTRIBUTION
CATEGORICAL = AggregationType.CATEGORICAL_COUNT


def take_list(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    aggregator.update(metrics)


def take_one_by_one(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    for dataset, name, value, agg_type, weight in metrics:
        aggregator.record(name, value, agg_type, dataset=dataset, weight=weight)


def take_batch(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    aggregator.update(pickle.loads(pickle.dumps(MetricBatch.from_metrics(metrics))))


def logged(
    take: Callable[[MetricsAggregator, list[Metric]], None], *metrics: Metric
) -> dict[str, float]:
    aggregator = MetricsAggregator()
    take(aggregator, list(metrics))
    return aggregator.get_metrics_for_logging()


@on_devices(1)
def test_values_and_weights_of_any_type_and_way_in() -> None:
    import jax.numpy as jnp

    for take in (take_list, take_one_by_one, take_batch):
        for shape in ((), (1,), (1, 1)):
            for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_):
                one = jnp.ones(shape, dtype)
                results = logged(
                    take, Metric("d", "m", one, MEAN, one), Metric("d", "m", 4, MEAN, 2)
                )
                assert results == {"data_d/m": 3.0}
        counts = logged(
            take,
            *[Metric("d", "m", value, CATEGORICAL) for value in (jnp.int32(3), jnp.array([True]))],
        )
        assert counts == {"data_d/m_count_3": 1.0, "data_d/m_count_True": 1.0}


@on_devices(1)
def test_an_array_that_was_donated_or_deleted_is_named_and_the_others_are_kept() -> None:
    import jax
    import jax.numpy as jnp

    donate = jax.jit(lambda x: x + 1, donate_argnums=0)
    aggregator = MetricsAggregator()
    donated, deleted = jnp.float32(1), jnp.float32(2)
    aggregator.record("donated", donated)
    aggregator.record("weight", 1.0, weight=deleted)
    aggregator.record("kept", jnp.float32(3))
    aggregator.record("host", 5.0)
    donate(donated)
    deleted.delete()
    with pytest.raises(
        RuntimeError, match=r"'donated'.*donated or deleted before it was read"
    ) as caught:
        aggregator.reduce()
    assert "metric 'weight'" in str(caught.value)
    assert "jnp.copy" in str(caught.value)
    assert aggregator.get_metrics_for_logging() == {"data/kept": 3.0, "data/host": 5.0}


@on_devices(1)
def test_arrays_of_torch_are_read_along_with_those_of_jax() -> None:
    import jax.numpy as jnp

    torch = pytest.importorskip("torch")
    aggregator = MetricsAggregator()
    for value in (jnp.float32(3), torch.tensor(4.0), 5.0, jnp.float32(6), torch.tensor(7.0)):
        aggregator.record("x", value)
    aggregator.record("len", torch.tensor(2), "distribution")
    aggregator.record("len", jnp.int32(4), "distribution")
    logged = aggregator.get_metrics_for_logging()
    assert (logged["data/x"], logged["data/len_stat_mean"]) == (5.0, 3.0)


@on_devices(1)
def test_what_is_no_one_number_is_refused() -> None:
    import jax
    import jax.numpy as jnp

    aggregator = MetricsAggregator()

    @jax.jit
    def step(x: Any) -> Any:
        with pytest.raises(TypeError, match=r"'m': a traced value has no number yet: return it"):
            aggregator.record("m", x)
        with pytest.raises(TypeError, match="'m': a traced value"):
            aggregator.record("m", 1.0, weight=x)
        return x

    step(1.0)
    with pytest.raises(ValueError, match=r"'m': a JAX array of shape \(2,\) is not one value"):
        aggregator.record("m", jnp.ones(2))
    with pytest.raises(TypeError, match=r"'m': an array of type complex64 is no number"):
        aggregator.record("m", jnp.complex64(1))
    with pytest.raises(TypeError, match=r"'m': an array of type key<fry> is no number"):
        aggregator.record("m", jax.random.key(0))
    assert aggregator.get_metrics_for_logging() == {}


@on_devices(1)
def test_an_update_reads_nothing() -> None:
    import jax
    import jax.numpy as jnp

    array = type(jnp.ones(()))
    read: list[str] = []
    aggregator = MetricsAggregator()
    value = jnp.ones(()) * 2
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__array__", "__float__", "__int__", "__bool__", "item", "tolist"):
            original = getattr(array, name)
            patch.setattr(array, name, _telling(read, name, original))
        with jax.transfer_guard_device_to_host("disallow"):
            aggregator.record("m", value, weight=value)
            aggregator.update([Metric("d", "m", value, DISTRIBUTION, value)])
        assert read == []
        float(value)
        assert read != []
    assert aggregator.get_metrics_for_logging()["data/m"] == 2.0


def _telling(read: list[str], name: str, original: Any) -> Any:
    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(name)
        return original(self, *args, **kwargs)

    return reading


@on_devices(1)
def test_what_stands_for_an_array_is_taken_as_one_everywhere(tmp_path: Any) -> None:
    """A Flax variable was "no number", though the reductions in a step took it."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from metricfold import JSONLSink, MetricsLogger, read_jsonl

    class Wrapped:
        """Something else that JAX takes for an array."""

        def __init__(self, value: Any) -> None:
            self.value = value

        def __jax_array__(self) -> Any:
            return self.value

    optimizer = nnx.Optimizer(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.25),
        wrt=nnx.Param,
    )
    rate = optimizer.opt_state.hyperparams["learning_rate"]
    values = [rate, nnx.Variable(jnp.float32(0.25)), nnx.Param(jnp.full((1,), 0.25)), Wrapped(0.25)]
    values += [Wrapped(np.float64(0.25)), nnx.Variable(0.25), Wrapped(jnp.float32(0.25))]
    for value in values:
        weight = Wrapped(jnp.float32(3)) if isinstance(value, Wrapped) else nnx.Variable(3.0)
        for take in (take_list, take_one_by_one, take_batch):
            results = logged(
                take, Metric("d", "m", value, MEAN, weight), Metric("d", "m", 0.75, MEAN, 1)
            )
            assert results == {"data_d/m": 0.375}
        aggregator = MetricsAggregator()
        aggregator.record_all({"a": value, "b": 1.0}, {"a": "mean", "b": "sum"}, weight=weight)
        aggregator.record("dropped", value, weight=Wrapped(0.0))
        assert aggregator.get_metrics_for_logging() == {"data/a": 0.25, "data/b": 1.0}
    vector = nnx.Variable(jnp.array([1.0, 3.0]))
    aggregator = MetricsAggregator()
    aggregator.record("each", vector, each=True)
    aggregator.record("weighed", Wrapped(np.array([1.0, 3.0])), weight=nnx.Variable(jnp.arange(2)))
    assert aggregator.get_metrics_for_logging() == {"data/each": 2.0, "data/weighed": 3.0}
    with pytest.raises(ValueError, match=r"'each': a JAX array of shape \(2,\) is not one value"):
        aggregator.record("each", vector)
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        logger.log(0, {"lr": nnx.Variable(0.25)}, extra={"more": Wrapped(np.float32(0.5))})
    (record,) = read_jsonl(tmp_path / "run.jsonl")
    assert record.metrics == {"lr": 0.25, "more": 0.5}


@on_devices(1)
def test_values_that_were_lost_are_one_message_that_names_each_metric_once() -> None:
    """It said the same for each value, 24 kB for 200 steps."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda state: {"loss": state["loss"] + 1}, donate_argnums=0)
    state = {"loss": jnp.float32(4)}
    aggregator = MetricsAggregator()
    for _ in range(200):
        state = step(state)
        aggregator.record("loss", state["loss"])
        aggregator.record("norm", 1.0, weight=state["loss"])
        aggregator.record("steps", 1.0, "sum")
    for name in "abcdefghijklmnopqrstuvwxyz":
        value = jnp.float32(1)
        aggregator.record(name, value)
        value.delete()
    for weight in (-1.0, -1.0, 3.0):
        aggregator.record("bad", 2.0, weight=jnp.float32(weight))
    with pytest.raises(RuntimeError) as caught:
        aggregator.reduce()
    said = str(caught.value)
    assert "metric 'loss' (199 times), metric 'norm' (199 times)" in said
    assert said.count("donated or deleted before it was read") == 1
    assert "... 8 more: the JAX array" in said
    assert "metric 'bad' (2 times): the weight -1.0 is not a finite number" in said
    assert len(said) < 2000
    logged = aggregator.get_metrics_for_logging("t")
    assert logged == {"t/steps": 200.0, "t/loss": 204.0, "t/norm": 1.0, "t/bad": 2.0}
