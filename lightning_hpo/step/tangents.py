"""The tangents y = dθ/dλ of forward mode, as they are carried along the training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_hpo._tensors import is_on_host, rows
from lightning_hpo.distributed import (
    average_,
    broadcast_,
    gather_stacks,
    local,
    norm_over_shards,
    sum_over_shards,
    take_slices,
)
from lightning_hpo.dynamics import THETA, State
from lightning_hpo.step.training_map import TrainingMap
from lightning_hpo.step.validation import ValidationGradient

# As many directions are carried through a step at a time as have this many elements together, or
# one: their products are all that is needed besides the tangents themselves.
_ELEMENTS = 2**20


class Tangents:
    """One tangent of s = (θ, optimizer state) per scalar hyperparameter, with respect to raw λ.

    :meth:`Step.jvp_` moves them along with s; here they fade, are projected, and are multiplied
    with g_V. Made by :meth:`Space.tangents`. Memory: (1 + number of optimizer state tensors) |θ|
    per scalar λ.

    Args:
        training: What all steps of the training share.
        unit: The unit vectors of λ space, by name.
        decay: The factor by which the tangents fade before each step; 1: not at all.
        sync: Whether H y + B is averaged over the ranks at every step.

    Attributes:
        state: ṡ, stacked over the m scalar λ.
        statistics: ṙ of the running statistics, stacked likewise.
        first: The position of the first scalar of each λ among all m.
        is_zero: Whether all are known to be zero, as at the start.

    Example:
        >>> class Carried(Estimator):
        ...     def setup(self, space):
        ...         super().setup(space)
        ...         self.y = space.tangents(decay=0.9)
        ...
        ...     def observe(self, step):
        ...         step.jvp_(self.y)
        ...
        ...     def hypergradient(self, validation):
        ...         total, norms = self.y.hypergradient(validation)
        ...         return estimators.Estimate(self.space.split(total), self.space.split(norms))
        >>> train(Carried())
    """

    def __init__(
        self, training: TrainingMap, unit: dict[str, Tensor], *, decay: float, sync: bool
    ) -> None:
        self.unit = unit
        self.sync = sync
        self.count = len(next(iter(unit.values())))
        sizes = [e[0].numel() for e in unit.values()]
        self.first = dict(zip(unit, accumulate(sizes, initial=0), strict=False))
        self.state: State = training.dynamics.zeros(self.count)
        self.statistics = training.statistics.zeros(self.count)
        self.is_zero = True
        self._training = training
        self._decay = decay
        self._has_moved = False
        self._norms: Tensor | None = None
        self._frozen: set[int] = set()

    def portions(self) -> Iterator[range]:
        """Splits the directions into those that are carried on together."""
        numel = sum(local(p).numel() for p in self._training.theta)
        size = max(1, _ELEMENTS // max(1, numel))
        for start in range(0, self.count, size):
            yield range(start, min(start + size, self.count))

    def reset(self) -> None:
        """Sets all tangents to zero: earlier steps are forgotten."""
        for tensors in self._tensors():
            torch._foreach_zero_(tensors)
        self.is_zero = True
        self._norms = None

    def begin_step(self) -> None:
        """Lets the tangents fade, once per step; parameters may have joined or left since."""
        if self._has_moved and self._decay != 1.0:
            self.scale_(self._decay)
        if self._has_moved and self.sync and self._training.statistics.is_broadcast:
            broadcast_(self.statistics)
        self._has_moved = False
        self.follow()

    def end_step(self) -> None:
        """Notes that the tangents have moved."""
        self.is_zero = False
        self._norms = None
        self._has_moved = True

    def follow(self) -> None:
        """Gives zero tangents to parameters that have joined the training, or left it."""
        for i, p in enumerate(self._training.theta):
            if not p.requires_grad and i not in self._frozen:
                for tensors in self.state.values():
                    if i < len(tensors):
                        tensors[i].zero_()
                self._norms = None
        self._frozen = {i for i, p in enumerate(self._training.theta) if not p.requires_grad}
        self._training.dynamics.grow_(self.state)

    def norms(self) -> Tensor:
        """Returns ‖y‖ over all parameters, one number per scalar λ: ``(m,)``."""
        if self._norms is None:
            parts = [torch.linalg.vector_norm(rows(y), dim=1) for y in self.state[THETA]]
            norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
            self._norms = norm_over_shards(norms, self._training.sharded)
        return self._norms

    def scale_(self, factors: Tensor | float) -> None:
        """Multiplies each tangent, all of its parts, by its factor.

        Args:
            factors: One per tangent, ``(m,)``, or one for all.
        """
        for tensors in self._tensors():
            for t in tensors:
                if isinstance(factors, Tensor):
                    t.mul_(factors.to(t.dtype).reshape(-1, *[1] * (t.dim() - 1)))
                else:
                    t.mul_(factors)
        if self._norms is not None:
            self._norms = self._norms * factors

    def project_(self, radius: float) -> None:
        """Projects each tangent on a ball, optimizer state along: r / max(‖y‖, r) · ṡ.

        Args:
            radius: r, in the units of θ per unit of raw λ; ``inf`` leaves them alone.
        """
        if math.isinf(radius):
            return
        norms = self.norms()
        # Where looking would make the host wait for a device, the product by one is cheaper.
        if not is_on_host(norms) or bool((norms > radius).any()):
            self.scale_(radius / norms.clamp(min=radius))

    def hypergradient(self, validation: ValidationGradient) -> tuple[Tensor, Tensor]:
        """Returns ⟨g_V, y⟩ + ⟨∂L_V/∂r, ṙ⟩ for each scalar λ, and ‖y‖: ``(m,)`` each.

        Online-HPO paper, eq. 5, with the running statistics r, which L_V depends on too.

        The product is NaN where ‖y‖ has overflowed; those tangents start anew, since they would
        stay non-finite for ever.

        Args:
            validation: g_V at θ_{t+1}.
        """
        self.follow()  # parameters that have joined since the step
        y = self.state[THETA]
        if self.sync:
            total = torch.stack(validation.products(y, self.statistics)).sum(0)
        else:
            pairs = zip(y, validation.tensors(), strict=True)
            parts = [rows(stack) @ g.flatten().to(stack.dtype) for stack, g in pairs]
            total = sum_over_shards(torch.stack(parts).sum(0), self._training.sharded)
            for stack, g in zip(self.statistics, validation.statistics(), strict=True):
                total += rows(stack) @ g.flatten().to(stack.dtype)
            average_([total])
        norms = self.norms()
        is_finite = torch.isfinite(norms)
        total = torch.where(is_finite, total, math.nan)
        if not bool(is_finite.all()):
            for tensors in self._tensors():
                for t in tensors:
                    t[~is_finite] = 0
            self._norms = None
        return total, norms

    def _tensors(self) -> Iterator[list[Tensor]]:
        """Yields the lists of all that is stacked over λ."""
        yield from self.state.values()
        if self.statistics:
            yield self.statistics

    def state_dict(self) -> dict[str, Any]:
        """Returns the tangents.

        Sharded tangents are assembled on the first process: all processes must call this.
        """
        parameters = self._training.theta
        return {
            "tangents": {name: gather_stacks(s, parameters) for name, s in self.state.items()},
            "statistics": self.statistics,
            "names": self._training.followed(),
            "is_zero": self.is_zero,
            "has_moved": self._has_moved,
            # After clipping they are not those of the tangents to the last bit.
            "norms": self._norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the tangents onto the devices of the parameters.

        Args:
            state: What :meth:`state_dict` returned.
        """
        # Parameters may have joined since; they get zero tangents at the next step.
        parameters = self._training.theta
        self.state = {
            name: take_slices(stacks, parameters[: len(stacks)])
            for name, stacks in state["tangents"].items()
        }
        own = self._training.followed()
        saved = dict(zip(state.get("names", own), state["statistics"], strict=True))
        for name, t in zip(own, self.statistics, strict=True):
            if name in saved:
                t.copy_(saved[name])
        if lost := saved.keys() - set(own):
            warnings.warn(
                "OnlineHPOCallback: the resumed training does not follow the buffers "
                f"{', '.join(map(repr, sorted(lost)))} of the checkpoint; their tangents are lost",
                stacklevel=2,
            )
        self.is_zero = bool(state["is_zero"])
        self._has_moved = bool(state["has_moved"])
        norms = state["norms"]
        self._norms = None if norms is None else norms.to(parameters[0].device)
