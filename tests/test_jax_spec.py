"""The examples that the documentation of `DistributedMetrics` gives, on four devices.

Each runs as a reader would paste it, between what it leaves undefined and what it should give.
"""

from __future__ import annotations

from jax_devices import on_devices

DEVICES = 4


def compute_loss(params, batch):
    return ((params - batch["data"]) ** 2).mean()


def params_and_batch():
    """Parameters of 1 on each device; the data of device d is [d, d+1, d+2]: losses 2/3 … 35/3."""
    import jax.numpy as jnp

    data = jnp.arange(4.0)[:, None] + jnp.arange(3.0)
    return jnp.ones(4), {"data": data}


LOSSES = [((d - 1) ** 2 + d**2 + (d + 1) ** 2) / 3 for d in range(4)]


def close(found, expected, rtol=1e-6):
    import numpy as np

    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol)


@on_devices(DEVICES)
def test_basic_metrics_reduction() -> None:
    import jax

    from metricfold.jax import DistributedMetrics

    acc = 0.5
    params, batch = params_and_batch()

    # Create instance
    dm = DistributedMetrics()

    # Inside a pmap context, reduce metrics across devices
    @jax.pmap
    def train_step(params, batch):
        # ... compute loss and gradients ...
        loss = compute_loss(params, batch)

        # Reduce metrics across devices
        metrics = {"loss": loss, "accuracy": acc}
        metrics = dm.reduce_mean(metrics)

        return params, metrics

    _, metrics = train_step(params, batch)
    close(metrics["loss"], [sum(LOSSES) / 4] * 4)
    close(metrics["accuracy"], [0.5] * 4)


@on_devices(DEVICES)
def test_static_method_usage() -> None:
    import jax

    from metricfold.jax import DistributedMetrics

    params, batch = params_and_batch()

    # Static methods don't require instantiation
    @jax.pmap
    def train_step(params, batch):
        loss = compute_loss(params, batch)

        # Use static method
        metrics = {"loss": loss}
        metrics = DistributedMetrics.reduce_mean_static(metrics)

        return params, metrics

    _, metrics = train_step(params, batch)
    close(metrics["loss"], [sum(LOSSES) / 4] * 4)


@on_devices(DEVICES)
def test_custom_reduction_operations() -> None:
    import jax

    from metricfold.jax import DistributedMetrics

    params, batch = params_and_batch()
    grads = 3.0

    def compute_grad_norm(grads):
        return grads * (1 + jax.lax.axis_index(jax.sharding.get_abstract_mesh().manual_axes))

    dm = DistributedMetrics()

    # Define custom reduction per metric
    @jax.pmap
    def train_step(params, batch):
        loss = compute_loss(params, batch)
        batch_size = batch["data"].shape[0]
        max_grad_norm = compute_grad_norm(grads)

        metrics = {
            "loss": loss,
            "total_samples": batch_size,
            "max_grad_norm": max_grad_norm,
        }

        # Custom reductions: mean for loss, sum for samples, max for grad norm
        reduce_ops = {
            "loss": "mean",
            "total_samples": "sum",
            "max_grad_norm": "max",
        }
        metrics = dm.reduce_custom(metrics, reduce_fn=reduce_ops)

        return params, metrics

    _, metrics = train_step(params, batch)
    close(metrics["loss"], [sum(LOSSES) / 4] * 4)
    assert metrics["total_samples"].tolist() == [12] * 4
    assert metrics["max_grad_norm"].tolist() == [12.0] * 4


@on_devices(DEVICES)
def test_gathering_metrics_from_all_devices() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    params, batch = params_and_batch()

    def model(params, data):
        return params + data

    dm = DistributedMetrics()

    @jax.pmap
    def evaluate_step(params, batch):
        predictions = model(params, batch["data"])

        # Gather predictions from all devices (not reduce)
        results = {"predictions": predictions}
        results = dm.all_gather(results)

        return results  # noqa: RET504

    results = evaluate_step(params, batch)
    assert results["predictions"].shape == (4, 4, 3)
    for seen_by_one in np.asarray(results["predictions"]):
        assert seen_by_one.tolist() == (np.asarray(batch["data"]) + 1).tolist()


