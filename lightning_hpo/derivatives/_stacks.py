"""Lists of tensors that carry m directions along their first dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked_zeros(like: Sequence[Tensor], m: int) -> list[Tensor]:
    """Returns zeros of shape ``(m, *t.shape)`` for every tensor t."""
    return [torch.zeros((m, *t.shape), dtype=t.dtype, device=t.device) for t in like]
