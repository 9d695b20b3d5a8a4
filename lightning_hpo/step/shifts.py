"""Whether something else than the optimizer moves θ between its steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hpo._repr import listed
from lightning_hpo._tensors import is_on_host
from lightning_hpo.distributed import local
from lightning_hpo.step.trace_check import sum_of_bits

# Values are compared at so many steps in a row, at the start and again so many steps later. Each
# time takes two sums over θ, a twentieth of the time of a step of an MLP.
_ROW = 12
_EVERY = 500


class ShiftCheck:
    """Compares θ as the optimizer has left it with θ at its next step, and at an update.

    Tangents and adjoints pass through the optimizer's steps. What moves θ in between (a projection,
    a decay, a slow copy) is a constant shift to them, and that is warned about once. Versions are
    compared at each step; they do not count what is written through ``.data``, and count what is
    put back later, so that values decide. Nothing is copied: values are compared by sums of bits.
    Of the optimizer's state, in which nothing is put back, versions do.

    Args:
        module: The LightningModule.
        optimizer: The optimizer.

    Attributes:
        follows_state: Whether the optimizer's state is compared: T1T2 alone does not depend on it.
    """

    def __init__(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._state: dict[tuple[int, str], tuple[int, int]] | None = None
        self._is_told_of_state = False
        self.follows_state = False
        self._steps = 0
        self._until = _ROW  # values are compared until this step
        self._is_told = False
        self._trained: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []
        self._sums: Tensor | None = None  # an old one stays: memory does not come and go
        self._has_sums = False
        self._moved: tuple[list[Tensor], Tensor] | None = None  # found, and not read yet

    def after_step(self, theta: Sequence[Tensor], *, is_last_batch: bool) -> None:
        """Remembers θ as the optimizer has left it.

        Args:
            theta: The parameters that it moves.
            is_last_batch: Whether an epoch ends here, after which much may happen once.
        """
        self.forget()
        if self.follows_state and not self._is_told_of_state:
            self._state = self._state_now()
        if self._is_told:
            return
        self._steps += 1
        # What has no gradient is not trained: a teacher may be among what the optimizer is given.
        self._trained = [p for p in theta if p.grad is not None and p.requires_grad]
        self._versions = _versions(self._trained)
        if self._steps <= self._until or self._steps % _EVERY < _ROW or is_last_batch:
            self._sums = _sums(self._trained)
            self._has_sums = True

    def forget(self) -> None:
        """Forgets θ, which is known to have been moved."""
        self._trained, self._has_sums = [], False
        self._state = None

    def look_at_state(self) -> None:
        """Compares the optimizer's state now: tangents and adjoints take it as it was."""
        before, self._state = self._state, None
        if before is None or before == (now := self._state_now()):
            return
        self._is_told_of_state = True
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        names = {id(p): name for name, p in self._module.named_parameters()}
        changed = [f"{entry!r} of {names.get(i, 'one')!r}" for i, entry in keys]
        warnings.warn(
            "OnlineHPOCallback: something else than the optimizer changes its state between its "
            f"steps: {listed(changed, 1)}. Hypergradients of all estimators "
            "but T1T2 take that as a constant, or do not see it, and can be off by any factor. Do "
            "it in step() of a subclass of the optimizer, which is differentiated",
            stacklevel=2,
        )

    def _state_now(self) -> dict[tuple[int, str], tuple[int, int]]:
        """Returns which tensors the state consists of, and how often they have been written to."""
        return {
            (id(p), str(name)): (id(value), value._version)
            for p, state in self._optimizer.state.items()
            if isinstance(p, Tensor) and isinstance(state, dict)
            for name, value in state.items()
            if isinstance(value, Tensor)
        }

    def look(self, *, may_wait: bool) -> None:
        """Compares θ now.

        Args:
            may_wait: Whether the host may wait for the device.
        """
        if not self._trained or self._is_told:
            return
        if self._sums is None or not self._has_sums:
            if self._versions != _versions(self._trained):
                self._until = self._steps + _ROW  # it happens again, or has been put back
            return
        moved = self._sums != _sums(self._trained)
        if self._moved is not None and len(self._moved[0]) == len(self._trained):
            moved |= self._moved[1]
        self._moved = self._trained, moved
        if may_wait or is_on_host(moved):
            self._tell()

    def _tell(self) -> None:
        assert self._moved is not None
        (trained, moved), self._moved = self._moved, None
        flags = moved.tolist()
        if not any(flags):
            return
        self._is_told = True
        known = {id(p): name for name, p in self._module.named_parameters()}
        names = [known.get(id(p), "one") for p, flag in zip(trained, flags, strict=True) if flag]
        warnings.warn(
            "OnlineHPOCallback: something else than the optimizer moves the trained parameters "
            f"{listed([repr(name) for name in names], 3)} between its steps (a hook, a callback, "
            "or optimizer_step after its super()). Hypergradients take that as a constant shift: "
            "they are right for added noise, and wrong for clamping, normalizing, decaying or "
            "averaging the weights. Do that in step() of a subclass of the optimizer, which is "
            "differentiated",
            stacklevel=2,
        )


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(p._version, p.data_ptr()) for p in map(local, tensors)]


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    sums = [sum_of_bits(local(p.detach())) for p in tensors]
    device = tensors[0].device if tensors else None
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([zero if s is None else s.to(zero.device) for s in sums] or [zero])
