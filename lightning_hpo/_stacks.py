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


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stacks m tensors; a single one is not copied."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


def separate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors that can be written to in place; copies those that share memory.

    Autograd may return one tensor as the gradient of several leaves, or an expanded one.
    """
    seen: set[int] = set()
    result = []
    for t in tensors:
        overlaps = any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
        if t.numel() and (overlaps or t.data_ptr() in seen):
            t = t.clone()
        seen.add(t.data_ptr())
        result.append(t)
    return result
