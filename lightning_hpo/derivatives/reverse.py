"""joint_hvp by double backward: exact wherever the operators have second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hpo._tensors import stacked, stacked_zeros

if TYPE_CHECKING:
    from lightning_hpo.derivatives.joint_hvp import Loss

# Directions that one vectorized backward carries at a time: bounds its memory.
_CHUNK = 64


def joint_hvp(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    theta_part: bool,
    lambda_part: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Differentiates ⟨∇θL, u⟩ + ⟨∇λL, e⟩; see :func:`lightning_hpo.derivatives.joint_hvp`.

    One graph of the gradient serves all directions.
    """
    sources = [*(theta if u is not None else ()), *(lam if e is not None else ())]
    directions = [*(u or ()), *(e or ())]
    targets = [*(theta if theta_part else ()), *(lam if lambda_part else ())]
    m = directions[0].shape[0]
    with torch.enable_grad():
        value = loss(theta, lam)
        if value is None:
            products = stacked_zeros(targets, m)
        else:
            _check_double_backward(value)
            gradients = torch.autograd.grad(value, sources, create_graph=True, allow_unused=True)
            live = [
                (gradient, direction.to(gradient, non_blocking=True))
                for gradient, direction in zip(gradients, directions, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            products = _pull_back(live, targets, m)
    split = len(theta) if theta_part else 0
    return products[:split], products[split:]


def _check_double_backward(value: Tensor) -> None:
    """Looks for operators that have no second derivative although they do not say so.

    An ``autograd.Function`` marked with ``once_differentiable`` raises only where a derivative
    reaches its error node; elsewhere its output counts as a constant, and the product would
    silently miss its part. A walk through the graph costs about a microsecond per operator.

    Raises:
        RuntimeError: If there is such an operator.
    """
    stack: list[Any] = [value.grad_fn]
    seen = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if code is not None and code.co_filename == torch.autograd.function.__file__:
            raise RuntimeError(
                f"double backward of {node.name()} is not implemented: it is marked with "
                "@once_differentiable"
            )
        stack.extend(parent for parent, _ in node.next_functions)


def _pull_back(
    live: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Tensor], m: int
) -> list[Tensor]:
    """Returns Σ directionᵀ ∂gradient/∂target, stacked over the m directions."""
    if not live:
        return stacked_zeros(targets, m)
    gradients = [gradient for gradient, _ in live]
    directions = [direction for _, direction in live]
    if m > 1:
        try:
            products: list[Tensor | None] = [None] * len(targets)
            for start in range(0, m, _CHUNK):
                chunk = torch.autograd.grad(
                    gradients,
                    targets,
                    [d[start : start + _CHUNK] for d in directions],
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
                products = [_put(*pair, start, m) for pair in zip(products, chunk, strict=True)]
            return _fill(products, targets, m)
        except RuntimeError as error:
            # Some operators cannot be vectorized; one pass per direction always can.
            if isinstance(error, torch.OutOfMemoryError):
                raise
    rows = [
        torch.autograd.grad(
            gradients,
            targets,
            [d[j] for d in directions],
            retain_graph=j + 1 < m,
            allow_unused=True,
        )
        for j in range(m)
    ]
    return _fill([_stacked(parts) for parts in zip(*rows, strict=True)], targets, m)


def _put(product: Tensor | None, chunk: Tensor | None, start: int, m: int) -> Tensor | None:
    """Puts some of m directions in their place; all of them at once are not copied."""
    if chunk is None or len(chunk) == m:
        return chunk
    if product is None:
        product = chunk.new_empty((m, *chunk.shape[1:]))
    product[start : start + len(chunk)] = chunk
    return product


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stacks what is known of one target; None where it plays no part."""
    present = [part for part in parts if part is not None]
    return stacked(present) if present else None


def _fill(products: Sequence[Tensor | None], targets: Sequence[Tensor], m: int) -> list[Tensor]:
    return [
        stacked_zeros([target], m)[0] if product is None else product
        for product, target in zip(products, targets, strict=True)
    ]
