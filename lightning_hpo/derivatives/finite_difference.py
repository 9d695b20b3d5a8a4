"""Products by central differences of the gradient: need nothing but ordinary backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_hpo._tensors import (
    add_scaled_,
    filled,
    holding,
    is_on_host,
    separate,
    stacked_zeros,
    widened,
)
from lightning_hpo.derivatives._gradient import gradient
from lightning_hpo.derivatives.backend import direction_count
from lightning_hpo.derivatives.loss import Loss
from lightning_hpo.distributed import is_sharded, local, norm_over_shards


@dataclass
class FiniteDifference:
    r"""Differences gradients at ±δ; needs nothing but ordinary forward and backward passes.

        tangent: [∇θL(θ + δu, λ) − ∇θL(θ − δu, λ)] / 2δ
                 + [∇θL(θ, λ + δ'e) − ∇θL(θ, λ − δ'e)] / 2δ'
        adjoint: [∇(θ,λ)L(θ + δu, λ) − ∇(θ,λ)L(θ − δu, λ)] / 2δ

    with δ = ε^⅓ (1 + ‖x‖) / ‖d‖, which balances truncation against rounding; x is θ, or the λ that
    move, and d the direction. θ and λ are displaced one after the other, each at its own scale:
    with one common δ, a tangent u that is many orders of magnitude smaller than e is lost to
    rounding. They hold the displaced values for a while, and then their own again.

    The relative error is about 1e-4 in float32 on smooth networks, and a tenth in half precision.
    On networks with kinks (ReLU), differences across a kink are not the almost-everywhere Hessian
    that the exact backends return.

    Cost: 2 gradients of the loss per direction, 4 where both u and e are given.

    Source: Nocedal & Wright (2006, §8.1), for central differences and ε^⅓.

    Args:
        rounding: The relative rounding error ε of the loss, where that is larger than θ's dtype
            says (under autocast): steps are wider then.
        reach: How far each element of raw λ may be moved, one tensor per entry of ``lam``; None:
            any distance.
        theta_is_scratch: Whether nobody minds if θ comes back changed by rounding. It is then
            displaced in place, which takes |θ| less memory.
        leading: How many tensors of θ, from the first on, δ is chosen by; None: all. The others
            move along: the loss may be linear in them, and their scale be another.

    Example:
        >>> backend = derivatives.FiniteDifference()
        >>> (product,) = backend.tangent(loss, theta, lam, [torch.tensor([[2.0, 0.0]])], None)
        >>> torch.testing.assert_close(product, torch.tensor([[1.0, 0.0]]), atol=1e-3, rtol=0)
    """

    rounding: float | None = None
    reach: Sequence[Tensor] | None = None
    theta_is_scratch: bool = False
    leading: int | None = None

    is_exact: ClassVar[bool] = False

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
        return self._products(loss, theta, lam, u, e, slice(len(theta)))

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
        products = self._products(loss, theta, lam, u, None, slice(len(theta) - split, None))
        return products[:split], products[split:]

    def one_sided(
        self,
        loss: Loss,
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        u: Sequence[Tensor],
        u_norms: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the displaced part of one-sided differences of ∇θL along θ.

            H u ≈ ∇θL(θ + δu, λ) / δ − ∇θL(θ, λ) / δ,   δ = √ε (1 + ‖θ‖) / ‖u‖

        The last term is left to the caller, who has the gradient already. Costs one gradient per
        direction. The relative error is a few √ε: about 1e-3 to 1e-2 in float32, 1e-7 in float64.
        θ is displaced in a copy, and not meant to be sharded; the options play no part.

        Args:
            loss: L.
            theta: θ.
            lam: Raw λ.
            u: Directions in θ, ``(m, *θ_i.shape)`` each.
            u_norms: ‖u‖ of each direction ``(m,)``, where they are known.

        Returns:
            The first term, ``(m, *θ_i.shape)`` per entry of ``theta``, and the weights 1/δ
            ``(m,)``.

        Raises:
            ValueError: If there is no direction.
            TypeError: If a gradient is sparse.
        """
        m = direction_count(u)
        products: list[Tensor] = []
        weights: list[Tensor] = []
        size = math.sqrt(torch.finfo(theta[0].dtype).eps) * (1.0 + _norm(theta, False))
        for j in range(m):
            direction = [d[j] for d in u]
            norm = _norm(direction, False) if u_norms is None else u_norms[j]
            weights.append((norm / size).to(theta[0].dtype))
            if not 0.0 < _if_known(norm) < math.inf:
                continue  # a weight that is not finite makes the product NaN
            moved = _moved(theta, direction, _step(size, norm))
            gradients = _displaced_gradient(loss, theta, lam, theta, moved, weights[j])
            products = _plus(products, separate(filled(gradients, theta)), j, m)
        return products or stacked_zeros(theta, m), torch.stack(weights)

    def _products(
        self,
        loss: Loss,
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        u: Sequence[Tensor] | None,
        e: Sequence[Tensor] | None,
        wanted: slice,
    ) -> list[Tensor]:
        """Returns the differences of ∇L along m directions, over a slice of (θ, λ)."""
        m = direction_count(u, e)
        targets = [*theta, *lam][wanted]
        if not targets:
            return []
        sharded = is_sharded(theta)
        # A backward pass through sharded parameters reaches all of them anyway.
        reached = [*theta, *lam] if sharded else targets
        resolution = max(torch.finfo(t.dtype).eps for t in (*theta, *lam))
        epsilon = math.pow(max(resolution, self.rounding or 0.0), 1 / 3)
        products: list[Tensor] = []
        for block, directions, in_slices in ((theta, u, sharded), (lam, e, False)):
            if not directions:
                continue
            leading = len(block)
            if block is theta:
                leading = leading if self.leading is None else self.leading
                size = epsilon * (1.0 + _norm(theta[:leading], sharded))
            for j in range(m):
                direction = [d[j] for d in directions]
                norm = _norm(direction[:leading], in_slices)
                if leading < len(block):
                    norm = torch.where(norm == 0, _norm(direction[leading:], False), norm)
                if block is lam:
                    size = _size_along(lam, direction, epsilon, self.reach)
                if not 0.0 < _if_known(norm) < math.inf:
                    if norm != 0.0:
                        nan = [z[0].fill_(math.nan) for z in stacked_zeros(targets, 1)]
                        products = _plus(products, nan, j, m)
                    continue
                move = _moved_in_place if block is theta and self.theta_is_scratch else _moved
                step = _step(size, norm)
                ahead, behind = (
                    _displaced_gradient(
                        loss, theta, lam, reached, move(block, direction, sign * step)
                    )
                    for sign in (1.0, -1.0)
                )
                if sharded:
                    ahead, behind = ahead[wanted], behind[wanted]
                terms = _differences(ahead, behind, norm / (2 * size), targets)
                products = _plus(products, terms, j, m)
        return products or stacked_zeros(targets, m)


