"""The gradient of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_hpo._tensors import released, rows
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

    Example:
        >>> derivatives.gradient(loss(theta, lam), [*theta, *lam])
        [tensor([0.5000, 1.0000]), tensor(2.5000)]
    """
    active = [t for t in targets if t.requires_grad] if loss.requires_grad else []
    if not active:
        return [None] * len(targets)
    gradients = (
        _by_backward(loss, active)
        if is_sharded(active)
        else torch.autograd.grad(loss, active, allow_unused=True)
    )
    for g in gradients:
        _check_dense(g)
    found = {id(t): g for t, g in zip(active, gradients, strict=True)}
    return [found.get(id(t)) for t in targets]


def gradient_products(
    loss: Tensor, targets: Sequence[Tensor], stacks: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Multiplies the gradient of a scalar loss with m directions, target by target.

    Each part of the gradient is freed as soon as it has been multiplied: the whole never exists
    (except where targets are sharded). Costs one backward pass, and uses up the graph.

    Args:
        loss: A scalar.
        targets: Leaf tensors, as for :func:`gradient`.
        stacks: Directions y, ``(m, *t.shape)`` for each target t; None where none is wanted.

    Returns:
        ⟨∂L/∂t, y⟩ over the local slices, ``(m,)`` for each target t; None where there is no
        direction or no gradient.

    Raises:
        TypeError: If a gradient is sparse.

    Example:
        >>> stacks = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None]
        >>> derivatives.gradient_products(loss(theta, lam), [*theta, *lam], stacks)
        [tensor([0.5000, 1.0000]), None]
    """
    products: list[Tensor | None] = [None] * len(targets)

    def multiply(i: int, g: Tensor | None) -> Tensor | None:
        if g is None:  # a backward function that returns None
            return None
        _check_dense(g)
        y = stacks[i]
        if y is not None:
            products[i] = rows(y) @ g.flatten().to(y.dtype)
        return released(g)

    if is_sharded(targets):
        for i, g in enumerate(gradient(loss, targets)):
            if g is not None:
                multiply(i, g)
        return products
    handles = [
        t.register_hook(partial(multiply, i)) for i, t in enumerate(targets) if t.requires_grad
    ]
    try:
        gradient(loss, targets)
    finally:
        for handle in handles:
            handle.remove()
    return products


def _check_dense(g: Tensor | None) -> None:
    if g is not None and g.layout != torch.strided:
        raise TypeError(
            "OnlineHPOCallback: a parameter has a sparse gradient, expected dense ones; use "
            "nn.Embedding(sparse=False)"
        )


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
