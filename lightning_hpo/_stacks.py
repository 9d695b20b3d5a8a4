"""Lists of tensors that carry m directions along their first dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hpo.distributed import local


def stacked_zeros(like: Sequence[Tensor], m: int) -> list[Tensor]:
    """Returns zeros ``(m, *t.shape)`` per tensor t or its local slice, in float32 or better."""
    return [
        torch.zeros(
            (m, *t.shape), dtype=torch.promote_types(t.dtype, torch.float32), device=t.device
        )
        for t in map(local, like)
    ]


def rows(stack: Tensor) -> Tensor:
    """Returns a stack of m tensors as a matrix of m rows, which may be empty."""
    return stack.reshape(len(stack), math.prod(stack.shape[1:]))
