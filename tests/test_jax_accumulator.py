"""Metrics that accumulate on the device say what the same values say when they are recorded."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from accumulated import KINDS, NAMES, WEIGHTED, logged, recorded
from accumulated import check_equal as check_equal_to
from jax_devices import FAST, on_devices
from jax_processes import end_processes, run_processes
from ranks import run_threads

check_equal = functools.partial(check_equal_to, rtol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Any:
    yield
    end_processes()


def sample(n: int = 60, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return float32 values of both signs and many magnitudes, weights, and dataset ids."""
    import numpy as np

    rng = np.random.default_rng(seed)
    x = rng.lognormal(sigma=2, size=n) * rng.choice([-1, 1], n)
    w = rng.random(n) * rng.integers(0, 3, n)
    return np.float32(x), np.float32(w), rng.integers(0, 3, n).astype(np.int32)


def fold(acc: Any, x: Any, w: Any, ids: Any) -> Any:
    for name in acc.layout.names:
        acc = acc.update(name, x, weights=w if name in WEIGHTED else None, dataset_ids=ids)
    return acc


@functools.cache
def compiled() -> Any:
    import jax

    return jax.jit(fold)


# -- Against values that were recorded -------------------------------------------------------------


@on_devices(1)
def test_a_drained_accumulator_says_what_record_says() -> None:
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator(KINDS, NAMES)
    aggregator, reference = MetricsAggregator(), MetricsAggregator(None)
    step = compiled()
    for seed in range(3):
        values = sample(seed=seed)
        recorded(reference, *values)
        acc = step(acc, *values)
        if seed == 1:
            acc = aggregator.drain(acc)
    acc = aggregator.drain(acc)
    assert not np.asarray(acc.refused).any()
    snapshot, wanted = aggregator.reduce(), reference.reduce()
    for window in ("run", "interval"):
        check_equal(snapshot.as_dict("t", window), wanted.as_dict("t", window))
    assert snapshot.as_dict("t", rollup=True)["t/max"] == wanted.as_dict("t", rollup=True)["t/max"]
    # The run goes on, the interval begins anew.
    values = sample(seed=3)
    aggregator.drain(step(acc, *values))
    snapshot, wanted = aggregator.reduce(), recorded(reference, *values).reduce()
    for window in ("run", "interval"):
        check_equal(snapshot.as_dict("t", window), wanted.as_dict("t", window))


@on_devices(1)
def test_nan_infinities_and_zeros_are_taken_as_the_host_takes_them() -> None:
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    nan, inf = np.nan, np.inf
    for special in ([nan, 1, 2], [inf, 1], [-inf, 3], [inf, -inf, 1], [0.0, -0.0, 5], [nan], [inf]):
        x = np.float32([*special, *[special[0]] * (4 - len(special))])
        w, ids = np.ones_like(x), np.zeros(len(x), np.int32)
        for on_nan in ("propagate", "skip"):
            aggregator = MetricsAggregator(on_nan=on_nan)
            aggregator.drain(compiled()(DeviceAccumulator(KINDS, NAMES), x, w, ids))
            reference = recorded(MetricsAggregator(None, on_nan=on_nan), x, w, ids)
            found, wanted = (a.get_metrics_for_logging("t") for a in (aggregator, reference))
            assert found.keys() == wanted.keys()
            np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-15)


@on_devices(1)
def test_types_wider_and_narrower_than_float32() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"sum": "sum", "mean": "mean", "max": "max", "len": "distribution"})
    # Beyond float32 a sum is infinite, as one of float32 is; it was NaN.
    most = acc.update("sum", jnp.full(2, 3e38)).update("sum", jnp.float32(-3e38))
    assert logged(most) == logged(most.merge(acc)) == {"t/sum": np.inf}

    @jax.jit
    def step(acc, values):
        for name in acc.layout.names:
            acc = acc.update(name, values)
        return acc

    # A float32 would round these.
    big = np.array([2**31 - 1, 2**31 - 3, -(2**31), 2**24 + 1, 1], np.int32)
    for values in (
        big,
        np.uint32([2**32 - 1, 2**32 - 3, 7]),
        np.int8([127, 127, -128]),
        np.array([True, True, False]),
        jnp.full(3000, 0.1, jnp.bfloat16),
        jnp.full(3000, 1000, jnp.float16),
        3,
        2.5,
        np.float64(0.1),
    ):
        found = logged(step(acc, values))
        exact = np.asarray(values).astype(np.float64)
        exact = (
            np.float32(exact).astype(float) if exact.dtype == float and exact.ndim == 0 else exact
        )
        assert found["t/sum"] == pytest.approx(exact.sum(), rel=1e-14)
        assert found["t/mean"] == pytest.approx(exact.mean(), rel=1e-14)
        assert found["t/max"] == np.float32(exact.max())
        assert found["t/len_stat_mean"] == pytest.approx(exact.mean(), rel=1e-6, abs=1e-3)
        assert found["t/len_stat_count"] == exact.size


