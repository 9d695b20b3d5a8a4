"""The contract: derivatives of one step of the user's optimizer, s' = Φ(s, g)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hpo._tensors import is_on_host, stacked_zeros, widened
from lightning_hpo.distributed import local
from lightning_hpo.dynamics.clipping import GradientClipping
from lightning_hpo.dynamics.containers import rebuilt
from lightning_hpo.dynamics.state import THETA, State, extend_
from lightning_hpo.rng import RandomState

# State entries that count steps or follow a schedule: no function of θ or g.
_SCHEDULES = frozenset({"step", "eta", "mu", "mu_product"})

Block = list[tuple[int, slice]]
"""Positions of parameters, and which of their elements (flattened) are meant."""

BLOCK = 2**18
"""About how many elements a block has: few enough to stay in the cache of a CPU."""


@dataclass
class OptimizerStep:
    """One step of the optimizer, seen after the gradient is final and before θ moves.

    Its tensors are in float32 or better, whatever the precision of the training. Those of θ, g and
    the state may be the training's own.

    Attributes:
        options: The options of each parameter group in force at this step (learning rate, betas …).
        groups: For each group, the positions of its parameters in ``theta``.
        theta: θ_t, in the order of the optimizer's parameter groups.
        gradients: The gradient that the optimizer receives (after unscaling and clipping); None for
            a parameter that takes no part in this step.
        state: The optimizer's state of each parameter before this step; tensors may be in
            containers.
        clipping: What the Trainer did to the gradient before; None where nothing was clipped.
        unclipped: The gradient before clipping, where something was.
        frozen: The positions of parameters that did not require grad.
        counts: How many steps each parameter has taken, for an optimizer that depends on it.
        slope: ∂Φ/∂g of θ, where only that is kept; None where g and the state are.
        own: What an optimizer of another library keeps elsewhere: its attributes, and state that
            belongs to no parameter.
        rng: The random state before this step, of an optimizer that draws numbers.
        loss: What the optimizer's closure has returned; None where it had none.
        choices: The indices of the choices that were drawn for this step, by name.
        asked: The names of those that ``training_step`` has asked for.
    """

    options: list[dict[str, Any]]
    groups: list[list[int]]
    theta: list[Tensor]
    gradients: list[Tensor | None]
    state: list[dict[str, Any]]
    clipping: GradientClipping | None = None
    unclipped: list[Tensor | None] | None = None
    frozen: list[int] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    slope: list[Tensor] | None = None
    own: dict[str, Any] = field(default_factory=dict)
    rng: RandomState | None = None
    loss: Any = None
    choices: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.options[0]["lr"])

    def kept(self, *, values: bool) -> OptimizerStep:
        """Returns a record that outlives the step. Costs a copy of θ.

        Args:
            values: Whether g and the state are copied as well: the derivative of a nonlinear Φ
                needs them, and so does whoever makes the step again. Else only which parameters
                have a gradient, and which state exists, is known.
        """

        def copied(name: str, at: int | None, t: Any) -> Any:
            return t.clone() if isinstance(t, Tensor) else t

        def emptied(name: str, at: int | None, t: Any) -> Any:
            return t.new_empty(0) if is_function_of_theta(name, t) else t

        theta = [p.clone() for p in self.theta]
        if values:
            gradients = [None if g is None else g.clone() for g in self.gradients]
            state, own = rebuilt(self.state, copied), rebuilt(self.own, copied)
        else:
            gradients = [None if g is None else g.new_empty(0) for g in self.gradients]
            state, own = [rebuilt(s, emptied) for s in self.state], {}
        return replace(self, theta=theta, gradients=gradients, state=state, own=own)

    def blocks(self, index: Iterable[int]) -> Iterator[Block]:
        """Splits parameters, and large ones themselves, into blocks of limited size.

        Derivatives of an elementwise Φ need many temporary tensors, which are then small. A
        parameter that is not contiguous stays whole: flattening it takes a copy.
        """
        # Elsewhere launching an operation costs more than the memory that it takes.
        limit = BLOCK if is_on_host(self.theta[0]) else 16 * BLOCK
        block: Block = []
        size = 0
        for i in index:
            n = self.theta[i].numel()
            length = limit if self.theta[i].is_contiguous() else n
            for start in range(0, max(n, 1), max(length, 1)):  # sharded parameters may be empty
                part = slice(start, min(start + length, n))
                block.append((i, part))
                size += part.stop - part.start
                if size >= limit:
                    yield block
                    block, size = [], 0
        if block:
            yield block

    def restricted(self, block: Block) -> OptimizerStep:
        """Returns the step of some elements of flattened parameters; positions count among these.

        Each parameter may be in the block once.
        """
        place = {i: k for k, (i, _) in enumerate(block)}

        def cut(tensors: Sequence[Tensor | None]) -> list[Any]:
            return [None if (t := tensors[i]) is None else t.flatten()[part] for i, part in block]

        def cut_state(i: int, part: slice) -> dict[str, Any]:
            def cut_one(name: str, at: int | None, value: Any) -> Any:
                return value.flatten()[part] if is_function_of_theta(name, value) else value

            return dict(rebuilt(self.state[i], cut_one))

        return OptimizerStep(
            options=self.options,
            groups=[[place[i] for i in positions if i in place] for positions in self.groups],
            theta=cut(self.theta),
            gradients=cut(self.gradients),
            state=[cut_state(i, part) for i, part in block],
            clipping=self.clipping,
            unclipped=None if self.unclipped is None else cut(self.unclipped),
            frozen=[place[i] for i in self.frozen if i in place],
            counts=[self.counts[i] for i, _ in block] if self.counts else [],
            own=self.own,
            rng=self.rng,
        )

    def parts(
        self, key: Callable[[int], Hashable] = lambda i: None
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yields the options and the positions of parameters that move in the same way.

        Args:
            key: Splits the parameters of a group further; it receives a position.
        """
        for options, positions in zip(self.options, self.groups, strict=True):
            split: dict[Hashable, list[int]] = {}
            for i in positions:
                if self.gradients[i] is not None:
                    split.setdefault(key(i), []).append(i)
            for index in split.values():
                yield options, index


