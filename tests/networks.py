"""Networks for tests, small enough to train in a moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A network of a few hundred weights, called as (x, t, condition)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, 24), nn.SiLU(), nn.Dropout(dropout), nn.Linear(24, 16))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        out: Tensor = self.body(torch.cat([x.flatten(1), t[:, None] / 1000], 1))
        return out.view_as(x)
