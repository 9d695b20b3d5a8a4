"""T1–T2: the effect of λ on the last step alone."""

from __future__ import annotations

from lightning_hpo._arguments import check_flag, named_arguments
from lightning_hpo.estimators._reverse import Window
from lightning_hpo.estimators.base import Estimate, Estimator
from lightning_hpo.step import Effect, Space, Step, ValidationGradient


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
        MisconfigurationException: At the start of a training, if options of the optimizer are
            tuned with ``scale_by_lr=False``.

    Example:
        >>> callback = OnlineHPOCallback(T1T2(), every_n_steps=2)
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> len(callback.history)
        10
    """

    window = 1
    uses_hessian = False

    @named_arguments("T1T2")
    def __init__(self, scale_by_lr: bool = True) -> None:
        check_flag("T1T2", scale_by_lr=scale_by_lr)
        self.scale_by_lr = scale_by_lr
        self.follows_statistics = scale_by_lr

    def setup(self, space: Space) -> None:
        """Starts a training."""
        super().setup(space)
        if not self.scale_by_lr:
            space.refuse_options("T1T2(scale_by_lr=False)", "it leaves the optimizer's step out")
        self._window = Window(space, through_optimizer=self.scale_by_lr)
        self._effect: Effect | None = None

    def observe(self, step: Step) -> None:
        """Keeps the step, or what λ did in it."""
        self._effect = step.effect(through_optimizer=self.scale_by_lr)
        if self._effect is None:
            self._window.append(step)

    def hypergradient(self, validation: ValidationGradient) -> Estimate | None:
        """Returns Bᵀα, with respect to raw λ."""
        if self._effect is None:
            return self._window.hypergradient(validation)
        effect, self._effect = self._effect, None
        return Estimate(effect.pull_back(validation))
