"""T1–T2: the effect of λ on the last step alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hpo._tensors import rows, stacked
from lightning_hpo.dynamics import THETA, Block, OptimizerStep
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

    Memory: where all λ are strengths of such penalties, |θ| (once per penalty on the same weight).
    g_V is then multiplied by ∂Φ/∂g B as it arrives, and never exists as a whole. Else, or with an
    optimizer that mixes elements, with clipping by norm or tuned optimizer options: |θ|, that of
    g_V, and for an optimizer such as Adam, whose step is nonlinear, one of its gradient and state.

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
        self._window = Window(problem)
        self._effect: _Effect | None = None

    @property
    def _is_direct(self) -> bool:
        """Whether each element of θ_{t+1} depends on λ through its own penalties alone."""
        problem = self.problem
        if problem.in_loss or problem.options is not None:
            return False
        if not self.scale_by_lr:
            return True
        by_norm = problem.clipping is not None and not problem.clipping.by_value
        return problem.dynamics.is_elementwise and not by_norm

    @property
    def replays(self) -> bool:
        """Where some λ acts inside the training loss."""
        return bool(self.problem.in_loss)

    @property
    def keeps_steps(self) -> bool:
        """Unless its derivative is taken at once, the step is differentiated after it."""
        return not self._is_direct

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
        g_v = validation.tensors()
        return (self._window.hypergradient if self.scale_by_lr else self._window.one_step)(g_v)


class _Effect:
    """∂θ_{t+1}/∂λ through the penalties that act in the gradient.

    Of each penalty only the part over its own weights is kept: the rest is zero where Φ and
    clipping are elementwise.

    Args:
        problem: The problem.
        step: The step; it is not kept.
        through_step: Whether ∂Φ/∂g and clipping are applied; else their place is taken by −1.
    """

    def __init__(self, problem: Problem, step: OptimizerStep, *, through_step: bool) -> None:
        self._problem = problem
        parts: list[list[Tensor]] = [[] for _ in step.theta]
        self._owners: list[list[str]] = [[] for _ in step.theta]
        names = {id(h): name for name, h in problem.hyperparameters.items()}
        for penalty, index in problem.penalties_in(step):
            name = names.get(id(penalty.hyperparameter))
            if name is None:
                continue  # it is frozen
            _, rate, _ = penalty.hyperparameter.constraint.derivatives(penalty.raw)
            gradients = penalty.gradient([step.theta[i] for i in index])
            factor = rate.reshape(()).to(gradients[0].dtype)
            products = torch._foreach_mul(gradients, factor if through_step else -factor)
            for i, product in zip(index, products, strict=True):
                parts[i].append(product)
                self._owners[i].append(name)
        self._stacks = [rows(stacked(p)).contiguous() if p else None for p in parts]
        del parts
        if through_step:
            by_count: dict[int, list[int]] = {}
            for i, names_of in enumerate(self._owners):
                by_count.setdefault(len(names_of), []).append(i)
            for count, index in by_count.items():
                for block in step.blocks(index) if count else ():
                    self._pass(step.restricted(block), block)

    def _pass(self, step: OptimizerStep, block: Block) -> None:
        """Multiplies by ∂Φ/∂g and ∂ĝ/∂g of clipping; being diagonal, they are symmetric."""
        problem = self._problem
        places = [stack[:, part] for i, part in block if (stack := self._stacks[i]) is not None]
        products = list(places)
        if problem.clipping is not None and step.unclipped is not None:
            problem.clipping.product_(step.unclipped, products)
        products = problem.dynamics.vjp_(step, {THETA: products}, state_part=False)
        for place, product in zip(places, products, strict=True):
            if place is not product:
                place.copy_(product)

    def hypergradient(self, validation: ValidationGradient) -> list[Tensor]:
        """Returns ⟨g_V, ∂θ_{t+1}/∂λ⟩, with respect to raw λ."""
        raws = {name: h.raw for name, h in self._problem.hyperparameters.items()}
        totals = {name: torch.zeros_like(raw) for name, raw in raws.items()}
        # Parameters that have joined since are not yet affected.
        joined = len(self._problem.theta) - len(self._stacks)
        products = validation.products([*self._stacks, *[None] * joined])
        for names, dots in zip(self._owners, products, strict=False):
            for name, dot in zip(names, dots, strict=True):
                totals[name] += dot.reshape(totals[name].shape)
        return list(totals.values())
