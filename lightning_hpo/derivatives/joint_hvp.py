"""The one primitive: products with the joint Hessian of the training loss over (θ, λ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_hpo._arguments import check_choice
from lightning_hpo.derivatives import finite_difference, forward, reverse
from lightning_hpo.derivatives.difference import with_differences
from lightning_hpo.derivatives.reverse import GradientGraph

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], "Tensor | None"]
"""L_T as a pure function of (θ, λ); None where the step has no loss (a skipped batch)."""


class _Backend(Protocol):
    def __call__(
        self,
        loss: Loss,
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        u: Sequence[Tensor] | None,
        e: Sequence[Tensor] | None,
        theta_part: bool,
        lambda_part: bool,
    ) -> tuple[list[Tensor], list[Tensor]]: ...


BACKENDS: dict[str, _Backend] = {
    "reverse": reverse.joint_hvp,
    "forward": forward.joint_hvp,
    "finite_difference": finite_difference.joint_hvp,
}


def joint_hvp(
    loss: Loss,
    theta: Sequence[Tensor],
    lam: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    e: Sequence[Tensor] | None,
    *,
    backend: str = "reverse",
    theta_part: bool = True,
    lambda_part: bool = True,
    difference_steps: Sequence[float | None] | None = None,
    rounding: float | None = None,
    reach: Sequence[Tensor] | None = None,
    graph: GradientGraph | None = None,
    theta_is_scratch: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Multiplies the Hessian of the loss over the joint vector (θ, λ) with m directions.

    With H = ∂²L/∂θ², B = ∂²L/∂θ∂λ and C = ∂²L/∂λ², each direction (u, e) gives

        (H u + B e,  Bᵀ u + C e).

    Args:
        loss: L as a function of (θ, λ). Every call must use the same random draws.
        theta: Leaf tensors that require grad. ``finite_difference`` lets them hold displaced values
            for a while, and puts their own back; the other backends leave them alone.
        lam: Leaf tensors that require grad, treated in the same way.
        u: One tensor of shape ``(m, *θ_i.shape)`` per entry of ``theta``; None stands for zeros.
        e: One tensor of shape ``(m, *λ_i.shape)`` per entry of ``lam``; None stands for zeros.
        backend: ``"reverse"`` (double backward, exact), ``"forward"`` (forward-over-reverse, exact)
            or ``"finite_difference"`` (central differences of the gradient, relative error about
            1e-4 in float32 on smooth networks, and a tenth in half precision).
        theta_part: Whether H u + B e is wanted.
        lambda_part: Whether Bᵀ u + C e is wanted.
        difference_steps: For each entry of ``lam``, None, or half the width of the central
            difference by which the loss is differentiated with respect to it (random masks have no
            other derivative). Such entries mix freely with the others; each element that a
            direction moves, or whose λ part is wanted, costs two gradients. The C part between two
            of them, wanted only where ``e`` and the λ part meet, costs four losses per pair.
        rounding: The relative rounding error of the loss, where that is larger than θ's dtype says
            (under autocast). ``finite_difference`` takes wider steps then.
        reach: How far ``finite_difference`` may move each element of ``lam``; None: any distance.
        graph: What ``reverse`` keeps for further calls with the same loss, θ, λ and kinds of
            directions, and spares them; not kept where there are ``difference_steps``.
        theta_is_scratch: Whether nobody minds if θ comes back changed by rounding.
            ``finite_difference`` then displaces it in place, and takes |θ| less memory.

    Returns:
        The θ part and the λ part, each a list with the shapes of ``u`` and ``e``; a part that is
        not wanted is an empty list. Entries that the loss does not depend on are zeros.

    Cost, in gradients of the loss (measured on CPU): reverse 2.5–4.4, shared by all directions as
    far as the forward and first backward go; forward 3.6–5.3 per direction; finite differences 2
    per direction, 4 where both u and e are given.

    On networks with kinks (ReLU), differences across a kink are not the almost-everywhere Hessian
    that the exact backends return.

    Source: the mixed products are ∂g_T/∂θ · y + ∂g_T/∂λ of the online-HPO paper, eq. 7, and
    α_{t+1} A_{t+1}, α_{t+1} B_{t+1} of Reverse-HG (Franceschi et al. 2017, Algorithm 1); product by
    double backward: Pearlmutter (1994).

    Raises:
        ValueError: If ``backend`` is unknown, there is no direction, or no part is wanted.
        RuntimeError: If an operator of the loss has no derivative of the kind that the backend
            needs.
    """
    check_choice("joint_hvp", sorted(BACKENDS), backend=backend)
    u = u if u is None or len(u) else None
    e = e if e is None or len(e) else None
    if (u is None and e is None) or not (theta_part or lambda_part):
        raise ValueError("joint_hvp: needs a direction (u or e) and a part that is wanted")
    steps = difference_steps or [None] * len(lam)
    is_smooth = all(step is None for step in steps)
    product = BACKENDS[backend]
    if backend == "finite_difference":
        if reach is not None:
            reach = [r for r, step in zip(reach, steps, strict=True) if step is None]
        product = partial(
            finite_difference.joint_hvp,
            rounding=rounding,
            reach=reach,
            theta_is_scratch=theta_is_scratch,
        )
    elif backend == "reverse" and is_smooth:  # else other evaluations come in between
        product = partial(reverse.joint_hvp, graph=graph)
    if is_smooth:
        return product(loss, theta, lam, u, e, theta_part, lambda_part)
    return with_differences(product, loss, theta, lam, u, e, theta_part, lambda_part, steps)


def is_missing_derivative(error: RuntimeError) -> bool:
    """Whether an error says that an operator lacks a second or a forward derivative.

    Running out of memory, wrong shapes and the user's own errors are not that.
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
            "does not support forward",
            "forward ad",
            "once_differentiable",
            "marked with @once_differentiable",
            "computed under selective activation checkpoint",
        )
    )
