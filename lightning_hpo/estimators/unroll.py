"""UnrollK: the exact derivative of a window of K steps."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

from lightning_hpo._arguments import check_choice, check_flag, check_integer, named_arguments
from lightning_hpo.estimators._reverse import Window
from lightning_hpo.estimators.base import Estimate, Estimator
from lightning_hpo.step import Space, Step, Tangents, ValidationGradient

Mode = Literal["auto", "forward", "reverse"]
MODES = get_args(Mode)


class UnrollK(Estimator):
    r"""dL_V(θ_K)/dλ for the last K steps, θ_0 held fixed (Franceschi et al. 2017).

    Online-HPO paper, eqs. 3–7. Each window starts where the last one ended and forgets how θ came
    to be there. So the estimate vanishes with the learning rate (§3.2); ``UnrollK(1)`` is T1–T2.

    Cost: forward, K products with the joint Hessian per scalar λ and (1 + optimizer states) |θ| of
    memory per scalar λ, and the size of the buffers that are followed; reverse, K products in all
    and about K |θ| of memory (and K times the gradient and the state of a nonlinear optimizer, and
    the gradient before clipping), or 2 √K times as much and one more gradient per step for K above
    256.

    Args:
        k: The length K of the window, in optimizer steps.
        mode: ``"forward"`` (Forward-HG), ``"reverse"`` (Reverse-HG), or ``"auto"``: forward where
            there are fewer scalar λ than K, else reverse. Both give the same numbers to rounding.
            With several λ and memory to spare, ``"reverse"`` takes less time.
        restart: After each λ update, θ, the optimizer's state and the module's buffers return to
            the start of the window: the offline method of Maclaurin et al. (2015) and Franceschi et
            al. (2017), with K the whole training. Costs one copy of them. The learning-rate
            schedule goes on: it counts all steps.
        sync_tangents: In forward mode on several ranks, whether their products H y + B are averaged
            at every step; see :class:`ClipR`.

    Raises:
        TypeError: If ``k`` is not an integer, or ``restart`` or ``sync_tangents`` is not a bool.
        ValueError: If ``k < 1`` or ``mode`` is unknown.

    Example:
        >>> callback = OnlineHPOCallback(UnrollK(5))
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> [record.step for record in callback.history]
        [5, 10, 15, 20]
    """

    @named_arguments("UnrollK")
    def __init__(
        self, k: int, mode: Mode = "auto", restart: bool = False, sync_tangents: bool = True
    ) -> None:
        check_integer("UnrollK", 1, "step", k=k)
        check_choice("UnrollK", MODES, mode=mode)
        check_flag("UnrollK", restart=restart, sync_tangents=sync_tangents)
        self.k = k
        self.restart = restart
        self.sync_tangents = sync_tangents
        self.mode = mode
        self.horizon = k
        self.window = k
        self.uses_hessian = k > 1

    def setup(self, space: Space) -> None:
        """Starts a training, and settles the mode."""
        super().setup(space)
        forward = self.mode == "forward" or (self.mode == "auto" and space.count < self.k)
        self._is_cut = False
        self._mechanism: Tangents | Window = (
            space.tangents(sync=self.sync_tangents) if forward else Window(space, self.k)
        )

    @property
    def kind(self) -> str:
        """The window is a part of it: an open one fits only one of the same length and mode."""
        mode = "forward" if isinstance(self._mechanism, Tangents) else "reverse"
        return f"UnrollK({self.k}, {mode!r})"

    def observe(self, step: Step) -> None:
        """Advances the tangents, or keeps the step."""
        if isinstance(self._mechanism, Tangents):
            step.jvp_(self._mechanism)
        else:
            self._mechanism.append(step)

    def hypergradient(self, validation: ValidationGradient) -> Estimate | None:
        """Returns the derivative over the window, with respect to raw λ.

        None at the end of a reverse window whose first steps a checkpoint could not hold.
        """
        estimate: Estimate | None
        if isinstance(self._mechanism, Tangents):
            result, norms = self._mechanism.hypergradient(validation)
            estimate = Estimate(self.space.split(result), self.space.split(norms))
            self._mechanism.reset()
        else:
            estimate = self._mechanism.hypergradient(validation)
        if self._is_cut:
            self._is_cut = False
            return None
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """Returns the open window: its tangents, or its steps with their batches."""
        return self._mechanism.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the open window, or notes that its steps are lost."""
        self._is_cut = self._mechanism.load_state_dict(state) is False
        if self._is_cut:
            warnings.warn(
                "UnrollK: the checkpoint could not hold the first steps of the window that was "
                "open (batches that are no containers of tensors, or several processes); there is "
                "no λ update at its end",
                stacklevel=2,
            )
