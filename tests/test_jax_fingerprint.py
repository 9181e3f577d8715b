"""The arrays of an accumulator are tied to their names, and to nothing having been done to them.

Names lie beside the arrays, where checkpoints do not see them, and arrays lie open to whatever maps a
function over a training state. What comes of that is an error when it is drained or merged, never a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accumulated import logged
from jax_devices import on_devices


def two() -> tuple[Any, Any]:
    """Return accumulators of the same layout and of as many values."""
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    empty = DeviceAccumulator({"l": "mean", "m": "max"})
    x = np.float32([1.0, 2.0, 6.0])
    return tuple(empty.update_all({"l": v, "m": v}) for v in (x, -x))  # type: ignore[return-value]


@on_devices(1)
def test_arithmetic_on_the_arrays_is_an_error_and_no_number() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from metricfold import MetricsAggregator

    one, other = two()
    more = one.update("l", 3.0)
    ways = {
        "sum": jax.tree.map(jnp.add, one, other),
        "sum with nothing": jax.tree.map(jnp.add, one, one.empty()),
        "difference": jax.tree.map(jnp.subtract, more, one),
        "mean": jax.tree.map(lambda a, b: (a + b) / 2, one, other),
        "mean, cast back": jax.tree.map(lambda a, b: ((a + b) / 2).astype(a.dtype), one, other),
        "whole mean": jax.tree.map(lambda a, b: (a + b) // 2, one, other),
        "half": jax.tree.map(lambda a: a // 2, one),
        "mean of checkpoints": jax.tree.map(
            lambda a, b: np.mean([a, b], axis=0).astype(a.dtype), one, more
        ),
        "scaled": jax.tree.map(lambda a: a * 3, one),
        "moving average": optax.incremental_update(one, other, 0.1),
        "moving average, cast back": jax.tree.map(
            lambda a, b: (0.9 * a + 0.1 * b).astype(a.dtype), one, other
        ),
        "moving average of equals": jax.tree.map(
            lambda a, b: (0.9 * a + 0.1 * b).astype(a.dtype), one, one
        ),
        "zeros": jax.tree.map(jnp.zeros_like, one),
        "ones": jax.tree.map(jnp.ones_like, one),
        "maximum": jax.tree.map(jnp.maximum, more, one.update("m", 3.0)),
        "bfloat16": jax.tree.map(lambda a: a.astype(jnp.bfloat16), one),
        "float32 and back": jax.tree.map(lambda a: a.astype(jnp.float32).astype(a.dtype), one),
        "global norm": jax.tree.map(lambda a: a / optax.tree.norm(one), one),
    }
    for acc in ways.values():
        with pytest.raises((TypeError, ValueError), match=r"merge\(\)|added up"):
            MetricsAggregator().drain(acc)
        with pytest.raises((TypeError, ValueError), match=r"merge\(\)|added up"):
            one.merge(acc)
        with pytest.raises((TypeError, ValueError), match=r"merge\(\)|added up"):
            # It is as wrong after an update, and merged with a right one in a compiled step.
            MetricsAggregator().drain(jax.jit(lambda a, b: b.merge(a.update("l", 1.0)))(acc, one))
    assert logged(ways["zeros"].empty().update("l", 2.0)) == {"t/l": 2.0}


@on_devices(1)
def test_what_leaves_integers_alone_leaves_an_accumulator_alone() -> None:
    """Its sums were float32, which a moving average of all that is inexact made other numbers of."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    one, other = two()

    def averaged(a: Any, b: Any) -> Any:
        return 0.9 * a + 0.1 * b if jnp.issubdtype(a.dtype, jnp.inexact) else a

    want = {"t/l": 3.0, "t/m": 6.0}
    assert logged(jax.tree.map(averaged, one, other)) == want
    assert logged(jax.tree.map(lambda a, b: jnp.where(True, a, b), one, other)) == want
    assert logged(jax.tree.map(lambda a: jnp.stack([a, a])[1], one)) == want
    assert logged(jax.device_get(one)) == want
    assert logged(jax.tree.map(jnp.asarray, jax.device_get(one))) == want
    assert logged(jax.tree.map(lambda a: a.copy(), one)) == want
    assert logged(jax.lax.cond(np.bool_(True), lambda a, _: a, lambda _, b: b, one, other)) == want
    assert logged(one.merge(other)) == {"t/l": 0.0, "t/m": 6.0}


