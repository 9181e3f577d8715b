"""A byte-level transformer with about 0.2 million parameters: small, but every part is real."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metricfold.demo.texts import MAX_BYTES_PER_TEXT

__all__ = ["ByteTransformer"]

BYTES = 256
NEIGHBOURS = 4


class ByteTransformer(nn.Module):
    """Predicts each byte from those before it.

    Takes tokens of shape (batch, length) and returns logits of shape (batch, length, 256).
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(MAX_BYTES_PER_TEXT, width)
        self.neighbours = nn.Conv1d(width, width, kernel_size=NEIGHBOURS)
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", **options)
        self.blocks = nn.TransformerEncoder(
            block, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, BYTES, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the byte after each token."""
        length, device = tokens.shape[1], tokens.device
        x = self.token(tokens) + self.position(torch.arange(length, device=device))
        # Attention takes thousands of steps to find the preceding bytes; this shows them at once.
        before = nn.functional.pad(x.transpose(1, 2), (NEIGHBOURS - 1, 0))
        x = x + nn.functional.gelu(self.neighbours(before)).transpose(1, 2)
        # Padding stands on the right, where causal attention never looks from a real token.
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=device)
        logits: torch.Tensor = self.head(self.blocks(x, causal, is_causal=True))
        return logits
