"""A byte-level transformer with about 0.2 million parameters: small, but every part is real."""

from __future__ import annotations

import torch
from torch import nn

from metricfold.demo.texts import MAX_BYTES_PER_TEXT

__all__ = ["ByteTransformer"]

BYTES = 256
NEIGHBOURS = 4


class ByteTransformer(nn.Module):
    """Predicts each byte from those before it.

    Args:
        width: features per token.
        depth: number of blocks.
        heads: attention heads per block.

    Takes tokens of shape (batch, length) and returns logits of shape (batch, length, 256).
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(MAX_BYTES_PER_TEXT, width)
        self.neighbours = nn.Conv1d(width, width, kernel_size=NEIGHBOURS)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the byte after each token."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        # Attention takes thousands of steps to find the preceding bytes; this shows them at once.
        before = nn.functional.pad(x.transpose(1, 2), (NEIGHBOURS - 1, 0))
        x = x + nn.functional.gelu(self.neighbours(before)).transpose(1, 2)
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Block(nn.Module):
    """Causal self-attention, then a two-layer network, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_network = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape (batch, length, width)."""
        batch, length, width = x.shape
        projected = self.queries_keys_values(self.norm_attention(x))
        # (batch, length, 3 · heads · size) -> three of (batch, heads, length, size)
        q, k, v = projected.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Padding stands on the right, where causal attention never looks from a real token.
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        result: torch.Tensor = x + self.network(self.norm_network(x))
        return result
