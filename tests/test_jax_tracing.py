"""Where Python runs once for all steps, a call that takes metrics in is an error, and elsewhere it counts."""

from __future__ import annotations

from typing import Any

import pytest
from jax_devices import on_devices

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger


@on_devices(2)
def test_a_number_recorded_where_jax_stages_a_program_is_refused_not_counted_once() -> None:
    """It was taken once, when the function was traced, whatever the steps."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import lax
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    aggregator = MetricsAggregator()

    def step(x: Any, *_: Any) -> Any:
        aggregator.record("tokens", x.size, "sum")
        return x

    def total(x: Any) -> Any:
        return step(x).sum()

    def scanned(carry: Any, x: Any) -> Any:
        return carry, step(x)

    @jax.custom_vjp
    def custom(x: Any) -> Any:
        return x.sum()

    custom.defvjp(lambda x: (total(x), x), lambda x, g: (g * x,))
    x = jnp.ones(2)
    staged = {
        "jit": lambda: jax.jit(step)(x),
        "jit of grad": lambda: jax.jit(jax.grad(total))(x),
        "jit of vmap": lambda: jax.jit(jax.vmap(step))(x),
        "jit of custom_vjp": lambda: jax.jit(jax.grad(custom))(x),
        "nnx.jit": lambda: nnx.jit(step)(x),
        "pmap": lambda: jax.pmap(step)(x),
        "shard_map": lambda: jax.shard_map(
            step, mesh=mesh_of(data=2), in_specs=P("data"), out_specs=P("data")
        )(x),
        "scan": lambda: lax.scan(scanned, 0.0, x),
        "map": lambda: lax.map(step, x),
        "cond": lambda: lax.cond(True, step, step, x),
        "while_loop": lambda: lax.while_loop(lambda x: x[0] < 1, step, x),
        "while_loop's condition": lambda: lax.while_loop(lambda x: step(x)[0] < 1, lambda x: x, x),
        "fori_loop": lambda: lax.fori_loop(0, 2, lambda _, x: step(x), x),
        "checkpoint": lambda: jax.checkpoint(step)(x),
        "grad of checkpoint": lambda: jax.grad(jax.checkpoint(total))(x),
        "eval_shape": lambda: jax.eval_shape(step, x),
        "make_jaxpr": lambda: jax.make_jaxpr(step)(x),
        "lower": lambda: jax.jit(step).lower(x),
    }
    for name, run in staged.items():
        with pytest.raises(TypeError, match=r"record\('tokens'\) is called in a function that JAX"):
            run()
        assert aggregator.get_metrics_for_logging() == {}, name


@on_devices(2)
def test_where_python_runs_each_time_a_number_counts_each_time() -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import io_callback

    x = jnp.ones(3)

    def counted(run: Any) -> float:
        aggregator = MetricsAggregator()

        def record(x: Any) -> Any:
            aggregator.record("tokens", x.size, "sum")
            return x

        for _ in range(2):
            run(record)
        jax.effects_barrier()
        return aggregator.get_metrics_for_logging().get("data/tokens", 0.0)

    def callback(call: Any) -> Any:
        return lambda record: jax.jit(lambda x: call(record, x))(x)

    def disabled(run: Any) -> Any:
        def without_jit(record: Any) -> None:
            with jax.disable_jit():
                run(record)

        return without_jit

    each_time = {
        "grad": (lambda record: jax.grad(lambda x: record(x).sum())(x), 3),
        "vmap": (lambda record: jax.vmap(record)(x[None]), 3),
        "debug.callback": (callback(lambda f, x: jax.debug.callback(f, x)), 3),
        "io_callback": (callback(lambda f, x: io_callback(f, x, x, ordered=True)), 3),
        "pure_callback": (callback(lambda f, x: jax.pure_callback(f, x, x)), 3),
        "callback in a scan": (
            callback(lambda f, x: lax.scan(lambda c, v: (c, jax.debug.callback(f, v)), 0, x)),
            3,
        ),
        "disable_jit": (disabled(lambda record: jax.jit(record)(x)), 3),
        "disable_jit, scan": (
            disabled(lambda record: lax.scan(lambda c, v: (c, record(v)), 0.0, x)),
            3,
        ),
        "disable_jit, grad": (
            disabled(lambda record: jax.grad(jax.jit(lambda x: record(x).sum()))(x)),
            3,
        ),
    }
    for name, (run, elements) in each_time.items():
        assert counted(run) == 2 * elements, name


@on_devices(1)
def test_every_call_of_an_aggregator_or_logger_in_a_traced_function_says_what_to_do(
    tmp_path: Any,
) -> None:
    import jax
    import jax.numpy as jnp

    from metricfold import Metric
    from metricfold.jax import DeviceAccumulator

    aggregator = MetricsAggregator()
    logger = MetricsLogger([JSONLSink(tmp_path / "run.jsonl")])
    timer, mark = aggregator.timer("forward"), aggregator.mark()

    @timer
    def timed(x: Any) -> Any:
        return x

    calls = {
        "record": lambda x: aggregator.record("loss", 0.0 * x.size),
        "record_all": lambda x: aggregator.record_all({"loss": 1.0}),
        "update": lambda x: aggregator.update([Metric("d", "loss", 1.0, "mean")]),
        "drain": lambda x: aggregator.drain(DeviceAccumulator({"loss": "mean"})),
        "timer": timed,
        "pause": lambda x: aggregator.pause(),
        "mark": lambda x: aggregator.mark(),
        "rollback": lambda x: aggregator.rollback(mark),
        "reset": lambda x: aggregator.reset(),
        "reduce": lambda x: aggregator.reduce(),
        "reduce_async": lambda x: aggregator.reduce_async(),
        "state_dict": lambda x: aggregator.state_dict(),
        "log": lambda x: logger.log(0, {"loss": x}),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"{name}\(.*jax\.debug\.callback"):
            jax.eval_shape(call, 1.0)
    assert aggregator.reduce().as_dict("t") == {}
    # Under grad alone Python runs each time, but a value that is differentiated is no number.
    with pytest.raises(TypeError, match=r"'loss': a traced value has no number yet.*has_aux=True"):
        jax.grad(lambda x: (aggregator.record("loss", x), x)[1])(1.0)
    with pytest.raises(TypeError, match=r"'weighed': a traced value"):
        jax.grad(lambda x: (aggregator.record("weighed", 1.0, weight=x), x)[1])(1.0)
    with pytest.raises(
        TypeError, match=r"source\['loss'\].*a traced value has no number yet: return"
    ):
        jax.grad(lambda x: (logger.log(0, {"loss": x}), x)[1])(1.0)
    with pytest.raises(TypeError, match=r"extra\['lr'\].*a traced value has no number yet: return"):
        jax.grad(lambda x: (logger.log(0, {}, extra={"lr": x}), x)[1])(1.0)
    logger.close()
    aggregator.record("loss", jnp.float32(2))
    assert aggregator.get_metrics_for_logging() == {"data/loss": 2.0}


@on_devices(1)
def test_one_thread_may_trace_while_another_records() -> None:
    import threading

    import jax

    aggregator = MetricsAggregator()

    def step(x: Any) -> Any:
        other = threading.Thread(target=aggregator.record, args=("loss", 1.0))
        other.start()
        other.join()
        return x

    jax.jit(step)(1.0)
    assert aggregator.get_metrics_for_logging() == {"data/loss": 1.0}
