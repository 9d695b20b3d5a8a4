"""The random number generators that a training draws from."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
            numpy=_read_numpy(),
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

    def is_same_as(self, other: RandomState) -> bool:
        """Whether nothing has been drawn between the two."""
        return not self.differences(other)

    def differences(self, other: RandomState) -> list[str]:
        """Names the generators that something has been drawn from between the two."""
        same = {
            "torch on the CPU": torch.equal(self.cpu, other.cpu),
            "torch on the device": self.device is None
            or other.device is None
            or torch.equal(self.device, other.device),
            "python": self.python == other.python,
            "numpy": self.numpy[2:] == other.numpy[2:]
            and np.array_equal(self.numpy[1], other.numpy[1]),
        }
        return [name for name, is_same in same.items() if not is_same]

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
        _write_numpy(self.numpy)
        random.setstate(self.python)


# np.random.get_state and set_state make a number of each of 624 words, which takes as long as a
# step of a small network. Here the words are copied as they lie in memory, and their position. What
# lies elsewhere is the second of two normal numbers, which is kept from the draw of the first.
_WORDS = 624


def _memory_of_numpy() -> int | None:
    """Returns where NumPy's generator has its words; None for one of another kind or layout."""
    generator = np.random.mtrand._rand._bit_generator
    if not isinstance(generator, np.random.MT19937):
        return None
    address: int = generator.ctypes.state_address
    return address if _is_laid_out_so(address) else None


@cache
def _is_laid_out_so(address: int) -> bool:
    """Whether the memory of NumPy's generator holds what NumPy says that it does."""
    state: Any = np.random.get_state()  # noqa: NPY002
    _, words, position, *_ = state
    return ctypes.string_at(address, 4 * _WORDS + 4) == _as_memory(words, position)


def _as_memory(words: Any, position: int) -> bytes:
    memory: bytes = words.tobytes() + position.to_bytes(4, sys.byteorder)
    return memory


def _take_kept_normal(address: int) -> float | None:
    """Takes the normal number that NumPy has kept, if any; draws nothing."""
    before = ctypes.string_at(address, 4 * _WORDS + 4)
    first = np.random.standard_normal()  # noqa: NPY002
    if ctypes.string_at(address, len(before)) == before:
        return first
    np.random.standard_normal()  # noqa: NPY002 - takes the one that has been kept now
    ctypes.memmove(address, before, len(before))
    return None


def _read_numpy() -> Any:
    """Returns what ``np.random.get_state`` does."""
    address = _memory_of_numpy()
    if address is None:
        return np.random.get_state()  # noqa: NPY002
    kept = _take_kept_normal(address)
    memory = ctypes.string_at(address, 4 * _WORDS + 4)
    words = np.frombuffer(memory, np.uint32, _WORDS).copy()
    position = int.from_bytes(memory[-4:], sys.byteorder)
    state = ("MT19937", words, position, int(kept is not None), kept or 0.0)
    if kept is not None:
        np.random.set_state(state)  # noqa: NPY002
    return state


def _write_numpy(state: Any) -> None:
    """Does what ``np.random.set_state`` does."""
    address = _memory_of_numpy()
    if address is None or not isinstance(state, tuple) or state[3]:
        np.random.set_state(state)  # noqa: NPY002
        return
    _take_kept_normal(address)
    _, words, position, *_ = state
    memory = _as_memory(words, position)
    ctypes.memmove(address, memory, len(memory))


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


@contextmanager
def seeded_rng(device: torch.device, seed: int, k: int) -> Iterator[int]:
    """Runs a block under random numbers that belong to item k of a stream.

    Yields:
        The seed, below 2³².
    """
    with forked_rng(device):
        yield reseed(device, seed, k)


def reseed(device: torch.device, seed: int, k: int) -> int:
    """Seeds the generators for item k of a stream; returns the seed, below 2³²."""
    own = (seed * 1_000_003 + k) % 2**32
    torch.default_generator.manual_seed(own)
    if device.type == "cuda":
        torch.cuda.manual_seed(own)
    np.random.seed(own)  # noqa: NPY002
    random.seed(own)
    return own


class ResumedRandomState:
    """Puts the random state of a checkpoint in place, when the training that was saved would go on.

    A loader draws the order of an epoch from the global generators. So at the end of an epoch the
    state is needed before Lightning makes the next iterator, and within one after it has made one.

    Args:
        saved: What the callback wrote: whether the checkpoint lies within an epoch, and the state
            of each process. None: nothing is to be restored.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self._saved = saved
        self._for_batch: RandomState | None = None
        self._for_epoch: RandomState | None = None

    def on_start(self, device: torch.device, rank: int, world_size: int) -> None:
        """Before Lightning makes its first iterator. Another number of processes starts anew."""
        saved, self._saved = self._saved, None
        if saved is None or len(saved["ranks"]) != world_size:
            return
        state = RandomState.from_state_dict(saved["ranks"][rank])
        if saved["in_epoch"]:
            self._for_batch = state
        else:
            state.restore(device)
            self._for_epoch = state

    def on_another_iterator(self, device: torch.device) -> None:
        """Undoes what was drawn for an iterator that Lightning does not use, but replaces."""
        if self._for_epoch is not None:
            self._for_epoch.restore(device)

    def on_batch_start(self, device: torch.device) -> None:
        """The first batch; from here on the training draws as it would have."""
        if self._for_batch is not None:
            self._for_batch.restore(device)
        self._for_batch = self._for_epoch = None
