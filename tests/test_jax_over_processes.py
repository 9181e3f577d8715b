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
