"""The random number generators that a training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RandomState:
    """The state of every random number generator that a ``training_step`` is likely to use."""

    cpu: Tensor
    device: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Reads the generators of the CPU, of ``device``, of NumPy and of Python."""
        return cls(
            cpu=torch.get_rng_state(),
            device=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            numpy=np.random.get_state(),  # noqa: NPY002
            python=random.getstate(),
        )

    def share_with(self, earlier: RandomState) -> None:
        """Takes over what is the same at an earlier moment: a long window holds it once."""
        if self.python == earlier.python:
            self.python = earlier.python
        if self.numpy[2:] == earlier.numpy[2:] and np.array_equal(self.numpy[1], earlier.numpy[1]):
            self.numpy = earlier.numpy
        if torch.equal(self.cpu, earlier.cpu):
            self.cpu = earlier.cpu

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as tensors, numbers and lists, which a checkpoint may hold."""
        kind, keys, *rest = self.numpy
        plain = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
        return {**vars(self), "numpy": plain}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomState:
        """Reads what :meth:`state_dict` returned."""
        kind, keys, *rest = state["numpy"]
        return cls(**{**state, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)})

    def restore(self, device: torch.device) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


@contextmanager
def forked_rng(device: torch.device, state: RandomState | None = None) -> Iterator[None]:
    """Runs a block under ``state`` (default: the present one) and puts the present state back."""
    before = RandomState.capture(device)
    if state is not None:
        state.restore(device)
    try:
        yield
    finally:
        before.restore(device)
