"""Products by double backward: exact wherever the operators have second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_hpo._tensors import released, stacked, stacked_zeros, without_hooks
from lightning_hpo.derivatives.backend import direction_count
from lightning_hpo.derivatives.loss import Loss

_Edges = list[GradientEdge | None]
"""Where each part of ∇L is in its graph; None for a part that is not differentiated."""


@dataclass
class Reverse:
    r"""Differentiates the gradient by a second backward pass.

        tangent: ∇θ(⟨∇θL, u⟩ + ⟨∇λL, e⟩)        adjoint: ∇(θ,λ) ⟨∇θL, u⟩

    One graph of the gradient serves all directions, and with ``is_last=False`` further tangents of
    the same evaluation, of whatever kinds of directions. The values of ∇L are not kept: each part
    is freed as it arrives. An instance serves one evaluation at a time; after its last tangent
    nothing is held.

    Cost: 2.5–4.4 gradients of the loss (measured on CPU), shared by all directions as far as the
    forward and the first backward pass go.

    Source: Pearlmutter (1994).

    Example:
        >>> backend = derivatives.Reverse()
        >>> backend.tangent(loss, theta, lam, None, [torch.tensor([2.0])])  # B e
        [tensor([[2., 4.]])]
    """

    is_exact: ClassVar[bool] = True
    _kept: tuple[Loss, _Edges] | None = field(default=None, init=False, repr=False, compare=False)

    def tangent(
        self,
        loss: Loss,
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        u: Sequence[Tensor] | None,
        e: Sequence[Tensor] | None,
        *,
        is_last: bool = True,
    ) -> list[Tensor]:
        """Returns H u + B e; see :meth:`lightning_hpo.derivatives.Backend.tangent`."""
        m = direction_count(u, e)
        sources = [*theta, *lam]
        directions = [*(u or repeat(None, len(theta))), *(e or repeat(None, len(lam)))]
        edges = self._take(loss)
        with torch.enable_grad():
            if edges is None:
                # Later tangents may have directions where this one has none.
                needed = [d is not None or not is_last for d in directions]
                edges = _gradient_edges(loss(theta, lam), sources, needed)
            products = _products(edges, sources, directions, theta, m, is_kept=not is_last)
        if not is_last:
            self._kept = loss, edges
        return products

    def adjoint(
        self,
        loss: Loss,
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        u: Sequence[Tensor],
        *,
        theta_part: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns H u and Bᵀ u; see :meth:`lightning_hpo.derivatives.Backend.adjoint`."""
        m = direction_count(u)
        split = len(theta) if theta_part else 0
        targets = [*theta[:split], *lam]
        if not targets:
            return [], []
        with torch.enable_grad():
            edges = _gradient_edges(loss(theta, lam), theta, [True] * len(theta))
            products = _products(edges, theta, u, targets, m, is_kept=False)
        return products[:split], products[split:]

    def _take(self, loss: Loss) -> _Edges | None:
        """Returns the graph that an earlier tangent has kept; it is not kept any longer.

        What another loss has left behind, whose last tangent never came, is of no use.
        """
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] == loss else None


def _gradient_edges(
    value: Tensor | None, sources: Sequence[Tensor], needed: Sequence[bool]
) -> _Edges:
    """Takes the gradient with its graph; returns where each needed part of it is in the graph.

    Each part is freed as soon as it is there: the whole never exists.
    """
    if value is None:
        return [None] * len(sources)
    _check_double_backward(value)
    edges: _Edges = [None] * len(sources)

    def note(i: int, g: Tensor | None) -> Tensor | None:
        if g is None:  # a backward function that returns None
            return None
        if g.requires_grad:
            edges[i] = get_gradient_edge(g)
        return released(g)

    # The step itself may have frozen some of them.
    live = [
        (i, s)
        for i, (s, is_needed) in enumerate(zip(sources, needed, strict=True))
        if is_needed and s.requires_grad
    ]
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


def _products(
    edges: _Edges,
    sources: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    targets: Sequence[Tensor],
    m: int,
    *,
    is_kept: bool,
) -> list[Tensor]:
    """Returns the derivatives of ⟨∇L, directions⟩, with the user's hooks left out."""
    live = [
        (edge, direction.to(source, non_blocking=True))
        for edge, source, direction in zip(edges, sources, directions, strict=True)
        if edge is not None and direction is not None
    ]
    with without_hooks(targets):
        return _pull_back(live, targets, m, is_kept=is_kept)


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
