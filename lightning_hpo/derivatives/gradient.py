"""The gradient of a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(loss: Tensor, targets: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the gradient of a scalar loss; costs one backward pass and uses up the graph.

    Args:
        loss: A scalar.
        targets: Leaf tensors.

    Returns:
        One tensor per target; None for one that does not require grad or plays no part.
    """
    active = [t for t in targets if t.requires_grad] if loss.requires_grad else []
    if not active:
        return [None] * len(targets)
    gradients = torch.autograd.grad(loss, active, allow_unused=True)
    found = {id(t): g for t, g in zip(active, gradients, strict=True)}
    return [found.get(id(t)) for t in targets]
