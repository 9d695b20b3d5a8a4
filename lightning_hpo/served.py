"""An estimator at work in a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_hpo.estimators import Estimate, Estimator
from lightning_hpo.step import Space, ValidationGradient


@dataclass
class Served:
    """An estimator at work, and what it serves.

    Attributes:
        pattern: The pattern of names that it was given for.
        estimator: A copy of the user's.
        space: θ, and the λ that it serves.
    """

    pattern: str
    estimator: Estimator
    space: Space

    def observes(self, step: int, should_update: Callable[[int], bool]) -> bool:
        """Whether it needs to see a step, counted from 1."""
        window = self.estimator.window
        if window is None:
            return step % self.estimator.stride == 0
        return any(should_update(step + i) for i in range(window))

    def estimate(self, validation: ValidationGradient) -> Estimate | None:
        """Returns the estimate, if its parts are what they must be.

        Raises:
            TypeError: If it is no :class:`Estimate`.
            ValueError: If it has other shapes than raw λ.
        """
        name = type(self.estimator).__name__
        estimate = self.estimator.hypergradient(validation)
        if estimate is None:
            return None
        if not isinstance(estimate, Estimate):
            raise TypeError(
                f"{name}.hypergradient returned a {type(estimate).__name__}, expected an Estimate "
                "or None"
            )
        expected = [tuple(raw.shape) for raw in self.space.raws]
        for part in (estimate.gradients, estimate.norms):
            found = expected if part is None else [tuple(t.shape) for t in part]
            if found != expected:
                raise ValueError(
                    f"{name}.hypergradient returned tensors of the shapes {found}, expected "
                    f"{expected}: one per hyperparameter of {list(self.space.hyperparameters)}, "
                    "shaped like its raw tensor; space.split() makes them from one number per "
                    "scalar"
                )
        return estimate
