"""The optimizer's own options as hyperparameters: learning rate, momentum, betas, weight decay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._arguments import did_you_mean
from lightning_hpo._tensors import rows
from lightning_hpo.dynamics.base import OptimizerStep
from lightning_hpo.dynamics.generic import GenericDynamics
from lightning_hpo.dynamics.state import THETA, State, entry
from lightning_hpo.hyperparameters import (
    CategoricalHyperparameter,
    Constraint,
    Hyperparameter,
    Interval,
    Positive,
    UnitInterval,
)

# In raw λ. The step is evaluated in float64, where this leaves a relative error of about 1e-10.
_EPSILON = 1e-5

# In units of the gradient. Second differences divide by both: an error of about 1e-7 is left.
_SHARE = 1e-3

# SGD keeps no momentum buffer at exactly 0, and so shows no derivative there.
_LEAST_MOMENTUM = 1e-6


class OptimizerOptions:
    r"""Tunes options of an optimizer: λ acts in Φ itself, s' = Φ(s, g, λ).

    With ∂Φ/∂λ added to the tangents, ``ClipR(radius=inf)`` is RTHO (Franceschi et al. 2017) and
    ``T1T2`` is one-step hypergradient descent. ∂Φ/∂λ is a central difference of the optimizer's own
    step in float64: two steps on copies, per scalar option.

    Each λ is named ``optimizer.<option>``. ``lr`` is tuned on a log scale; under a schedule, or
    where the groups differ, it is the *scale* on the learning rates, and starts at 1. Other options
    are common to all groups.

    Args:
        optimizer: The user's optimizer.
        options: The :class:`Hyperparameter` to use for each option; None stands for a default.
        scheduled: Whether a scheduler changes the learning rate.

    Raises:
        ValueError: If the optimizer has no such option, or its groups differ in it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: Mapping[str, Hyperparameter | None],
        scheduled: bool,
    ) -> None:
        self._optimizer = optimizer
        self._dynamics = GenericDynamics(optimizer)
        self._saved: list[dict[str, Any]] = []
        self._read: dict[str, tuple[tuple[int, int], Tensor]] = {}
        # Raw λ at the start, and the number that it stands for, which a constraint may round.
        self._starts: dict[str, tuple[Tensor, Any]] = {}
        groups = optimizer.param_groups
        self._is_scale = scheduled or len({float(group["lr"]) for group in groups}) > 1
        self._by_option: dict[str, Hyperparameter] = {}
        for option, hyperparameter in options.items():
            value = groups[0].get(option)
            values = list(value) if isinstance(value, (tuple, list)) else [value]
            if not _is_number(value):
                known = [
                    n
                    for n, v in groups[0].items()
                    if _is_number(v) and n not in ("params", "initial_lr")
                ]
                raise ValueError(
                    f"The option {option!r} of the optimizer is to be tuned or fixed, but "
                    f"{type(optimizer).__name__} has no such number; it has {known}"
                    + (f": {question}" if (question := did_you_mean(option, known)) else "")
                )
            if option != "lr" and any(group[option] != value for group in groups):
                raise ValueError(
                    f"The parameter groups of the optimizer differ in {option!r} "
                    f"({[group[option] for group in groups]}), so that it cannot be tuned or fixed "
                    "for all"
                )
            h = hyperparameter or self._default(option, values)
            if isinstance(h, CategoricalHyperparameter):
                if len(values) != 1:
                    raise ValueError(
                        f"The option {option!r} of {type(optimizer).__name__} has {len(values)} "
                        "numbers; only an option that is a single number can be a choice"
                    )
                _check_choices(option, h, _range(option))
            elif h.raw.numel() != len(values):
                raise ValueError(
                    f"The option {option!r} of {type(optimizer).__name__} has {len(values)} "
                    f"number(s), the value to be tuned or fixed has {h.raw.numel()}"
                )
            self._by_option[option] = h
            if hyperparameter is None and not (option == "lr" and self._is_scale):
                numbers = torch.tensor(values, dtype=h.raw.dtype)
                if torch.allclose(h().detach().flatten(), numbers, rtol=1e-6, atol=0.0):
                    self._starts[option] = h.raw.detach().cpu().clone(), value

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """The hyperparameters, by name."""
        return {f"optimizer.{option}": h for option, h in self._by_option.items()}

    @property
    def choices(self) -> list[str]:
        """The names of those that are chosen among a few."""
        every = self.hyperparameters.items()
        return [name for name, h in every if isinstance(h, CategoricalHyperparameter)]

    def _default(self, option: str, values: list[Any]) -> Hyperparameter:
        numbers = [float(v) for v in values]
        constraint: Constraint
        if option == "lr":
            return Hyperparameter(1.0 if self._is_scale else numbers[0], Positive())
        if option == "momentum":
            numbers = [max(v, _LEAST_MOMENTUM) for v in numbers]
        if option == "betas":
            constraint = UnitInterval()
        elif option != "momentum" and min(numbers) > 0:
            constraint = Positive()
        else:
            constraint = _range(option)
        init = numbers[0] if len(numbers) == 1 else torch.tensor(numbers)
        return Hyperparameter(init, constraint)

    def set_(self) -> None:
        """Puts the tuned values in the place of the optimizer's, for one step."""
        groups = self._optimizer.param_groups
        self._saved = [{option: group[option] for option in self._by_option} for group in groups]
        for option in self._by_option:
            self._put(option)

    def _put(self, option: str) -> None:
        h = self._by_option[option]
        if not h.is_resolved:
            return  # the optimizer's own acts meanwhile
        value: Any
        if isinstance(h, CategoricalHyperparameter):
            value = float(h.choices[h.in_force])
        else:
            raw = self._raw(option)
            start = self._starts.get(option)
            is_first = start is not None and torch.equal(raw, start[0])
            value = start[1] if is_first else _numbers(h.constraint(raw))  # type: ignore[index]
        for group in self._optimizer.param_groups:
            if option == "lr" and self._is_scale:
                assert isinstance(value, float)
                group[option] = value * float(group["lr"])
            else:
                group[option] = value

    def unresolved(self) -> dict[str, Hyperparameter]:
        """The hyperparameters whose values are not known yet, by name."""
        return {name: h for name, h in self.hyperparameters.items() if not h.is_resolved}

    def renew_(self, names: Iterable[str]) -> None:
        """Puts values in place that have become known during a step; not that of ``lr``."""
        if self._saved:
            for name in names:
                self._put(name.removeprefix("optimizer."))

    def _raw(self, option: str) -> Tensor:
        """Returns raw λ on the CPU; waits for a device only where λ has been written to."""
        raw = self._by_option[option].raw
        written = raw._version, raw.data_ptr()
        before, known = self._read.get(option, (None, raw))
        if before != written:
            known = raw.detach().cpu().clone()
            self._read[option] = written, known
        return known

    def restore_(self) -> None:
        """Puts back what a scheduler expects to find."""
        for group, saved in zip(self._optimizer.param_groups, self._saved, strict=False):
            group.update(saved)
        self._saved = []

    def derivatives(
        self, step: OptimizerStep, names: Collection[str]
    ) -> dict[str, list[dict[str, dict[int, Tensor]]]]:
        """Returns ∂s'/∂(raw λ) of a step that was made with the present λ.

        Args:
            step: The step.
            names: Which of the hyperparameters are meant. Choices are left out.

        Returns:
            For each hyperparameter, one entry per element: by the name of the state tensor and the
            position of the parameter, a tensor shaped like it.
        """
        result = {}
        for option, h in self._by_option.items():
            is_choice = isinstance(h, CategoricalHyperparameter)
            if f"optimizer.{option}" not in names or is_choice or not h.is_resolved:
                continue
            entries = []
            for i in range(h.raw.numel()):
                ahead, behind = (
                    self._moved(step, option, h, i, sign * _EPSILON) for sign in (1.0, -1.0)
                )
                entries.append(_difference(ahead, behind, 2 * _EPSILON))
            result[f"optimizer.{option}"] = entries
        return result

    def displacement(
        self,
        step: OptimizerStep,
        name: str,
        baseline: float,
        along: Sequence[Tensor | None] | None = None,
    ) -> dict[str, dict[int, Tensor]]:
        """Returns (v − v̄) ∂s'/∂v of an option v that was drawn for a step.

        Times ∇φ log p_φ(v), its mean over v is the derivative of the mean of s' where that is
        linear in the option, as it is in a learning rate.

        Args:
            step: The step.
            name: Of the hyperparameter.
            baseline: v̄, which does not change that mean.
            along: A direction d of the gradient g, for (v − v̄) ∂²s'/∂v∂g d in its place.

        Returns:
            By the name of the state tensor and the position of the parameter, a tensor like it.
        """
        option = name.removeprefix("optimizer.")
        h = self._by_option[option]
        assert isinstance(h, CategoricalHyperparameter)
        value = float(h.choices[step.choices[name]])
        width = _EPSILON * max(abs(float(choice)) for choice in h.choices)

        def sloped(step: OptimizerStep) -> dict[str, dict[int, Tensor]]:
            ahead, behind = (
                self._run(step, option, value + d, (value + d) / value if value else 1.0)
                for d in (width, -width)
            )
            return _difference(ahead, behind, 2 * width)

        if along is None:
            slope = sloped(step)
        else:
            ahead, behind = (
                sloped(_with_gradient_moved(step, along, distance))
                for distance in (_SHARE, -_SHARE)
            )
            slope = _difference(ahead, behind, 2 * _SHARE)
        return {
            state: {at: (value - baseline) * t for at, t in tensors.items()}
            for state, tensors in slope.items()
        }

    def _moved(
        self, step: OptimizerStep, option: str, h: Hyperparameter, i: int, distance: float
    ) -> dict[str, dict[int, Tensor]]:
        """Runs the step with element i of one raw λ moved."""
        raw = self._raw(option).double()
        moved = raw.clone()
        moved.view(-1)[i] += distance
        value, before = h.constraint(moved), h.constraint(raw)
        ratio = value.item() / before.item() if option == "lr" else 1.0
        return self._run(step, option, _numbers(value), ratio)

    def _run(
        self, step: OptimizerStep, option: str, value: Any, ratio: float
    ) -> dict[str, dict[int, Tensor]]:
        """Runs the step with another value of an option, or a learning rate times a ratio."""
        if option == "lr":  # what is in force is λ times the schedule, or λ itself
            options = [{**o, "lr": float(o["lr"]) * ratio} for o in step.options]
        else:
            options = [{**o, option: value} for o in step.options]
        return self._dynamics.run_in_double(step, options)


