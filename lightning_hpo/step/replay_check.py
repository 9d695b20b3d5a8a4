"""Whether the gradient of a step is that of its replay, on which every estimator relies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._tensors import filled, separate, widened
from lightning_hpo.distributed import average_, local
from lightning_hpo.objectives import Moment
from lightning_hpo.step.training_map import TrainingMap

# Steps after which the gradient is compared again.
EVERY = 100


class ReplayCheck:
    """Compares the gradient of a step with that of its replay: at the first, then now and then.

    Where both are the same to rounding, and nothing else may change gradients, one-sided
    differences may use the step's own. Where they differ much there is a warning. Where the replay
    is that of the step at its batch, but no longer right before the optimizer moves, steps are
    replayed at their batches from then on.

    Args:
        training: What all steps share; its ``reuses_gradient`` is set here.
        hooks_may_change: Whether hooks may change gradients after the backward pass.

    Attributes:
        forbids_delay: Whether such a replay has been seen not to be that of the step.
        hooks_may_change: Whether hooks may change gradients after the backward pass.
    """

    def __init__(self, training: TrainingMap, hooks_may_change: Callable[[], bool]) -> None:
        self.forbids_delay = False
        self._compared_at = 0  # the step at which they were compared last; 0: not yet
        self._training = training
        self.hooks_may_change = hooks_may_change
        self._expected: list[Tensor] | None = None
        self._is_regular = False
        self._moment: Moment | None = None

    def is_due(self, step: int) -> bool:
        """Whether it is time to compare again, at a step after which λ is updated.

        At other steps the host would have to wait for the device.
        """
        return step - self._compared_at >= EVERY

    def look_at_hooks(self) -> None:
        """Gives up the step's own gradient where a hook has come since."""
        if self._training.reuses_gradient and self.hooks_may_change():
            self._training.reuses_gradient = False

    def expect(self, gradients: list[Tensor | None] | None, *, is_regular: bool = False) -> None:
        """Keeps the gradient of a replay.

        Args:
            gradients: One per parameter; None where the step has no loss.
            is_regular: Whether this is the comparison that was due. One that a resumed training
                makes at its start does not count: it leaves the others where they would have been.
        """
        self._is_regular = is_regular
        if gradients is not None:
            # Ranks may differ in which parameters they use, but not in what they average.
            self._expected = separate(filled(gradients, self._training.theta))
            if not self._training.sharded:
                average_(self._expected)

    def watch(self, moment: Moment) -> None:
        """Keeps a micro-batch that will be replayed right before the step, if it is compared."""
        if self._expected is not None and not self._training.sharded:
            self._moment = moment

    def forget(self) -> None:
        """Forgets the gradient of a batch after which the optimizer did not step."""
        self._expected = self._moment = None

    def compare(self, step: int) -> None:
        """Compares the gradient in place with what is expected, if anything is.

        Args:
            step: The step, counted from 1.
        """
        expected, self._expected = self._expected, None
        moment, self._moment = self._moment, None
        if expected is None:
            return
        training = self._training
        error = self._error(expected)
        if error is None:
            return
        is_first = self._compared_at == 0
        counts = is_first or self._is_regular
        if counts:
            self._compared_at = step
        # A difference is divided by √ε, in which more than rounding would be seen.
        rounding = 8 * min(torch.finfo(widened(g).dtype).eps for g in expected)
        if moment is not None:
            del expected
            self.expect(training.objective.gradient(moment, training.theta))
            late, self._expected = self._error(self._expected or []), None
            is_late = late is not None and late > max(rounding, 2 * error)
            self.forbids_delay |= counts and is_late
        training.reuses_gradient = (
            error <= rounding
            and not self.forbids_delay
            and (is_first or training.reuses_gradient)
            and not self.hooks_may_change()
        )
        if error > 0.05:
            warnings.warn(
                "OnlineHPOCallback: the gradient differs from that of a replay of its "
                f"training_step by {error:.0%}. Either hooks change gradients, or the loss depends "
                "on something that a replay cannot reproduce: random numbers from elsewhere than "
                "torch, NumPy and Python's random, or state outside of the module (global "
                "variables, files, threads); hypergradients will not see it",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been found out so far."""
        return {
            "reuses_gradient": self._training.reuses_gradient,
            "compared_at": self._compared_at,
            "forbids_delay": self.forbids_delay,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._training.reuses_gradient = bool(state["reuses_gradient"])
        self._compared_at = int(state["compared_at"])
        self.forbids_delay = bool(state["forbids_delay"])

    def _error(self, expected: list[Tensor]) -> float | None:
        """Returns the relative error of a gradient; None where the step has none."""
        pairs = [
            (widened(g), widened(local(p.grad)))
            for p, g in zip(self._training.theta, expected, strict=False)
            if p.grad is not None
        ]
        if not pairs:
            return None
        difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
        return float(difference / torch.stack([b.norm() for _, b in pairs]).norm())
