"""Steps of a long window made again from a checkpoint, so that few of them need to be kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_hpo.dynamics import GenericDynamics, OptimizerStep
from lightning_hpo.estimators.base import Problem, in_place
from lightning_hpo.objectives import Moment

Moments = list[tuple[Moment, float]]


def thinned(step: OptimizerStep) -> OptimizerStep:
    """Returns a step without its tensors: only its options, and which parameters took part."""
    marks = [None if g is None else g.new_empty(0) for g in step.gradients]
    return replace(step, theta=[], gradients=marks, state=[], unclipped=None)


def rebuild(
    problem: Problem, start: OptimizerStep, later: list[tuple[Moments, OptimizerStep]]
) -> list[OptimizerStep]:
    """Repeats training from a kept step through thinned ones.

    Each gradient is taken again with the same batch and random draws, gets the penalties and the
    clipping, and moves θ through the optimizer's own formula.

    Args:
        problem: The problem.
        start: A complete step.
        later: The micro-batches and the thinned record of each step after it.

    Returns:
        The complete records of ``later``.
    """
    dynamics = GenericDynamics(problem.dynamics.optimizer)
    complete = []
    current = start
    for moments, record in later:
        theta, state = dynamics.advance(current)
        gradients = _gradients(problem, moments, record, theta)
        unclipped = None
        if record.clipping is not None:
            unclipped = [None if g is None else g.clone() for g in gradients]
            record.clipping.clip_(gradients)
        current = replace(
            record, theta=theta, state=state, gradients=gradients, unclipped=unclipped
        )
        complete.append(current)
    return complete


def _gradients(
    problem: Problem, moments: Moments, record: OptimizerStep, theta: list[Tensor]
) -> list[Tensor | None]:
    """Returns the gradient of the regularized loss at θ, before clipping."""
    active = [i for i, g in enumerate(record.gradients) if g is not None]
    own = [problem.theta[i] for i in active]
    total = [torch.zeros_like(theta[i]) for i in active]
    with in_place(problem.theta, theta, active):
        for moment, weight in moments:
            parts = problem.objective.gradient(moment, own)
            for part, whole in zip(parts or (), total, strict=bool(parts)):
                if part is not None:
                    whole.add_(part, alpha=weight)
    problem.average_(total)
    result: list[Tensor | None] = [None] * len(theta)
    for i, whole in zip(active, total, strict=True):
        result[i] = whole
    problem.add_penalty_gradients_(result, theta)
    return result
