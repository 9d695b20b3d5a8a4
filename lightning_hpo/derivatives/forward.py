"""Products by forward-over-reverse: exact, and lean in memory, where operators support it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_hpo._dual import dual_level
from lightning_hpo._tensors import stacked_zeros
from lightning_hpo.derivatives._gradient import gradient
from lightning_hpo.derivatives.backend import direction_count
from lightning_hpo.derivatives.loss import Loss


@dataclass
class Forward:
    r"""Carries directions through the gradient by forward-mode differentiation.

        tangent: d/dε ∇θL(θ + εu, λ + εe)        adjoint: d/dε ∇(θ,λ)L(θ + εu, λ)

    at ε = 0: the loss is called with dual tensors in the place of θ and λ. Parameters that it also
    reaches by another path (a list, a closure, the optimizer) are found by their gradient; the loss
    is then evaluated again with these themselves made dual, for which they are written to, with
    what they hold.

    Cost: 3.6–5.3 gradients of the loss per direction (measured on CPU); nothing is shared between
    directions or calls. One more evaluation per call, and one more tangent of them in memory, where
    there are such parameters.

    Source: Pearlmutter (1994), whose R{·} operator this is.

    Example:
        >>> backend = derivatives.Forward()
        >>> backend.tangent(loss, theta, lam, [torch.tensor([[2.0, 0.0]])], None)  # H u
        [tensor([[1., 0.]])]
    """

    is_exact: ClassVar[bool] = True

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
        return _products(loss, theta, lam, u, e, slice(len(theta)))

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
        split = len(theta) if theta_part else 0
        products = _products(loss, theta, lam, u, None, slice(len(theta) - split, None))
        return products[:split], products[split:]


def _products(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    wanted: slice,
) -> list[Tensor]:
    """Returns the derivatives of ∇L along m directions, over a slice of (θ, λ)."""
    m = direction_count(u, e)
    targets = [*theta, *lam][wanted]
    if not targets:
        return []
    products = stacked_zeros(targets, m)
    direct: set[int] = set()
    for j in range(m):
        at = ([d[j] for d in u] if u else None, [d[j] for d in e] if e else None)
        tangents, missed = _evaluate(loss, theta, lam, *at, wanted, direct)
        while missed:
            direct |= missed
            tangents, missed = _evaluate(loss, theta, lam, *at, wanted, direct)
        for product, tangent in zip(products, tangents, strict=True):
            if tangent is not None:
                # A forward derivative can come in float64 for a float32 model: copy_ casts.
                product[j].copy_(tangent)
    return products


def _evaluate(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    wanted: slice,
    direct: Set[int],
) -> tuple[list[Tensor | None], set[int]]:
    """Returns the derivatives of ∇L along one direction, and which θ the duals do not stand for.

    Args:
        loss: L.
        theta: θ.
        lam: λ.
        u: The direction in θ.
        e: The direction in λ.
        wanted: A slice of (θ, λ).
        direct: The positions of the θ that are made dual themselves.
    """
    with torch.enable_grad(), dual_level():
        dual_theta, dual_lam = _duals(theta, u, direct), _duals(lam, e)
        value = loss(dual_theta, dual_lam)
        if value is None:
            return [None] * len([*theta, *lam][wanted]), set()
        others = [i for i in range(len(theta)) if i not in direct]
        duals = [*dual_theta, *dual_lam][wanted]
        gradients = gradient(value, [*duals, *(theta[i] for i in others)])
        tangents = [
            None if g is None else forward_ad.unpack_dual(g).tangent
            for g in gradients[: len(duals)]
        ]
        reached = zip(others, gradients[len(duals) :], strict=True)
        missed = {i for i, g in reached if g is not None}
        return [None if t is None else t.detach() for t in tangents], missed


def _duals(
    primals: Sequence[Tensor], direction: Sequence[Tensor] | None, direct: Set[int] = frozenset()
) -> list[Tensor]:
    """Returns leaves with tangents: new ones, but for those that are made dual themselves."""
    leaves = [p if i in direct else p.detach().requires_grad_() for i, p in enumerate(primals)]
    if not direction:
        return leaves
    duals = []
    for leaf, part, primal in zip(leaves, direction, primals, strict=True):
        tangent = part.to(leaf, non_blocking=True)
        if leaf is primal:
            with torch.no_grad():  # only an operator that writes can give it a tangent
                duals.append(leaf.copy_(forward_ad.make_dual(leaf.detach(), tangent)))
        else:
            duals.append(forward_ad.make_dual(leaf, tangent))
    return duals
