"""Tangents and adjoints of any optimizer, by differentiating its own step function."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_hpo._dual import dual_level
from lightning_hpo._hooks import emptied
from lightning_hpo.dynamics.base import Dynamics, OptimizerStep, is_function_of_theta
from lightning_hpo.dynamics.containers import Ref, rebuilt
from lightning_hpo.dynamics.differentiable import Differentiable
from lightning_hpo.dynamics.entry import Entry
from lightning_hpo.dynamics.state import THETA, State, entries
from lightning_hpo.rng import RandomState, forked_rng

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

# Implementation switches: the plain per-tensor formulas are the ones to differentiate.
_SWITCHES = ("foreach", "fused", "capturable", "differentiable")

# What torch itself and its schedulers store on an optimizer.
_NOT_OWN = frozenset(vars(torch.optim.SGD([torch.zeros(())], lr=0.0))) | {
    "step",
    "_opt_called",
    "_step_count",
    "_warned_capturable_if_run_uncaptured",
}
_GLOBAL_HOOKS: list[Any] = [
    _global_optimizer_pre_hooks,
    _global_optimizer_post_hooks,
]
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

Key = tuple[str, int]
"""The name of a tensor of a step, and the position of the parameter that it belongs to."""

GRADIENT = "gradient"


class GenericDynamics(Dynamics):
    """Φ of any optimizer.

    The optimizer's own ``step`` runs on copies of its parameters and of all that it keeps: on dual
    tensors for tangents, under autograd for adjoints, with operations in place rewritten by
    ``torch.func.functionalize``. So the formula that is differentiated is the formula that trains.
    The derivative of a root at 0 is defined as 0, as in
    :class:`~lightning_hpo.dynamics.adam.AdamDynamics`.

    State may be in containers: ``state[p]["GG"][0]`` is the entry ``"GG.0"`` of tangents. Tensors
    that belong to no parameter (of a group, of ``optimizer.state["k"]``, of an attribute, of an
    optimizer inside) are entries of the first parameter, ``"group.0.d"`` or ``"own.buffer"``.

    Cost per product: about one un-fused step, and one copy of θ, g and the state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        kind = type(optimizer)
        self.is_elementwise = is_elementwise(kind)
        self.is_foreign = not kind.__module__.startswith("torch.optim")
        self.draws = self.is_foreign  # until a trial shows that it does not
        self._takes_closure = "closure" in inspect.signature(_unwrapped_step(kind)).parameters

    def capture(self) -> OptimizerStep:
        """See :meth:`Dynamics.capture`; other libraries may keep state anywhere."""
        step = super().capture()
        if self.is_foreign:
            refs = self._refs(self.optimizer, self.theta)
            step.state = [_kept(entry, refs) for entry in step.state]
            step.own = self._own(self.optimizer, self.theta)
        if self.draws:
            step.rng = RandomState.capture(step.theta[0].device)
        return step

    def enter(self) -> Entry:
        """Looks at the optimizer when its step begins; see :class:`Entry`."""
        return Entry(self._settings)

    def _settings(self) -> OptimizerStep:
        """Returns the options, the state and the attributes as they are; no copy of θ."""
        optimizer, theta = self.optimizer, self.theta
        refs = self._refs(optimizer, theta)
        return OptimizerStep(
            options=[
                {name: v for name, v in group.items() if name != "params"}
                for group in optimizer.param_groups
            ],
            groups=[],
            theta=[],
            gradients=[],
            state=[_kept(optimizer.state.get(p, {}), refs) for p in theta],
            own=self._own(optimizer, theta),
        )

    def jvp_(self, step: OptimizerStep, tangent: State, gradient: list[Tensor]) -> None:
        """See :meth:`Dynamics.jvp_`; the m tangents run one after the other."""
        m = tangent[THETA][0].shape[0]
        results = [self._jvp_one(step, tangent, gradient, j) for j in range(m)]
        for name, i in results[0]:
            entries(tangent, name)[i] = torch.stack([r[name, i] for r in results])

    def _jvp_one(
        self, step: OptimizerStep, tangent: State, gradient: list[Tensor], j: int
    ) -> dict[Key, Tensor]:
        """Returns the j-th tangent of everything that the step writes."""

        def dual(key: Key, primal: Tensor) -> Tensor:
            name, i = key
            copy = primal.detach().clone()
            if not self._is_followed(key, primal):
                return copy
            directions = gradient[i] if name == GRADIENT else entries(tangent, name)[i]
            if directions.shape[1:] != copy.shape:
                return copy  # this state did not exist at an earlier step
            result: Tensor = forward_ad.make_dual(copy, directions[j].to(copy.dtype))
            return result

        with dual_level(), torch.no_grad(), Differentiable():
            moved = self._make(self._filled(step, dual))
            return {key: _tangent(value) for key, value in self._followed(moved).items()}

    def vjp_(self, step: OptimizerStep, adjoint: State, *, state_part: bool = True) -> list[Tensor]:
        """See :meth:`Dynamics.vjp_`; one graph of the step serves all m adjoints."""
        result = [torch.zeros_like(t) for t in adjoint[THETA]]
        if not self._active(step):
            return result
        m = adjoint[THETA][0].shape[0]
        tensors = {key: value.detach() for key, value in self._tensors(step).items()}
        leaves = {key: value for key, value in tensors.items() if self._is_followed(key, value)}
        others = {key: value for key, value in tensors.items() if key not in leaves}
        outputs: list[Key] = []

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            held = dict(zip([*leaves, *others], values, strict=True))
            with Differentiable(functional=True):
                # What is in place must not write to what is differentiated.
                moved = self._make(self._filled(step, lambda key, value: held[key].clone()))
            after = self._followed(moved)
            outputs[:] = [
                key
                for key, value in after.items()
                if entries(adjoint, key[0])[key[1]].shape[1:] == value.shape
            ]
            written.extend(after)
            return tuple(after[key] for key in outputs)

        def function(*values: Tensor) -> Any:
            # The others are written to as well, and so take part in the rewriting.
            return torch.func.functionalize(run)(*values, *others.values())

        written: list[Key] = []
        with torch.enable_grad():
            values, pull = torch.func.vjp(function, *leaves.values())[:2]
        bars = [entries(adjoint, name)[i] for name, i in outputs]
        rows = [
            pull(tuple(bar[j].to(value.dtype) for bar, value in zip(bars, values, strict=True)))
            for j in range(m)
        ]
        for position, (name, i) in enumerate(leaves):
            pulled = torch.stack([row[position] for row in rows])
            if name == GRADIENT:
                result[i] = pulled
            else:
                entries(adjoint, name)[i] = pulled
        for name, i in set(written) - leaves.keys():
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
        with torch.no_grad():
            after = self._make(in_double(replace(step, options=options), self))
        moved: dict[str, dict[int, Tensor]] = {}
        for (name, i), value in self._followed(after).items():
            moved.setdefault(name, {})[i] = value
        return moved

    def is_elementwise_at(self, step: OptimizerStep) -> bool:
        """Whether a step moves each element by its own gradient and state alone.

        The step is made in float64, once whole, then for every second element of the flattened
        parameters and for the others: θ and all state must agree to rounding, and state must be
        shaped like θ. So must they at the step after it, where there is state, and with a gradient
        so large that limits on norms act. Blocks of elements rely on all of this:
        :func:`~lightning_hpo.dynamics.jvp_lean_`.

        Cost: five steps, and twice θ, g and the state in float64.
        """
        after = self.advance(step)
        for key, value in self._tensors(after).items():
            before = self._tensors(step).get(key)
            if not (_is_common(key[0]) and value.is_floating_point()):
                continue
            if before is None or not torch.equal(before, value):
                return False
        gradients = [None if g is None else g * _LARGE for g in step.gradients]
        following = replace(after, gradients=gradients)
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

    def advance(
        self, step: OptimizerStep, closure: Callable[[OptimizerStep], Any] | None = None
    ) -> OptimizerStep:
        """Makes a step on copies.

        Args:
            step: The step.
            closure: Called with the copies, where the optimizer calls its closure; its result is
                that of the closure.

        Returns:
            θ, the optimizer's state and options, and what it keeps elsewhere, after the step.
        """
        with torch.no_grad():
            return self._make(self._filled(step, lambda key, value: value.clone()), closure)

    # -------------------------------------------------------------------------- tensors of a step

    def _active(self, step: OptimizerStep) -> list[int]:
        # Empty slices of sharded parameters have nothing to differentiate.
        return [i for i, g in enumerate(step.gradients) if g is not None and g.numel()]

    def _moving(self, step: OptimizerStep) -> Collection[int]:
        """Lists the parameters that the optimizer sees; of torch.optim those with a gradient."""
        if self.is_foreign and not self.is_elementwise:
            return range(len(step.theta))
        return {i for i, g in enumerate(step.gradients) if g is not None}

    def _is_followed(self, key: Key, value: Tensor) -> bool:
        """Whether a tensor may depend on θ and g."""
        name = key[0]
        if _is_common(name) and (self.is_elementwise or not self.is_foreign):
            return False
        return name in (THETA, GRADIENT) or is_function_of_theta(name, value)

    def _followed(self, step: OptimizerStep) -> dict[Key, Tensor]:
        """Returns the tensors of s that may depend on θ and g, of parameters that the step sees."""
        moving = self._moving(step)
        return {
            key: value
            for key, value in self._tensors(step).items()
            if key[0] != GRADIENT and key[1] in moving and self._is_followed(key, value)
        }

    def _tensors(self, step: OptimizerStep) -> dict[Key, Tensor]:
        """Returns all tensors of a step."""
        found: dict[Key, Tensor] = {}

        def note(key: Key, value: Tensor) -> Tensor:
            found[key] = value
            return value

        self._filled(step, note)
        return found

    def _filled(
        self, step: OptimizerStep, tensor: Callable[[Key, Tensor], Tensor]
    ) -> OptimizerStep:
        """Returns a step with other tensors in containers of its own."""
        moving = self._moving(step)

        def leaf(name: str, at: int | None, value: Any) -> Any:
            return tensor((name, at or 0), value) if isinstance(value, Tensor) else value

        return replace(
            step,
            theta=[tensor((THETA, i), p) if i in moving else p for i, p in enumerate(step.theta)],
            gradients=[
                None if g is None else tensor((GRADIENT, i), g)
                for i, g in enumerate(step.gradients)
            ],
            state=[
                dict(rebuilt(s, leaf, at=i)) if i in moving else s for i, s in enumerate(step.state)
            ],
            options=[rebuilt(o, leaf, f"{_GROUP}.{k}") for k, o in enumerate(step.options)],
            own=rebuilt(step.own, leaf, _OWN),
        )

    # ----------------------------------------------------------------------------------- the trial

    def _make(
        self, step: OptimizerStep, closure: Callable[[OptimizerStep], Any] | None = None
    ) -> OptimizerStep:
        """Lets the optimizer step on the very tensors of ``step``, which it uses up.

        The optimizer itself, and what it holds in containers and objects, is not touched.
        """
        kind = type(self.optimizer)
        moving = self._moving(step)
        params = {i: p for i, p in enumerate(step.theta) if i in moving}

        def give_gradients() -> None:
            for i, p in params.items():
                p.grad = step.gradients[i]

        give_gradients()
        shadow = object.__new__(kind)
        groups = [
            {
                **options,
                **{switch: False for switch in _SWITCHES if switch in options},
                "params": [params[i] for i in positions if i in params],
            }
            for options, positions in zip(step.options, step.groups, strict=True)
        ]
        state = copy(self.optimizer.state)
        state.clear()
        targets: dict[Ref, Any] = {
            Ref("optimizer"): shadow,
            Ref("groups"): groups,
            Ref("state"): state,
            **{Ref("parameter", i): p for i, p in params.items()},
            **{Ref("group", k): group for k, group in enumerate(groups)},
            **{Ref("params", k): group["params"] for k, group in enumerate(groups)},
        }
        for i, p in params.items():
            targets[Ref("entries", i)] = {}
            if step.state[i]:
                state[p] = targets[Ref("entries", i)]

        def resolved(name: str, at: int | None, value: Any) -> Any:
            return targets.get(value, value) if isinstance(value, Ref) else value

        memo: dict[int, Any] = {}
        for i in params:
            targets[Ref("entries", i)].update(rebuilt(step.state[i], resolved, memo=memo))
        own = rebuilt(step.own, resolved, memo=memo)
        state.update(own.pop(_STATE, {}))
        vars(shadow).update(
            {
                name: copy(value) if isinstance(value, (list, dict, set)) else value
                for name, value in vars(self.optimizer).items()
                if name in _NOT_OWN or not self.is_foreign
            }
            | own
        )
        shadow.state, shadow.param_groups = state, groups
        _unhook(shadow, set())

        def now() -> OptimizerStep:
            theta = [params.get(i, p) for i, p in enumerate(step.theta)]
            refs = self._refs(shadow, theta)
            return replace(
                step,
                state=[
                    _kept(shadow.state.get(p, {}), refs) if i in params else before
                    for i, (p, before) in enumerate(zip(theta, step.state, strict=True))
                ],
                options=[
                    {n: v for n, v in group.items() if n != "params"}
                    for group in shadow.param_groups
                ],
                own=self._own(shadow, theta),
            )

        def stub() -> Any:
            give_gradients()
            if closure is not None:
                return closure(now())
            return torch.zeros(()) if step.loss is None else step.loss

        arguments = {"closure": stub} if self.is_foreign and self._takes_closure else {}
        draws = step.rng is not None and self.draws
        fork = forked_rng(step.theta[0].device, step.rng) if draws else nullcontext()
        # Those on all optimizers are not for the steps of a copy, and of optimizers inside it.
        with fork, emptied(_GLOBAL_HOOKS):
            _unwrapped_step(kind)(shadow, **arguments)
        return now()

    def _refs(self, optimizer: torch.optim.Optimizer, theta: list[Tensor]) -> dict[int, Any]:
        """Returns what is recorded elsewhere, by ``id``."""
        return {
            id(optimizer): Ref("optimizer"),
            id(optimizer.param_groups): Ref("groups"),
            id(optimizer.state): Ref("state"),
            **{id(p): Ref("parameter", i) for i, p in enumerate(theta)},
            **{id(group): Ref("group", k) for k, group in enumerate(optimizer.param_groups)},
            **{
                id(group["params"]): Ref("params", k)
                for k, group in enumerate(optimizer.param_groups)
            },
            **{
                id(optimizer.state[p]): Ref("entries", i)
                for i, p in enumerate(theta)
                if p in optimizer.state
            },
        }

    def _own(self, optimizer: torch.optim.Optimizer, theta: list[Tensor]) -> dict[str, Any]:
        """Records attributes and the state that belongs to no parameter, in containers of its own.

        Tensors are those of the optimizer.
        """
        if not self.is_foreign:
            return {}
        known = {id(p) for p in theta}
        found = {name: v for name, v in vars(optimizer).items() if name not in _NOT_OWN}
        loose = {key: v for key, v in optimizer.state.items() if id(key) not in known}
        if loose:
            found[_STATE] = loose
        memo = self._refs(optimizer, theta)
        return _kept(found, memo)


