"""∂θ_{t+1}/∂λ of a single step, where λ are strengths of penalties that act in the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hpo._tensors import rows, stacked
from lightning_hpo.distributed import sum_over_shards
from lightning_hpo.dynamics import OptimizerStep, multiply_by_slope_
from lightning_hpo.step.space import Space
from lightning_hpo.step.validation import ValidationGradient

_GRADIENT = ""
"""Stands among the names of hyperparameters for the gradient."""


class Effect:
    """∂θ_{t+1}/∂λ through the penalties that act in the gradient.

    With an elementwise Φ, of each penalty only the part over its own weights is kept: the rest is
    zero. Clipping by norm (ĝ, with ∂ĝ/∂g = s (I − a g gᵀ)) adds one vector that serves them all:

        ∂θ_{t+1}/∂λ = s [∂Φ/∂g B − a ⟨g, B⟩ ∂Φ/∂g g]

    Memory: |θ|, once per penalty on the same weight, and once more where clipping by norm acts.

    Args:
        space: θ and λ.
        step: The step; it is not kept.
        through_optimizer: Whether ∂Φ/∂g and clipping are applied; else their place is taken by −1.
        is_shared: Whether others need the gradient before clipping; else it is used up.

    Example:
        >>> class Direct(Estimator):
        ...     window, uses_hessian = 1, False
        ...
        ...     def observe(self, step):
        ...         self.effect = step.effect()
        ...
        ...     def hypergradient(self, validation):
        ...         return estimators.Estimate(self.effect.pull_back(validation))
        >>> train(Direct())
    """

    def __init__(
        self, space: Space, step: OptimizerStep, *, through_optimizer: bool, is_shared: bool
    ) -> None:
        self._space = space
        parts: list[list[Tensor]] = [[] for _ in step.theta]
        self._owners: list[list[str]] = [[] for _ in step.theta]
        for name, penalty, which, index in space.penalties_in(step):
            if name is None:
                continue  # it is frozen, or another estimator's
            _, rate = penalty.hyperparameter.constraint.derivatives(penalty.raw)
            factor = rate.reshape(()) if through_optimizer else -rate.reshape(())
            for k, i in zip(which, index, strict=True):
                (gradient,) = penalty.gradients([k], [step.theta[i]])  # one at a time
                parts[i].append(gradient * factor.to(gradient))
                self._owners[i].append(name)
        self._scale: Tensor | None = None
        if through_optimizer and step.clipping is not None and not step.clipping.by_value:
            self._clip(step, parts, is_shared)
        self._stacks: list[Tensor | None] = []
        for own in parts:
            self._stacks.append(rows(stacked(own)).contiguous() if own else None)
            own.clear()  # one parameter at a time is there twice
        if through_optimizer:
            multiply_by_slope_(space.training.dynamics, step, self._stacks)

    def _clip(self, step: OptimizerStep, parts: list[list[Tensor]], is_shared: bool) -> None:
        """Notes what clipping by norm does, and adds g to the vectors, where it acts."""
        clipping, gradients = step.clipping, step.unclipped
        assert clipping is not None
        assert gradients is not None
        scale, share = clipping.by_norm([g for g in gradients if g is not None])
        dots = dict.fromkeys(self._space.hyperparameters, torch.zeros_like(scale))
        for g, own, names in zip(gradients, parts, self._owners, strict=True):
            if g is None:
                continue
            for name, part in zip(names, own, strict=True):
                dots[name] = dots[name] + torch.dot(part.flatten(), g.flatten())
        sharded = self._space.training.sharded
        together = sum_over_shards(torch.stack(list(dots.values())), sharded)
        self._scale = scale
        self._shares = dict(zip(dots, (share * together).unbind(), strict=True))
        for g, own, names in zip(gradients, parts, self._owners, strict=True):
            if g is not None:
                own.append(g.clone() if is_shared else g)
                names.append(_GRADIENT)
        if not is_shared:
            step.unclipped = None

    def pull_back(self, validation: ValidationGradient) -> list[Tensor]:
        """Returns ⟨g_V, ∂θ_{t+1}/∂λ⟩, one tensor per λ, with respect to raw λ.

        g_V is multiplied as it arrives, and need not exist as a whole.

        Args:
            validation: g_V at θ_{t+1}.
        """
        totals = {
            name: torch.zeros_like(raw)
            for name, raw in zip(self._space.hyperparameters, self._space.raws, strict=True)
        }
        totals[_GRADIENT] = self._space.raws[0].new_zeros(())
        # Parameters that have joined since are not yet affected.
        joined = len(self._space.theta) - len(self._stacks)
        products = validation.products([*self._stacks, *[None] * joined])
        for names, dots in zip(self._owners, products, strict=False):
            for name, dot in zip(names, dots, strict=True):
                totals[name] += dot.reshape(totals[name].shape)
        along = totals.pop(_GRADIENT)
        if self._scale is not None:
            for name, total in totals.items():
                total.sub_(self._shares[name] * along).mul_(self._scale)
        return list(totals.values())
