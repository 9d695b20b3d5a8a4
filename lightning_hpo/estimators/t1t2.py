"""T1–T2: the effect of λ on the last step alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_hpo._tensors import rows, stacked
from lightning_hpo.distributed import sum_over_shards
from lightning_hpo.dynamics import OptimizerStep, multiply_by_slope_
from lightning_hpo.estimators._reverse import Window
from lightning_hpo.estimators.base import Estimator, Problem, ValidationGradient
from lightning_hpo.objectives import Moment


class T1T2(Estimator):
    r"""One-step hypergradient (Luketina et al. 2016, eq. 3; online-HPO paper, eq. 8).

        dL_V/dλ ≈ Bᵀ α,   α = (∂Φ/∂g)ᵀ g_V(θ_{t+1}),   B = ∂²L_T/∂θ∂λ at (θ_t, λ_t)

    For plain SGD α = −η g_V; for any other optimizer it is g_V pulled back through its step, so the
    result is exactly that of ``UnrollK(1)``. It is proportional to the long-run hypergradient only
    where the Hessian of L_T is a multiple of the identity.

    Cost per update: one validation gradient, and the product Bᵀα, which is free for penalties that
    act in the gradient. It does not depend on the number of λ.

    Memory: where all λ are strengths of such penalties, |θ| (once per penalty on the same weight,
    and once more where clipping acts). g_V is then multiplied by ∂Φ/∂g B as it arrives, and
    never exists as a whole. Else |θ|, that of g_V, and for a nonlinear step such as Adam's that of
    ∂Φ/∂g (of its gradient and state, where the optimizer mixes elements or has tuned options); once
    more where clipping by norm acts.

    Args:
        scale_by_lr: With False, α = −g_V: the variant Unroll1-gTgV of the online-HPO paper (§4 a),
            whose updates do not shrink with the learning rate.

    Raises:
        TypeError: If ``scale_by_lr`` is not a bool.
    """

    horizon = 1
    window = 1

    def __init__(self, scale_by_lr: bool = True) -> None:
        if not isinstance(scale_by_lr, bool):
            raise TypeError(f"T1T2: scale_by_lr={scale_by_lr!r}, expected True or False")
        self.scale_by_lr = scale_by_lr

    def setup(self, problem: Problem) -> None:
        """Starts a training."""
        super().setup(problem)
        if not self.scale_by_lr:
            problem.refuse_options("T1T2(scale_by_lr=False)", "it leaves the optimizer's step out")
        self._window = Window(problem, through_steps=self.scale_by_lr)
        self._effect: _Effect | None = None

    @property
    def _is_direct(self) -> bool:
        """Whether λ acts through penalties alone, on each element of θ_{t+1} by itself."""
        problem = self.problem
        if problem.in_loss or problem.options is not None:
            return False
        return problem.dynamics.is_elementwise or not self.scale_by_lr

    @property
    def replay(self) -> Literal["never", "after_step"]:
        """After the step, where some λ acts inside the training loss; else never."""
        return "after_step" if self.problem.in_loss else "never"

    def before_batch(self, moment: Moment, weight: float) -> None:
        """Keeps the micro-batch."""
        self._window.before_batch(moment, weight)

    def before_step(self, step: OptimizerStep) -> None:
        """Keeps the step, or its derivative."""
        if self._is_direct:
            self._effect = _Effect(self.problem, step, through_step=self.scale_by_lr)
        else:
            self._window.before_step(step)

    def discard(self) -> None:
        """Forgets the micro-batches of a step that did not happen."""
        self._window.discard()

    def hypergradient(self, validation: ValidationGradient) -> list[Tensor] | None:
        """Returns Bᵀα, with respect to raw λ."""
        if self._effect is not None:
            effect, self._effect = self._effect, None
            return effect.hypergradient(validation)
        return self._window.hypergradient(validation.tensors())


_GRADIENT = ""
"""Stands among the names of hyperparameters for the gradient."""


class _Effect:
    """∂θ_{t+1}/∂λ through the penalties that act in the gradient.

    With an elementwise Φ, of each penalty only the part over its own weights is kept: the rest is
    zero. Clipping by norm (ĝ, with ∂ĝ/∂g = s (I − a g gᵀ)) adds one vector that serves them all:

        ∂θ_{t+1}/∂λ = s [∂Φ/∂g B − a ⟨g, B⟩ ∂Φ/∂g g]

    Args:
        problem: The problem.
        step: The step; it is not kept, and its gradient before clipping is used up.
        through_step: Whether ∂Φ/∂g and clipping are applied; else their place is taken by −1.
    """

    def __init__(self, problem: Problem, step: OptimizerStep, *, through_step: bool) -> None:
        self._problem = problem
        parts: list[list[Tensor]] = [[] for _ in step.theta]
        self._owners: list[list[str]] = [[] for _ in step.theta]
        names = {id(h): name for name, h in problem.hyperparameters.items()}
        for penalty, which, index in problem.penalties_in(step):
            name = names.get(id(penalty.hyperparameter))
            if name is None:
                continue  # it is frozen
            _, rate = penalty.hyperparameter.constraint.derivatives(penalty.raw)
            factor = rate.reshape(()) if through_step else -rate.reshape(())
            for k, i in zip(which, index, strict=True):
                (gradient,) = penalty.gradients([k], [step.theta[i]])  # one at a time
                parts[i].append(gradient * factor.to(gradient))
                self._owners[i].append(name)
        self._scale: Tensor | None = None
        if through_step and step.clipping is not None and not step.clipping.by_value:
            self._clip(step, parts)
        self._stacks: list[Tensor | None] = []
        for own in parts:
            self._stacks.append(rows(stacked(own)).contiguous() if own else None)
            own.clear()  # one parameter at a time is there twice
        if through_step:
            multiply_by_slope_(problem.dynamics, step, self._stacks)

    def _clip(self, step: OptimizerStep, parts: list[list[Tensor]]) -> None:
        """Notes what clipping by norm does, and adds g to the vectors, where it acts."""
        problem = self._problem
        clipping, gradients = step.clipping, step.unclipped
        assert clipping is not None
        assert gradients is not None
        scale, share = clipping.by_norm([g for g in gradients if g is not None])
        dots = dict.fromkeys(problem.hyperparameters, torch.zeros_like(scale))
        for g, own, names in zip(gradients, parts, self._owners, strict=True):
            if g is None:
                continue
            for name, part in zip(names, own, strict=True):
                dots[name] = dots[name] + torch.dot(part.flatten(), g.flatten())
        together = sum_over_shards(torch.stack(list(dots.values())), problem.sharded)
        self._scale = scale
        self._shares = dict(zip(dots, (share * together).unbind(), strict=True))
        for g, own, names in zip(gradients, parts, self._owners, strict=True):
            if g is not None:
                own.append(g)
                names.append(_GRADIENT)
        step.unclipped = None

    def hypergradient(self, validation: ValidationGradient) -> list[Tensor]:
        """Returns ⟨g_V, ∂θ_{t+1}/∂λ⟩, with respect to raw λ."""
        raws = {name: h.raw for name, h in self._problem.hyperparameters.items()}
        totals = {name: torch.zeros_like(raw) for name, raw in raws.items()}
        totals[_GRADIENT] = next(iter(raws.values())).new_zeros(())
        # Parameters that have joined since are not yet affected.
        joined = len(self._problem.theta) - len(self._stacks)
        products = validation.products([*self._stacks, *[None] * joined])
        for names, dots in zip(self._owners, products, strict=False):
            for name, dot in zip(names, dots, strict=True):
                totals[name] += dot.reshape(totals[name].shape)
        along = totals.pop(_GRADIENT)
        if self._scale is not None:
            for name, total in totals.items():
                total.sub_(self._shares[name] * along).mul_(self._scale)
        return list(totals.values())