_GROUP, _OWN, _STATE = "group", "own", "state"


def _kept(values: dict[str, Any], refs: dict[int, Any]) -> dict[str, Any]:
    """Returns containers of its own around the same tensors."""
    memo = dict(refs)
    return {name: rebuilt(v, lambda n, i, t: t, name, memo=memo) for name, v in values.items()}


def _is_common(name: str) -> bool:
    """Whether a tensor belongs to no parameter."""
    return name.startswith((f"{_GROUP}.", f"{_OWN}."))


def in_double(step: OptimizerStep, dynamics: GenericDynamics) -> OptimizerStep:
    """Returns a copy of a step in float64."""

    def double(key: Key, value: Tensor) -> Tensor:
        if value.is_floating_point() and dynamics._is_followed(key, value):
            return value.detach().to(torch.float64, copy=True)
        return value.detach().clone()

    return dynamics._filled(step, double)


def _unhook(optimizer: Any, seen: set[int]) -> None:
    """Takes hooks and patches away from a copy of an optimizer, and from optimizers inside it."""
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    own = vars(optimizer)
    own.pop("step", None)  # learning-rate schedulers patch the instance
    own.update({name: OrderedDict() for name in _HOOKS})
    for value in own.values():
        if isinstance(value, torch.optim.Optimizer):
            _unhook(value, seen)


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