@on_devices(1)
def test_weights_mask_padding_in_every_aggregation() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator(KINDS)
    x = np.float32([[1, 2, 1e30], [np.nan, np.inf, -5]])
    mask = np.array([[True, True, False], [False, False, False]])

    @jax.jit
    def step(acc):
        for name in KINDS:
            acc = acc.update(name, x, weights=mask)
            acc = acc.update(name, x, weights=0)
            acc = acc.update(name, x[:, :0])  # nothing at all
        return acc

    acc = step(acc)
    found = logged(acc)
    assert found["t/mean"] == 1.5
    assert (found["t/sum"], found["t/max"], found["t/min"]) == (3.0, 2.0, 1.0)
    assert found["t/len_stat_count"] == 2
    # All metrics at once, and one weight per sample, which stands for all its tokens.
    step = jax.jit(lambda acc: acc.update_all(dict.fromkeys(KINDS, x), weights=mask))
    assert logged(step(acc.empty())) == found
    of_samples = np.float32([[1, 3], [5, 7]]), np.array([3, 1])
    step = jax.jit(lambda acc: acc.update("mean", of_samples[0], weights=of_samples[1]))
    assert logged(step(acc.empty()))["t/mean"] == 3.0


@on_devices(1)
def test_the_histogram_is_that_of_the_host_at_64_buckets_per_octave() -> None:
    import jax
    import numpy as np

    from metricfold import LogLinearHistogram
    from metricfold._core.device.rows import M
    from metricfold.jax import DeviceAccumulator

    rng = np.random.default_rng(5)
    edges = np.float32([2**-126, 1, 1.5, 2, np.nextafter(np.float32(2), 0), 3.4e38, 64, 65])
    for values in (
        sample()[0],
        np.concatenate([edges, -edges, [0, 0]]).astype(np.float32),
        np.float32(rng.normal(size=5000)),
        np.float32(rng.normal(300, 0.1, 5000)),
    ):
        acc = jax.jit(DeviceAccumulator({"x": "distribution"}).update, static_argnums=0)(
            "x", values
        )
        state = next(acc.layout.states(acc.start_read()()))[1]
        fine = LogLinearHistogram(65_536)
        fine.update(values)
        while fine.m > M:
            fine.downscale()
        assert fine.m == M
        host = LogLinearHistogram(512)
        host.merge(fine)
        found, wanted = state.sample.older.to_dict(), host.to_dict()
        assert found["totals"] == wanted["totals"]
        assert (found["minimum"], found["maximum"]) == (wanted["minimum"], wanted["maximum"])
        assert len(found["segments"]) == len(wanted["segments"])
        for one, other in zip(found["segments"], wanted["segments"], strict=True):
            assert (one["m"], one["index"]) == (other["m"], other["index"])
            assert one["sums"][0] == other["sums"][0]
            np.testing.assert_allclose(one["sums"], other["sums"], rtol=3e-7)


def test_buckets_from_elsewhere_make_the_histogram_that_their_values_make() -> None:
    import numpy as np

    from metricfold import LogLinearHistogram
    from metricfold._core.sketch import bucket_index

    values = np.concatenate([np.random.default_rng(0).lognormal(size=500) * -3, [2.0, 2.0]])
    index = np.unique(bucket_index(values, 6))
    at = np.searchsorted(index, bucket_index(values, 6))
    _, exponent = np.frexp(np.abs(values))
    u = np.abs(values) / np.ldexp(1.0, exponent - 7) % 1.0
    sums = np.stack([np.bincount(at, weights) for weights in (np.ones_like(u), u, u * u)])
    made = LogLinearHistogram.from_buckets(
        index,
        sums,
        6,
        count=values.size,
        squares=values.size,
        minimum=values.min(),
        maximum=values.max(),
        nan_count=2,
    )
    host = LogLinearHistogram()
    host.update([*values, math.nan, math.nan])
    while host.m > 6:
        host.downscale()
    assert (made.m, made.count, made.nan_count) == (6, 502, 2)
    assert made.mean == pytest.approx(values.mean(), rel=1e-12)
    assert made.std == pytest.approx(values.std(ddof=1), rel=1e-9)
    assert made.quantile([0.1, 0.5, 0.9]) == pytest.approx(host.quantile([0.1, 0.5, 0.9]), rel=1e-9)
    host.merge(made)
    assert host.count == 1004


@pytest.mark.parametrize(
    ("index", "sums", "m", "complaint"),
    [
        ([0], [[1], [0], [0]], 6, "an index is 0"),
        ([2047 << 6 | 1], [[1], [0], [0]], 6, "beyond those of finite floats"),
        ([1], [[1], [0]], 6, "3 sums of each"),
        ([1], [[1], [0], [0]], 17, "m=17"),
    ],
)
def test_buckets_that_cannot_be_are_refused(index: Any, sums: Any, m: int, complaint: str) -> None:
    from metricfold import LogLinearHistogram

    with pytest.raises(ValueError, match=complaint):
        LogLinearHistogram.from_buckets(
            index, sums, m, count=1, squares=1.0, minimum=1.0, maximum=1.0
        )


