"""What the processes with several devices promise to the tests that run in them."""

from __future__ import annotations

from jax_devices import on_devices


@on_devices(4)
def test_devices_meet_in_every_collective_however_far_they_run_ahead() -> None:
    """On two cores XLA had two threads for four devices, and aborted after 40 seconds.

    Products of this size run on threads of their own, which then wait for the other devices; and
    more steps are under way than XLA takes up.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    mesh = mesh_of(data=4)
    batch = jax.device_put(jnp.ones((256, 784)), NamedSharding(mesh, P("data")))
    weight = jax.device_put(jnp.full((784, 256), 1 / 784.0), NamedSharding(mesh, P()))

    @jax.jit
    def step(weight: jax.Array, batch: jax.Array) -> jax.Array:
        return weight - 1e-9 * batch.T @ (batch @ weight)

    for _ in range(150):
        weight = step(weight, batch)
    expected = (1 - 1e-9 * 784 * 256) ** 150  # each step makes all that the products hold smaller
    assert abs(float((batch @ weight).mean()) - expected) < 1e-3
