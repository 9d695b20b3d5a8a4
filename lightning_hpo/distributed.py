"""Every collective that the package makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor


def average_(tensors: Sequence[Tensor]) -> None:
    """Averages tensors over all processes, in place; does nothing in a single process.

    Gradients and products with the Hessian are linear in the loss, and the loss of a data-parallel
    training is the mean over the ranks: averaging the parts gives the parts of the average.

    All tensors travel in one flat buffer, since a collective per tensor costs a hundred times more.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world_size = torch.distributed.get_world_size()
    if world_size == 1 or not tensors:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in by_kind.values():
        flat = torch.cat([t.reshape(-1) for t in group])
        torch.distributed.all_reduce(flat)
        flat /= world_size
        parts = flat.split([t.numel() for t in group])
        torch._foreach_copy_(list(group), [p.view_as(t) for p, t in zip(parts, group, strict=True)])
