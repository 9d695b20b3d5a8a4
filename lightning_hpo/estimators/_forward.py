"""Forward mode: the tangents y = dθ/dλ, carried along the training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._tensors import add_scaled_, rows
from lightning_hpo.distributed import (
    average_,
    gather_stacks,
    norm_over_shards,
    sum_over_shards,
    take_slices,
)
from lightning_hpo.dynamics import THETA, OptimizerStep, State
from lightning_hpo.estimators.base import Problem
from lightning_hpo.objectives import Moment


class Tangents:
    """One tangent of (θ, optimizer state) per scalar hyperparameter.

        ṡ_{t+1} = ∂Φ/∂s ṡ_t + ∂Φ/∂g (H y_t + B)

    Online-HPO paper, eq. 7, with the user's optimizer in the place of plain gradient descent.
    Memory: (1 + number of optimizer state tensors) |θ| per scalar λ, and from the batch to the step
    one more for H y + B.

    Args:
        problem: The problem.
        sync: Whether H y + B is averaged over the ranks at every micro-batch, which is exact. With
            False each rank follows the tangents of its own data, and ⟨g_V, y⟩ is averaged instead.
    """

    def __init__(self, problem: Problem, sync: bool = True) -> None:
        self._problem = problem
        self._sync = sync
        self._unit = problem.unit_directions()
        self._gradient: list[Tensor] | None = None
        self._weights: Tensor | None = None
        self._norms: Tensor | None = None
        self._frozen: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Sets all tangents to zero: earlier steps are forgotten."""
        self.state: State = self._problem.dynamics.zeros(self._problem.count)
        self._is_zero = True
        self._norms = None
        self.discard()

    def discard(self) -> None:
        """Forgets the micro-batches of a step that did not happen."""
        self._gradient = self._weights = None

    def before_batch(self, moment: Moment, weight: float) -> None:
        """Adds the micro-batch's H y + B to the tangent of the gradient."""
        self._follow()
        problem = self._problem
        y = None if self._is_zero else self.state[THETA]
        self._weights = None
        if self._sync and problem.is_one_sided and y is not None:
            norms = self.norms()
            products, self._weights = problem.one_sided_hvp(moment, y, self._unit, norms)
        else:
            products, _ = problem.network_hvp(
                moment, y, self._unit, lambda_part=False, sync=self._sync
            )
        if weight != 1.0:
            torch._foreach_mul_(products, weight)
        if self._gradient is None:
            self._gradient = products
        else:
            torch._foreach_add_(self._gradient, products)

    def network_gradient(self, gradients: list[Tensor | None]) -> None:
        """Completes one-sided differences by the gradient at (θ, λ) itself."""
        if self._weights is None or self._gradient is None:
            return
        pairs = [(t, g) for t, g in zip(self._gradient, gradients, strict=True) if g is not None]
        for j, weight in enumerate(self._weights):
            add_scaled_([t[j] for t, _ in pairs], [g for _, g in pairs], -weight)
        self._weights = None

    def before_step(self, step: OptimizerStep) -> None:
        """Moves the tangents along with θ."""
        self._follow()
        problem = self._problem
        gradient = self._gradient
        if gradient is None or self._weights is not None:  # one-sided, and never completed
            gradient, _ = problem.zeros(problem.count, lambda_part=False)
        problem.add_penalty_hvp_((gradient, []), step, self.state[THETA], unit=True)
        if problem.clipping is not None and step.unclipped is not None:
            problem.clipping.product_(step.unclipped, gradient)
        problem.dynamics.jvp_(step, self.state, gradient)
        problem.add_option_tangents_(step, self.state, self._unit)
        self._is_zero = False
        self._norms = None
        self.discard()

    def _follow(self) -> None:
        """Gives zero tangents to parameters that have joined the training, or left it."""
        theta = self._problem.theta
        for i, p in enumerate(theta):
            if not p.requires_grad and i not in self._frozen:
                for tensors in self.state.values():
                    if i < len(tensors):
                        tensors[i].zero_()
                self._norms = None
        self._frozen = {i for i, p in enumerate(theta) if not p.requires_grad}
        if len(theta) > len(self.state[THETA]):
            fresh = self._problem.dynamics.zeros(self._problem.count)
            for name, tensors in self.state.items():
                known = len(tensors)
                tensors.extend(
                    fresh[name][known:]
                    if name in fresh
                    else [t.new_zeros((len(t), 0)) for t in fresh[THETA][known:]]
                )

    def norms(self) -> Tensor:
        """Returns ‖y‖ over all parameters, one number per scalar λ: ``(m,)``."""
        if self._norms is None:
            parts = [torch.linalg.vector_norm(rows(y), dim=1) for y in self.state[THETA]]
            norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
            self._norms = norm_over_shards(norms, self._problem.sharded)
        return self._norms

    def scale_(self, factors: Tensor | float) -> None:
        """Multiplies each tangent, optimizer state included, by its factor (``(m,)`` or one)."""
        for tensors in self.state.values():
            for t in tensors:
                if isinstance(factors, Tensor):
                    t.mul_(factors.to(t.dtype).reshape(-1, *[1] * (t.dim() - 1)))
                else:
                    t.mul_(factors)
        if self._norms is not None:
            self._norms = self._norms * factors

    def forget_non_finite(self, norms: Tensor) -> None:
        """Starts anew the tangents that have overflowed: they would stay non-finite for ever."""
        broken = ~torch.isfinite(norms)
        if bool(broken.any()):
            for tensors in self.state.values():
                for t in tensors:
                    t[broken] = 0
            self._norms = None

    def hypergradient(self, g_v: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Returns ⟨g_V, y⟩ for each λ (online-HPO paper, eq. 5), and ‖y‖.

        The product is NaN where ‖y‖ has overflowed.
        """
        products = [
            rows(y) @ g.flatten().to(y.dtype) for y, g in zip(self.state[THETA], g_v, strict=True)
        ]
        total = sum_over_shards(torch.stack(products).sum(0), self._problem.sharded)
        if not self._sync:
            average_([total])
        norms = self.norms()
        total = torch.where(torch.isfinite(norms), total, math.nan)
        return self._problem.from_stack(total), norms

    def state_dict(self) -> dict[str, Any]:
        """Returns the tangents.

        An accumulation window that is open is left out: its gradient is not saved either. Sharded
        tangents are assembled on the first process: all processes must call this.
        """
        parameters = self._problem.theta
        return {
            "tangents": {name: gather_stacks(s, parameters) for name, s in self.state.items()},
            "is_zero": self._is_zero,
            # After clipping they are not those of the tangents to the last bit.
            "norms": self._norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the tangents onto the devices of the parameters."""
        # Parameters may have joined since; they get zero tangents at the next step.
        self.state = {
            name: take_slices(stacks, self._problem.theta[: len(stacks)])
            for name, stacks in state["tangents"].items()
        }
        self._is_zero = bool(state["is_zero"])
        norms = state["norms"]
        self._norms = None if norms is None else norms.to(self._problem.theta[0].device)
