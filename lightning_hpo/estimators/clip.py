"""ClipR: tangents that are kept between updates and projected on a ball."""

from __future__ import annotations

from typing import Any

from lightning_hpo._arguments import check_count, check_flag, check_number, named_arguments
from lightning_hpo.estimators.base import Estimate, Estimator
from lightning_hpo.step import Space, Step, ValidationGradient


class ClipR(Estimator):
    r"""Online hypergradient with clipped tangents (online-HPO paper, Algorithm 1 and eq. 9).

        y_{t+1} = P_r(∂Φ/∂s (γ y_t) + ∂Φ/∂g (H γ y_t + B)),   P_r(y) = r / max(‖y‖, r) · y
        dL_V/dλ ≈ ⟨g_V(θ_{t+1}), y_{t+1}⟩

    ‖y‖ is the norm over all parameters, per scalar λ; the tangents of the optimizer's state are
    scaled along. y is the derivative with respect to raw λ.

    Without forgetting (γ = 1), a λ that starts far too high can be driven past its optimum: the
    clipped tangent keeps its old direction, and with it the sign of the hypergradient.

    Cost per step: one product with the joint Hessian per scalar λ; per update, one validation
    gradient.

    Memory: (1 + number of optimizer state tensors) |θ| per scalar λ, and the size of the buffers
    that are followed (running statistics, centres, banks of features). While a step is under way,
    its product besides, whatever the number of λ: about 1.5 |θ|, with differences 2 |θ|, and the
    gradient before clipping; and what a replay depends on, a copy of the batch and the buffers.
    Where gradients are accumulated, or a hook of the module or of another callback stands between
    batch and step and may change either, products are formed at the batch and kept: |θ| more per
    scalar λ.

    Args:
        radius: r, in the units of θ per unit of raw λ; ``inf`` is RTHO (Franceschi et al. 2017).
        decay: γ between 0 and 1, applied at every step; 0 forgets everything, which is T1–T2.
        stride: Advances the tangents through every n-th step only, with γⁿ, so that the cost per
            step falls by n. Their fixed point, −H⁻¹B for plain gradient descent, is that of stride
            1, approached n times as slowly, and they are stable wherever the training is:
            directions of low curvature, whose tangents still grow, come out up to n times too
            small.
        sync_tangents: On several ranks, whether their products H y + B are averaged at every step,
            |θ| numbers per scalar λ. That is exact. With False each rank follows the
            tangents of its own shard of the data, and only ⟨g_V, y⟩ is averaged, at the updates: λ
            stay equal on all ranks, but the mean of products is not the product of the means, and
            it differs wherever the shards do. Norms are then of the rank's own tangents, and a
            checkpoint holds those of rank 0. No effect where the parameters are sharded: their
            gradients come averaged.

    Raises:
        TypeError: If an argument is not a number, or ``sync_tangents`` is not a bool.
        ValueError: If ``radius`` is NaN or not positive, ``decay`` is outside [0, 1], or
            ``stride`` is no positive integer.

    Example:
        >>> callback = OnlineHPOCallback(ClipR(20.0, decay=0.99))
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> callback.history[-1].tangent_norms["l2"] <= 20.0
        True
    """

    @named_arguments("ClipR")
    def __init__(
        self,
        radius: float = 20.0,
        decay: float = 1.0,
        stride: int = 1,
        sync_tangents: bool = True,
    ) -> None:
        check_number("ClipR", "a positive number or inf (RTHO)", lambda r: r > 0, radius=radius)
        check_number("ClipR", "a number in [0, 1]", lambda d: 0 <= d <= 1, decay=decay)
        check_count("ClipR", stride=stride)
        check_flag("ClipR", sync_tangents=sync_tangents)
        self.radius = float(radius)
        self.decay = float(decay)
        self.stride = stride
        self.sync_tangents = sync_tangents

    def setup(self, space: Space) -> None:
        """Starts a training from y = 0."""
        super().setup(space)
        self._tangents = space.tangents(decay=self.decay**self.stride, sync=self.sync_tangents)

    def observe(self, step: Step) -> None:
        """Advances the tangents and clips them."""
        step.jvp_(self._tangents)
        self._tangents.project_(self.radius)

    def hypergradient(self, validation: ValidationGradient) -> Estimate:
        """Returns ⟨g_V, y⟩, with respect to raw λ, and ‖y‖ after clipping."""
        result, norms = self._tangents.hypergradient(validation)
        return Estimate(self.space.split(result), self.space.split(norms))

    def state_dict(self) -> dict[str, Any]:
        """Returns the tangents."""
        return self._tangents.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the tangents."""
        self._tangents.load_state_dict(state)
