"""The contract of a backend: two products with second derivatives of the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_hpo.derivatives.loss import Loss


class Backend(Protocol):
    r"""Multiplies with H = ∂²L/∂θ² and B = ∂²L/∂θ∂λ, m directions at a time.

    - :meth:`tangent`: (u, e) → H u + B e
    - :meth:`adjoint`: u → (H u, Bᵀ u)

    ``loss`` is L as a function of (θ, λ); every call of it must use the same random draws.
    ``theta`` and ``lam`` are leaf tensors that require grad; ``lam`` may be empty. Directions and
    products are stacked: one tensor ``(m, *t.shape)`` per tensor t, of sharded θ per local slice;
    products shaped like sharded θ come averaged over the ranks. Products are at least as precise as
    θ and λ themselves, and may share memory with each other and with the directions.

    Sources: the tangent is ∂g_T/∂θ · y + ∂g_T/∂λ of the online-HPO paper, eq. 7; the adjoint is
    α_{t+1} A_{t+1}, α_{t+1} B_{t+1} of Reverse-HG (Franceschi et al. 2017, Algorithm 1).

    Example:
        >>> backend = derivatives.BACKENDS["forward"]()
        >>> backend.adjoint(loss, theta, lam, [torch.tensor([[2.0, 0.0]])])  # H u, Bᵀ u
        ([tensor([[1., 0.]])], [tensor([2.])])
    """

    @property
    def is_exact(self) -> bool:
        """Whether the operators of the loss need second or forward derivatives."""
        ...

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
        """Returns H u + B e.

        Args:
            loss: L.
            theta: θ.
            lam: Raw λ.
            u: Directions in θ, ``(m, *θ_i.shape)`` each; None stands for zeros.
            e: Directions in raw λ, ``(m, *λ_k.shape)`` each; None stands for zeros.
            is_last: Whether no tangent of the same evaluation (this very ``loss``, θ and λ)
                follows. A backend may share work between them.

        Returns:
            One tensor ``(m, *θ_i.shape)`` per entry of ``theta``; zeros where L does not depend on
            it, or there is no loss.

        Raises:
            ValueError: If there is no direction.
            TypeError: If a gradient is sparse.
            RuntimeError: If an operator of the loss lacks a derivative that the backend needs; see
                :func:`is_missing_derivative`.
        """
        ...

    def adjoint(
        self,
        loss: Loss,
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        u: Sequence[Tensor],
        *,
        theta_part: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns H u and Bᵀ u.

        Args:
            loss: L.
            theta: θ.
            lam: Raw λ.
            u: Directions in θ, ``(m, *θ_i.shape)`` each.
            theta_part: Whether H u is wanted.

        Returns:
            One tensor ``(m, *θ_i.shape)`` per entry of ``theta``, or an empty list where H u is not
            wanted, which then costs nothing; and one tensor ``(m, *λ_k.shape)`` per entry of
            ``lam``. Zeros as for :meth:`tangent`.

        Raises:
            ValueError: If there is no direction.
            TypeError: If a gradient is sparse.
            RuntimeError: As for :meth:`tangent`.
        """
        ...


def direction_count(u: Sequence[Tensor] | None, e: Sequence[Tensor] | None = None) -> int:
    """Returns the number m of stacked directions.

    Raises:
        ValueError: If there is no direction.
    """
    for direction in (*(u or ()), *(e or ())):
        return len(direction)
    raise ValueError(
        f"a product needs a direction: got u={u} and e={e}, expected one tensor (m, *t.shape) for "
        "each t of theta in u, or of lam in e"
    )


def is_missing_derivative(error: RuntimeError) -> bool:
    """Whether an error says that an operator lacks a second or a forward derivative.

    Running out of memory, wrong shapes and the user's own errors are not that.

    Args:
        error: What a product of :class:`Reverse` or :class:`Forward` has raised.

    Example:
        >>> derivatives.is_missing_derivative(RuntimeError("derivative ... is not implemented"))
        True
        >>> derivatives.is_missing_derivative(RuntimeError("shapes cannot be multiplied"))
        False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, NotImplementedError):
        return True
    text = str(error).lower()
    return any(
        sign in text
        for sign in (
            "is not implemented",
            "not differentiable",
            "does not support double",
            "double backward",
            "3rd+ order derivatives",
            "does not support forward",
            "forward ad",
            "once_differentiable",
            "marked with @once_differentiable",
            "computed under selective activation checkpoint",
            "zerotensors are immutable",
        )
    )