def _with_gradient_moved(
    step: OptimizerStep, along: Sequence[Tensor | None], distance: float
) -> OptimizerStep:
    gradients = [
        g if g is None or d is None else g.double() + distance * d.double()
        for g, d in zip(step.gradients, along, strict=True)
    ]
    return replace(step, gradients=gradients)


def _difference(
    ahead: dict[str, dict[int, Tensor]], behind: dict[str, dict[int, Tensor]], width: float
) -> dict[str, dict[int, Tensor]]:
    return {
        name: {at: (value - behind[name][at]) / width for at, value in values.items()}
        for name, values in ahead.items()
    }


def _range(option: str) -> Constraint:
    """Returns what an option that is a single number may be."""
    if option == "lr":
        return Positive()
    return Interval(_LEAST_MOMENTUM, 1 - 1e-4) if option == "momentum" else Interval(0.0)


def _check_choices(option: str, h: CategoricalHyperparameter, constraint: Constraint) -> None:
    """Refuses choices that an option cannot take.

    Raises:
        ValueError: If they are no numbers, or lie outside the constraint.
    """
    for choice in h.choices:
        reason = "it is no number"
        if isinstance(choice, (int, float)) and not isinstance(choice, bool):
            try:
                constraint.inverse(torch.tensor(float(choice), dtype=torch.float64))
            except ValueError as error:
                reason = str(error)
            else:
                continue
        raise ValueError(
            f"The option {option!r} of the optimizer is to be chosen among {list(h.choices)}, but "
            f"it cannot be {choice!r}: {reason}"
        )


