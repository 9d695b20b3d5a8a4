"""The contract of an estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_hpo._repr import shown
from lightning_hpo.step import Space, Step, ValidationGradient


@dataclass
class Estimate:
    """What an estimator says at an update.

    Args:
        gradients: dL_V/d(raw λ), one tensor per hyperparameter of the space, shaped like its raw
            tensor.
        norms: ‖dθ/d(raw λ)‖ per scalar λ, in units of θ per unit of raw λ and the same shapes; None
            where no tangents are kept.
        outcome: How the estimate came about, where that can fail; kept in the history.

    Example:
        >>> class Signs(T1T2):
        ...     def hypergradient(self, validation):
        ...         estimate = super().hypergradient(validation)
        ...         return estimators.Estimate([h.sign() for h in estimate.gradients])
        >>> callback = OnlineHPOCallback(Signs(), every_n_steps=10)
    """

    gradients: list[Tensor]
    norms: list[Tensor] | None = None
    outcome: str | None = None


class Estimator(ABC):
    """Estimates dL_V/dλ, the total derivative along the training as far back as it can see.

    Each training works on a shallow copy of its own, which is dropped at the end: :meth:`setup` may
    set any attribute. Lists and dicts that the constructor has made are shared with the original;
    what changes belongs into :meth:`setup`. For every optimizer step
    that the estimator asks for, :meth:`observe` gets the :class:`Step` when the gradient is final
    and θ has not moved; where an update is due, :meth:`hypergradient` follows after θ has moved to
    θ_{t+1}. ``examples/guide/extending.md`` writes one.

    Example:
        >>> class OneStep(Estimator):
        ...     window = 1
        ...
        ...     def observe(self, step):
        ...         self.kept = step.kept()
        ...
        ...     def hypergradient(self, validation):
        ...         adjoint = {"theta": [g.unsqueeze(0) for g in validation.tensors()]}
        ...         return estimators.Estimate([t[0] for t in self.kept.vjp_(adjoint)])
        >>> callback = OnlineHPOCallback(OneStep(), every_n_steps=10)
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)

    Attributes:
        horizon: Steps between λ updates unless ``every_n_steps`` says otherwise.
        window: How many steps before an update are observed; None: every ``stride``-th step.
        stride: Which steps are observed where there is no window.
        uses_hessian: Whether products with H are asked for. Without them a step in which the λ act
            through penalties alone is not replayed.
        follows_statistics: Whether it sees how λ moves the running statistics of normalization
            layers. Where it does not, a warning names them.
        restart: Whether θ, the optimizer's state and the buffers return to the start of the window
            after each update.
    """

    horizon: int = 1
    window: int | None = None
    stride: int = 1
    uses_hessian: bool = True
    follows_statistics: bool = True
    restart: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self)})"

    def setup(self, space: Space) -> None:
        """Starts a training; an override calls ``super()``.

        Args:
            space: θ, and the λ that this estimator serves.

        Example:
            >>> class Announced(OneStep):
            ...     def setup(self, space):
            ...         super().setup(space)
            ...         print("serves", list(space.hyperparameters))
            >>> callback = OnlineHPOCallback(Announced(), every_n_steps=10)
            >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
            serves ['l2']
        """
        self.space = space

    @abstractmethod
    def observe(self, step: Step) -> None:
        """Sees a step: its gradient is final, θ_t is still in place.

        Args:
            step: The step as a map with its derivative. It is good until it returns; what is needed
                later is made by ``step.kept()``.

        Example:
            >>> class Watching(OneStep):
            ...     def observe(self, step):
            ...         super().observe(step)
            ...         print("learning rate", step.lr)
            >>> callback = OnlineHPOCallback(Watching(), every_n_steps=20)
            >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
            learning rate 0.1
        """

    @abstractmethod
    def hypergradient(self, validation: ValidationGradient) -> Estimate | None:
        """Returns the estimate of dL_V/dλ and starts the next window.

        Args:
            validation: ∇θ L_V at θ_{t+1}, taken when it is asked for.

        Returns:
            The estimate; None where the window is incomplete, so that λ is left alone.

        Example:
            >>> class Clamped(OneStep):
            ...     def hypergradient(self, validation):
            ...         estimate = super().hypergradient(validation)
            ...         bounded = [g.clamp(-1e-6, 1e-6) for g in estimate.gradients]
            ...         return estimators.Estimate(bounded)
            >>> callback = OnlineHPOCallback(Clamped(), every_n_steps=20)
            >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
            >>> abs(callback.history[0].hypergradients["l2"]) <= 1e-6
            tensor(True)
        """

    @property
    def kind(self) -> str:
        """What a checkpoint is compared by: its state fits only an estimator of the same kind.

        Example:
            >>> OneStep().kind
            'OneStep'
        """
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs: tensors, numbers, lists and dicts.

        Example:
            >>> class Saved(OneStep):
            ...     updates = 0
            ...
            ...     def state_dict(self):
            ...         return {"updates": self.updates}
            >>> Saved().state_dict()
            {'updates': 0}
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no state
        """Restores what :meth:`state_dict` returned, after :meth:`setup`.

        Args:
            state: As it was saved.

        Example:
            >>> class Restored(OneStep):
            ...     def load_state_dict(self, state):
            ...         self.updates = state["updates"]
            >>> estimator = Restored()
            >>> estimator.load_state_dict({"updates": 3})
        """
