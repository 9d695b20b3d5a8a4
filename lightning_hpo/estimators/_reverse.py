"""Reverse mode: a window of steps, differentiated backwards from the validation loss."""

from __future__ import annotations

import math
from typing import Any

from lightning_hpo.distributed import world_size
from lightning_hpo.dynamics import THETA, State
from lightning_hpo.estimators.base import Estimate
from lightning_hpo.step import Space, Step, ValidationGradient

# Windows up to this length keep every step.
KEPT_STEPS = 256


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
        space: θ and λ.
        length: The number of steps K.
        through_optimizer: Whether ∂Φ/∂g and clipping are applied; else their place is taken by −1.
    """

    def __init__(self, space: Space, length: int = 1, *, through_optimizer: bool = True) -> None:
        self._space = space
        self._length = length
        self._through_optimizer = through_optimizer
        self._stride = 1 if length <= KEPT_STEPS else math.isqrt(length)
        self._steps: list[Step] = []

    def append(self, step: Step) -> None:
        """Keeps a step."""
        if len(self._steps) % self._stride:
            self._steps.append(step.thinned())
        else:
            kept = step.kept(
                is_first=self._length == 1,
                rebuilds=self._stride > 1,
                through_optimizer=self._through_optimizer,
            )
            self._steps.append(kept)

    def hypergradient(self, validation: ValidationGradient) -> Estimate | None:
        """Differentiates the window backwards, and empties it.

        None where the optimizer was given parameters within the window.
        """
        g_v = validation.tensors()
        if any(len(step.point.gradients) != len(g_v) for step in self._steps):
            self._steps.clear()
            return None
        adjoint: State = {THETA: [g.unsqueeze(0) for g in g_v]}
        statistics = None  # no gradient descent moves them: −g_V stands for no step of theirs
        if self._through_optimizer:
            statistics = [g.unsqueeze(0).clone() for g in validation.statistics()]
        total = list(self._space.zeros(1).values())
        while self._steps:
            self._complete_last()
            # Before the first step of the window θ does not depend on λ.
            is_first = len(self._steps) == 1
            step = self._steps.pop()
            parts = step.vjp_(adjoint, statistics, state_part=not is_first)
            for whole, part in zip(total, parts, strict=True):
                whole.add_(part)
        return Estimate([t[0] for t in total])

    def _complete_last(self) -> None:
        """Makes the steps since the last one that was kept again, if they are thinned."""
        if self._steps[-1].is_thinned:
            kept = max(i for i, step in enumerate(self._steps) if not step.is_thinned)
            for i in range(kept + 1, len(self._steps)):
                self._steps[i] = self._steps[i].remade(self._steps[i - 1])

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps of the window, where they can be saved, and their number.

        They cannot where a batch is no container of tensors and numbers, or where each of several
        processes has batches of its own: a checkpoint holds those of one process.
        """
        steps = [None] if world_size() > 1 else [step.pack() for step in self._steps]
        return {"steps": None if None in steps else steps, "length": len(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores the steps of a window; returns whether all of them are there."""
        self._steps = [Step.unpack(self._space, step) for step in state["steps"] or ()]
        return len(self._steps) == int(state["length"])