def _size_along(
    lam: Sequence[Tensor],
    direction: Sequence[Tensor],
    epsilon: float,
    reach: Sequence[Tensor] | None,
) -> Tensor:
    """Chooses how far λ is moved: by ε (1 + ‖x‖) with x the entries that move, within reach.

    Rounding under autocast, for which ε is large, is the same on both sides where λ does not pass
    through it.
    """
    moves = [d.to(x, non_blocking=True) != 0 for x, d in zip(lam, direction, strict=True)]
    size = epsilon * (1.0 + _norm([x.detach() * m for x, m in zip(lam, moves, strict=True)], False))
    for r, m in zip(reach or (), moves, strict=reach is not None):
        size = torch.minimum(size, torch.where(m, r.to(size), math.inf).min())
    return size.clamp(min=0.2 * epsilon)  # λ of less than that may still have an effect


def _norm(tensors: Sequence[Tensor], in_slices: bool) -> Tensor:
    """Returns the norm over all tensors, without reading it."""
    norms = [
        torch.linalg.vector_norm(
            local(t.detach()), dtype=torch.promote_types(t.dtype, torch.float32)
        )
        for t in tensors
    ] or [torch.zeros(())]
    return norm_over_shards(torch.linalg.vector_norm(torch.stack(norms)), in_slices)


def _if_known(norm: Tensor) -> float:
    """Returns a norm, or 1 where looking would make the host wait for a device."""
    return float(norm) if is_on_host(norm) else 1.0


def _step(size: Tensor, norm: Tensor) -> Tensor:
    """Returns δ = size / ‖d‖; 0 for a direction that is zero, unknown to the host."""
    if is_on_host(norm):
        return size / norm
    return torch.where(norm > 0, size / norm, 0.0)


def _displaced_gradient(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    targets: Sequence[Tensor],
    moved: AbstractContextManager[None],
    factor: Tensor | None = None,
) -> list[Tensor | None]:
    """Returns ∇L, or ``factor`` times it, with some tensors moved."""
    with moved, torch.enable_grad():
        value = loss(theta, lam)
        if value is None:
            return [None] * len(targets)
        # A factor of the loss costs no pass over the gradient.
        return gradient(value if factor is None else value * factor.to(value), targets)


def _differences(
    ahead: Sequence[Tensor | None],
    behind: Sequence[Tensor | None],
    factor: Tensor,
    targets: Sequence[Tensor],
) -> list[Tensor]:
    """Returns (ahead − behind) times a factor, in float32 or better; uses up both."""
    result = separate([widened(a) for a in filled(ahead, targets)])
    present = [(r, widened(b)) for r, b in zip(result, behind, strict=True) if b is not None]
    if present:
        torch._foreach_sub_([r for r, _ in present], [b for _, b in present])
    torch._foreach_mul_(result, factor.to(result[0]))
    return result


def _plus(products: list[Tensor], terms: list[Tensor], j: int, m: int) -> list[Tensor]:
    """Adds terms, which it may keep, to the j-th of m products, where there are any yet."""
    if m == 1 and not products:
        return [t.unsqueeze(0) for t in terms]  # no pass over them
    products = products or stacked_zeros(terms, m)
    torch._foreach_add_([p[j] for p in products], terms)
    return products


def _moved(
    block: Sequence[Tensor], direction: Sequence[Tensor], delta: Tensor
) -> AbstractContextManager[None]:
    """Lets tensors hold x + δ d for a while."""
    values = (local(t.detach()) for t in block)
    return holding(block, (_displaced(x, d, delta) for x, d in zip(values, direction, strict=True)))


@contextmanager
def _moved_in_place(
    block: Sequence[Tensor], direction: Sequence[Tensor], delta: Tensor
) -> Iterator[None]:
    """Lets tensors hold x + δ d for a while, without a copy; x is restored to rounding."""
    if is_sharded(block) or any(widened(t) is not t for t in block):
        with _moved(block, direction, delta):
            yield
        return
    values = [t.detach() for t in block]
    add_scaled_(values, direction, delta)
    try:
        yield
    finally:
        add_scaled_(values, direction, -delta)


def _displaced(value: Tensor, direction: Tensor, delta: Tensor) -> Tensor:
    """Returns value + δ direction in float32 or better: in half precision δ may overflow."""
    value = widened(value)
    return torch.addcmul(value, direction.to(value, non_blocking=True), delta.to(value))