@on_devices(1)
def test_a_carry_that_is_filled_with_zeros_is_an_error() -> None:
    import jax
    import jax.numpy as jnp

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    def run(acc: Any, x: Any) -> Any:
        return jax.lax.scan(lambda acc, v: (acc.update("l", v), None), acc, x)[0]

    acc = DeviceAccumulator({"l": "min"})
    x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    assert logged(jax.jit(run)(acc, x)) == {"t/l": 1.0}
    with pytest.raises(ValueError, match="filled with zeros"):
        MetricsAggregator().drain(jax.jit(run)(jax.tree.map(jnp.zeros_like, acc), x))


@on_devices(4)
def test_sums_and_means_over_devices_are_errors_and_reduce_is_the_way() -> None:
    import jax
    import jax.numpy as jnp

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    def folded(v: Any) -> Any:
        return DeviceAccumulator({"l": "mean", "m": "max"}).update_all({"l": v, "m": v})

    x = jnp.array([1.0, 2.0, 3.0, 6.0])
    accs = jax.pmap(folded)(x)
    first = lambda acc: jax.tree.map(lambda a: a[0], acc)  # noqa: E731

    def mean_as_before(acc: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.pmean(a, "i").astype(a.dtype), acc)

    for way in (
        lambda acc: jax.lax.psum(acc, "i"),
        lambda acc: jax.lax.pmean(acc, "i"),
        mean_as_before,
        lambda acc: jax.lax.psum(acc, "i").reduce("i"),  # no way back
    ):
        with pytest.raises((TypeError, ValueError), match=r"merge\(\)|added up"):
            MetricsAggregator().drain(first(jax.pmap(way, axis_name="i")(accs)))
    for summed in (jax.tree.map(lambda a: a.sum(0), accs), jax.tree.map(lambda a: a.mean(0), accs)):
        with pytest.raises((TypeError, ValueError), match=r"merge\(\)|added up"):
            MetricsAggregator().drain(summed)
    assert logged(first(accs)) == {"t/l": 1.0, "t/m": 1.0}
    reduced = jax.pmap(lambda acc: acc.reduce("i"), axis_name="i")(accs)
    assert logged(first(reduced)) == {"t/l": 3.0, "t/m": 6.0}

    # One device's, zeroed on the way, does not pass for one of all.
    def reset_on_one(acc: Any) -> Any:
        mine = jax.lax.axis_index("i") == 2
        return jax.tree.map(lambda a: jnp.where(mine, jnp.zeros_like(a), a), acc).reduce("i")

    with pytest.raises(ValueError, match="filled with zeros"):
        MetricsAggregator().drain(first(jax.pmap(reset_on_one, axis_name="i")(accs)))