class Dynamics(ABC):
    """Tangents and adjoints through one step Φ of an optimizer.

    Where parameters are sharded, everything here is a local slice: Φ must then be elementwise.

    Φ maps the state s = (θ, optimizer state) and the gradient g to the next state. Both products
    hold for any number m of tangents or adjoints at once. A parameter without a gradient does not
    move, and neither do its tangents.

    Args:
        optimizer: The user's optimizer. It is only read.
    """

    nonlinear: ClassVar[bool] = True
    """Whether the derivative of Φ depends on the values of g and of the state."""

    is_elementwise = True
    """Whether each element moves by its own gradient and state alone: ∂Φ/∂g is then diagonal."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def theta(self) -> list[Tensor]:
        """The optimizer's parameters, group by group."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def state_names(self) -> tuple[str, ...]:
        """The state tensors, shaped like θ, that tangents have before the optimizer has them."""
        return ()

    def capture(self) -> OptimizerStep:
        """Records the step that is about to happen; see :meth:`OptimizerStep.kept`."""

        def copied(name: str, at: int | None, v: Any) -> Any:
            # A scheduler writes to a learning rate that is a tensor in place.
            return v.detach().clone() if isinstance(v, Tensor) else v

        def seen(name: str, at: int | None, v: Any) -> Any:
            return widened(local(v)) if isinstance(v, Tensor) else v

        options = []
        groups = []
        start = 0
        for group in self.optimizer.param_groups:
            options.append(
                {name: rebuilt(v, copied) for name, v in group.items() if name != "params"}
            )
            groups.append(list(range(start, start + len(group["params"]))))
            start += len(group["params"])
        theta = self.theta
        gradients = [None if p.grad is None else widened(local(p.grad.detach())) for p in theta]
        state = [dict(rebuilt(self.optimizer.state.get(p, {}), seen)) for p in theta]
        values = [widened(local(p.detach())) for p in theta]
        step = OptimizerStep(options, groups, values, gradients, state)
        step.frozen = [i for i, p in enumerate(theta) if not p.requires_grad]
        return step

    def zeros(self, m: int) -> State:
        """Returns m zero tangents or adjoints, in float32 or better."""
        return {name: stacked_zeros(self.theta, m) for name in (THETA, *self.state_names)}

    def grow_(self, state: State) -> None:
        """Gives zeros to parameters that the optimizer has received since the state was made."""
        joined = self.theta[len(state[THETA]) :]
        if joined:
            extend_(state, joined, (THETA, *self.state_names))

    @abstractmethod
    def jvp_(self, step: OptimizerStep, tangent: State, gradient: list[Tensor]) -> None:
        r"""Moves tangents through the step, in place: ṡ' = ∂Φ/∂s ṡ + ∂Φ/∂g ġ.

        Args:
            step: The step.
            tangent: ṡ, replaced by ṡ'.
            gradient: ġ, one tensor ``(m, *p.shape)`` per parameter; used up, and may become a part
                of the tangent.
        """

    @abstractmethod
    def vjp_(self, step: OptimizerStep, adjoint: State, *, state_part: bool = True) -> list[Tensor]:
        r"""Pulls adjoints back through the step, in place: s̄ = (∂Φ/∂s)ᵀ s̄'.

        Args:
            step: The step.
            adjoint: s̄', replaced by s̄. State tensors that are not in it have the adjoint 0.
            state_part: Whether s̄ is wanted; else the adjoint is used up as work space.

        Returns:
            ḡ = (∂Φ/∂g)ᵀ s̄', one tensor ``(m, *p.shape)`` per parameter; zeros where the step had
            no gradient.
        """


def is_function_of_theta(name: str, value: Any) -> bool:
    """Whether an entry of the optimizer's state depends on θ or g."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not (name in _SCHEDULES and value.dim() == 0)
    )


def pick(tensors: list[Tensor], index: list[int]) -> list[Tensor]:
    """Returns the tensors at the given positions."""
    return [tensors[i] for i in index]


def put(tensors: list[Any], index: list[int], values: list[Tensor]) -> None:
    """Stores values at the given positions."""
    for i, value in zip(index, values, strict=True):
        tensors[i] = value