@on_devices(DEVICES)
def test_collecting_per_device_metrics() -> None:
    import contextlib
    import io

    import jax

    from metricfold.jax import DistributedMetrics

    params, batch = params_and_batch()
    train_step = jax.pmap(lambda params, batch: {"loss": compute_loss(params, batch)})

    dm = DistributedMetrics()

    # After pmap returns metrics with device dimension
    metrics_per_device = train_step(params, batch)
    # Shape of metrics_per_device["loss"]: (num_devices,)

    # Collect into list of per-device values
    collected = dm.collect_from_devices(metrics_per_device)
    # collected["loss"] is now a list of values, one per device

    # Useful for debugging or logging per-device metrics
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for i, loss in enumerate(collected["loss"]):
            print(f"Device {i} loss: {loss}")

    assert isinstance(collected["loss"], list)
    close(collected["loss"], LOSSES)
    assert [line.split(":")[0] for line in printed.getvalue().splitlines()] == [
        f"Device {i} loss" for i in range(4)
    ]


@on_devices(DEVICES)
def test_integration_with_training_loop() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from metricfold.jax import DataParallel, DeviceMeshManager, DistributedMetrics

    class Linear:
        @staticmethod
        def apply(params, data):
            return data @ params

    model = Linear()
    optimizer = optax.sgd(0.1)
    params = jnp.zeros(3)
    optimizer_state = optimizer.init(params)
    data = np.random.default_rng(0).normal(size=(20, 8, 3)).astype(np.float32)
    dataloader = [{"data": x, "targets": x @ np.float32([1, 2, 3])} for x in data]
    losses = []

    # Setup distributed training
    manager = DeviceMeshManager()
    mesh = manager.create_data_parallel_mesh()
    dp = DataParallel()
    dm = DistributedMetrics()  # noqa: F841 (the example does not use it either)

    # Create shardings
    data_sharding = dp.create_data_parallel_sharding(mesh)

    @jax.jit
    def train_step(params, optimizer_state, batch):
        def loss_fn(p):
            logits = model.apply(p, batch["data"])
            loss = jnp.mean((logits - batch["targets"]) ** 2)
            return loss, {"loss": loss}

        (_loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)

        # Aggregate gradients and metrics
        grads = dp.all_reduce_gradients(grads, reduce_type="mean")

        # Update parameters
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        params = optax.apply_updates(params, updates)

        return params, optimizer_state, metrics

    # Training loop
    for batch in dataloader:
        # Shard batch
        sharded_batch = dp.shard_batch(batch, data_sharding)

        # Training step
        params, optimizer_state, metrics = train_step(params, optimizer_state, sharded_batch)

        losses.append(float(metrics["loss"]))

    assert len(sharded_batch["data"].addressable_shards) == 4
    # The same on one device, in NumPy.
    alone = np.zeros(3)
    for batch, loss in zip(dataloader, losses, strict=True):
        error = batch["data"] @ alone - batch["targets"]
        close(loss, np.mean(error**2), rtol=1e-4)
        alone -= 0.1 * 2 * batch["data"].T @ error / len(error)
    close(params, alone, rtol=1e-4)
    assert losses[-1] < losses[0] / 20


@on_devices(DEVICES)
def test_complete_multi_gpu_example() -> None:
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from sklearn.datasets import load_digits

    from metricfold.jax import DataParallel, DeviceMeshManager, DistributedMetrics

    digits = load_digits()
    pixels = np.pad(digits.data.astype(np.float32) / 16, [(0, 0), (0, 784 - 64)])
    dataloader = [
        {"images": pixels[i : i + 64], "labels": digits.target[i : i + 64]}
        for i in range(0, 640, 64)
    ]
    losses = []
    accuracies = []

    # Model definition
    class SimpleModel(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            super().__init__()
            self.dense1 = nnx.Linear(784, 256, rngs=rngs)
            self.dense2 = nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.dense1(x))
            return self.dense2(x)

    # Setup
    manager = DeviceMeshManager()
    mesh = manager.create_data_parallel_mesh()
    dp = DataParallel()
    dm = DistributedMetrics()  # noqa: F841 (the example does not use it either)

    # Create model and optimizer (wrt=nnx.Param required in NNX 0.11.0+)
    model = SimpleModel(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    # Training step with metrics aggregation
    def train_step(model, optimizer, batch):
        def loss_fn(m):
            logits = m(batch["images"])
            loss = jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            )
            accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["labels"])
            return loss, {"loss": loss, "accuracy": accuracy}

        (_loss, metrics), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)  # NNX 0.11.0+ API

        return metrics

    # Training loop
    data_sharding = dp.create_data_parallel_sharding(mesh)

    for batch in dataloader:
        sharded_batch = dp.shard_batch(batch, data_sharding)
        metrics = train_step(model, optimizer, sharded_batch)
        losses.append(float(f"{metrics['loss']:.4f}"))
        accuracies.append(float(f"{metrics['accuracy']:.4f}"))

    assert {shard.data.shape for shard in sharded_batch["images"].addressable_shards} == {(16, 784)}
    assert losses[-1] < losses[0] - 0.1
    assert accuracies[-1] > accuracies[0] + 0.3