@on_devices(1)
def test_arrays_of_other_names_are_refused(tmp_path: Path) -> None:
    """They were taken, under whatever names the template had."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    x, ids = np.float32([1.0, 5.0]), np.int32([0, 1])
    acc = DeviceAccumulator({"l": "mean", "n": "sum"}, ("a", "b")).update("l", x, dataset_ids=ids)
    others = [
        DeviceAccumulator({"l": "mean", "n": "sum"}, ("b", "a")),
        DeviceAccumulator({"n": "mean", "l": "sum"}, ("a", "b")),
        DeviceAccumulator({"n": "sum", "l": "mean"}, ("a", "b")),
        DeviceAccumulator({"l": "mean", "n": "mean"}, ("a", "b")),
        DeviceAccumulator({"l": "mean", "n": "sum"}, ("a", "c")),
    ]
    assert len({other.layout.fingerprint for other in (acc, *others)}) == 6
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "acc", acc)
        checkpointer.wait_until_finished()
        for other in others:
            restored = checkpointer.restore(tmp_path / "acc", other)
            for use in (MetricsAggregator().drain, other.merge):
                with pytest.raises(
                    ValueError, match=r"other metrics, aggregations, axes, datasets or trees"
                ):
                    use(restored)
        same = checkpointer.restore(tmp_path / "acc", acc.empty())
    assert logged(same) == {"t_a/l": 1.0, "t_b/l": 5.0}

    for other in others:
        smuggled = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(acc))
        with pytest.raises(ValueError, match="in another order"):
            MetricsAggregator().drain(smuggled)


@on_devices(1)
def test_an_error_that_shows_only_once_the_step_has_run_is_that_of_the_log() -> None:
    import jax
    import jax.numpy as jnp

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"l": "mean"}).update("l", jnp.ones(3))

    @jax.jit
    def slow(acc: Any) -> Any:
        busy = jax.lax.fori_loop(0, 40, lambda _, m: jnp.tanh(m @ m), jnp.ones((700, 700)))
        return jax.tree.map(lambda a: a + a + jnp.isnan(busy[0, 0]).astype(a.dtype), acc)

    slow(acc)
    aggregator = MetricsAggregator()
    aggregator.record("other", 1.0)

    def drained_and_logged() -> None:
        aggregator.drain(slow(acc))
        aggregator.get_metrics_for_logging("t")

    with pytest.raises((ValueError, RuntimeError), match="added up"):
        drained_and_logged()
    assert aggregator.get_metrics_for_logging("t") == {"t/other": 1.0}


def test_a_set_of_datasets_is_refused() -> None:
    """It was taken, in the order that it had in this process."""
    from metricfold._core.device.rows import Layout

    names = {"alpaca": 1, "orca": 2}
    for unordered in (set(names), frozenset(names), names.keys() & {"alpaca", "orca"}):
        with pytest.raises(TypeError, match=r"another order in each process.*sorted\(datasets\)"):
            Layout.of({"l": "mean"}, unordered)
    for ordered in (names, names.keys(), list(names), iter(names), dict(names).keys()):
        assert Layout.of({"l": "mean"}, ordered).datasets == ("alpaca", "orca")


@on_devices(4)
def test_many_accumulators_in_one_are_updated_and_drained_one_by_one_and_begun_anew_at_once() -> (
    None
):
    """`empty()` raised IndivisibleError."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    kinds = {"n": "sum", "top": "max"}
    x = jnp.array([1.0, 2.0, 3.0, 6.0])
    step = jax.pmap(lambda acc, v: acc.update_all({"n": v, "top": v}))
    reduced = jax.pmap(lambda acc: acc.reduce())
    aggregator, accs = MetricsAggregator(), jax.pmap(lambda _: DeviceAccumulator(kinds))(x)
    for turn in (1, 2):
        accs = step(step(accs, x), x)
        drained = aggregator.drain(jax.tree.map(lambda a: a[0], reduced(accs)))
        assert drained.lanes.shape == accs.lanes.shape[1:]
        again = accs.empty()
        for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(accs), strict=True):
            assert (new.shape, new.sharding) == (old.shape, old.sharding)
        accs = again
        assert aggregator.get_metrics_for_logging("t") == {"t/n": 24.0 * turn, "t/top": 6.0}

    # Seeds, or members of an ensemble.
    accs = jax.vmap(lambda v: DeviceAccumulator(kinds).update("n", v))(x)
    for use in (
        MetricsAggregator().drain,
        lambda acc: acc.update("n", 1.0),
        lambda acc: acc.reduce("i"),
    ):
        with pytest.raises(ValueError, match=r"4 of them.*empty\(\)"):
            use(accs)
    with pytest.raises(ValueError, match="4 of them does not merge with one that holds one"):
        accs.merge(DeviceAccumulator(kinds))
    twice = accs.merge(accs)
    members = [jax.tree.map(lambda a, i=i: a[i], twice) for i in range(4)]
    assert [logged(member)["t/n"] for member in members] == [2.0, 4.0, 6.0, 12.0]
    of_all = jax.vmap(lambda acc: acc.reduce("seed"), axis_name="seed")(twice)
    assert logged(jax.tree.map(lambda a: a[0], of_all))["t/n"] == 24.0
    grid = jax.vmap(jax.vmap(lambda v: DeviceAccumulator(kinds).update("n", v)))(x.reshape(2, 2))
    assert grid.empty().lanes.shape == grid.lanes.shape
    assert logged(jax.tree.map(lambda a: a[1, 0], grid)) == {"t/n": 3.0}
    _, *others = jax.tree.leaves(grid)
    torn = jax.tree.unflatten(jax.tree.structure(grid), [np.zeros(3, np.uint32), *others])
    with pytest.raises(ValueError, match="hold"):
        torn.empty()
