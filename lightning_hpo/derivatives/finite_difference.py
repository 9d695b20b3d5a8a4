"""joint_hvp by central differences of the gradient: needs nothing but ordinary backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hpo._stacks import stacked, stacked_zeros
from lightning_hpo.derivatives.gradient import gradient
from lightning_hpo.distributed import is_sharded, local, norm_over_shards

if TYPE_CHECKING:
    from lightning_hpo.derivatives.joint_hvp import Loss


def joint_hvp(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    theta_part: bool,
    lambda_part: bool,
    rounding: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Differences gradients at ±δ; see :func:`lightning_hpo.derivatives.joint_hvp`.

        [∇L(θ + δu, λ) − ∇L(θ − δu, λ)] / 2δ  +  [∇L(θ, λ + δ'e) − ∇L(θ, λ − δ'e)] / 2δ'

    θ and λ are displaced one after the other, each at its own scale: with one common δ, a tangent
    u that is many orders of magnitude smaller than e is lost to rounding.

    Of sharded θ, ``u`` and the θ part are local slices; the θ part is averaged over the ranks.
    """
    targets = [*(theta if theta_part else ()), *(lam if lambda_part else ())]
    wanted = slice(0 if theta_part else len(theta), None if lambda_part else len(theta))
    m = next(d.shape[0] for d in (*(u or ()), *(e or ())))
    products = stacked_zeros(targets, m)
    sharded = is_sharded(theta)
    for block, directions, in_slices in ((theta, u, sharded), (lam, e, False)):
        if directions is None:
            continue
        for j in range(m):
            direction = [d[j] for d in directions]
            norm = _norm(direction, in_slices)
            if norm == 0.0:
                continue
            if not math.isfinite(norm):
                for product in products:
                    product[j].fill_(math.nan)
                continue
            delta = _step(block, norm, rounding, in_slices)
            for sign in (1.0, -1.0):
                gradients = _displaced_gradient(
                    loss,
                    theta,
                    lam,
                    # A backward pass through sharded parameters reaches all of them anyway.
                    [*theta, *lam] if sharded else targets,
                    block,
                    direction,
                    sign * delta,
                )
                if sharded:
                    gradients = gradients[wanted]
                for product, g in zip(products, gradients, strict=True):
                    if g is not None:
                        product[j].add_(g, alpha=sign / (2 * delta))
    split = len(theta) if theta_part else 0
    return products[:split], products[split:]


def one_sided_differences(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    u_norms: Sequence[float] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Returns the displaced part of one-sided differences of ∇θL.

        H u + B e ≈ ∇θL(θ + δu, λ) / δ + ∇θL(θ, λ + δ'e) / δ' − (1/δ + 1/δ') ∇θL(θ, λ)

    with δ = √ε (1 + ‖x‖) / ‖d‖. The last term is left to the caller, who has the gradient already.
    Costs one gradient per direction, or two where both u and e are given. The relative error is a
    few √ε: about 1e-3 to 1e-2 in float32, 1e-7 in float64.

    Args:
        loss: As for :func:`lightning_hpo.derivatives.joint_hvp`.
        theta: Likewise.
        lam: Likewise.
        u: Likewise.
        e: Likewise.
        u_norms: ‖u‖ of each direction, where they are known.

    Returns:
        The first two terms, ``(m, *θ_i.shape)`` each, and the weights 1/δ + 1/δ' ``(m,)``.
    """
    m = next(d.shape[0] for d in (*(u or ()), *(e or ())))
    rows: list[list[Tensor] | None] = [None] * m
    weights = torch.zeros(m, dtype=torch.float64)
    for block, directions in ((theta, u), (lam, e)):
        for j in range(m if directions is not None else 0):
            direction = [d[j] for d in directions or ()]
            norm = u_norms[j] if block is theta and u_norms is not None else _norm(direction, False)
            if norm == 0.0:
                continue
            epsilon: float = torch.finfo(block[0].dtype).eps
            weight = norm / (math.sqrt(epsilon) * (1.0 + _norm(block, False)))
            weights[j] += weight
            if not math.isfinite(norm):
                continue  # the weight makes the product NaN
            gradients = _displaced_gradient(
                loss, theta, lam, theta, block, direction, 1 / weight, weight
            )
            found = [
                torch.zeros_like(t) if g is None else g
                for t, g in zip(theta, gradients, strict=True)
            ]
            row = rows[j]
            if row is None:
                rows[j] = found
            else:
                rows[j] = list(torch._foreach_add(row, found))
    complete = [[torch.zeros_like(t) for t in theta] if row is None else row for row in rows]
    return [stacked(parts) for parts in zip(*complete, strict=True)], weights


def _step(block: Sequence[Tensor], norm: float, rounding: float | None, in_slices: bool) -> float:
    """Chooses δ = ε^⅓ (1 + ‖x‖) / ‖d‖, which balances truncation against rounding."""
    epsilon: float = max(torch.finfo(block[0].dtype).eps, rounding or 0.0)
    return math.pow(epsilon, 1 / 3) * (1.0 + _norm(block, in_slices)) / norm


def _norm(tensors: Sequence[Tensor], in_slices: bool) -> float:
    norms = torch.stack([torch.linalg.vector_norm(local(t.detach())).double() for t in tensors])
    return float(norm_over_shards(torch.linalg.vector_norm(norms), in_slices))


def _displaced_gradient(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    targets: Sequence[Tensor],
    block: Sequence[Tensor],
    direction: Sequence[Tensor],
    delta: float,
    factor: float = 1.0,
) -> Sequence[Tensor | None]:
    """Returns ``factor`` times ∇L, with ``block`` moved by ``delta`` along ``direction``."""
    with _moved(block, direction, delta), torch.enable_grad():
        value = loss(theta, lam)
        # A factor of the loss costs no pass over the gradient.
        return [None] * len(targets) if value is None else gradient(value * factor, targets)


@contextmanager
def _moved(block: Sequence[Tensor], direction: Sequence[Tensor], delta: float) -> Iterator[None]:
    """Lets tensors hold displaced values for a while; afterwards they are bit for bit as before."""
    before = [t.data for t in block]
    if is_sharded(block):
        # Sharded parameters refer to their storage in several places: values are copied into it,
        # and put back by copy, never by subtraction: (x + d) − d is not x.
        slices = [local(t.detach()) for t in block]
        saved = [s.clone() for s in slices]
        try:
            for s, d in zip(slices, direction, strict=True):
                s.add_(d.to(s.dtype), alpha=delta)
            yield
        finally:
            for s, value in zip(slices, saved, strict=True):
                s.copy_(value)
        return
    try:
        for t, d in zip(block, direction, strict=True):
            t.data = torch.add(t.data, d.to(t.dtype), alpha=delta)
        yield
    finally:
        for t, data in zip(block, before, strict=True):
            t.data = data
