"""Reverse mode: a window of steps, differentiated backwards from the validation loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_hpo.distributed import world_size
from lightning_hpo.dynamics import THETA, OptimizerStep, State
from lightning_hpo.estimators._recompute import rebuild, thinned
from lightning_hpo.estimators.base import Problem
from lightning_hpo.objectives import Moment, is_plain

# Windows up to this length keep every step.
KEPT_STEPS = 256


@dataclass
class _Record:
    moments: list[tuple[Moment, float]]
    step: OptimizerStep


class Window:
    """The last steps, with all that is needed to differentiate them.

        α_K = g_V,   ḡ_t = (∂Φ/∂g)ᵀ α_{t+1},   α_t = (∂Φ/∂s)ᵀ α_{t+1} + H ḡ_t,   dL_V/dλ = Σ Bᵀ ḡ_t

    Reverse-HG of Franceschi et al. (2017), Algorithm 1. Each step is replayed on its own, so that
    one step's graph is alive at a time. Memory: |θ| per step, and for a nonlinear optimizer its
    gradient and state besides. The cost does not depend on the number of λ.

    A window of more than ``KEPT_STEPS`` steps keeps every √K-th step only, and makes those in
    between again from there: about 2 √K |θ|, for one more gradient per step. Every step keeps its
    batch, its random state and the buffers that changed.

    Args:
        problem: The problem.
        length: The number of steps K.
    """

    def __init__(self, problem: Problem, length: int = 1) -> None:
        self._problem = problem
        self._stride = 1 if length <= KEPT_STEPS else math.isqrt(length)
        if self._stride > 1:
            # Making steps again needs the values of g and of the state.
            problem.dynamics.nonlinear = True
        self._records: list[_Record] = []
        self._moments: list[tuple[Moment, float]] = []

    def __len__(self) -> int:
        return len(self._records)

    def discard(self) -> None:
        """Forgets the micro-batches of a step that did not happen."""
        self._moments = []

    def before_batch(self, moment: Moment, weight: float) -> None:
        """Keeps a micro-batch for its replay."""
        self._moments.append((moment, weight))

    def before_step(self, step: OptimizerStep) -> None:
        """Keeps the step. It must have been captured with ``keep=True``."""
        if len(self._records) % self._stride:
            step = thinned(step)
        self._records.append(_Record(self._moments, step))
        self._moments = []

    def hypergradient(self, g_v: list[Tensor]) -> list[Tensor] | None:
        """Differentiates the window backwards, and empties it; uses up g_V.

        None where the optimizer was given parameters within the window.
        """
        problem = self._problem
        if any(len(record.step.gradients) != len(g_v) for record in self._records):
            self._records.clear()
            return None
        adjoint: State = {THETA: [g.unsqueeze(0) for g in g_v]}
        _, total = problem.zeros(1, theta_part=False)
        while self._records:
            self._complete_last()
            record = self._records.pop()
            problem.add_option_adjoints_(record.step, adjoint, total)
            # Before the first step of the window θ does not depend on λ.
            theta_part = bool(self._records)
            g_bar = problem.dynamics.vjp_(record.step, adjoint, state_part=theta_part)
            if problem.clipping is not None and record.step.unclipped is not None:
                problem.clipping.product_(record.step.unclipped, g_bar)
            for tensors in adjoint.values():
                for i in record.step.frozen if theta_part else ():
                    tensors[i].zero_()  # as its tangent, from when it leaves the training
            self._accumulate(record, g_bar, (adjoint[THETA] if theta_part else [], total))
        return [t[0] for t in total]

    def _complete_last(self) -> None:
        """Makes the steps since the last one that was kept again, if they are thinned."""
        if self._records[-1].step.theta:
            return
        kept = max(i for i, record in enumerate(self._records) if record.step.theta)
        later = self._records[kept + 1 :]
        steps = rebuild(
            self._problem,
            self._records[kept].step,
            [(record.moments, record.step) for record in later],
        )
        for record, step in zip(later, steps, strict=True):
            record.step = step

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps of the window, where they can be saved, and their number.

        They cannot where a batch is no container of tensors and numbers, or where each of several
        processes has batches of its own: a checkpoint holds those of one process.
        """
        records = [] if world_size() > 1 else [self._pack(record) for record in self._records]
        return {"records": None if None in records else records, "length": len(self._records)}

    def _pack(self, record: _Record) -> dict[str, Any] | None:
        moments = [(self._problem.objective.pack(moment), w) for moment, w in record.moments]
        step = vars(record.step)
        if not is_plain(step) or any(moment is None for moment, _ in moments):
            return None
        return {"moments": moments, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores the steps of a window; returns whether all of them are there."""
        for record in state["records"] or ():
            moments = [(self._problem.objective.unpack(m), w) for m, w in record["moments"]]
            step = move_data_to_device(record["step"], self._problem.theta[0].device)
            self._records.append(_Record(moments, OptimizerStep(**step)))
        return len(self._records) == int(state["length"])

    def one_step(self, g_v: list[Tensor]) -> list[Tensor] | None:
        """Returns −Bᵀ g_V of the last step alone: no optimizer, no clipping, no step size."""
        _, total = self._problem.zeros(1, theta_part=False)
        record = self._records.pop()
        self._records.clear()
        self._accumulate(record, [-g.unsqueeze(0) for g in g_v], ([], total))
        return [t[0] for t in total]

    def _accumulate(
        self, record: _Record, g_bar: list[Tensor], into: tuple[list[Tensor], list[Tensor]]
    ) -> None:
        """Adds (H ḡ, Bᵀ ḡ) of one step; an empty part is not wanted."""
        problem = self._problem
        theta_result, lam_result = into
        for moment, weight in record.moments:
            theta_part, lambda_part = problem.network_hvp(
                moment,
                g_bar,
                None,
                step=record.step,
                theta_part=bool(theta_result),
            )
            if theta_part:
                torch._foreach_add_(theta_result, theta_part, alpha=weight)
            torch._foreach_add_(lam_result, lambda_part, alpha=weight)
        problem.add_penalty_hvp_(into, record.step, g_bar)
