"""Implicit: the hypergradient at a stationary point of the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_hpo._arguments import check_choice, check_count, check_number, named_arguments
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.estimators.base import Estimate, Estimator
from lightning_hpo.step import Space, Step, ValidationGradient

Solver = Literal["cg", "neumann"]
SOLVERS = get_args(Solver)


class SolverOutcome(str, Enum):
    """How the linear solver of :class:`Implicit` ended.

    Example:
        >>> callback = OnlineHPOCallback(Implicit("neumann", iterations=5), every_n_steps=10)
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> callback.history[-1].outcome == estimators.SolverOutcome.ITERATION_LIMIT
        True
    """

    CONVERGED = "converged"
    """The residual is below the tolerance."""
    ITERATION_LIMIT = "iteration limit"
    """It is not, after all iterations: the last iterate is used."""
    NEGATIVE_CURVATURE = "negative curvature"
    """CG met a direction p with pᵀHp ≤ 0: the iterate before it is used. More damping helps."""
    DIVERGED = "diverged"
    """The Neumann series grows: its step size exceeds 2 / the largest curvature."""

    def __str__(self) -> str:
        return self.value


class Implicit(Estimator):
    r"""dL_V/dλ = −Bᵀ v with (H + damping · I) v = g_V (Pedregosa 2016, Algorithm 1; Larsen 1998).

    By the implicit function theorem this is the derivative of L_V(θ*(λ)) where g_T(θ*, λ) = 0
    (online-HPO paper, eq. 2), and an approximation before training has come that far. H, B and g_V
    are taken at the present θ, H and B on the batch of the last step; the optimizer plays no part.

    Where choices are drawn, θ* is that of the mean loss, and H and B are means over all their
    combinations. Where these are more than ``enumerate_up_to`` of :class:`PolicyGradient` (8
    without it), ``"neumann"`` draws choices anew for each term, which is right in the mean; for
    ``"cg"`` it would not be, and it is refused.

    Cost per update: one product with the joint Hessian per iteration (and combination of choices),
    and one more. It does not depend on the number of λ. Memory: four vectors like θ.

    Args:
        solver: ``"cg"``: conjugate gradients, for positive definite H + damping · I. ``"neumann"``:
            v = a Σ_k (I − a H)^k g_V (Lorraine et al. 2020, Algorithm 3), with the learning rate in
            force as the step a.
        iterations: The largest number of iterations.
        damping: Added to the diagonal of H, in its units: loss per square of θ.
        tolerance: The solver stops where the residual is below ``tolerance`` · ‖g_V‖.

    The history has the outcome of every solve, a :class:`SolverOutcome`.

    Raises:
        TypeError: If ``damping`` or ``tolerance`` is not a number.
        ValueError: If ``solver`` is unknown, ``iterations`` is no positive integer, or ``damping``
            or ``tolerance`` is negative or not finite.
        MisconfigurationException: At the start of a training, if ``"cg"`` meets too many
            combinations of choices, or options of the optimizer are tuned.

    Example:
        >>> callback = OnlineHPOCallback(Implicit("neumann", iterations=5), every_n_steps=10)
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> callback.history[-1].outcome
        'iteration limit'
    """

    window = 1
    follows_statistics = False
    enumerate_up_to = 8

    @named_arguments("Implicit")
    def __init__(
        self,
        solver: Solver = "cg",
        iterations: int = 20,
        damping: float = 0.0,
        tolerance: float = 1e-6,
    ) -> None:
        check_choice("Implicit", SOLVERS, solver=solver)
        check_count("Implicit", iterations=iterations)
        check_number(
            "Implicit",
            "a finite number ≥ 0",
            lambda x: 0 <= x < math.inf,
            damping=damping,
            tolerance=tolerance,
        )
        self.solver = solver
        self.iterations = iterations
        self.damping = float(damping)
        self.tolerance = float(tolerance)

    def setup(self, space: Space) -> None:
        """Starts a training."""
        super().setup(space)
        space.refuse_options("Implicit", "the optimizer plays no part in it")
        self._choices = space.training.choices
        self._names = self._choices.uncertain()
        self._drawn = 0
        number = self._choices.number(self._names)
        self.is_exact = number <= self.enumerate_up_to  # B is a mean over all choices
        if not self.is_exact and self.solver == "cg":
            raise MisconfigurationException(
                f"Implicit(solver='cg') needs the mean of the Hessian over all {number} "
                f"combinations of the choices {self._names}, which are more than "
                f"enumerate_up_to={self.enumerate_up_to}. Use Implicit('neumann'), whose terms "
                "draw choices anew, or for choices PolicyGradient(Implicit(), "
                f"enumerate_up_to={number})"
            )

    def observe(self, step: Step) -> None:
        """Notes the batch and which parameters take part; θ is read after the step."""
        self._step = step

    def hypergradient(self, validation: ValidationGradient) -> Estimate:
        """Returns −Bᵀ v, with respect to raw λ."""
        solve = self._cg if self.solver == "cg" else self._neumann
        self._every = self._choices.every(self._names) if self.is_exact else [({}, 1.0)]
        v, outcome = solve([g.unsqueeze(0) for g in validation.tensors()], self._step.lr)
        total = self._mean(
            self._step, lambda step: step.products(v, here=True, theta_part=False)[1]
        )
        del self._step
        return Estimate([-t[0] for t in total], outcome=str(outcome))

    def _mean(self, step: Step, product: Callable[[Step], list[Tensor]]) -> list[Tensor]:
        """Returns the mean of a product over the choices in the loss."""
        total: list[Tensor] = []
        for indices, weight in self._every:
            found = product(step.under(indices))
            torch._foreach_mul_(found, weight)
            if total:
                torch._foreach_add_(total, found)
            else:
                total = found
        return total

    def _damped(self, u: list[Tensor]) -> list[Tensor]:
        step = self._step
        if not self.is_exact:
            step = step.under(self._choices.sample("implicit", self._drawn))
            self._drawn += 1
        product = self._mean(step, lambda s: s.products(u, here=True, lambda_part=False)[0])
        if self.damping:
            torch._foreach_add_(product, u, alpha=self.damping)
        return product

    def _cg(self, b: list[Tensor], lr: float) -> tuple[list[Tensor], SolverOutcome]:
        """Conjugate gradients (Hestenes & Stiefel 1952) from 0."""
        x = [torch.zeros_like(t) for t in b]
        r = [t.clone() for t in b]
        p = [t.clone() for t in b]
        rr = self._dot(r, r)
        target = self.tolerance**2 * rr
        for iteration in range(self.iterations):
            if rr <= target:
                return x, SolverOutcome.CONVERGED
            q = self._damped(p)
            curvature = self._dot(p, q)
            if not curvature > 0:
                # The first direction is g_V itself: without it there would be no step at all.
                return (b if iteration == 0 else x), SolverOutcome.NEGATIVE_CURVATURE
            alpha = rr / curvature
            torch._foreach_add_(x, p, alpha=alpha)
            torch._foreach_add_(r, q, alpha=-alpha)
            before, rr = rr, self._dot(r, r)
            torch._foreach_mul_(p, rr / before)
            torch._foreach_add_(p, r)
        return x, SolverOutcome.CONVERGED if rr <= target else SolverOutcome.ITERATION_LIMIT

    def _neumann(self, b: list[Tensor], lr: float) -> tuple[list[Tensor], SolverOutcome]:
        """Sums the Neumann series of (H + damping · I)⁻¹ with step ``lr``."""
        term = [t.clone() for t in b]
        total = [t.clone() for t in b]
        norm = first = self._dot(b, b)
        outcome = SolverOutcome.ITERATION_LIMIT
        for _ in range(self.iterations):
            torch._foreach_add_(term, self._damped(term), alpha=-lr)
            before, norm = norm, self._dot(term, term)
            if not norm <= first or not norm <= before * (1 + 1e-3):
                outcome = SolverOutcome.DIVERGED
                break
            torch._foreach_add_(total, term)
            if norm <= self.tolerance**2 * first:
                outcome = SolverOutcome.CONVERGED
                break
        torch._foreach_mul_(total, lr)
        return total, outcome

    def state_dict(self) -> dict[str, Any]:
        """Returns how many choices have been drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""
        self._drawn = state["drawn"]

    def _dot(self, a: list[Tensor], b: list[Tensor]) -> float:
        return float(self.space.dot(a, b))
