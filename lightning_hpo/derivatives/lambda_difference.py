"""Products for λ that act through random masks: differences over λ, a backend for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hpo._tensors import is_on_host, rows, separate, stacked_zeros
from lightning_hpo.derivatives._gradient import gradient
from lightning_hpo.derivatives.backend import Backend, direction_count
from lightning_hpo.derivatives.loss import Loss
from lightning_hpo.distributed import is_sharded, local, sum_over_shards


@dataclass
class LambdaDifference:
    r"""Completes a backend's products by central differences over some λ.

    Random masks have no other derivative with respect to their probability. With gradients at
    λ ± ε, taken with the same random draws ξ (online-HPO paper, §3.5.2),

        B e ≈ [∇θL(λ + ε) − ∇θL(λ − ε)] e / 2ε
        Bᵀu ≈ ⟨∇θL(λ + ε) − ∇θL(λ − ε), u⟩ / 2ε

    for each element of such a λ; H and the smooth λ are left to ``inner``.

    Cost: that of ``inner``, and two gradients per differenced element, shared by all directions:
    for a tangent those elements that a direction moves, for an adjoint all. ``inner`` shares no
    work between calls here, because other evaluations come in between.

    Args:
        inner: The backend for θ and the smooth λ, which alone it sees as ``lam``.
        steps: For each entry of ``lam``, ε (half the width of the difference, in units of raw λ),
            or None where the loss is smooth in it.

    Example:
        >>> backend = derivatives.LambdaDifference(derivatives.Reverse(), steps=[0.25])
        >>> backend.adjoint(loss, theta, lam, [torch.tensor([[2.0, 0.0]])])  # H u, Bᵀ u
        ([tensor([[1., 0.]])], [tensor([2.])])
    """

    inner: Backend
    steps: Sequence[float | None]

    @property
    def is_exact(self) -> bool:
        """Whether the operators of the loss need second or forward derivatives."""
        return self.inner.is_exact

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
        smooth = self._smooth()
        smooth_e = [e[k] for k in smooth] if e else None
        if u or smooth_e:
            smooth_lam = [lam[k] for k in smooth]
            products = self.inner.tangent(self._rest(loss, lam), theta, smooth_lam, u, smooth_e)
            result = separate(products)  # they are added to below
        else:
            result = stacked_zeros(theta, m)
        if e:
            for k, i, step in self._differenced(lam):
                rates = e[k].reshape(m, -1)[:, i]
                if is_on_host(rates) and not bool(rates.any()):
                    continue
                change = _change(loss, theta, lam, k, i, step)
                for part, c in zip(result, change, strict=True):
                    part += torch.tensordot(rates.to(c, non_blocking=True), c, dims=0)
        return result

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
        theta_result: list[Tensor] = []
        lam_result = stacked_zeros(lam, m)
        smooth = self._smooth()
        if theta_part or smooth:
            smooth_lam = [lam[k] for k in smooth]
            theta_result, parts = self.inner.adjoint(
                self._rest(loss, lam), theta, smooth_lam, u, theta_part=theta_part
            )
            for k, part in zip(smooth, parts, strict=True):
                lam_result[k] = part
        for k, i, step in self._differenced(lam):
            change = _change(loss, theta, lam, k, i, step)
            row = lam_result[k].reshape(m, -1)[:, i]
            dots = [
                (rows(d).to(c.dtype) @ c.flatten()).to(row.dtype)
                for d, c in zip(u, change, strict=True)
            ]
            row += sum_over_shards(torch.stack(dots).sum(0), is_sharded(theta))
        return theta_result, lam_result

    def _smooth(self) -> list[int]:
        """Lists the λ that ``inner`` differentiates."""
        return [k for k, step in enumerate(self.steps) if step is None]

    def _differenced(self, lam: Sequence[Tensor]) -> Iterator[tuple[int, int, float]]:
        """Yields the position of each λ that has a step, its elements, and the step."""
        for k, (value, step) in enumerate(zip(lam, self.steps, strict=True)):
            if step is not None:
                for i in range(value.numel()):
                    yield k, i, step

    def _rest(self, loss: Loss, lam: Sequence[Tensor]) -> Loss:
        """Returns the loss as a function of θ and of the smooth λ alone."""

        def rest(theta: Sequence[Tensor], smooth_lam: Sequence[Tensor]) -> Tensor | None:
            every = list(lam)
            for k, value in zip(self._smooth(), smooth_lam, strict=True):
                every[k] = value
            return loss(theta, every)

        return rest


def _change(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    k: int,
    i: int,
    step: float,
) -> list[Tensor]:
    """Returns the rate of change of ∇θL as element i of λ_k moves."""
    change = [torch.zeros_like(local(t)) for t in theta]
    for distance in (step, -step):
        moved = _moved(lam, k, i, distance)
        # A backward pass through sharded parameters reaches all leaves anyway.
        reached = [*theta, *moved] if is_sharded(theta) else theta
        with torch.enable_grad():
            value = loss(theta, moved)
            if value is None:
                continue
            gradients = gradient(value, reached)[: len(theta)]
        for total, g in zip(change, gradients, strict=True):
            if g is not None:
                total.detach().add_(g, alpha=1 / (2 * distance))
    return change


def _moved(lam: Sequence[Tensor], k: int, i: int, distance: float) -> list[Tensor]:
    """Returns λ with element i of λ_k moved."""
    moved = lam[k].detach().clone()
    moved.view(-1)[i] += distance
    return [*lam[:k], moved.requires_grad_(), *lam[k + 1 :]]
