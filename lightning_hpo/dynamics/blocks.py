"""Derivatives of elementwise steps, some elements at a time: their temporaries are then small."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_hpo._tensors import rows
from lightning_hpo.dynamics.base import Block, Dynamics, OptimizerStep
from lightning_hpo.dynamics.state import THETA, State, entry


def jvp_lean_(
    dynamics: Dynamics,
    step: OptimizerStep,
    tangent: State,
    gradient: list[Tensor],
    which: slice = slice(None),
) -> None:
    """Moves some of the tangents through a step, with little work space.

    Args:
        dynamics: Φ.
        step: The step.
        tangent: ṡ, replaced by ṡ'.
        gradient: ġ of those that are meant; used up.
        which: Which of the m tangents are meant.
    """
    if dynamics.nonlinear and dynamics.is_elementwise:
        for block in step.blocks(range(len(gradient))):
            state = _cut(tangent, block, which)
            h = [rows(gradient[i])[:, elements] for i, elements in block]
            dynamics.jvp_(step.restricted(block), state, h)
            _put_back(tangent, state, block, which)
    elif gradient and len(gradient[0]) == len(tangent[THETA][0]):
        dynamics.jvp_(step, tangent, gradient)
    else:
        state = {name: [t[which] for t in tensors] for name, tensors in tangent.items()}
        dynamics.jvp_(step, state, gradient)
        for name, tensors in state.items():
            for i, t in enumerate(tensors):
                _put(t, entry(tangent, name, i, t.shape[1:])[which])


def vjp_lean_(
    dynamics: Dynamics, step: OptimizerStep, adjoint: State, *, state_part: bool = True
) -> list[Tensor]:
    """Pulls adjoints back through a step, with little work space; see :meth:`Dynamics.vjp_`."""
    if not (dynamics.nonlinear and dynamics.is_elementwise):
        return dynamics.vjp_(step, adjoint, state_part=state_part)
    result = [t.new_empty(t.shape) for t in adjoint[THETA]]
    for block in step.blocks(range(len(result))):
        state = _cut(adjoint, block, slice(None))
        h = dynamics.vjp_(step.restricted(block), state, state_part=state_part)
        for (i, elements), t in zip(block, h, strict=True):
            rows(result[i])[:, elements] = t
        if state_part:
            _put_back(adjoint, state, block, slice(None))
    return result


def multiply_by_slope_(
    dynamics: Dynamics,
    step: OptimizerStep,
    stacks: Sequence[Tensor | None],
) -> None:
    """Multiplies vectors by ∂Φ/∂g of θ in an elementwise step, and by ∂ĝ/∂g of clipping by value.

    Both are diagonal: tangents and adjoints need the same. Clipping by norm, which is not diagonal,
    is left to the caller.

    Args:
        dynamics: Φ.
        step: The step.
        stacks: ``(m, n)`` for each parameter of n elements, multiplied in place; None for none. m
            may differ between parameters.
    """
    by_count: dict[int, list[int]] = {}
    for i, stack in enumerate(stacks):
        if stack is not None:
            by_count.setdefault(len(stack), []).append(i)
    for index in by_count.values():
        for block in step.blocks(index):
            places = [stack[:, part] for i, part in block if (stack := stacks[i]) is not None]
            products = list(places)
            part_of_step = step.restricted(block)
            if step.clipping is not None and step.clipping.by_value:
                assert part_of_step.unclipped is not None
                step.clipping.product_(part_of_step.unclipped, products)
            products = dynamics.vjp_(part_of_step, {THETA: products}, state_part=False)
            for place, product in zip(places, products, strict=True):
                _put(product, place)


def _cut(state: State, block: Block, which: slice) -> State:
    """Returns some elements of tangents or adjoints, as views."""
    for tensors in state.values():
        for i, _ in block:
            tensors[i] = tensors[i].contiguous()  # else parts of it would be copies
    return {
        name: [rows(tensors[i])[which, elements] for i, elements in block]
        for name, tensors in state.items()
    }


def _put_back(state: State, parts: State, block: Block, which: slice) -> None:
    """Stores parts that were not computed in place, and those of state the step has created."""
    for name, tensors in parts.items():
        for (i, elements), t in zip(block, tensors, strict=True):
            like = state[THETA][i]
            if t.numel() or not like.numel():  # it exists; a slice of θ may be empty
                _put(t, rows(entry(state, name, i, like.shape[1:]))[which, elements])


def _put(value: Tensor, place: Tensor) -> None:
    """Writes a part to its place, unless it has been computed there."""
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)
