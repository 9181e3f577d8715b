"""Metrics reduced over devices of several JAX processes, of which each sees its own alone."""

from __future__ import annotations

from typing import Any

import pytest
from jax_processes import run_processes

PROCESSES = 2
FLOATS = ("float32", "bfloat16", "float16")
DTYPES = (*FLOATS, "int8", "int32", "bool")


def reduced(rank: int) -> dict[str, Any]:
    """Reduce what differs between the processes; return what this one has of it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import PartitionSpec as P

    from metricfold.jax import DataParallel, DeviceMeshManager, DistributedMetrics

    dm, dp = DistributedMetrics(), DataParallel()
    mesh = DeviceMeshManager().create_data_parallel_mesh()
    sharding = dp.create_data_parallel_sharding(mesh)
    # Each process gives its own rows of the batch.
    batch = dp.shard_batch({"x": np.float32([[1, 2], [3, 100]])[rank][None], "n": 3}, sharding)
    # In column d, what device d has is NaN.
    nans = np.where(np.eye(PROCESSES), np.nan, np.arange(4).reshape(2, 2)).astype(np.float32)
    bad = dp.shard_batch(nans[rank][None], sharding)

    def step(x, bad):
        metrics = {dtype: x[0].astype(dtype) for dtype in DTYPES}
        ops = {"number": 3} | {f"bad {dtype}": bad[0].astype(dtype) for dtype in FLOATS}
        return {
            "mean": dm.reduce_mean(metrics | ops),
            "sum": dm.reduce_sum(metrics | ops),
            "max": dm.reduce_max(metrics | ops),
            "min": dm.reduce_min(metrics | ops),
            "weighted": dm.reduce_mean(metrics, weights=x[0, 0]),
            "gathered": dm.all_gather(metrics),
            "packed": dm.reduce_mean({"x": x[0, 0], "y": x[0, 1]}, packed=True),
        }

    def run(check_vma: bool) -> Any:
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma
        )
        return jax.jit(mapped)(batch["x"], bad)

    results = [run(check_vma=check) for check in (True, False)]
    unpacked = [result.pop("packed").unpack() for result in results]
    as_float = [jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), r) for r in results]

    pmapped = jax.pmap(lambda x: dm.reduce_sum({"x": x, "n": 1}, packed=True), axis_name="batch")
    whole = {"x": batch["x"]}
    with pytest.raises(ValueError, match=r"metrics\['x'\] lives partly on devices of other proc"):
        dm.collect_from_devices(whole)
    tiled = multihost_utils.process_allgather(whole, tiled=True)
    return {
        "results": as_float,
        "unpacked": unpacked,
        "number": int(batch["n"]),
        "pmapped": pmapped(np.float32([rank + 1])).unpack(),
        "collected": [row.tolist() for row in dm.collect_from_devices(tiled)["x"]],
    }


def test_reductions_over_processes_agree_with_numpy() -> None:
    of_all = run_processes(reduced, PROCESSES)
    import ml_dtypes
    import numpy as np

    x = np.float32([[1, 2], [3, 100]])
    for found in of_all:
        for results in found["results"]:
            for dtype in DTYPES:
                kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
                each = x.astype(kind).astype(np.float32)
                for op in ("mean", "sum", "max", "min"):
                    expected = getattr(np, op)(each, axis=0)
                    assert results[op][dtype].tolist() == expected.tolist(), (op, dtype)
                    if dtype in FLOATS:
                        assert np.isnan(results[op][f"bad {dtype}"]).all()
                weighted = (each * [[1], [3]]).sum(axis=0) / 4
                assert results["weighted"][dtype].tolist() == weighted.tolist()
                assert results["gathered"][dtype].tolist() == each.tolist()
            assert [results[op]["number"] for op in ("mean", "sum", "max")] == [3.0, 6.0, 3.0]
        assert found["unpacked"] == [{"x": 2.0, "y": 51.0}] * 2
        assert found["number"] == 3
        assert found["pmapped"] == {"x": 3.0, "n": 2.0}
        assert found["collected"] == x.tolist()


def held_by_all(rank: int) -> Any:
    """Record values that lie, whole, on the devices of all processes, and others."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from metricfold import Metric, MetricsAggregator
    from metricfold.jax import (
        DataParallel,
        DeviceAccumulator,
        DeviceMeshManager,
        DistributedMetrics,
    )

    dm, dp = DistributedMetrics(), DataParallel()
    mesh = DeviceMeshManager().create_data_parallel_mesh()
    split = dp.create_data_parallel_sharding(mesh)
    batch = dp.shard_batch(np.float32([[1, 2], [3, 6]])[rank][None], split)
    whole = NamedSharding(mesh, P())

    @jax.jit
    def step(x: Any, acc: Any) -> Any:
        rows = jax.lax.with_sharding_constraint(x.sum(axis=1), whole)
        packed = dm.reduce_sum({"tokens": x.sum()}, axis_name=None, packed=True)
        acc = acc.update("cells", x, ids={"row": jnp.arange(2)}).watch_tree("grad", {"w": x})
        return x.mean(), x.sum(), rows, packed, acc

    aggregator = MetricsAggregator()
    how: Any = {"axes": {"row": 2, "column": 2}, "trees": {"grad": {"w": batch}}}
    acc = DeviceAccumulator({"cells": ("sum", "row", "column")}, **how, mesh=mesh)
    for _ in range(3):
        mean, total, rows, packed, acc = step(batch, acc)
    aggregator.drain(acc)
    aggregator.record("mean", mean, weight=rank + 1)
    aggregator.record("sum", total, "sum")
    aggregator.record("each", rows, "sum", each=True)
    aggregator.record("weighed", rows, weight=rows)
    aggregator.record("len", rows, "distribution", each=True)
    aggregator.update([Metric("d", "listed", total, "sum"), Metric("d", "host", 1.0, "sum")])
    aggregator.record_all({"all": total, "number": 1.0}, "sum")
    aggregator.record("own", jnp.float32(rank + 1), "sum")
    aggregator.record("weight", float(rank), weight=total)
    aggregator.record(f"alone on {rank}", total, "sum") if rank else None
    aggregator.record("first", total, "sum") if not rank else None
    with pytest.raises(ValueError, match=r"'bad': a JAX array of shape \(2,\) is not one value"):
        aggregator.record("bad", rows)
    snapshot = aggregator.reduce()
    cells = snapshot.array(None, "cells")[0].tolist()
    return snapshot.as_dict("t"), cells, packed.unpack(), step._cache_size()


