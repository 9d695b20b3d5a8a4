"""joint_hvp by double backward: exact wherever the operators have second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_hpo._tensors import released, stacked, stacked_zeros, without_hooks

if TYPE_CHECKING:
    from lightning_hpo.derivatives.joint_hvp import Loss


@dataclass
class GradientGraph:
    """How ∇L comes about, kept for more products with the same loss at the same (θ, λ).

    The values of ∇L are not kept: products do not need them.

    Attributes:
        edges: One per source (θ where u is given, then λ where e is given); None where it plays no
            part. None as a whole before the first product.
        is_kept: Whether more products will follow; the last one frees the graph as it goes.
    """

    edges: list[GradientEdge | None] | None = None
    is_kept: bool = False


def joint_hvp(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    theta_part: bool,
    lambda_part: bool,
    graph: GradientGraph | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Differentiates ⟨∇θL, u⟩ + ⟨∇λL, e⟩; see :func:`lightning_hpo.derivatives.joint_hvp`.

    One graph of the gradient serves all directions, and further calls that are given it.
    """
    sources = [*(theta if u is not None else ()), *(lam if e is not None else ())]
    directions = [*(u or ()), *(e or ())]
    targets = [*(theta if theta_part else ()), *(lam if lambda_part else ())]
    m = directions[0].shape[0]
    graph = graph or GradientGraph()
    with torch.enable_grad():
        if graph.edges is None:
            graph.edges = _gradient_edges(loss(theta, lam), sources)
        live = [
            (edge, direction.to(source, non_blocking=True))
            for edge, source, direction in zip(graph.edges, sources, directions, strict=True)
            if edge is not None
        ]
        with without_hooks(targets):
            products = _pull_back(live, targets, m, is_kept=graph.is_kept)
    split = len(theta) if theta_part else 0
    return products[:split], products[split:]


def _gradient_edges(value: Tensor | None, sources: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Takes the gradient with its graph; returns where each part of it is in the graph.

    Each part is freed as soon as it is there: the whole never exists.
    """
    if value is None:
        return [None] * len(sources)
    _check_double_backward(value)
    edges: list[GradientEdge | None] = [None] * len(sources)

    def note(i: int, g: Tensor | None) -> Tensor | None:
        if g is None:  # a backward function that returns None
            return None
        if g.requires_grad:
            edges[i] = get_gradient_edge(g)
        return released(g)

    # The step itself may have frozen some of them.
    live = [(i, s) for i, s in enumerate(sources) if s.requires_grad]
    handles = [s.register_hook(partial(note, i)) for i, s in live]
    try:
        if live:
            inputs = [s for _, s in live]
            torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return edges


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
    live: Sequence[tuple[GradientEdge, Tensor]],
    targets: Sequence[Tensor],
    m: int,
    *,
    is_kept: bool,
) -> list[Tensor]:
    """Returns Σ directionᵀ ∂gradient/∂target, stacked over the m directions."""
    wanted = [t for t in targets if t.requires_grad]
    if not live or not wanted:
        return stacked_zeros(targets, m)
    if len(wanted) < len(targets):  # the step itself has frozen some
        found = iter(_pull_back(live, wanted, m, is_kept=is_kept))
        return [next(found) if t.requires_grad else stacked_zeros([t], m)[0] for t in targets]
    gradients = [edge for edge, _ in live]
    directions = [direction for _, direction in live]
    if m > 1:
        try:
            products = torch.autograd.grad(
                gradients,
                targets,
                directions,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
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
            retain_graph=is_kept or j + 1 < m,
            allow_unused=True,
        )
        for j in range(m)
    ]
    return _fill([_stacked(parts) for parts in zip(*rows, strict=True)], targets, m)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stacks what is known of one target; None where it plays no part."""
    present = [part for part in parts if part is not None]
    return stacked(present) if present else None


def _fill(products: Sequence[Tensor | None], targets: Sequence[Tensor], m: int) -> list[Tensor]:
    return [
        stacked_zeros([target], m)[0] if product is None else product
        for product, target in zip(products, targets, strict=True)
    ]
