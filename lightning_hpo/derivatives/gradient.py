"""The gradient of a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hpo.distributed import is_sharded, local


def gradient(loss: Tensor, targets: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the gradient of a scalar loss; costs one backward pass and uses up the graph.

    Where targets are sharded, their gradients come averaged over the ranks, as local slices; those
    of the other targets are this rank's own.

    Args:
        loss: A scalar.
        targets: Leaf tensors; if parameters are sharded, all of them that the loss depends on.

    Returns:
        One tensor per target; None for one that does not require grad or plays no part.

    Raises:
        TypeError: If a gradient is sparse.
    """
    active = [t for t in targets if t.requires_grad] if loss.requires_grad else []
    if not active:
        return [None] * len(targets)
    gradients = (
        _by_backward(loss, active)
        if is_sharded(active)
        else torch.autograd.grad(loss, active, allow_unused=True)
    )
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise TypeError(
            "OnlineHPOCallback: a parameter has a sparse gradient, expected dense ones; use "
            "nn.Embedding(sparse=False)"
        )
    found = {id(t): g for t, g in zip(active, gradients, strict=True)}
    return [found.get(id(t)) for t in targets]


def _by_backward(loss: Tensor, targets: Sequence[Tensor]) -> list[Tensor | None]:
    """Takes the gradient by ``backward``: sharded parameters are not themselves in the graph."""
    before = [t.grad for t in targets]
    for t in targets:
        t.grad = None  # it would be added to
    try:
        loss.backward()
        return [None if t.grad is None else local(t.grad) for t in targets]
    finally:
        for t, grad in zip(targets, before, strict=True):
            t.grad = grad