def test_a_value_that_several_processes_hold_counts_once_on_the_lowest() -> None:
    """Each process counted it, so that a sum was as many times too large."""
    for logged, cells, unpacked, compiled in run_processes(held_by_all, PROCESSES):
        assert cells == [[3, 6], [9, 18]]
        assert logged.pop("t/cells") == 36
        tree = {name: logged.pop(name) for name in list(logged) if name.startswith("t/grad/")}
        assert tree.pop("t/grad/norm") == pytest.approx(50**0.5, rel=1e-6)
        assert tree == {
            "t/grad/abs_max": 6,
            "t/grad/mean": 3,
            "t/grad/nonfinite": 0,
            "t/grad/zeros": 0,
        }
        lengths = {name: logged.pop(name) for name in list(logged) if name.startswith("t/len")}
        assert lengths["t/len_stat_mean"] == 6.0
        assert logged == {
            "t/mean": 3.0,
            "t/sum": 12.0,
            "t/each": 12.0,
            "t/weighed": 7.5,
            "t_d/listed": 12.0,
            "t_d/host": 2.0,
            "t/all": 12.0,
            "t/number": 2.0,
            "t/own": 3.0,
            "t/weight": 0.5,
            "t/first": 12.0,
        }
        assert unpacked == {"tokens": 12.0}
        assert compiled == 1
