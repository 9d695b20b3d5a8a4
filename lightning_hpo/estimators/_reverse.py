"""Reverse mode: a window of steps, differentiated backwards from the validation loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_hpo._tensors import rows
from lightning_hpo.distributed import world_size
from lightning_hpo.dynamics import (
    THETA,
    GradientClipping,
    OptimizerStep,
    State,
    multiply_by_slope_,
    vjp_lean_,
)
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
    gradient and state besides (in a window of one step only ∂Φ/∂g). The cost does not depend on the
    number of λ.

    A window of more than ``KEPT_STEPS`` steps keeps every √K-th step only, and makes those in
    between again from there: about 2 √K |θ|, for one more gradient per step. Every step keeps its
    batch, its random state and the buffers that changed.

    Args:
        problem: The problem.
        length: The number of steps K.
        through_steps: Whether ∂Φ/∂g and clipping are applied; else their place is taken by −1.
    """

    def __init__(self, problem: Problem, length: int = 1, *, through_steps: bool = True) -> None:
        self._problem = problem
        self._length = length
        self._through_steps = through_steps
        self._stride = 1 if length <= KEPT_STEPS else math.isqrt(length)
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
        """Keeps the step."""
        problem = self._problem
        if len(self._records) % self._stride:
            step = thinned(step)
        elif not self._through_steps:
            step = replace(step.kept(values=False), clipping=None, unclipped=None)
        elif self._keeps_slope:
            step = self._with_slope(step)
        else:
            # ∂Φ/∂λ of tuned options, and making steps again, need the values where Φ is linear too.
            remakes = problem.options is not None or self._stride > 1
            step = step.kept(values=problem.dynamics.nonlinear or remakes)
        self._records.append(_Record(self._moments, step))
        self._moments = []

    @property
    def _keeps_slope(self) -> bool:
        """Whether one number per element says all about a step: Φ is nonlinear but elementwise."""
        problem = self._problem
        is_last = self._length == 1 and problem.options is None
        return is_last and problem.dynamics.nonlinear and problem.dynamics.is_elementwise

    def _with_slope(self, step: OptimizerStep) -> OptimizerStep:
        """Keeps ∂Φ/∂g in the place of g and the state, where adjoints need nothing else."""
        problem = self._problem
        slope = [t.new_ones((1, *t.shape)) for t in step.theta]  # contiguous
        multiply_by_slope_(problem.dynamics, step, [rows(t) for t in slope])
        kept = replace(step.kept(values=False), slope=slope)
        if step.clipping is not None and step.clipping.by_value:
            kept = replace(kept, clipping=None, unclipped=None)  # it is part of the slope
        return kept

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
            g_bar = self._through_step(record.step, adjoint, theta_part=theta_part)
            for tensors in adjoint.values():
                for i in record.step.frozen if theta_part else ():
                    tensors[i].zero_()  # as its tangent, from when it leaves the training
            self._accumulate(record, g_bar, (adjoint[THETA] if theta_part else [], total))
        return [t[0] for t in total]

    def _through_step(
        self, step: OptimizerStep, adjoint: State, *, theta_part: bool
    ) -> list[Tensor]:
        """Returns ḡ, and replaces the adjoint where that before the step is wanted."""
        problem = self._problem
        if not self._through_steps:
            return [t.neg_() for t in adjoint[THETA]]
        if step.slope is None:
            g_bar = vjp_lean_(problem.dynamics, step, adjoint, state_part=theta_part)
        else:
            g_bar = adjoint[THETA]
            torch._foreach_mul_(g_bar, step.slope)
        if step.clipping is not None:
            assert step.unclipped is not None
            step.clipping.product_(step.unclipped, g_bar)
        return g_bar

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
        step = {**vars(record.step), "clipping": None}
        if record.step.clipping is not None:
            step["clipping"] = vars(record.step.clipping)
        if not is_plain(step) or any(moment is None for moment, _ in moments):
            return None
        return {"moments": moments, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores the steps of a window; returns whether all of them are there."""
        for record in state["records"] or ():
            moments = [(self._problem.objective.unpack(m), w) for m, w in record["moments"]]
            step = move_data_to_device(record["step"], self._problem.theta[0].device)
            if step["clipping"] is not None:
                step["clipping"] = GradientClipping(**step["clipping"])
            self._records.append(_Record(moments, OptimizerStep(**step)))
        return len(self._records) == int(state["length"])

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
