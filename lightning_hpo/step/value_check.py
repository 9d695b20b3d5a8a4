"""Whether the gradient of the training loss is the derivative of its value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hpo._tensors import filled, holding
from lightning_hpo.derivatives import gradient
from lightning_hpo.distributed import average_
from lightning_hpo.objectives import Moment
from lightning_hpo.step.space import Space
from lightning_hpo.step.training_map import TrainingMap

# By how much slopes must differ, relative to what the gradient says.
_TOLERANCE = 0.03
# The smaller of two steps changes the loss by so much of itself; float32 leaves 1e-3 of that.
_STEP = 3e-4
_RATIO = 4


def check_value(training: TrainingMap, moment: Moment, spaces: Sequence[Space]) -> None:
    """Warns where the training loss holds something constant, or has a gradient of its own.

    Second derivatives by autograd are those of its graph, in which ``detach()`` and ``no_grad``
    leave parts of the loss out; where hooks or an ``autograd.Function`` change gradients, the
    Hessian is not symmetric. Either way the gradient is not the derivative of the loss's value.
    Costs a gradient and nine forward passes.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        spaces: Those of the estimators, which have been set up.
    """
    replaying = [space for space in spaces if space.replays]
    if (
        not replaying
        or training.sharded
        # In half precision differences of values are noise.
        or not {p.dtype for p in training.theta} <= {torch.float32, torch.float64}
        # Differences of the gradient along tangents see whatever it depends on.
        or (training.derivatives == "finite_difference" and all(s.followed for s in replaying))
    ):
        return
    try:
        found = _difference(training, moment)
    except RuntimeError:
        if training.objective.rounding is None:
            raise
        return  # a step that cannot do without autocast, or has no memory for it
    if found is None:
        return
    slope, expected = found
    warnings.warn(
        "OnlineHPOCallback: the gradient of the training loss is not the derivative of its value: "
        f"along one direction the loss changes at a rate of {slope:.3g}, and its gradient says "
        f"{expected:.3g}. Something in training_step is held constant (.detach(), .data, "
        "torch.no_grad(), as targets and weights often are) or has a gradient of its own (an "
        "autograd.Function, a straight-through estimate, a hook). Hypergradients miss how training "
        "moves it: they may be a few per cent off, or of the wrong sign. "
        "derivatives='finite_difference' with ClipR or UnrollK(mode='forward') follows what is "
        "held constant, except through rounding; where it is a small part of the loss, ignore this",
        stacklevel=2,
    )


def _difference(training: TrainingMap, moment: Moment) -> tuple[float, float] | None:
    """Returns the slope of the value along a direction and that of its gradient, if they differ.

    The directions: the gradient, along which rounding matters least; and the gradient scaled to
    the size of each parameter, with random signs, so that each of them counts.
    """
    objective, theta = training.objective, training.theta
    with (
        torch.enable_grad(),
        objective.evaluations(moment, theta, exact=True, full_precision=True) as evaluate,
    ):
        loss, _ = evaluate(theta, objective.leaves())
        if loss is None:
            return None
        # With the factor that hooks see in the training.
        parts = gradient(loss * objective.scale, theta)
        g = [t / objective.scale for t in filled(parts, theta)]
        start = loss.detach().double().reshape(1).clone()
        eps = max(torch.finfo(t.dtype).eps for t in (loss, *theta))
        del loss, parts
        # The loss of a data-parallel training is the mean over the ranks: all move alike.
        average_([*g, start])
        norms = torch.stack([torch.linalg.vector_norm(t).double() for t in g])
        sizes = torch.stack([torch.linalg.vector_norm(p.detach()).double() for p in theta])

        def values(scales: Tensor) -> list[float]:
            """Returns the loss where θ is, and near and far on either side."""
            found = []
            for distance in (0, 1, -1, _RATIO, -_RATIO):
                moved = (
                    p.detach() + (distance * s).to(t) * t
                    for p, s, t in zip(theta, scales, g, strict=True)
                )
                with holding(theta, moved):
                    value, _ = evaluate(theta, objective.leaves())
                found.append(norms.new_tensor(math.nan) if value is None else value.detach())
            total = torch.stack([v.to(norms).reshape(()) for v in found])
            average_([total])
            result: list[float] = total.tolist()
            return result

        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, norms.shape, generator=generator).to(norms) * 2 - 1
        for factors in (torch.ones_like(norms), signs * (sizes / norms).nan_to_num(0, 0, 0)):
            expected = float((factors * norms**2).sum())
            size = float((factors * norms**2).abs().sum())
            length = float((factors * norms).norm())
            if not (math.isfinite(length) and size > 0):
                continue
            here = abs(float(start))
            step = min(_STEP * here / size, 0.01 * float(sizes.norm()) / length)
            center, *sides = values(factors * step)
            repeats = abs(center - float(start)) <= 16 * eps * here
            slope = _slope(center, sides, step, expected, tolerance=_TOLERANCE * size)
            if repeats and 16 * eps * here < _TOLERANCE * step * size and slope is not None:
                return slope, expected
    return None


def _slope(
    center: float, sides: list[float], step: float, expected: float, *, tolerance: float
) -> float | None:
    """Returns the slope of a value; None where it may be the expected one.

    Two central differences have to agree that it is not: rounding and kinks nearby move them apart.
    At a kink right here (a unit whose input is zero) slopes differ to either side, and the expected
    one lies between them.
    """
    ahead, behind, far_ahead, far_behind = sides
    near = (ahead - behind) / (2 * step)
    far = (far_ahead - far_behind) / (2 * _RATIO * step)
    bend = (ahead + behind - 2 * center) / step
    far_bend = (far_ahead + far_behind - 2 * center) / (_RATIO * step)
    kink = (_RATIO * bend - far_bend) / (_RATIO - 1)  # without what curvature adds
    least = min(abs(near - expected), abs(far - expected))
    is_clear = least > max(tolerance, abs(kink)) and abs(near - far) < 0.1 * least
    return near if is_clear else None
