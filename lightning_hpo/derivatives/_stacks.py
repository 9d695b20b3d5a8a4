"""Lists of tensors that carry m directions along their first dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked_zeros(like: Sequence[Tensor], m: int) -> list[Tensor]:
    """Returns zeros of shape ``(m, *t.shape)`` for every tensor t, in float32 or better."""
    return [
        torch.zeros(
            (m, *t.shape), dtype=torch.promote_types(t.dtype, torch.float32), device=t.device
        )
        for t in like
    ]
