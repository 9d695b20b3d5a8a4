"""Whether the gradient of the training loss is the derivative of its value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_hpo._tensors import filled, holding, without_hooks
from lightning_hpo.derivatives import gradient
from lightning_hpo.distributed import average_
from lightning_hpo.objectives import Moment
from lightning_hpo.step.space import Space
from lightning_hpo.step.training_map import TrainingMap

# By how much slopes must differ, relative to what the gradient says.
_TOLERANCE = 0.02
# The smaller of two steps changes the loss by so much of itself; float32 leaves 1e-3 of that.
_STEP = 3e-4
_RATIO = 4
# Nor does it move θ by more than this part of it, where the gradient is small.
_FAR = 0.01
# Beyond what any threshold for gradients leaves alone; exact in floating point.
_FACTOR = 2.0**20


def check_value(training: TrainingMap, moment: Moment, spaces: Sequence[Space]) -> None:
    """Warns where the training loss holds something constant, or has a gradient of its own.

    Second derivatives by autograd are those of its graph, in which ``detach()`` and ``no_grad``
    leave parts of the loss out; where hooks or an ``autograd.Function`` change gradients, the
    Hessian is not symmetric. Either way the gradient is not the derivative of the loss's value.
    Also finds out whether differences may put their factor into the loss.
    Costs two or three gradients and nine forward passes.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        spaces: Those of the estimators, which have been set up.
    """
    replaying = [space for space in spaces if space.replays]
    # In half precision differences of values are noise.
    is_full = {p.dtype for p in training.theta} <= {torch.float32, torch.float64}
    if not replaying or training.sharded or not is_full:
        return
    if training.derivatives != "reverse" and any(space.followed for space in replaying):
        training.scales_gradient = _scales_gradient(training, moment)
    if training.derivatives == "finite_difference" and all(s.followed for s in replaying):
        return  # differences of the gradient along tangents see whatever it depends on
    # The transposed product by double backward goes through hooks on parameters as it should.
    is_adjoint = training.derivatives != "finite_difference"
    is_adjoint = is_adjoint and not any(s.followed for s in replaying)
    try:
        found = _difference(training, moment, with_hooks=not is_adjoint)
    except torch.OutOfMemoryError:
        return
    except Exception:
        if training.objective.rounding is None:
            raise
        return  # a step that cannot do without autocast
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


def _scales_gradient(training: TrainingMap, moment: Moment) -> bool:
    """Whether the gradient of a multiple of the loss is that multiple of its gradient."""
    objective, theta = training.objective, training.theta
    if objective.rounding is not None:
        return True  # which might overflow; under autocast nobody asks
    exact = training.derivatives != "finite_difference"
    with (
        torch.enable_grad(),
        objective.evaluations(
            moment, theta, exact=exact, full_precision=True, looks="check"
        ) as evaluate,
    ):

        def times(factor: float) -> list[Tensor]:
            loss, _ = evaluate(theta, objective.leaves())
            parts = None if loss is None else gradient(loss * factor, theta)
            return filled(parts or [None] * len(theta), theta)

        once, often = times(1.0), times(_FACTOR)
    pairs = zip(once, often, strict=True)
    parts = [torch.stack([(b / _FACTOR - a).norm(), a.norm()]).double() for a, b in pairs]
    norms = torch.stack(parts).norm(dim=0)
    average_([norms])  # all ranks must come to the same decision
    difference, scale = norms.tolist()
    return bool(difference <= 1e-3 * scale)


def _difference(
    training: TrainingMap, moment: Moment, *, with_hooks: bool
) -> tuple[float, float] | None:
    """Returns the slope of the value along a direction and that of its gradient, if they differ.

    The directions: the gradient, along which rounding matters least; and the gradient scaled to
    the size of each parameter, with random signs, so that each of them counts.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        with_hooks: Whether the gradient is that which hooks on parameters return.
    """
    objective, theta = training.objective, training.theta
    sizes = torch.stack([torch.linalg.vector_norm(p.detach()).double() for p in theta])
    length_of_theta = float(sizes.norm()) or 1.0  # of a linear model that starts at zero
    with (
        torch.enable_grad(),
        # Outermost: replays put back what they have found in parameters that are not trained.
        holding(theta, _off_kinks(theta, length_of_theta)),
        objective.evaluations(
            moment, theta, exact=True, full_precision=True, looks="check"
        ) as evaluate,
    ):
        loss, _ = evaluate(theta, objective.leaves())
        if loss is None:
            return None
        # With the factor that hooks see in the training.
        with nullcontext() if with_hooks else without_hooks(theta):
            parts = gradient(loss * objective.scale, theta)
        g = [t / objective.scale for t in filled(parts, theta)]
        start = loss.detach().double()
        eps = max(torch.finfo(t.dtype).eps for t in (loss, *theta))
        del loss, parts
        # The loss of a data-parallel training is the mean over the ranks: all move alike.
        average_(g)
        norms = torch.stack([torch.linalg.vector_norm(t).double() for t in g])

        def value_at(scales: Tensor) -> Tensor:
            moved = (p.detach() + s.to(t) * t for p, s, t in zip(theta, scales, g, strict=True))
            with holding(theta, moved):
                value, _ = evaluate(theta, objective.leaves())
            return norms.new_full((), math.nan) if value is None else value.detach().to(norms)

        def averaged(values: list[Tensor]) -> list[float]:
            total = torch.stack([v.reshape(()) for v in values])
            average_([total])
            result: list[float] = total.tolist()
            return result

        here, again = averaged([start, value_at(torch.zeros_like(norms))])
        rounding = 16 * eps * abs(here)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, norms.shape, generator=generator).to(norms) * 2 - 1
        for factors in (torch.ones_like(norms), signs * (sizes / norms).nan_to_num(0, 0, 0)):
            expected = float((factors * norms**2).sum())
            size = float((factors * norms**2).abs().sum())
            length = float((factors * norms).norm())
            if not (math.isfinite(here) and math.isfinite(length) and size > 0):
                continue
            step = min(_STEP * abs(here) / size, _FAR * length_of_theta / length)
            sides = averaged([value_at(step * d * factors) for d in (1, -1, _RATIO, -_RATIO)])
            slope = _slope(sides, step, expected, tolerance=_TOLERANCE * size)
            is_resolved = rounding < _TOLERANCE * step * size
            # A step that no replay repeats is warned about elsewhere.
            if slope is not None and is_resolved and abs(again - here) <= rounding:
                return slope, expected
    return None


def _off_kinks(theta: Sequence[Tensor], length: float) -> list[Tensor]:
    """Returns θ with random numbers in the place of zeros.

    Where weights and biases start at zero, units whose input is blank sit at the kink of their
    activation, where a central difference is the mean of both slopes.
    """
    generator = torch.Generator().manual_seed(0)
    scale = 0.1 * length / math.sqrt(sum(p.numel() for p in theta) or 1)
    result = []
    for p in theta:
        value = p.detach()
        is_zero = value == 0
        if p.requires_grad and bool(is_zero.any()):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            value = torch.where(is_zero, scale * noise.to(value), value)
        result.append(value)
    return result


def _slope(sides: list[float], step: float, expected: float, *, tolerance: float) -> float | None:
    """Returns the slope of a value; None where it may be the expected one.

    Two differences have to agree that it is not: rounding and kinks move them apart.
    """
    ahead, behind, far_ahead, far_behind = sides
    near = (ahead - behind) / (2 * step)
    far = (far_ahead - far_behind) / (2 * _RATIO * step)
    least = min(abs(near - expected), abs(far - expected))
    return near if least > tolerance and abs(near - far) < 0.1 * least else None
