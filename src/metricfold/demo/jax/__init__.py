"""The demo's training job on the devices of a JAX process: Flax NNX, optax, one compiled step."""