def add_to_tangent_(
    tangent: State, derivative: dict[str, dict[int, Tensor]], rates: Tensor
) -> None:
    """Adds ∂s'/∂λ · λ̇ to m tangents, where λ̇ has one entry per tangent."""
    for name, values in derivative.items():
        for i, value in values.items():
            place = entry(tangent, name, i, value.shape)
            rate = rates.to(place, non_blocking=True)
            place += torch.tensordot(rate, value.to(place.dtype), dims=0)


def pull_back(adjoint: State, derivative: dict[str, dict[int, Tensor]]) -> Tensor:
    """Returns ⟨s̄', ∂s'/∂λ⟩ for each of m adjoints: ``(m,)``, over the local slices."""
    m = adjoint[THETA][0].shape[0]
    total = torch.zeros(m, dtype=torch.float64, device=adjoint[THETA][0].device)
    for name, values in derivative.items():
        for i, value in values.items():
            if name in adjoint and adjoint[name][i].shape[1:] == value.shape:
                total += rows(adjoint[name][i].double()) @ value.flatten()
    return total


def _is_number(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(v, (int, float, Tensor)) and not isinstance(v, bool) for v in values)


def _numbers(value: Tensor) -> float | tuple[float, ...]:
    return value.item() if value.dim() == 0 else tuple(value.tolist())
