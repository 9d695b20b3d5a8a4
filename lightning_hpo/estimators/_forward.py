"""Forward mode: the tangents y = dθ/dλ, carried along the training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._tensors import add_scaled_, rows, stacked_zeros
from lightning_hpo.distributed import (
    average_,
    gather_stacks,
    local,
    norm_over_shards,
    sum_over_shards,
    take_slices,
)
from lightning_hpo.dynamics import THETA, OptimizerStep, State, jvp_lean_
from lightning_hpo.estimators.base import Network, Problem, ValidationGradient
from lightning_hpo.objectives import Moment

# As many directions are carried through a step at a time as have this many elements together, or
# one: their products are all that is needed besides the tangents themselves.
_ELEMENTS = 2**20


class Tangents:
    """One tangent of (θ, optimizer state) per scalar hyperparameter.

        ṡ_{t+1} = ∂Φ/∂s ṡ_t + ∂Φ/∂g (H y_t + B)

    Online-HPO paper, eq. 7, with the user's optimizer in the place of plain gradient descent.
    Memory: (1 + number of optimizer state tensors) |θ| per scalar λ. H y + B is formed right before
    the step, for a few directions at a time; where the step must be replayed at its batch, for all
    of them, which takes |θ| per scalar λ in between.

    Args:
        problem: The problem.
        sync: Whether H y + B is averaged over the ranks at every step, which is exact. With
            False each rank follows the tangents of its own data, and ⟨g_V, y⟩ is averaged instead.
    """

    def __init__(self, problem: Problem, sync: bool = True) -> None:
        self._problem = problem
        self._sync = sync
        self._unit = problem.unit_directions()
        self.state: State = problem.dynamics.zeros(problem.count)
        self._is_zero = True
        self._norms: Tensor | None = None
        self._frozen: set[int] = set()
        self._moment: Moment | None = None
        self._gradients: list[Tensor] | None = None

    def reset(self) -> None:
        """Sets all tangents to zero: earlier steps are forgotten."""
        for tensors in self.state.values():
            torch._foreach_zero_(tensors)
        self._is_zero = True
        self._norms = None
        self.discard()

    def discard(self) -> None:
        """Forgets the micro-batches of a step that did not happen."""
        self._moment = self._gradients = None

    def before_batch(self, moment: Moment, weight: float) -> None:
        """Keeps a micro-batch for its replay, or adds its H y + B to that of the step."""
        problem = self._problem
        if not problem.replays_at_once:
            self._moment = moment
            return
        self._follow()
        with problem.network(moment) as network:
            for units in self._portions():
                products, _ = self._gradient(network, units)
                if self._gradients is None and len(units) == problem.count:
                    torch._foreach_mul_(products, weight)
                    self._gradients = products
                    continue
                self._gradients = self._complete(self._gradients)
                parts = [t[units.start : units.stop] for t in self._gradients]
                torch._foreach_add_(parts, products, alpha=weight)

    def before_step(self, step: OptimizerStep) -> None:
        """Moves the tangents along with θ."""
        self._follow()
        problem = self._problem
        if self._moment is not None:
            norms = None
            if self._sync and problem.is_one_sided and not self._is_zero:
                norms = self.norms()
            with problem.network(self._moment) as network:
                for units in self._portions():
                    self._advance(step, units, *self._gradient(network, units, norms))
        else:
            gradients, self._gradients = self._complete(self._gradients), None
            self._advance(step, range(problem.count), gradients, None)
        problem.add_option_tangents_(step, self.state, self._unit)
        self._is_zero = False
        self._norms = None
        self.discard()

    def _complete(self, gradients: list[Tensor] | None) -> list[Tensor]:
        """Adds zeros for parameters that have joined since, or for all where there is nothing."""
        known = gradients or []
        return known + stacked_zeros(self._problem.theta[len(known) :], self._problem.count)

    def _portions(self) -> Iterator[range]:
        """Splits the directions into those that are carried on together."""
        m = self._problem.count
        size = max(1, _ELEMENTS // max(1, sum(local(p).numel() for p in self._problem.theta)))
        for start in range(0, m, size):
            yield range(start, min(start + size, m))

    def _gradient(
        self, network: Network, units: range, norms: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns the network's H y + B in some directions.

        Args:
            network: The micro-batch.
            units: The directions.
            norms: ‖y‖, where differences are to be one-sided.

        Returns:
            One tensor per parameter, and the weights of the gradient that remains to be subtracted
            from one-sided differences.
        """
        part = slice(units.start, units.stop)
        y = None if self._is_zero else [t[part] for t in self.state[THETA]]
        e = [t[part] for t in self._unit]
        weights = None
        if norms is not None and y is not None:
            products, weights = network.one_sided(y, e, norms[part])
        else:
            is_last = units.stop == self._problem.count
            products, _ = network.hvp(y, e, lambda_part=False, sync=False, is_last=is_last)
        if self._sync:
            self._problem.average_(products)
        return products, weights

    def _advance(
        self, step: OptimizerStep, units: range, gradient: list[Tensor], weights: Tensor | None
    ) -> None:
        """Carries some tangents through the step; completes and uses up their gradient."""
        problem = self._problem
        part = slice(units.start, units.stop)
        if weights is not None:
            # The step's own gradient holds that of the penalties too, which they add again below.
            own = step.gradients if step.unclipped is None else step.unclipped
            pairs = [(t, g) for t, g in zip(gradient, own, strict=True) if g is not None]
            for j, weight in enumerate(weights):
                add_scaled_([t[j] for t, _ in pairs], [g for _, g in pairs], -weight)
        y = [t[part] for t in self.state[THETA]]
        problem.add_penalty_hvp_((gradient, []), step, y, units=units, gradient_weights=weights)
        if step.clipping is not None:
            assert step.unclipped is not None
            step.clipping.product_(step.unclipped, gradient)
        jvp_lean_(problem.dynamics, step, self.state, gradient, part)

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
        self._problem.dynamics.grow_(self.state)

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

    def hypergradient(self, validation: ValidationGradient) -> tuple[list[Tensor], Tensor]:
        """Returns ⟨g_V, y⟩ for each λ (online-HPO paper, eq. 5), and ‖y‖.

        The product is NaN where ‖y‖ has overflowed.
        """
        self._follow()  # parameters that have joined since the step
        y = self.state[THETA]
        if self._sync:
            total = torch.stack(validation.products(y)).sum(0)
        else:
            pairs = zip(y, validation.tensors(), strict=True)
            parts = [rows(stack) @ g.flatten().to(stack.dtype) for stack, g in pairs]
            total = sum_over_shards(torch.stack(parts).sum(0), self._problem.sharded)
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