@on_devices(1)
def test_a_million_updates_in_float32_do_not_drift() -> None:
    import jax
    import numpy as np
    from jax import lax

    from metricfold.jax import DeviceAccumulator

    rng = np.random.default_rng(0)
    n = 1_000_000
    streams = {
        "always": np.full(n, 0.1, np.float32),
        "lognormal": np.float32(rng.lognormal(size=n)),
        "around": np.float32(rng.normal(300, 0.1, n)),
    }
    found = {name: {} for name in streams}
    for agg in ("sum", "mean", "distribution"):
        run = jax.jit(
            lambda acc, parts, agg=agg: lax.scan(
                lambda acc, part: (acc.update(agg, part), None), acc, parts
            )[0]
        )
        empty = DeviceAccumulator({agg: agg})
        run = run.lower(empty, streams["always"]).compile(compiler_options=FAST)
        for name, stream in streams.items():
            found[name] |= logged(run(empty, stream))
    for name, stream in streams.items():
        exact, ours = stream.astype(np.float64), found[name]
        assert ours["t/distribution_stat_count"] == n
        assert abs(ours["t/sum"] / exact.sum() - 1) < 1e-12
        assert abs(ours["t/mean"] / exact.mean() - 1) < 1e-7
        assert abs(ours["t/distribution_stat_mean"] / exact.mean() - 1) < 1e-7
        # Where all values are the same, there is none to relate an error to.
        spread = 1.0 if name == "always" else exact.std()
        assert abs(ours["t/distribution_stat_std"] - exact.std(ddof=1)) < 1e-5 * spread
    naive = np.cumsum(streams["always"], dtype=np.float32)[-1]
    assert abs(naive / (n * np.float64(np.float32(0.1))) - 1) > 1e-3  # what this is for


@on_devices(1)
def test_the_std_of_values_close_together_far_from_zero_is_right() -> None:
    """That of 10^4 ± 0.001 was off by more than itself, and that of equal values was not 0."""
    import jax
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    empty = DeviceAccumulator({"x": "distribution"})
    rng = np.random.default_rng(0)
    weighed = jax.jit(lambda acc, x, w: acc.update("x", x, weights=w))
    for location, scale in ((300, 1e-3), (1e4, 1e-3), (1e6, 0.1), (-(2.0**20), 0.0), (0.1, 0.0)):
        x = np.float32(location + scale * rng.normal(size=(40, 32)))
        exact = x.astype(np.float64) if scale else np.zeros(x.shape)
        one, other = empty, empty
        for part in x[:20]:
            one = one.update("x", part)
        for part in x[20:]:
            other = other.update("x", part)
        both = jax.tree.map(lambda a, b: np.stack([a, b]), one, other)
        reduced = jax.vmap(lambda acc: acc.reduce("i"), axis_name="i")(both)
        for acc in (one.merge(other), jax.tree.map(lambda a: a[0], reduced)):
            found = logged(acc)["t/x_stat_std"]
            assert found == pytest.approx(exact.std(ddof=1), rel=1e-6, abs=1e-300), location
        # Weighed by tokens, and by anything.
        for w in (rng.integers(1, 4096, x.shape), rng.random(x.shape)):
            acc, weights = empty, np.float32(w)
            for part, weight in zip(x, weights, strict=True):
                acc = weighed(acc, part, weight)
            mean = np.average(exact, weights=weights.astype(np.float64))
            spread = np.average((exact - mean) ** 2, weights=weights.astype(np.float64))
            found = logged(acc)["t/x_stat_std"]
            assert found == pytest.approx(np.sqrt(spread), rel=2e-3, abs=1e-300), location


@on_devices(1)
def test_counts_are_exact_where_float32_stops_counting() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"len": "distribution", "mean": "mean"})
    ones = jnp.ones(1000)
    acc = jax.jit(lambda acc: acc.update("len", ones).update("mean", ones))(acc)
    doubled = jax.jit(lambda acc: acc.merge(acc))
    for _ in range(20):
        acc = doubled(acc)
    acc = jax.jit(lambda acc: acc.update("len", 1.0).update("mean", 3.0))(acc)
    count = 1000 * 2**20 + 1  # 2^30: a float32 knows no 2^30 + 1
    assert int(acc.lanes[0, 0]) == count
    found = logged(acc)
    assert found["t/len_stat_count"] == count
    assert found["t/mean"] == pytest.approx((count + 2) / count, rel=1e-15)
    assert np.asarray(acc.lanes).dtype == np.int32


# -- In all the places where JAX may put it --------------------------------------------------------


