"""Whether the derivatives of another library's optimizer are those of its step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.dynamics.base import OptimizerStep
from lightning_hpo.dynamics.generic import GRADIENT, GenericDynamics, Key, in_double
from lightning_hpo.dynamics.state import THETA, State
from lightning_hpo.rng import RandomState, forked_rng

# Observed steps at which an optimizer is looked at: what acts later only is found later.
_DUE = frozenset({1, 3, 10, 30, 100})

# How many steps are made one after the other: tangents of the state come into being at the first.
_STEPS = 3
# By so much, and so much of itself, another loss is larger.
_MORE = 1e-3

# Distances of central differences, relative to each element, with the error that is allowed
# relative to the largest derivative. The second is for formulas that are in float32 inside.
_DISTANCES = ((1e-5, 1e-3), (1e-2, 5e-2))


class Verification:
    """Looks at the steps of an optimizer of another library.

    From the present state, three steps are made on copies in float64, each with a gradient of its
    own. Tangents of θ and of all state, from random changes of θ and from random changes of the
    gradients, must agree with central differences, element by element; adjoints must be the
    transpose of the tangents. Before that, a trial must leave the optimizer as it is, and not
    depend on the loss; after the real step, θ must be where the trial has come to.

    Changes are in proportion to each element, so that steps like sign(g), the first one of Adam,
    stay smooth. An element where differences of two distances disagree is at a kink, and not
    compared.

    Cost: about 60 steps and 10 copies of θ, g and the state in float64 at the observed steps
    1, 3, 10, 30 and 100; where the optimizer declares itself elementwise, of one block of elements.

    Args:
        dynamics: The derivatives.
    """

    def __init__(self, dynamics: GenericDynamics) -> None:
        self._dynamics = dynamics
        self._seen = 0
        self._expected: OptimizerStep | None = None
        self._distance = 0.0

    def closure(self) -> str | None:
        """Looks at how the optimizer uses its closure; returns what is wrong with it, if anything.

        The gradient is made up: this is known before there is any.
        """
        step = self._dynamics.capture()
        step.gradients = [torch.full_like(p, 1e-3) for p in step.theta]
        moved: list[bool] = []
        written: list[str] = []

        def evaluate(there: OptimizerStep) -> Tensor:
            pairs = zip(there.theta, step.theta, strict=True)
            moved.append(any(not torch.equal(a, b) for a, b in pairs))
            return torch.tensor(1.0)

        def evaluate_again(there: OptimizerStep) -> Tensor:
            now = self._dynamics._tensors(there)
            # Single numbers are put back.
            written.extend(
                name
                for (name, i), value in self._dynamics._tensors(after).items()
                if name not in (THETA, GRADIENT)
                and value.numel() > 1
                and (name, i) in now
                and not torch.equal(now[name, i], value)
            )
            return torch.tensor(1.0)

        with torch.no_grad(), forked_rng(step.theta[0].device), suppress(Exception):
            # What else is wrong is seen with a real gradient.
            after = self._dynamics.advance(step, evaluate)
            if moved == [False]:
                self._dynamics.advance(after, evaluate_again)
        if len(moved) > 1:
            return (
                f"it evaluates its closure {len(moved)} times in a step: it takes several "
                "gradients, of which only one can be followed"
            )
        if any(moved):
            return "it moves the parameters before it evaluates its closure"
        if written:
            return f"it writes to its state {written[0]!r} before it evaluates its closure"
        return None

    def before(self, step: OptimizerStep) -> str | None:
        """Looks at a step that is about to happen; returns what is wrong with it, if anything."""
        self._seen += 1
        self._expected = None
        if self._seen not in _DUE:
            return None
        with torch.no_grad(), forked_rng(step.theta[0].device):
            try:
                return self._trial(step) or self._derivatives(step)
            except Exception as error:  # of any kind: the step is the user's
                message = " ".join(str(error).split())[:200]
                return f"a trial of its step ends in {type(error).__name__}: {message}"

    def after(self) -> str | None:
        """Compares the step that has happened with the trial of it."""
        expected, self._expected = self._expected, None
        if expected is None:
            return None
        real = self._dynamics.capture().theta
        off = [
            (p - q).norm() - 100 * torch.finfo(own.dtype).eps * q.norm()
            for p, q, own in zip(real, expected.theta, self._dynamics.theta, strict=True)
        ]
        if max(map(float, off)) > 0.02 * self._distance:
            return (
                "its step is not the one that a trial of it makes: it depends on something that "
                "is kept outside of the optimizer"
            )
        return None

    # ----------------------------------------------------------------------------------- the trial

    def _trial(self, step: OptimizerStep) -> str | None:
        """Makes the step twice on copies: with the closure's loss, and with a little more.

        A step that compares it with a bound is another one only beyond that, and has a derivative.
        """
        dynamics = self._dynamics
        shared = _sharing_memory(dynamics, step)
        if shared is not None:
            return f"its state {shared!r} shares memory with other state, which copies do not"
        before = _fingerprint(dynamics)
        drawn = RandomState.capture(step.theta[0].device)
        bare = replace(step, rng=None)  # so that it is seen whether numbers are drawn
        results = []
        loss = torch.zeros(()) if step.loss is None else torch.as_tensor(step.loss)
        for value in (loss, loss + _MORE * (1 + loss.abs())):
            drawn.restore(step.theta[0].device)
            results.append(dynamics.advance(replace(bare, loss=value)))
        if self._seen == 1:
            now = RandomState.capture(step.theta[0].device)
            dynamics.draws = not now.is_same_as(drawn)
        self._expected = results[0]
        self._distance = max(
            float((p - q).norm()) for p, q in zip(results[0].theta, step.theta, strict=True)
        )
        if any(
            not torch.equal(a, b)
            for a, b in zip(results[0].theta, results[1].theta, strict=True)
            if not a.isnan().any()
        ):
            return (
                "its step depends on the value of the loss, or is not the same when it is made "
                "twice"
            )
        changed = [name for name, value in _fingerprint(dynamics).items() if before[name] != value]
        if changed:
            return f"a trial of its step changes {changed[0]}, which cannot be copied"
        return None

    # ------------------------------------------------------------------------------ the derivatives

    def _derivatives(self, step: OptimizerStep) -> str | None:
        dynamics = self._dynamics
        if dynamics.is_elementwise:
            active = [i for i, g in enumerate(step.gradients) if g is not None]
            step = step.restricted(next(step.blocks(active)))
        step = in_double(step, dynamics)
        generator = torch.Generator().manual_seed(0)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

        gradients = [
            [None if g is None else g * (1 + 0.3 * noise(g).clamp(-2, 2)) for g in step.gradients]
            for _ in range(_STEPS)
        ]
        gradients[0] = step.gradients
        zeros = [torch.zeros_like(p) for p in step.theta]
        still = [zeros] * _STEPS
        along = [
            [z if g is None else g * noise(g) for g, z in zip(gs, zeros, strict=True)]
            for gs in gradients
        ]
        for what, theta, rates in (
            ("the gradient", zeros, along),
            ("the parameters", [p * noise(p) for p in step.theta], still),
        ):
            name = self._along(step, gradients, theta, rates, noise)
            if name is not None:
                return f"{name} after a step, as a function of {what}, is not what tangents follow"
        return None

    def _along(
        self,
        step: OptimizerStep,
        gradients: list[list[Tensor | None]],
        theta: list[Tensor],
        rates: list[list[Tensor]],
        noise: Any,
    ) -> str | None:
        """Compares derivatives along one direction; returns the name of what is wrong."""
        points = [step]
        for following in gradients[1:]:
            points.append(replace(self._dynamics.advance(points[-1]), gradients=following))
        points[0] = replace(step, gradients=gradients[0])

        tangent: State = {THETA: [t.unsqueeze(0).clone() for t in theta]}
        tangents: list[dict[Key, Tensor]] = []
        for point, rate in zip(points, rates, strict=True):
            self._dynamics.jvp_(point, tangent, [t.unsqueeze(0).clone() for t in rate])
            tangents.append(
                {(n, i): t[0].clone() for n, ts in tangent.items() for i, t in enumerate(ts)}
            )
        wrong: str | None = None
        for distance, tolerance in _DISTANCES:
            wrong = None
            is_conclusive = True
            pairs = [
                self._differences(step, gradients, theta, rates, d)
                for d in (distance, distance / 3)
            ]
            for found, truth, check in zip(tangents, *pairs, strict=True):
                for key, (value, magnitude) in truth.items():
                    limit = tolerance * _largest(value) + 1e-13 / distance * magnitude
                    is_smooth = (value - check[key][0]).abs() <= limit
                    is_conclusive &= bool(is_smooth.sum() * 2 >= value.numel())
                    there = found.get(key, torch.zeros(0))
                    there = there if there.shape == value.shape else torch.zeros_like(value)
                    is_right = (there - value).abs() <= 2 * limit
                    if not bool((is_right | ~is_smooth).all()) or not there.isfinite().all():
                        wrong = wrong or _called(key[0])
            if is_conclusive:
                break
        else:
            return wrong or "what it writes"
        return wrong or self._transpose(points, theta, rates, tangent, noise)

    def _differences(
        self,
        step: OptimizerStep,
        gradients: list[list[Tensor | None]],
        theta: list[Tensor],
        rates: list[list[Tensor]],
        distance: float,
    ) -> Iterator[dict[Key, tuple[Tensor, float]]]:
        """Yields central differences of what each of the steps writes, and its largest element."""
        dynamics = self._dynamics
        ahead, behind = (
            replace(step, theta=[p + h * t for p, t in zip(step.theta, theta, strict=True)])
            for h in (distance, -distance)
        )
        for gs, rate in zip(gradients, rates, strict=True):
            ahead, behind = (
                dynamics.advance(
                    replace(
                        there,
                        gradients=[
                            None if g is None else g + h * t for g, t in zip(gs, rate, strict=True)
                        ],
                    )
                )
                for there, h in ((ahead, distance), (behind, -distance))
            )
            values, others = dynamics._followed(ahead), dynamics._followed(behind)
            yield {
                key: ((value - others[key]) / (2 * distance), _largest(value))
                for key, value in values.items()
                if key in others and others[key].shape == value.shape
            }

    def _transpose(
        self,
        points: Sequence[OptimizerStep],
        theta: list[Tensor],
        rates: list[list[Tensor]],
        tangent: State,
        noise: Any,
    ) -> str | None:
        """Whether ⟨s̄', ṡ'⟩ is what adjoints make of it; returns what is wrong."""
        adjoint: State = {THETA: []}
        forward = 0.0
        size = 0.0
        for name, values in tangent.items():
            # Each has the same weight.
            scale = max(1e-300, float(sum(t.norm() for t in values)))
            adjoint[name] = [noise(t) / scale for t in values]
            terms = [float((a * t).sum()) for a, t in zip(adjoint[name], values, strict=True)]
            forward += sum(terms)
            size += sum(map(abs, terms))
        backward = 0.0
        for point, rate in zip(reversed(points), reversed(rates), strict=True):
            pulled = self._dynamics.vjp_(point, adjoint)
            terms = [float((h[0] * t).sum()) for h, t in zip(pulled, rate, strict=True)]
            backward += sum(terms)
            size += sum(map(abs, terms))
        terms = [float((h[0] * t).sum()) for h, t in zip(adjoint[THETA], theta, strict=True)]
        backward += sum(terms)
        size += sum(map(abs, terms))
        return None if abs(forward - backward) <= 1e-6 * size else "the adjoint of what it writes"


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _called(name: str) -> str:
    if name == THETA:
        return "the parameter"
    return f"its state {name!r}"


def _sharing_memory(dynamics: GenericDynamics, step: OptimizerStep) -> str | None:
    """Returns the name of a tensor that is a view of another one, or of the same memory."""
    seen: dict[int, Tensor] = {}
    for (name, _), value in dynamics._tensors(step).items():
        if name in (THETA, GRADIENT) or value.layout is not torch.strided or not value.numel():
            continue
        other = seen.setdefault(value.untyped_storage().data_ptr(), value)
        is_part = value.numel() != other.numel() or value.data_ptr() != other.data_ptr()
        if other is not value and is_part:
            return name
    return None


def _fingerprint(dynamics: GenericDynamics) -> dict[str, Any]:
    """Describes the optimizer, so that a change of it is seen."""
    step = dynamics.capture()
    described: dict[str, Any] = {}
    for (name, i), value in dynamics._tensors(step).items():
        where = "the parameters" if name == THETA else "p.grad" if name == GRADIENT else repr(name)
        described[f"{where} ({i})"] = (value._version, float(value.double().sum()))
    return described
