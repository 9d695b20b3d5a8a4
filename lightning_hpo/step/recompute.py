"""Steps of a long window made again from one that was kept, so that few need to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hpo.dynamics import GenericDynamics
from lightning_hpo.step.network import in_place
from lightning_hpo.step.step import Step


def rebuild(start: Step, later: Sequence[Step]) -> list[Step]:
    """Repeats training from a kept step through thinned ones.

    Each gradient is taken again with the same batch and random draws, gets the penalties and the
    clipping, and moves θ through the optimizer's own formula. Costs a gradient per step.

    Args:
        start: A step that was kept with ``rebuilds=True``.
        later: The thinned steps after it.

    Returns:
        The complete steps of ``later``.
    """
    dynamics = GenericDynamics(start.space.training.dynamics.optimizer)
    complete = []
    current = start.point
    for step in later:
        after = dynamics.advance(current)
        gradients = _gradients(step, after.theta)
        unclipped = None
        if step.point.clipping is not None:
            unclipped = [None if g is None else g.clone() for g in gradients]
            step.point.clipping.clip_(gradients)
        current = replace(
            step.point,
            theta=after.theta,
            state=after.state,
            own=after.own,
            gradients=gradients,
            unclipped=unclipped,
        )
        complete.append(replace(step, point=current))
    return complete


def _gradients(step: Step, theta: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradient of the regularized loss at θ, before clipping."""
    training = step.space.training
    active = [i for i, g in enumerate(step.point.gradients) if g is not None]
    own = [training.theta[i] for i in active]
    total = [torch.zeros_like(theta[i]) for i in active]
    with in_place(training.theta, theta, active):
        for moment, weight in step.moments:
            parts = training.objective.gradient(moment, own)
            for part, whole in zip(parts or (), total, strict=bool(parts)):
                if part is not None:
                    whole.add_(part, alpha=weight)
    step.space.average_(total)
    for penalty, which, index in training.penalties_in(step.point):
        weights = [theta[i] for i in index]
        penalty.add_gradient_(which, [total[active.index(i)] for i in index], weights)
    result: list[Tensor | None] = [None] * len(theta)
    for i, whole in zip(active, total, strict=True):
        result[i] = whole
    return result
