"""joint_hvp for λ that act through random masks: differences over λ, autograd for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hpo._tensors import is_on_host, rows, separate, stacked_zeros
from lightning_hpo.derivatives.gradient import gradient
from lightning_hpo.distributed import is_sharded, local, sum_over_shards

if TYPE_CHECKING:
    from lightning_hpo.derivatives.joint_hvp import Loss

Product = Callable[..., tuple[list[Tensor], list[Tensor]]]


def with_differences(
    product: Product,
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    theta_part: bool,
    lambda_part: bool,
    steps: Sequence[float | None],
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Completes a backend's product by central differences over some λ.

    With the gradients at λ ± ε, taken with the same random draws ξ (online-HPO paper, §3.5.2),

        B e ≈ [∇θL(λ + ε) − ∇θL(λ − ε)] e / 2ε
        Bᵀu ≈ ⟨∇θL(λ + ε) − ∇θL(λ − ε), u⟩ / 2ε

    and likewise for the mixed part of C; between two such λ, C is a difference of differences. The
    arguments are those of :func:`lightning_hpo.derivatives.joint_hvp`.
    """
    smooth = [k for k, step in enumerate(steps) if step is None]
    stepped = {k: step for k, step in enumerate(steps) if step is not None}
    m = next(d.shape[0] for d in (*(u or ()), *(e or ())))
    theta_result = stacked_zeros(theta, m) if theta_part else []
    lam_result = stacked_zeros(lam, m) if lambda_part else []

    def rest(th: Sequence[Tensor], some: Sequence[Tensor]) -> Tensor | None:
        every = list(lam)
        for k, value in zip(smooth, some, strict=True):
            every[k] = value
        return loss(th, every)

    smooth_lam = [lam[k] for k in smooth]
    smooth_e = [e[k] for k in smooth] if e is not None and smooth else None
    wants_lam = lambda_part and bool(smooth)
    if (u is not None or smooth_e is not None) and (theta_part or wants_lam):
        theta_parts, lam_parts = product(
            rest, theta, smooth_lam, u, smooth_e, theta_part, wants_lam
        )
        parts = separate([*theta_parts, *lam_parts])  # they are added to below
        theta_result = parts[: len(theta_parts)] or theta_result
        for k, part in zip(smooth, parts[len(theta_parts) :], strict=bool(lam_parts)):
            lam_result[k] = part

    for k, step in stepped.items():
        for i in range(lam[k].numel()):
            rates = None if e is None else e[k].reshape(m, -1)[:, i]
            if rates is not None and is_on_host(rates) and not bool(rates.any()):
                rates = None
            if rates is None and not lambda_part:
                continue
            change = _change(loss, [*theta, *smooth_lam], theta, lam, k, i, step)
            theta_change, smooth_change = change[: len(theta)], change[len(theta) :]
            if rates is not None:
                for part, c in zip(theta_result, theta_change, strict=bool(theta_result)):
                    part += torch.tensordot(rates.to(c, non_blocking=True), c, dims=0)
            if not lambda_part:
                continue
            if rates is not None:
                for j, c in zip(smooth, smooth_change, strict=True):
                    lam_result[j] += torch.tensordot(rates.to(c, non_blocking=True), c, dims=0)
            row = lam_result[k].reshape(m, -1)[:, i]
            for directions, changes, in_slices in (
                (u, theta_change, is_sharded(theta)),
                (smooth_e, smooth_change, False),
            ):
                if directions:
                    dots = [
                        (rows(d).to(c.dtype) @ c.flatten()).to(row.dtype)
                        for d, c in zip(directions, changes, strict=True)
                    ]
                    row += sum_over_shards(torch.stack(dots).sum(0), in_slices)
            if e is not None:
                with torch.no_grad():
                    row += _curvature(loss, theta, lam, e, stepped, k, i).to(row)
    return theta_result, lam_result


def _change(
    loss: Loss,
    targets: Sequence[Tensor],
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    k: int,
    i: int,
    step: float,
) -> list[Tensor]:
    """Returns the rate of change of ∇L over the targets as element i of λ_k moves."""
    change = [torch.zeros_like(local(t)) for t in targets]
    for sign in (1.0, -1.0):
        with torch.enable_grad():
            value = loss(theta, _moved(lam, {(k, i): sign * step}))
            if value is None:
                continue
            gradients = gradient(value, targets)
        for total, g in zip(change, gradients, strict=True):
            if g is not None:
                total.detach().add_(g, alpha=sign / (2 * step))
    return change


def _curvature(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    e: Sequence[Tensor],
    stepped: dict[int, float],
    k: int,
    i: int,
) -> Tensor:
    """Returns row (k, i) of C e over the λ that are differenced, for each of the m directions."""
    m = e[0].shape[0]
    result = torch.zeros(m, dtype=torch.float64)
    for other, width in stepped.items():
        for n in range(lam[other].numel()):
            rates = e[other].reshape(m, -1)[:, n].double().cpu()
            if not bool(rates.any()):
                continue
            second = 0.0
            for a in (1.0, -1.0):
                for b in (1.0, -1.0):
                    moves = {(k, i): a * stepped[k]}
                    moves[other, n] = moves.get((other, n), 0.0) + b * width
                    value = loss(theta, _moved(lam, moves))
                    second += 0.0 if value is None else a * b * float(value.detach())
            result += rates * second / (4 * stepped[k] * width)
    return result


def _moved(lam: Sequence[Tensor], moves: dict[tuple[int, int], float]) -> list[Tensor]:
    """Returns λ with some elements moved."""
    result = list(lam)
    for (k, i), distance in moves.items():
        moved = result[k].detach().clone()
        moved.view(-1)[i] += distance
        result[k] = moved.requires_grad_()
    return result
