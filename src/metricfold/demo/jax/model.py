"""The byte-level transformer of `metricfold.demo.model`, in Flax NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from metricfold.demo.texts import MAX_BYTES_PER_TEXT

__all__ = ["ByteTransformer"]

BYTES = 256
NEIGHBOURS = 4


class ByteTransformer(nnx.Module):
    """Predicts each byte from those before it.

    Takes tokens of shape (batch, length) and returns logits of shape (batch, length, 256).
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, *, rngs: nnx.Rngs) -> None:
        spread = nnx.initializers.normal(0.2)
        self.token = nnx.Embed(BYTES, width, embedding_init=spread, rngs=rngs)
        self.position = nnx.Embed(MAX_BYTES_PER_TEXT, width, embedding_init=spread, rngs=rngs)
        self.neighbours = nnx.Conv(width, width, NEIGHBOURS, padding="CAUSAL", rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits of the byte after each token."""
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[1]))
        # Attention takes thousands of steps to find the preceding bytes; this shows them at once.
        x = x + nnx.gelu(self.neighbours(x))
        # Padding stands on the right, where causal attention never looks from a real token.
        causal = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, causal)
        logits: jax.Array = self.head(self.norm(x))
        return logits


class Block(nnx.Module):
    """Causal self-attention, then a two-layer network, each added to what came in."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm_network = nnx.LayerNorm(width, rngs=rngs)
        self.network = nnx.Sequential(
            nnx.Linear(width, 4 * width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(4 * width, width, rngs=rngs),
        )

    def __call__(self, x: jax.Array, causal: jax.Array) -> jax.Array:
        """Return features of the same shape (batch, length, width)."""
        x = x + self.attention(self.norm_attention(x), mask=causal)
        result: jax.Array = x + self.network(self.norm_network(x))
        return result