@on_devices(1)
def test_it_may_be_a_carry_and_be_donated_and_live_in_a_module(tmp_path: Path) -> None:
    import jax
    import numpy as np
    from flax import nnx
    from jax import lax

    from metricfold.jax import DeviceAccumulator

    x, w, ids = sample()
    parts = tuple(a.reshape(20, 3) for a in (x, w, ids))
    want = logged(compiled()(DeviceAccumulator(KINDS, NAMES), x, w, ids))

    def scanned(acc, parts):
        return lax.scan(lambda acc, part: (fold(acc, *part), None), acc, parts)[0]

    check_equal(logged(jax.jit(scanned)(DeviceAccumulator(KINDS, NAMES), parts)), want)

    acc = DeviceAccumulator(KINDS, NAMES)
    donated = jax.jit(fold, donate_argnums=0)
    for part in zip(*parts, strict=True):
        before, acc = acc, donated(acc, *part)
        assert before.lanes.is_deleted()
    check_equal(logged(acc), want)
    with pytest.raises(ValueError, match="was donated"):
        logged(before)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.metrics = nnx.Variable(DeviceAccumulator(KINDS, NAMES))
            self.plain = nnx.data(DeviceAccumulator({"n": "sum"}))

    @nnx.jit
    def step(model, x, w, ids):
        model.metrics.set_value(fold(model.metrics.get_value(), x, w, ids))
        model.plain = model.plain.update("n", 1)

    model = Model()
    for part in zip(*parts, strict=True):
        step(model, *part)
    check_equal(logged(model.metrics.get_value()), want)
    assert logged(model.plain) == {"t/n": 20.0}

    # It has no gradient, and takes none away.
    def loss(v, acc):
        return (v**2).sum(), acc.update("n", v**2)

    slope, acc = jax.grad(loss, has_aux=True)(np.float32([1, 2]), DeviceAccumulator({"n": "sum"}))
    assert slope.tolist() == [2.0, 4.0]
    assert logged(acc) == {"t/n": 5.0}


@on_devices(4)
def test_each_device_folds_its_part_and_reduce_brings_them_together() -> None:
    import jax
    import numpy as np
    from jax_ways import ways

    from metricfold.jax import DeviceAccumulator

    x, w, ids = sample(80)
    x[0] *= 1e-6  # devices of which one has little to say
    parts = tuple(a.reshape(4, 5, 4) for a in (x, w, ids))
    want = logged(compiled()(DeviceAccumulator(KINDS, NAMES), x, w, ids))
    few = {name: KINDS[name] for name in ("mean", "min", "len")}
    few_wanted = {
        key: value for key, value in want.items() if key.split("/")[1][:3] in ("mea", "min", "len")
    }

    def step(parts):
        acc = DeviceAccumulator(few, NAMES)
        return fold(acc, *(part.reshape(-1) for part in parts)).reduce()

    for way in ("pmap", "vmap", "shard_map, Explicit, check_vma=True"):
        check_equal(logged(ways()[way](step, parts)), few_wanted)

    # Carried from step to step by each device, and reduced when it is time to log.
    each = jax.pmap(lambda parts: fold(DeviceAccumulator(KINDS, NAMES), *(p[0] for p in parts)))(
        parts
    )
    step_of_each = jax.pmap(fold)
    for i in range(1, 5):
        each = step_of_each(each, *(part[:, i] for part in parts))
    with pytest.raises(ValueError, match="not one accumulator"):
        logged(each)
    for run in ways().values():
        check_equal(logged(run(lambda acc: acc.reduce(), jax.tree.map(np.asarray, each))), want)

    text = jax.pmap(lambda acc: acc.reduce()).lower(each).as_text()
    assert text.count("all_reduce") == 5
    scalars = DeviceAccumulator({"a": "mean", "b": "max", "c": "sum"}, NAMES)
    few = jax.pmap(lambda i: scalars.reduce()).lower(np.zeros(4)).as_text()
    assert few.count("all_reduce") <= 3
    with pytest.raises(NameError, match="not bound"):
        scalars.reduce("batch")


@on_devices(4)
def test_under_plain_jit_with_sharded_inputs_there_is_one_accumulator() -> None:
    import re

    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    mesh = mesh_of(data=4)
    values = sample(80)
    want = logged(compiled()(DeviceAccumulator(KINDS, NAMES), *values))
    split = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in values]
    whole = [jax.device_put(a, NamedSharding(mesh, P())) for a in values]
    start = jax.device_put(DeviceAccumulator(KINDS, NAMES), NamedSharding(mesh, P()))
    step = jax.jit(lambda acc, *values: fold(acc, *values).reduce(None))

    def collectives(step, *arguments):
        text = jax.jit(step).lower(*arguments).compile().as_text()
        kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
        return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))

    assert collectives(step, start, *whole) == []
    # What XLA needs to add up, and to find the largest, if each is done by hand.
    x, _, ids = split

    def by_hand(sums, x, ids):
        return sums.at[ids].add(x), jax.ops.segment_max(x, ids, 3)

    least = collectives(by_hand, jax.device_put(np.zeros(3), NamedSharding(mesh, P())), x, ids)
    assert least == ["all-reduce"] * 2

    def scalars(acc, x, ids):
        for name in ("mean", "sum", "max", "min"):
            acc = acc.update(name, x, dataset_ids=ids)
        return acc

    assert collectives(scalars, start, x, ids) == least
    # A DISTRIBUTION sorts its values, weights and cells, for which they are gathered.
    assert collectives(step, start, *split) == ["all-gather"] * 3 + least
    acc = step(start, *split)
    check_equal(logged(acc), want)
    # What comes back is where the old one was, and compiles to nothing new.
    aggregator = MetricsAggregator()
    again = aggregator.drain(acc)
    assert again.lanes.sharding == acc.lanes.sharding
    known = step._cache_size()
    check_equal(logged(step(again, *split)), want)
    assert step._cache_size() == known
    assert np.asarray(aggregator.reduce().per_rank("a", "sum")).size == 1


