"""T1–T2: the effect of λ on the last step alone."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_hpo.dynamics import OptimizerStep
from lightning_hpo.estimators._reverse import Window
from lightning_hpo.estimators.base import Estimator, Problem
from lightning_hpo.objectives import Moment


class T1T2(Estimator):
    r"""One-step hypergradient (Luketina et al. 2016, eq. 3; online-HPO paper, eq. 8).

        dL_V/dλ ≈ Bᵀ α,   α = (∂Φ/∂g)ᵀ g_V(θ_{t+1}),   B = ∂²L_T/∂θ∂λ at (θ_t, λ_t)

    For plain SGD α = −η g_V; for any other optimizer it is g_V pulled back through its step, so the
    result is exactly that of ``UnrollK(1)``. It is proportional to the long-run hypergradient only
    where the Hessian of L_T is a multiple of the identity.

    Cost per update: one validation gradient, and the product Bᵀα, which is free for penalties that
    act in the gradient. It does not depend on the number of λ. Memory: one copy of θ, and for
    an optimizer such as Adam, whose step is nonlinear, one of its gradient and state.

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

    @property
    def replay(self) -> Literal["never", "later"]:
        """Later, where some λ acts inside the training loss; else never."""
        return "later" if self.problem.in_loss else "never"

    @property
    def keeps_steps(self) -> bool:
        """The step is differentiated after it has happened."""
        return True

    def before_batch(self, moment: Moment, weight: float) -> None:
        """Keeps the micro-batch."""
        self._window.before_batch(moment, weight)

    def before_step(self, step: OptimizerStep) -> None:
        """Keeps the step."""
        self._window.before_step(step)

    def discard(self) -> None:
        """Forgets the micro-batches of a step that did not happen."""
        self._window.discard()

    def hypergradient(self, g_v: list[Tensor]) -> list[Tensor] | None:
        """Returns Bᵀα, with respect to raw λ."""
        return (self._window.hypergradient if self.scale_by_lr else self._window.one_step)(g_v)
