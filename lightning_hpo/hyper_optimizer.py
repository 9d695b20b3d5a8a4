"""One λ update: check that the hypergradient is finite, step, project."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hpo.hyperparameters import Hyperparameter

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


DEFAULT_RATE = 0.01


def default_optimizer(raw: list[Tensor], lr: float = 1.0) -> torch.optim.Optimizer:
    """Adam on the raw values with learning rate 0.01, times ``lr``.

    It acts where an estimator is given; where that is chosen, ``SignalToNoise`` takes its place.
    Steps do not depend on the scale of the hypergradient, which with respect to log λ is
    proportional to λ: plain SGD stalls for a tiny λ and overshoots for a large one.
    """
    return torch.optim.Adam(raw, lr=DEFAULT_RATE * lr)


class HyperOptimizer:
    """Moves raw λ with a torch optimizer.

    Args:
        hyperparameters: What is moved. Their ``raw`` buffers are written in place.
        factory: Makes the optimizer from the list of raw tensors.

    Raises:
        TypeError: If the factory does not return a ``torch.optim.Optimizer``, or returns an LBFGS.
    """

    def __init__(
        self, hyperparameters: Mapping[str, Hyperparameter], factory: OptimizerFactory
    ) -> None:
        self._hyperparameters = list(hyperparameters.values())
        self.optimizer = factory([h.raw for h in self._hyperparameters])
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"OnlineHPOCallback: optimizer={factory!r} returned a "
                f"{type(self.optimizer).__name__}, expected a torch.optim.Optimizer, for example "
                "optimizer=lambda raw: torch.optim.SGD(raw, lr=0.1)"
            )
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise TypeError(
                "OnlineHPOCallback: optimizer makes an LBFGS, which evaluates a closure; expected "
                "an optimizer of gradients, for example torch.optim.Adam"
            )

    def step(self, hypergradients: Sequence[Tensor | None], lr_scale: float = 1.0) -> bool:
        """Makes one update, or none if any hypergradient is not finite.

        Args:
            hypergradients: One per hyperparameter, with respect to raw λ; where it is None, λ is
                left alone.
            lr_scale: Multiplies the learning rate for this update.

        Returns:
            Whether λ was updated. It is not where a hypergradient, or what the update would leave
            behind, is not finite.
        """
        pairs = zip(self._hyperparameters, hypergradients, strict=True)
        moved = {h: gradient for h, gradient in pairs if gradient is not None}
        if not all(map(_is_finite, moved.values())):
            return False
        raws = [h.raw for h in moved]
        before = [raw.clone() for raw in raws]
        state = {raw: _copied(self.optimizer.state.get(raw, {})) for raw in raws}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for raw, gradient in zip(raws, moved.values(), strict=True):
            raw.grad = gradient.to(raw.dtype).reshape(raw.shape)
        try:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_scale
            self.optimizer.step()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for raw in raws:
                raw.grad = None
        tensors = [*raws, *(v for raw in raws for v in self.optimizer.state[raw].values())]
        if not all(_is_finite(t) for t in tensors if isinstance(t, Tensor)):
            # A finite hypergradient can be too large for the arithmetic of the λ-optimizer.
            for raw, value in zip(raws, before, strict=True):
                raw.copy_(value)
                self.optimizer.state[raw] = state[raw]
            return False
        for h in moved:
            h.raw.copy_(h.constraint.project(h.raw))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the λ-optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the λ-optimizer's state."""
        self.optimizer.load_state_dict(state)


def _is_finite(tensor: Tensor) -> bool:
    # Of a number: torch.isfinite makes six kernels of it.
    return math.isfinite(tensor) if tensor.numel() == 1 else bool(torch.isfinite(tensor).all())


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
