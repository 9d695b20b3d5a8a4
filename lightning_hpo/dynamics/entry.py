"""What an optimizer does with its counts and options before it calls its closure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lightning_hpo._kinds import read_slots
from lightning_hpo._tensors import widened
from lightning_hpo.distributed import local
from lightning_hpo.dynamics.base import OptimizerStep
from lightning_hpo.dynamics.containers import rebuilt

Records = dict[tuple[str, int], dict[str, Any]]
"""Options of groups, state of parameters, and attributes of the optimizer: each by name."""


class Entry:
    """What an optimizer held when its step began.

    A gradient is final only inside of the closure. An optimizer that counts, or sets its learning
    rate, before it calls it does so again when its step is made on copies: these must start from
    what was there before. What has changed inside of the closure was changed by the training step,
    and happens once. Larger tensors are those of the optimizer itself.

    Args:
        read: Returns the options, the state and the attributes as they are.
    """

    def __init__(self, read: Callable[[], OptimizerStep]) -> None:
        self._read = read
        step = read()
        self._then = _rebuilt(step, _kept)
        self._seen = _rebuilt(step, _Seen)
        self._changed: Records = {}

    def begin(self) -> None:
        """Looks at what has changed when the closure is called."""
        self._changed = {}
        for place, now in _rebuilt(self._read(), _Seen).items():
            before = self._seen.get(place, {})
            for name in before.keys() | now.keys():
                if not _same(before.get(name), now.get(name)):
                    self._changed.setdefault(place, {})[name] = now.get(name)

    def return_(self, step: OptimizerStep) -> None:
        """Lets a step, captured at the end of the closure, start from what was there before it."""
        if not self._changed:
            return
        seen, own = _rebuilt(self._read(), _Seen), _records(step)
        for place, begun in self._changed.items():
            for name, value in begun.items():
                if not _same(value, seen[place].get(name)):
                    continue  # the training step has set it since
                if name in self._then.get(place, {}):
                    own[place][name] = rebuilt(self._then[place][name], _widened)
                else:
                    own[place].pop(name, None)


class _Seen:
    """A tensor, and how often it has been written to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.numel() <= 1 else tensor


def _widened(name: str, at: int | None, value: Any) -> Any:
    return widened(local(value.detach())) if isinstance(value, Tensor) else value


def _records(step: OptimizerStep) -> Records:
    return {
        ("own", 0): step.own,
        **{("options", k): options for k, options in enumerate(step.options)},
        **{("state", i): state for i, state in enumerate(step.state)},
    }


def _rebuilt(step: OptimizerStep, tensor: Callable[[Tensor], Any]) -> Records:
    def leaf(name: str, at: int | None, value: Any) -> Any:
        return tensor(value) if isinstance(value, Tensor) else value

    memo: dict[int, Any] = {}
    return {
        place: {name: rebuilt(value, leaf, memo=memo) for name, value in record.items()}
        for place, record in _records(step).items()
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two records are the same; so is what shows nothing of itself."""
    pairs = [(a, b)]
    seen: set[tuple[int, int]] = set()
    while pairs:
        a, b = pairs.pop()
        if a is b or (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        if type(a) is not type(b):
            return False
        if isinstance(a, _Seen):
            if a.tensor is not b.tensor or a.version != b.version:
                return False
        elif isinstance(a, (int, float, complex, str, bytes)):
            if a != b and (a == a or b == b):
                return False
        elif isinstance(a, np.ndarray):
            if a.tobytes() != b.tobytes():
                return False
        elif type(a).__module__ == "itertools":
            if repr(a) != repr(b):
                return False
        elif isinstance(a, dict):
            if a.keys() != b.keys():
                return False
            pairs += [(value, b[key]) for key, value in a.items()]
        elif isinstance(a, (list, tuple, deque)):
            if len(a) != len(b):
                return False
            pairs += zip(a, b, strict=True)
        else:
            pairs.append((read_slots(a), read_slots(b)))
            pairs.append((getattr(a, "__dict__", None), getattr(b, "__dict__", None)))
    return True