@on_devices(4)
def test_a_step_on_a_mesh_compiles_once() -> None:
    """It compiled twice: what it returned was on the mesh, and what it was first given was not."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator, DeviceMeshManager
    from metricfold.jax import mesh as meshes

    def check(acc: Any, mesh: Any) -> None:
        x = jax.device_put(np.float32([1, 2, 3, 6]), NamedSharding(mesh, P("data")))
        step = jax.jit(lambda acc, x: acc.update("l", x), donate_argnums=0)
        aggregator = MetricsAggregator()
        for _ in range(2):
            acc = aggregator.drain(step(step(acc, x), x))
        assert step._cache_size() == 1
        assert aggregator.get_metrics_for_logging("t") == {"t/l": 48.0}

    kinds = {"l": "sum"}
    check(DeviceAccumulator(kinds, mesh=mesh_of(data=4)), mesh_of(data=4))
    with jax.set_mesh(mesh_of(data=4)):
        check(DeviceAccumulator(kinds), mesh_of(data=4))
    made, meshes._made = meshes._made, {}
    try:
        mesh = DeviceMeshManager().create_data_parallel_mesh()
        check(DeviceAccumulator(kinds), mesh)
        # Where the program has said otherwise, values are followed.
        alone = jax.device_put(np.float32(1), jax.devices()[1])
        acc = DeviceAccumulator(kinds).update("l", alone)
        assert acc.lanes.devices() == {jax.devices()[1]}
        both = DeviceAccumulator(kinds).update("l", 2.0).merge(acc)
        assert logged(both) == {"t/l": 3.0}
        DeviceMeshManager().create_data_parallel_mesh(2)  # now it is not known which
        assert len(DeviceAccumulator(kinds).lanes.devices()) == 1
    finally:
        meshes._made = made


@on_devices(4)
def test_under_plain_jit_on_an_explicit_mesh_it_is_as_on_an_auto_one() -> None:
    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DeviceAccumulator

    values, kinds = sample(80), {"len": "distribution"}
    want = logged(compiled()(DeviceAccumulator(kinds, NAMES), *values))
    mesh = mesh_of(AxisType.Explicit, data=4)
    split = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in values]
    check_equal(logged(jax.jit(fold)(DeviceAccumulator(kinds, NAMES), *split)), want)
    with jax.set_mesh(mesh):
        # Of rows that are split, with one weight and one dataset for each.
        rows = jax.device_put(np.float32([[1, 3], [5, 7], [2, 2], [4, 4]]), split[0].sharding)
        ids = jax.device_put(np.int32([0, 0, 1, 1]), split[0].sharding)
        weighted = jax.jit(
            lambda acc, x, ids: acc.update("mean", x, weights=np.ones(4), dataset_ids=ids)
        )
        found = logged(weighted(DeviceAccumulator({"mean": "mean"}, ("a", "b")), rows, ids))
        assert found == {"t_a/mean": 4.0, "t_b/mean": 3.0}
        # What stands for an array is laid out as that is; outside of a compiled step, too.
        acc = DeviceAccumulator({"mean": "mean"}, ("a", "b"))
        acc = acc.update("mean", nnx.Param(rows), dataset_ids=nnx.Variable(ids))
        assert logged(acc) == {"t_a/mean": 4.0, "t_b/mean": 3.0}
        with pytest.raises(ValueError, match="no metric 'lost'"):
            jax.jit(lambda x: DeviceAccumulator(kinds).update("lost", x))(rows)


@on_devices(4)
def test_it_is_the_carry_of_a_scan_inside_a_shard_map() -> None:
    import jax
    from jax import lax
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DeviceAccumulator

    values, kinds = sample(80), {"mean": "mean", "len": "distribution"}
    want = logged(compiled()(DeviceAccumulator(kinds, NAMES), *values))
    parts = tuple(a.reshape(20, 4) for a in values)

    def step(parts):
        acc = lax.pcast(DeviceAccumulator(kinds, NAMES), "data", to="varying")
        acc = lax.scan(lambda acc, part: (fold(acc, *part), None), acc, parts)[0]
        return acc.reduce("data")

    mapped = jax.shard_map(step, mesh=mesh_of(data=4), in_specs=P("data"), out_specs=P())
    check_equal(logged(jax.jit(mapped)(parts)), want)


# -- What the aggregator makes of it ---------------------------------------------------------------


@on_devices(1)
def test_nothing_is_lost_or_counted_twice_when_a_reduction_fails() -> None:
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"n": "sum", "len": "distribution"})
    acc = acc.update("n", np.float32([1, 2])).update("len", np.float32([5, 6]))
    aggregator = MetricsAggregator()
    acc = aggregator.drain(acc)
    with pytest.raises(RuntimeError, match="step"):
        aggregator.reduce(step=-5)
    acc = aggregator.drain(acc.update("n", 4.0))
    found = aggregator.get_metrics_for_logging("t", "interval")
    assert found["t/n"] == 7.0
    assert found["t/len_stat_count"] == 2.0
    aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging("t")["t/n"] == 7.0


@on_devices(1)
def test_a_drain_that_clashes_changes_nothing() -> None:
    import jax
    import numpy as np

    from metricfold import AggregationType, MaxAggHandler, MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"new": "sum", "loss": "mean"}).update("new", 1).update("loss", 2.0)
    for name, kind, complaint in (
        ("loss", "max", "already registered with aggregation type max"),
        ("loss_stat_x", "sum", None),
    ):
        aggregator = MetricsAggregator()
        aggregator.record(name, 1.0, kind)
        if complaint is None:
            aggregator.drain(acc)
            continue
        with pytest.raises(ValueError, match=complaint):
            aggregator.drain(acc)
        assert aggregator.get_metrics_for_logging("t") == {f"t/{name}": 1.0}
        aggregator.record("new", 3.0, "max")  # its type is still free

    lengths = DeviceAccumulator({"len": "distribution"}).update("len", np.float32([1, 2]))
    aggregator = MetricsAggregator()
    aggregator.record("len", 9.0, "distribution")
    # It was refused; now it is part of the interval, as values of it are that are no longer recent.
    aggregator.drain(lengths)
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", "interval")["t/len_stat_count"] == 3
    assert snapshot.as_dict("t", "interval")["t/len_stat_min"] == 1.0
    assert snapshot.as_dict("t")["t/len_stat_count"] == 1
    unbounded = MetricsAggregator(None)
    unbounded.record("len", 9.0, "distribution")
    unbounded.drain(lengths)
    assert unbounded.get_metrics_for_logging("t")["t/len_stat_count"] == 3

    class Mine(MaxAggHandler):
        pass

    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.MEAN, Mine())
    with pytest.raises(ValueError, match="another handler for 'mean'"):
        aggregator.drain(acc)
    with pytest.raises(TypeError, match="takes an accumulator"):
        aggregator.drain({"loss": 1.0})
    with pytest.raises(TypeError, match="outside"):
        jax.jit(MetricsAggregator().drain)(acc)
    aggregator.close()
    with pytest.raises(RuntimeError, match="closed"):
        aggregator.drain(acc)


@on_devices(1)
def test_values_join_a_distribution_that_devices_send() -> None:
    import numpy as np

    from metricfold import Metric, MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"len": "distribution"}, ("d",)).update("len", np.float32([1, 2]))
    aggregator = MetricsAggregator(dist_window_size=2)
    aggregator.drain(acc)
    aggregator.update([Metric("d", "len", v, "distribution") for v in (3.0, 4.0, 5.0)])
    aggregator.record("other", 1.0, "distribution")
    assert aggregator.get_metrics_for_logging("t")["t_d/len_stat_count"] == 5
    aggregator.update([Metric("d", "len", 6.0, "distribution")])
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", "run")["t_d/len_stat_count"] == 6
    assert snapshot.as_dict("t", "interval")["t_d/len_stat_count"] == 1


@on_devices(1)
def test_ranks_that_drain_nothing_learn_the_keys_from_those_that_do() -> None:
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    def rank(communicator: Any, route: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        acc = DeviceAccumulator(KINDS, NAMES)
        seen = []
        for turn in range(3):
            if (communicator.rank + turn) % 2:
                acc = aggregator.drain(
                    compiled()(acc, *sample(60, seed=10 * communicator.rank + turn))
                )
            seen.append(aggregator.get_metrics_for_logging("t"))
        return seen, aggregator.state_dict()

    reference = MetricsAggregator(None)
    wanted = []
    for turn in range(3):
        for number in range(3):
            if (number + turn) % 2:
                recorded(reference, *sample(60, seed=10 * number + turn))
        wanted.append(reference.get_metrics_for_logging("t"))
    for route in ("narrow", "wide"):
        results = run_threads(lambda c, route=route: rank(c, route), 3)
        assert all(result == results[0] for result in results)
        for one, other in zip(results[0][0], wanted, strict=True):
            check_equal(one, other)
    assert np.isfinite(list(wanted[-1].values())).all()


def held_by_all_processes(rank: int) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from metricfold import MetricsAggregator
    from metricfold.jax import DataParallel, DeviceAccumulator, DeviceMeshManager

    mesh, parallel = DeviceMeshManager().create_data_parallel_mesh(), DataParallel()
    sharding = parallel.create_data_parallel_sharding(mesh)
    x = parallel.shard_batch(np.float32([1, 2, 3]) + 10 * rank, sharding)
    everywhere = NamedSharding(mesh, P())
    step = jax.jit(lambda acc, x: acc.update_all({"n": x, "len": x}), out_shardings=everywhere)
    aggregator = MetricsAggregator()
    acc = DeviceAccumulator({"n": "sum", "len": "distribution"}, mesh=mesh)
    own = DeviceAccumulator({"own": "sum"})
    found = []
    for _ in range(2):
        acc = aggregator.drain(step(acc, x))
        own = aggregator.drain(own.update("own", jnp.float32(rank + 1)))
        found.append(aggregator.get_metrics_for_logging("t"))
    assert (
        step._cache_size() == 1
    )  # it compiled twice: for what is not on the mesh, and for what is
    return found


def test_what_several_processes_hold_together_counts_once() -> None:
    results = run_processes(held_by_all_processes, 2)
    assert results[0] == results[1]
    first, second = results[0]
    assert (first["t/n"], second["t/n"]) == (42.0, 84.0)
    assert (first["t/len_stat_count"], second["t/len_stat_count"]) == (6, 12)
    assert (first["t/len_stat_min"], first["t/len_stat_max"]) == (1.0, 13.0)
    assert (first["t/own"], second["t/own"]) == (3.0, 6.0)


@on_devices(1)
def test_a_checkpoint_goes_on_where_the_run_was() -> None:
    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc, reference = DeviceAccumulator(KINDS, NAMES), MetricsAggregator(None)
    first = MetricsAggregator()
    first.drain(compiled()(acc, *sample(seed=1)))
    recorded(reference, *sample(seed=1))
    state = first.state_dict()

    resumed = MetricsAggregator()
    resumed.load_state_dict(state)
    check_equal(resumed.reduce().as_dict("t"), reference.get_metrics_for_logging("t"))
    resumed.drain(compiled()(acc, *sample(seed=2)))
    recorded(reference, *sample(seed=2))
    check_equal(resumed.get_metrics_for_logging("t"), reference.get_metrics_for_logging("t"))

    # Recent values of that name would stand for something else.
    other = MetricsAggregator()
    other.record("len", 1.0, "distribution", dataset="a")
    with pytest.raises(ValueError, match="make the aggregator as the one that saved"):
        other.load_state_dict(state)


@on_devices(1)
def test_orbax_saves_what_has_not_been_drained(tmp_path: Path) -> None:
    import jax
    import orbax.checkpoint as ocp

    from metricfold.jax import DeviceAccumulator

    acc = compiled()(DeviceAccumulator(KINDS, NAMES), *sample())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "acc", acc)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, DeviceAccumulator(KINDS, NAMES))
        restored = checkpointer.restore(tmp_path / "acc", like)
    assert isinstance(restored, DeviceAccumulator)
    assert logged(restored) == logged(acc)


# -- Bad input -------------------------------------------------------------------------------------


@on_devices(1)
def test_what_cannot_be_placed_is_left_out_and_counted() -> None:
    import jax
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    class Heard(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.texts.append(record.getMessage())

    heard = Heard()
    logging.getLogger("metricfold").addHandler(heard)
    acc = DeviceAccumulator({"loss": "mean", "n": "sum"}, ("a", "b"))
    x = np.float32([1, 2, 4, 8, 16, 32])

    @jax.jit
    def step(acc, ids, w):
        return acc.update("loss", x, dataset_ids=ids, weights=w).update("n", x, dataset_ids=ids)

    ids = np.int32([0, 1, 2, -1, 1, 2**31 - 1])
    for typed in (ids, ids.astype(np.int64)):
        heard.texts.clear()
        aggregator = MetricsAggregator()
        aggregator.drain(step(acc, typed, np.float32([1, 1, np.nan, 1, -1, 1])))
        found = aggregator.get_metrics_for_logging("t")
        assert found == {"t_a/loss": 1.0, "t_b/loss": 2.0, "t_a/n": 1.0, "t_b/n": 18.0}
        assert len(heard.texts) == 3
        assert heard.texts[0].startswith(
            "3 values of metric 'loss' came with dataset_ids outside of 0..1"
        )
        assert heard.texts[1].startswith("1 values of metric 'loss' came with weights")
        assert heard.texts[2].startswith("3 values of metric 'n'")
    logging.getLogger("metricfold").removeHandler(heard)
    far = np.uint32([0, 2**32 - 1, 1, 1, 1, 1])
    assert logged(acc.update("n", x, dataset_ids=far)) == {"t_a/n": 1.0, "t_b/n": 60.0}


@on_devices(1)
def test_ids_of_few_bits_name_any_of_more_datasets_than_they_can_count() -> None:
    """They were compared with a number of datasets that their type does not hold."""
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"n": "sum"}, [f"d{i}" for i in range(300)])
    for ids in (np.uint8([3, 255]), np.int8([3, 127]), np.uint16([3, 299])):
        found = logged(acc.update("n", np.float32([1, 2]), dataset_ids=jnp.asarray(ids)))
        assert found == {"t_d3/n": 1.0, f"t_d{ids[1]}/n": 2.0}
    assert logged(acc.update("n", 1.0, dataset_ids=jnp.int8(-1))) == {}


@on_devices(1)
def test_what_numpy_has_masked_is_refused_and_does_not_count() -> None:
    """What lay under the mask counted."""
    import jax
    import numpy as np

    from metricfold.jax import DeviceAccumulator, DistributedMetrics

    acc = DeviceAccumulator({"n": "sum"}, ("a",))
    x, ids = np.float32([1, 1e9]), np.int32([0, 0])
    masked = np.ma.masked_array(x, [False, True])
    for given in (
        {"values": masked},
        {"values": np.ma.masked},
        {"values": x, "weights": masked},
        {"values": x, "dataset_ids": np.ma.masked_array(ids, [False, True])},
    ):
        with pytest.raises(ValueError, match=r"has masked a part.* weights"):
            acc.update("n", **{"dataset_ids": ids, **given})
    with pytest.raises(ValueError, match="has masked a part"):
        jax.pmap(lambda _: DistributedMetrics().reduce_sum({"n": masked}))(x[:1])
    whole = np.ma.masked_array(x, [False, False])
    assert logged(acc.update("n", whole, dataset_ids=ids)) == {"t_a/n": 1e9 + 1}


@on_devices(1)
def test_shapes_alone_are_not_drained_and_arrays_that_are_none_restored() -> None:
    import jax

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"n": "sum"}).update("n", 2.0)
    with pytest.raises(TypeError, match="has shapes and no numbers"):
        MetricsAggregator().drain(jax.eval_shape(lambda acc: acc, acc))
    raw = {**acc.arrays(), "grid": None}  # as Orbax restores them without a template
    assert logged(acc.empty().with_arrays(raw)) == {"t/n": 2.0}


@on_devices(1)
def test_weights_whose_squares_overflow_put_no_rank_out() -> None:
    """The reduction failed: "rank 0 sent numbers that no rank sends"."""
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"len": "distribution"})
    found = logged(acc.update("len", np.float32([1, 3, 5]), weights=np.float32([1, 1, 1e25])))
    assert (found["t/len_stat_count"], found["t/len_stat_mean"]) == (2, 2.0)
    found = logged(acc.update("len", np.float32([1, 3] * 4), weights=np.float32(9e18)))
    assert (found["t/len_stat_count"], found["t/len_stat_mean"]) == (8, 2.0)


@on_devices(1)
def test_zero_is_the_smallest_without_a_sign() -> None:
    """It was logged as -0.0."""
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"low": "min", "high": "max"})
    for values in (np.float32([0, 1]), np.array([False, True]), np.int32([0, 3])):
        found = logged(acc.update_all({"low": values, "high": -1.0 * values}))
        assert str(found["t/low"]) == "0.0"
        assert found["t/high"] == 0.0


@on_devices(1)
def test_an_accumulator_that_is_donated_after_drain_says_what_to_go_on_with() -> None:
    import jax

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    step = jax.jit(lambda acc: acc.update("n", 1.0), donate_argnums=0)
    aggregator = MetricsAggregator()
    acc = step(DeviceAccumulator({"n": "sum"}))
    aggregator.drain(acc)  # and not acc = aggregator.drain(acc)
    step(acc)
    with pytest.raises(RuntimeError, match=r"go on with the empty one that drain\(\) returns"):
        aggregator.get_metrics_for_logging("t")


@on_devices(1)
def test_wrong_shapes_types_and_names_are_errors_when_the_step_is_traced() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"loss": "mean"}, ("a", "b"))
    x, ids = np.ones((4, 3), np.float32), np.zeros(4, np.int32)

    def attempt(*args, acc=acc, **kwargs):
        jax.eval_shape(lambda: acc.update(*args, **kwargs))

    attempt("loss", x, dataset_ids=ids, weights=1.0)
    for error, complaint, arguments in (
        (ValueError, r"no metric 'lost', but 'loss'", ("lost", x, {})),
        (ValueError, r"one of 2 datasets: give dataset_ids", ("loss", x, {})),
        (
            ValueError,
            r"dataset_ids .* shape \(2,\), but the values \(4, 3\)",
            ("loss", x, {"dataset_ids": ids[:2]}),
        ),
        (
            ValueError,
            r"weights .* shape \(4, 3, 1\)",
            ("loss", x, {"dataset_ids": ids, "weights": x[..., None]}),
        ),
        (TypeError, "give integers", ("loss", x, {"dataset_ids": x})),
        (TypeError, "complex", ("loss", x * 1j, {"dataset_ids": ids})),
        (TypeError, "no number", ("loss", "text", {"dataset_ids": 0})),
    ):
        name, values, options = arguments
        with pytest.raises(error, match=complaint):
            attempt(name, values, **options)
    with pytest.raises(ValueError, match="belongs to no dataset"):
        attempt("n", 1.0, dataset_ids=0, acc=DeviceAccumulator({"n": "sum"}))
    with pytest.raises(ValueError, match="same metrics"):
        acc.merge(DeviceAccumulator({"loss": "mean"}))
    for error, complaint, metrics, datasets in (
        (ValueError, "'categorical_count', which no accumulator", {"x": "categorical_count"}, ()),
        (ValueError, "'mine', which no accumulator", {"x": "mine"}, ()),
        (TypeError, "by name", ["loss"], ()),
        (TypeError, "by name", {}, ()),
        (TypeError, "give a list of names", {"x": "sum"}, "alpaca"),
        (ValueError, "each name once", {"x": "sum"}, ("a", "a")),
        (ValueError, "empty", {"": "sum"}, ()),
    ):
        with pytest.raises(error, match=complaint):
            DeviceAccumulator(metrics, datasets)
