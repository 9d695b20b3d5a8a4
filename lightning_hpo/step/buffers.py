"""Which buffers are state that hypergradients follow, besides θ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lightning_hpo.distributed import average_, gather
from lightning_hpo.objectives import Moment
from lightning_hpo.step.backends import fall_back
from lightning_hpo.step.space import Space
from lightning_hpo.step.training_map import TrainingMap


def find_buffers(
    training: TrainingMap,
    moment: Moment,
    validate: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
) -> None:
    """Adds to the running statistics what else a step writes to buffers that L_V depends on.

    Costs a forward pass where there are other buffers of floating point numbers, and a validation
    gradient where the step writes to any of them.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        validate: Takes the derivative of L_V with respect to buffers.
    """
    objective, statistics = training.objective, training.statistics
    if training.sharded:
        return
    names = objective.written_buffers(moment, training.theta)
    # All ranks must follow the same: they exchange what they follow.
    names = sorted(set().union(*gather(names)))
    places = [objective.place_of(name) for name in names]
    if not places:
        return
    found = validate([owner._buffers[name] for owner, name in places])  # type: ignore[misc]
    depends = [float(g is not None and bool(g.any())) for g in found]
    flags = torch.tensor(depends, device=training.theta[0].device)
    average_([flags])
    statistics.follow(
        [*statistics.places, *(p for p, flag in zip(places, flags.tolist(), strict=True) if flag)]
    )


def check_buffers(training: TrainingMap, moment: Moment, spaces: Sequence[Space]) -> None:
    """Looks for followed buffers that are written to without a graph, and says what comes of it.

    What a step computes under ``no_grad``, or from ``detach()`` and ``.data``, has no derivative
    for autograd, though θ moves it. The derivatives of all r' along one direction in θ are compared
    with central differences. Differences of whole steps follow it in tangents; ``"auto"`` takes
    them. Else such buffers are constants. Costs a gradient and two forward passes.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        spaces: Those of the estimators, which have been set up.
    """
    statistics = training.statistics
    if not statistics or statistics.by_value or training.sharded:
        return
    wrong = torch.tensor(_without_graph(training, moment), device=training.theta[0].device)
    average_([wrong])
    flags = wrong.tolist()
    if not any(flags):
        return
    places = list(zip(statistics.places, flags, strict=True))
    names = [repr(training.objective.name_of(place)) for place, flag in places if flag]
    reason = (
        f"training_step writes to the buffers {', '.join(names[:4])} without a graph (under "
        "torch.no_grad(), by .detach() or .data)"
    )
    tangents = [each for space in spaces if space.replays for each in space.followed]
    if training.is_automatic and training.derivatives == "auto" and tangents:
        training.derivatives = fall_back(f"{reason}, which other derivatives miss")
    if training.derivatives == "finite_difference":
        statistics.follow_by_value(reason)
        return
    statistics.follow(place for place, flag in places if not flag)
    for each in tangents:
        each.statistics = statistics.zeros(each.count)
    warnings.warn(
        f"OnlineHPOCallback takes buffers that L_V depends on as constants, because {reason}. "
        "Hypergradients miss how λ moves them; derivatives='auto' or 'finite_difference' with "
        "ClipR or UnrollK(mode='forward') follows them",
        stacklevel=2,
    )


def _without_graph(training: TrainingMap, moment: Moment) -> list[float]:
    """Returns 1 for each statistic whose derivative is not what autograd says, else 0."""
    objective, theta = training.objective, training.theta
    statistics = training.statistics.leaves(moment.state)
    generator = torch.Generator().manual_seed(0)
    resolution = max(torch.finfo(t.dtype).eps for t in (*theta, *statistics))
    step = max(resolution, objective.rounding or 0.0) ** (1 / 3)
    tolerance = 0.05 if step < 0.02 else 0.3
    directions = [
        p.detach() * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for p in theta
    ]
    weights = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in statistics
    ]
    with torch.enable_grad(), ExitStack() as stack:
        evaluate = stack.enter_context(
            objective.evaluations(moment, theta, exact=True, statistics=True)
        )

        def moved(distance: float) -> list[Tensor]:
            values = [
                (p.detach() + distance * d).requires_grad_(p.requires_grad)
                for p, d in zip(theta, directions, strict=True)
            ]
            _, after = evaluate([*values, *statistics], objective.leaves())
            return [(w * r.detach()).sum() for w, r in zip(weights, after, strict=True)]

        pairs = zip(moved(step), moved(-step), strict=True)
        truth = [float(a - b) / (2 * step) for a, b in pairs]
        _, after = evaluate([*theta, *statistics], objective.leaves())
        sizes = [float((w * r.detach()).norm()) for w, r in zip(weights, after, strict=True)]

        def along(parts: Sequence[Tensor]) -> float:
            total = sum(parts)
            if not (isinstance(total, Tensor) and total.requires_grad):
                return 0.0
            active = [(p, d) for p, d in zip(theta, directions, strict=True) if p.requires_grad]
            gradients = torch.autograd.grad(
                total, [p for p, _ in active], retain_graph=True, allow_unused=True
            )
            return sum(
                float((g * d).sum())
                for g, (_, d) in zip(gradients, active, strict=True)
                if g is not None
            )

        def is_wrong(found: float, value: float, size: float) -> bool:
            rounding: float = 10 * resolution * size / step
            return not abs(found - value) <= tolerance * max(abs(found), abs(value)) + rounding

        terms = [(w * r).sum() for w, r in zip(weights, after, strict=True)]
        if not is_wrong(along(terms), sum(truth), sum(sizes)):
            return [0.0] * len(terms)
        each = zip(terms, truth, sizes, strict=True)
        return [float(is_wrong(along([t]), value, size)) for t, value, size in each]
