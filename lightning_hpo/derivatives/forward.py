"""joint_hvp by forward-over-reverse: exact, and lean in memory, where operators support it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_hpo._tensors import stacked_zeros

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
) -> tuple[list[Tensor], list[Tensor]]:
    """Carries (u, e) through the gradient; see :func:`lightning_hpo.derivatives.joint_hvp`.

    The loss is called with dual tensors in the place of θ and λ.
    """
    targets = [*(theta if theta_part else ()), *(lam if lambda_part else ())]
    directions = [*(u or ()), *(e or ())]
    m = directions[0].shape[0]
    products = stacked_zeros(targets, m)
    for j in range(m):
        with torch.enable_grad(), forward_ad.dual_level():
            dual_theta = _duals(theta, u, j)
            dual_lam = _duals(lam, e, j)
            value = loss(dual_theta, dual_lam)
            if value is None:
                continue
            wanted = [*(dual_theta if theta_part else ()), *(dual_lam if lambda_part else ())]
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
            for product, gradient in zip(products, gradients, strict=True):
                if gradient is None:
                    continue
                tangent = forward_ad.unpack_dual(gradient).tangent
                if tangent is not None:
                    # A forward derivative can come in float64 for a float32 model: copy_ casts.
                    product[j].copy_(tangent.detach())
    split = len(theta) if theta_part else 0
    return products[:split], products[split:]


def _duals(primals: Sequence[Tensor], directions: Sequence[Tensor] | None, j: int) -> list[Tensor]:
    leaves = [p.detach().requires_grad_() for p in primals]
    if directions is None:
        return leaves
    return [
        forward_ad.make_dual(leaf, direction[j].to(leaf, non_blocking=True))
        for leaf, direction in zip(leaves, directions, strict=True)
    ]
