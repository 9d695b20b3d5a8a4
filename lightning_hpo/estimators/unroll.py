"""UnrollK: the exact derivative of a window of K steps."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_hpo._arguments import check_choice, check_flag, check_integer
from lightning_hpo.distributed import local
from lightning_hpo.dynamics import OptimizerStep
from lightning_hpo.estimators._forward import Tangents
from lightning_hpo.estimators._reverse import Window
from lightning_hpo.estimators.base import Estimator, Problem, ValidationGradient
from lightning_hpo.objectives import Moment

Mode = Literal["auto", "forward", "reverse"]
MODES = get_args(Mode)


class Snapshot:
    """A copy of θ, the optimizer's state and the buffers, to return to.

    Args:
        problem: The problem.
        saved: What :meth:`state_dict` of an earlier snapshot returned. Default: the present.
    """

    def __init__(self, problem: Problem, saved: dict[str, Any] | None = None) -> None:
        self._problem = problem
        optimizer = problem.dynamics.optimizer
        self._values = saved or {
            "theta": [local(p.detach()).clone() for p in problem.theta],
            "state": [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in problem.theta],
            "buffers": [b.detach().clone() for b in problem.objective.buffers()],
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back; the λ themselves stay."""
        theta, values = self._problem.theta, self._values
        # Parameters that have joined the training within the window stay.
        for p, value, state in zip(theta, values["theta"], values["state"], strict=False):
            local(p).copy_(value)
            self._problem.dynamics.optimizer.state[p] = {
                name: v.to(p.device) if isinstance(v, Tensor) and v.dim() else v
                for name, v in state.items()
            }
        for buffer, value in zip(self._problem.objective.buffers(), values["buffers"], strict=True):
            buffer.copy_(value)

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the copies; None for sharded parameters, of which each process has its own."""
        return None if self._problem.sharded else self._values


class UnrollK(Estimator):
    r"""dL_V(θ_K)/dλ for the last K steps, θ_0 held fixed (Franceschi et al. 2017).

    Online-HPO paper, eqs. 3–7. Each window starts where the last one ended and forgets how θ came
    to be there. So the estimate vanishes with the learning rate (§3.2); ``UnrollK(1)`` is T1–T2.

    Cost: forward, K products with the joint Hessian per scalar λ and (1 + optimizer states) |θ| of
    memory per scalar λ; reverse, K products in all and about K |θ| of memory (and K times the
    gradient and the state of a nonlinear optimizer, and the gradient before clipping), or 2 √K
    times as much and one more gradient per step for K above 256.

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
    """

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

    def setup(self, problem: Problem) -> None:
        """Starts a training, and settles the mode."""
        super().setup(problem)
        forward = self.mode == "forward" or (self.mode == "auto" and problem.count < self.k)
        self._start: Snapshot | None = None
        self._is_cut = False
        self._mechanism: Tangents | Window = (
            Tangents(problem, self.sync_tangents) if forward else Window(problem, self.k)
        )

    @property
    def kind(self) -> str:
        """The window is a part of it: an open one fits only one of the same length and mode."""
        mode = "forward" if isinstance(self._mechanism, Tangents) else "reverse"
        return f"UnrollK({self.k}, {mode!r})"

    @property
    def replay(self) -> Literal["before_step", "after_step"]:
        """Before the step in forward mode, after the window in reverse mode."""
        return "before_step" if isinstance(self._mechanism, Tangents) else "after_step"

    def before_batch(self, moment: Moment, weight: float) -> None:
        """Multiplies with the joint Hessian, or keeps the micro-batch."""
        if self.restart and self._start is None:
            self._start = Snapshot(self.problem)
        self._mechanism.before_batch(moment, weight)

    def before_step(self, step: OptimizerStep) -> None:
        """Advances or keeps the step."""
        self._mechanism.before_step(step)

    def discard(self) -> None:
        """Forgets the micro-batches of a step that did not happen."""
        self._mechanism.discard()

    def hypergradient(self, validation: ValidationGradient) -> list[Tensor] | None:
        """Returns the derivative over the window, with respect to raw λ.

        None at the end of a reverse window whose first steps a checkpoint could not hold.
        """
        result: list[Tensor] | None
        if isinstance(self._mechanism, Tangents):
            result, norms = self._mechanism.hypergradient(validation)
            self._norms = self.problem.from_stack(norms)
            self._mechanism.reset()
        else:
            result = self._mechanism.hypergradient(validation.tensors())
        if self._is_cut:
            self._is_cut = False
            return None
        return result

    def after_update(self) -> None:
        """Returns to the start of the window, where ``restart`` asks for it."""
        if self._start is not None:
            self._start.restore()
            self._start = None

    def tangent_norms(self) -> list[Tensor] | None:
        """Returns ‖y‖ at the end of the last window; None in reverse mode."""
        return self._norms if isinstance(self._mechanism, Tangents) else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the open window: its tangents, or its steps with their batches."""
        start = None if self._start is None else self._start.state_dict()
        return {"window": self._mechanism.state_dict(), "start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the open window, or notes that its steps are lost."""
        if state["start"] is not None:
            self._start = Snapshot(self.problem, state["start"])
        self._is_cut = self._mechanism.load_state_dict(state["window"]) is False
        if self._is_cut:
            warnings.warn(
                "UnrollK: the checkpoint could not hold the first steps of the window that was "
                "open (batches that are no containers of tensors, or several processes); there is "
                "no λ update at its end",
                stacklevel=2,
            )
