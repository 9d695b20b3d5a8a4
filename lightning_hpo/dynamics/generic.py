"""Tangents and adjoints of any optimizer, by differentiating its own step function."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lightning_hpo._dual import dual_level
from lightning_hpo.dynamics.base import Dynamics, OptimizerStep, is_function_of_theta
from lightning_hpo.dynamics.state import THETA, State, entries

# Classes of torch.optim whose step treats every element alike.
_ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "ASGD",
    "Rprop",
)

# By how much a gradient is enlarged to see whether an optimizer limits norms.
_LARGE = 1e6

# The same function for real numbers. The derivative of sgn is a tensor without memory, which ends
# the process by a segmentation fault inside allow_mutation_on_saved_tensors (torch 2.14).
_AS_SIGN: dict[Any, Callable[..., Tensor]] = {
    torch.sgn: torch.sign,
    Tensor.sgn: Tensor.sign,
    Tensor.sgn_: Tensor.sign_,
}

# Implementation switches: the plain per-tensor formulas are the ones to differentiate.
_SWITCHES = ("foreach", "fused", "capturable", "differentiable")


class GenericDynamics(Dynamics):
    """Φ of any elementwise or matrix-valued ``torch.optim`` optimizer.

    The optimizer's own ``step`` runs on copies of its parameters and state: on dual tensors for
    tangents, under autograd for adjoints. So the formula that is differentiated is the formula
    that trains. The derivative of a square root at 0 is defined as 0, as in
    :class:`~lightning_hpo.dynamics.adam.AdamDynamics`.

    Cost per product: about one un-fused step, and one copy of θ, g and the state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.is_elementwise = is_elementwise(type(optimizer))

    def jvp_(self, step: OptimizerStep, tangent: State, gradient: list[Tensor]) -> None:
        """See :meth:`Dynamics.jvp_`; the m tangents run one after the other."""
        m = tangent[THETA][0].shape[0]
        results = [self._jvp_one(step, tangent, gradient, j) for j in range(m)]
        for name, values in results[0].items():
            for i in values:
                entries(tangent, name)[i] = torch.stack([r[name][i] for r in results])

    def _jvp_one(
        self, step: OptimizerStep, tangent: State, gradient: list[Tensor], j: int
    ) -> dict[str, dict[int, Tensor]]:
        """Returns the j-th tangent of everything that the step writes."""
        active = [i for i, g in enumerate(step.gradients) if g is not None]

        def dual(primal: Tensor, directions: Tensor) -> Tensor:
            copy = primal.detach().clone()
            if directions.shape[1:] != copy.shape:
                return copy  # this state did not exist at an earlier step
            result: Tensor = forward_ad.make_dual(copy, directions[j].to(copy.dtype))
            return result

        with dual_level(), torch.no_grad(), _Differentiable():
            moved = self._run(
                step,
                active,
                theta=lambda i, p: dual(p, tangent[THETA][i]),
                gradient=lambda i, g: dual(g, gradient[i]),
                state=lambda i, name, v: dual(v, entries(tangent, name)[i]),
            )
            return {
                name: {i: _tangent(value) for i, value in values.items()}
                for name, values in moved.items()
            }

    def vjp_(self, step: OptimizerStep, adjoint: State, *, state_part: bool = True) -> list[Tensor]:
        """See :meth:`Dynamics.vjp_`; one graph of the step serves all m adjoints."""
        # Empty slices of sharded parameters share one address, by which torch tells apart what is
        # mutated below.
        active = [i for i, g in enumerate(step.gradients) if g is not None and g.numel()]
        result = [torch.zeros_like(t) for t in adjoint[THETA]]
        if not active:
            return result
        m = adjoint[THETA][0].shape[0]
        leaves: dict[tuple[str, int], Tensor] = {}

        def leaf(name: str, i: int, value: Tensor) -> Tensor:
            leaves[name, i] = value.detach().clone().requires_grad_()
            return leaves[name, i].clone()

        # Optimizers work in place; this context keeps what their backward needs.
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            with torch.enable_grad(), _Differentiable():
                moved = self._run(
                    step,
                    active,
                    theta=lambda i, p: leaf(THETA, i, p),
                    gradient=lambda i, g: leaf("gradient", i, g),
                    state=lambda i, name, v: leaf(name, i, v),
                )
            outputs = [
                (value, bar)
                for name, values in moved.items()
                for i, value in values.items()
                if value.requires_grad
                and (bar := entries(adjoint, name)[i]).shape[1:] == value.shape
            ]
            rows = [
                torch.autograd.grad(
                    [value for value, _ in outputs],
                    list(leaves.values()),
                    [bar[j].to(value.dtype) for value, bar in outputs],
                    retain_graph=j + 1 < m,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for j in range(m)
            ]
        for position, (name, i) in enumerate(leaves):
            pulled = torch.stack([row[position] for row in rows])
            if name == "gradient":
                result[i] = pulled
            else:
                entries(adjoint, name)[i] = pulled
        for name in moved:
            for i in moved[name]:
                if (name, i) not in leaves:
                    # This state was created by the step: nothing before it depends on it.
                    entries(adjoint, name)[i] = torch.zeros_like(entries(adjoint, name)[i])
        return result

    def run_in_double(
        self, step: OptimizerStep, options: list[dict[str, Any]]
    ) -> dict[str, dict[int, Tensor]]:
        """Makes the step with other options, on copies in float64.

        Returns:
            What the step wrote: by the name of the state tensor and the position of the parameter.
        """
        active = [i for i, g in enumerate(step.gradients) if g is not None]
        with torch.no_grad():
            return self._run(
                replace(step, options=options),
                active,
                theta=lambda i, p: p.detach().to(torch.float64, copy=True),
                gradient=lambda i, g: g.to(torch.float64, copy=True),
                state=lambda i, name, v: v.to(torch.float64, copy=True),
            )

    def is_differentiable_at(self, step: OptimizerStep) -> bool:
        """Whether tangents and adjoints of a step agree with differences of it.

        They do not for an optimizer that works on ``.data``, disables gradients inside its step, or
        keeps its state elsewhere than in ``optimizer.state``. One random direction of g is tried in
        float64. In it each element changes in proportion to itself, so that steps like sign(g), the
        first one of Adam, stay smooth.
        """
        active = [i for i, g in enumerate(step.gradients) if g is not None]
        step = replace(
            step,
            theta=[p.double() for p in step.theta],
            gradients=[None if g is None else g.double() for g in step.gradients],
            state=[
                {n: v.double() if is_function_of_theta(n, v) else v for n, v in s.items()}
                for s in step.state
            ],
        )
        generator = torch.Generator().manual_seed(0)
        directions = [torch.zeros_like(p) for p in step.theta]
        moved: list[list[Tensor]] = []
        for i in active:
            g = step.gradients[i]
            assert g is not None
            directions[i] = torch.randn(g.shape, generator=generator).to(g) * g
        for sign in (1.0, -1.0):
            gradients = [
                None if g is None else g + sign * 1e-4 * d
                for g, d in zip(step.gradients, directions, strict=True)
            ]
            there = self.run_in_double(replace(step, gradients=gradients), step.options)
            moved.append([there[THETA][i] for i in active])
        truth = [(a - b) / 2e-4 for a, b in zip(*moved, strict=True)]

        tangent: State = {THETA: [torch.zeros_like(p).unsqueeze(0) for p in step.theta]}
        self.jvp_(step, tangent, [d.unsqueeze(0).clone() for d in directions])
        adjoint: State = {THETA: [torch.zeros_like(p).unsqueeze(0) for p in step.theta]}
        for i, t in zip(active, truth, strict=True):
            adjoint[THETA][i] = t.unsqueeze(0)
        pulled = self.vjp_(step, adjoint)
        square = sum(float(t.square().sum()) for t in truth)
        forward = sum(
            float((tangent[THETA][i][0] * t).sum()) for i, t in zip(active, truth, strict=True)
        )
        reverse = sum(float((pulled[i][0] * directions[i]).sum()) for i in active)
        return all(abs(value - square) <= 0.05 * square for value in (forward, reverse))

    def is_elementwise_at(self, step: OptimizerStep) -> bool:
        """Whether a step moves each element by its own gradient and state alone.

        The step is made in float64, once whole, then for every second element of the flattened
        parameters and for the others: θ and all state must agree to rounding, and state must be
        shaped like θ. So must they at the step after it, where there is state, and with a gradient
        so large that limits on norms act. Blocks of elements rely on all of this:
        :func:`~lightning_hpo.dynamics.jvp_lean_`.

        Cost: five steps, and twice θ, g and the state in float64.
        """
        theta, state = self.advance(step)
        gradients = [None if g is None else g * _LARGE for g in step.gradients]
        following = replace(step, theta=theta, state=state, gradients=gradients)
        return all(self._moves_alike_in_parts(s) for s in (step, following))

    def _moves_alike_in_parts(self, step: OptimizerStep) -> bool:
        whole = self.run_in_double(step, step.options)
        if any(v.shape != step.theta[i].shape for vs in whole.values() for i, v in vs.items()):
            return False
        for first in (0, 1):
            # Parameters take turns: the halves of single numbers are every second parameter.
            halves = [(i, slice((first + i) % 2, None, 2)) for i in whole[THETA]]
            block = [(i, part) for i, part in halves if step.theta[i].flatten()[part].numel()]
            if not block:
                continue
            try:
                moved = self.run_in_double(step.restricted(block), step.options)
            except Exception:  # of any kind: the step is the user's, and refuses vectors
                return False
            alone = {(name, k): value for name, vs in moved.items() for k, value in vs.items()}
            truth = {
                (name, k): values[i].flatten()[part]
                for name, values in whole.items()
                for k, (i, part) in enumerate(block)
                if i in values
            }
            if alone.keys() != truth.keys():
                return False
            if not all(_agree(alone[key], value) for key, value in truth.items()):
                return False
        return True

    def advance(self, step: OptimizerStep) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Makes a step on copies; returns θ and the optimizer's state after it."""
        active = [i for i, g in enumerate(step.gradients) if g is not None]
        theta, state = list(step.theta), list(step.state)
        with torch.no_grad():
            self._run(
                step,
                active,
                theta=lambda i, p: p.detach().clone(),
                gradient=lambda i, g: g.clone(),  # some optimizers write to it
                state=lambda i, name, v: v.clone(),
                result=(theta, state),
            )
        return theta, state

    def _run(
        self,
        step: OptimizerStep,
        active: list[int],
        *,
        theta: Callable[[int, Tensor], Tensor],
        gradient: Callable[[int, Tensor], Tensor],
        state: Callable[[int, str, Tensor], Tensor],
        result: tuple[list[Tensor], list[dict[str, Any]]] | None = None,
    ) -> dict[str, dict[int, Tensor]]:
        """Runs the optimizer's step on stand-ins; returns what it wrote, by name and position.

        ``result`` receives θ and the whole state, step counters included, where it is given.
        """
        optimizer = self.optimizer
        shadow = object.__new__(type(optimizer))
        vars(shadow).update(
            {
                name: copy(value) if isinstance(value, (list, dict, set)) else value
                for name, value in vars(optimizer).items()
            }
        )
        vars(shadow).pop("step", None)  # learning-rate schedulers patch the instance
        shadow.state = defaultdict(dict)
        params: dict[int, Tensor] = {}
        for i in active:
            g = step.gradients[i]
            assert g is not None
            p = theta(i, step.theta[i])
            if p.requires_grad:
                p.retain_grad()
            p.grad = gradient(i, g)
            params[i] = p
            for name, value in step.state[i].items():
                if is_function_of_theta(name, value):
                    value = state(i, name, value)
                elif isinstance(value, Tensor):
                    value = value.clone()  # the step counts it up in place
                shadow.state[p][name] = value
        shadow.param_groups = [
            {
                **options,
                **{switch: False for switch in _SWITCHES if switch in options},
                "params": [params[i] for i in positions if i in params],
            }
            for options, positions in zip(step.options, step.groups, strict=True)
        ]
        _unwrapped_step(type(optimizer))(shadow)
        moved: dict[str, dict[int, Tensor]] = {THETA: params}
        for i, p in params.items():
            if result is not None:
                result[0][i], result[1][i] = p, dict(shadow.state[p])
            for name, value in shadow.state[p].items():
                if is_function_of_theta(name, value):
                    moved.setdefault(name, {})[i] = value
        return moved


class _Differentiable(TorchFunctionMode):
    """Replaces the few operations of an optimizer that have no, or no finite, derivative."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.sqrt, Tensor.sqrt):
            return _sqrt(args[0])
        if func is Tensor.sqrt_:
            return args[0].copy_(_sqrt(args[0]))
        if func is torch.maximum and kwargs.get("out") is not None:
            return kwargs["out"].copy_(torch.maximum(*args))
        if func is Tensor.detach:
            # SGD detaches the first momentum buffer, which cuts dθ/dλ off from that step.
            return args[0]
        return _AS_SIGN.get(func, func)(*args, **kwargs)


def is_elementwise(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer moves each element by its own gradient and state alone.

    A class says so itself by its attribute ``elementwise``, which may also be set from outside:
    ``Lion.elementwise = True``. Else it does where its ``step`` is that of an elementwise class of
    ``torch.optim``; a subclass with a ``step`` of its own may mix elements. What a class says of
    itself is to be verified: :meth:`GenericDynamics.is_elementwise_at`.
    """
    declared = getattr(kind, "elementwise", None)
    if declared is not None:
        return bool(declared)
    step = kind.step
    return any(
        getattr(step, "__qualname__", "") == f"{name}.step"
        and getattr(step, "__module__", "").startswith("torch.optim")
        for name in _ELEMENTWISE
    )


def _agree(value: Tensor, truth: Tensor) -> bool:
    """Whether two tensors are the same to rounding in float64, relative to the largest element."""
    if value.shape != truth.shape:
        return False
    largest = float(truth.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(value, truth, rtol=1e-12, atol=1e-12 * largest, equal_nan=True)


def _sqrt(x: Tensor) -> Tensor:
    """Returns √x with the derivative at 0 defined as 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    result: Tensor = torch.zeros_like(primal) if tangent is None else tangent.to(primal.dtype)
    return result.detach().clone()


def _unwrapped_step(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Returns the step function itself, without profiling, hooks and ``no_grad``."""
    function: Callable[..., Any] = kind.step
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
