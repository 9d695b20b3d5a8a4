"""Tensors inside containers and objects: lists, dicts, dataclasses, an optimizer in another."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hpo._kinds import read_slots, root_of


@dataclass(frozen=True)
class Ref:
    """Stands in a record for something of the optimizer that is recorded elsewhere.

    Attributes:
        kind: ``"parameter"``, ``"group"``, ``"params"`` and ``"entries"`` (the parameters of a
            group, the state of a parameter), ``"groups"``, ``"state"`` or ``"optimizer"``.
        index: The position of the parameter or the group.
    """

    kind: str
    index: int = 0


Leaf = Callable[[str, int | None, Any], Any]
"""What becomes of a tensor or a :class:`Ref`, given its name and the parameter that it belongs to.

The name is the path to it, ``"GG.0"``; a parameter that is the key of a dict is no part of it.
"""

_LEAVES = (Tensor, Ref)
_COPIED = (np.ndarray, np.random.Generator, np.random.RandomState, random.Random)


def rebuilt(
    value: Any,
    leaf: Leaf,
    name: str = "",
    at: int | None = None,
    memo: dict[int, Any] | None = None,
) -> Any:
    """Returns a value with the same containers, of which none is shared, around other tensors.

    Containers are dicts, lists, tuples, sets and deques, of subclasses too, optimizers, and plain
    objects of the user's classes, with or without slots. Arrays, generators of random numbers and
    iterators over things in memory are copied. Modules, functions, and what has no attributes of
    its own are left as they are.

    Args:
        value: The value.
        leaf: What tensors become.
        name: The path to the value.
        at: The position of the parameter that it belongs to.
        memo: What values become, by their ``id``; what is held twice stays one.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    # Numbers are no containers, and small ones share an identity.
    if value is None or isinstance(value, (int, float, complex, str, bytes)):
        return value

    def inner(key: Any, held: Any, at: int | None = at) -> Any:
        return rebuilt(held, leaf, f"{name}.{key}" if name else str(key), at, memo)

    result: Any
    if isinstance(value, _LEAVES):
        result = leaf(name, at, value)
    elif isinstance(value, torch.Generator):
        result = value.clone_state()
    elif isinstance(value, _COPIED) or type(value).__module__ == "itertools":
        result = _copied(value)
    elif isinstance(value, dict):
        result = memo[id(value)] = _emptied(value)
        for key, held in value.items():
            if isinstance(key, _LEAVES):
                other = rebuilt(key, leaf, name, at, memo)
                ref = key if isinstance(key, Ref) else other
                place = ref.index if isinstance(ref, Ref) else at
                result[other] = rebuilt(held, leaf, name, place, memo)
            else:
                result[key] = inner(key, held)
    elif isinstance(value, (list, deque)):
        result = memo[id(value)] = _emptied(value)
        result.extend([inner(k, held) for k, held in enumerate(value)])
    elif isinstance(value, tuple):
        items = [inner(k, held) for k, held in enumerate(value)]
        result = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, (set, frozenset)):
        result = type(value)(inner(k, held) for k, held in enumerate(value))
    elif _is_plain_object(value):
        kind = type(value)
        result = memo[id(value)] = kind() if kind is SimpleNamespace else object.__new__(kind)
        for member, held in read_slots(value).items():
            member.__set__(result, inner(member.__name__, held))  # also where it is frozen
        if hasattr(value, "__dict__"):
            vars(result).update({key: inner(key, held) for key, held in vars(value).items()})
    else:
        return value
    memo[id(value)] = result
    return result


def _emptied(container: Any) -> Any:
    """Returns a container of the same class, default factory and length, with nothing in it."""
    result = copy(container)
    result.clear()
    return result


def _copied(value: Any) -> Any:
    """Returns a copy with a position of its own, of what can be copied."""
    try:
        with warnings.catch_warnings():  # itertools say that they will not be from Python 3.14 on
            warnings.simplefilter("ignore", DeprecationWarning)
            return deepcopy(value)
    except TypeError:
        return value


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    return isinstance(value, torch.optim.Optimizer) or (
        (hasattr(value, "__dict__") or bool(read_slots(value)))
        and not callable(value)
        and not isinstance(value, (type, ModuleType, nn.Module))
        and root_of(kind) not in ("builtins", "torch", "logging", "threading")
        and "__new__" not in {n for base in kind.__mro__[:-1] for n in vars(base)}
    )
