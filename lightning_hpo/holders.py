"""How containers, generators and iterators hold what a step may change: read, written, copied."""

from __future__ import annotations

import operator
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Set
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_hpo._kinds import Kind, kind_of, read_slots, write_slots
from lightning_hpo.stores import read_objects, write_objects

MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"} | {"forward"}
"""Not the user's; kernels are exchanged by way of ``forward``."""

# No step registers these for its own sake, but fully_shard does so at the first forward pass.
_CHECKPOINT_HOOKS = frozenset(
    {
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
_PARTS = tuple(
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, (dict, set)) and name not in _CHECKPOINT_HOOKS
)
_get_parts = operator.itemgetter(*_PARTS)
MODULE_PARTS = _CHECKPOINT_HOOKS.union(_PARTS)
"""The attributes of every module in which torch keeps parameters, hooks, and the like."""


def parts_of(content: dict[str, Any]) -> tuple[Any, ...]:
    """Returns, of the attributes of a module, the containers in which torch keeps its parts."""
    try:
        parts: tuple[Any, ...] = _get_parts(content)
    except KeyError:  # it comes from a file of another version of torch
        parts = tuple(content[name] for name in _PARTS if name in content)
    return parts


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that are the user's state, and its mode."""
    return {name: value for name, value in vars(module).items() if name not in MODULE_INTERNALS}


# ------------------------------------------------------------------------------------- containers


class Holder(NamedTuple):
    """How the content of one kind of container is read, put back, and what it consists of."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    values: Callable[[Any], Iterable[Any]] = iter


# The methods of the base classes: those of a subclass may do more than to store.
def _write_dict(owner: dict[Any, Any], content: dict[Any, Any]) -> None:
    dict.clear(owner)
    dict.update(owner, content)


def _read_ordered(owner: OrderedDict[Any, Any]) -> dict[Any, Any]:
    return dict(OrderedDict.items(owner))


def _write_ordered(owner: OrderedDict[Any, Any], content: dict[Any, Any]) -> None:
    OrderedDict.clear(owner)
    for key, value in content.items():
        OrderedDict.__setitem__(owner, key, value)


def _write_list(owner: list[Any], content: list[Any]) -> None:
    list.__setitem__(owner, slice(None), content)


def _write_deque(owner: deque[Any], content: list[Any]) -> None:
    deque.clear(owner)
    deque.extend(owner, content)


def _write_set(owner: set[Any], content: Set[Any]) -> None:
    if set.__ne__(owner, content):  # the order of its elements may depend on its past
        set.intersection_update(owner, content)
        set.update(owner, content)


def read_cell(cell: Any) -> list[Any]:
    """Returns what a cell of a closure holds, in a list; an empty one where it is empty."""
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _write_cell(cell: Any, content: list[Any]) -> None:
    if content:
        cell.cell_contents = content[0]
    elif read_cell(cell):
        del cell.cell_contents


def read_class(cls: type) -> dict[str, Any]:
    """Returns the attributes of a class itself, methods included."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


@lru_cache(maxsize=4096)
def defaults_with_state(cls: type) -> tuple[Any, ...]:
    """Returns the default values of the arguments of methods that a call may change.

    Closures of methods are named where steps change them, and not put back: classes made in
    functions close over much that is none of theirs.
    """
    members: list[Any] = []
    for member in vars(cls).values():
        is_wrapped = issubclass(type(member), (staticmethod, classmethod))
        members.append(member.__func__ if is_wrapped else member)
    return tuple(
        value
        for f in members
        if type(f) is FunctionType
        for value in (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values())
        if kind_of(type(value)) is not Kind.ATOM
    )


def _write_class(cls: type, content: dict[str, Any]) -> None:
    now = read_class(cls)
    for name in now.keys() - content.keys():
        type.__delattr__(cls, name)
    for name, value in content.items():
        if name not in now or now[name] is not value:  # each write costs the caches of the class
            type.__setattr__(cls, name, value)


def _class_values(content: dict[str, Any]) -> list[Any]:
    return [value for value in content.values() if not issubclass(type(value), METHODS)]


def read_trainer(trainer: Any) -> dict[str, Any]:
    """Returns the attributes of a trainer that are not its own parts."""
    # Connectors have names with an underscore; so have the loggers, which the shield exchanges.
    return {name: value for name, value in vars(trainer).items() if name[:1] != "_"}


def _write_trainer(trainer: Any, content: dict[str, Any]) -> None:
    own = vars(trainer)
    for name in own.keys() - content.keys():
        if name[:1] != "_":
            del own[name]
    own.update(content)


_OF_TORCH = vars(torch.optim.SGD([torch.zeros(())], lr=0.0)).keys() | {"step", "_step_count"}


def read_optimizer(optimizer: Any) -> dict[str, Any]:
    """Returns the attributes of an optimizer that are plain data, and not torch's own."""
    plain = (int, float, complex, str, bytes, tuple, type(None))
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OF_TORCH and issubclass(type(value), plain)
    }


def _write_optimizer(optimizer: Any, content: dict[str, Any]) -> None:
    own = vars(optimizer)
    for name in read_optimizer(optimizer).keys() - content.keys():
        del own[name]
    own.update(content)


METHODS = (FunctionType, classmethod, staticmethod, property)

DICT = Holder(dict.copy, _write_dict, dict.values)
MODULE = Holder(dict.copy, _write_dict, dict.values)
ORDERED = Holder(_read_ordered, _write_ordered, dict.values)
LIST = Holder(list.copy, _write_list)
DEQUE = Holder(list, _write_deque)
SET = Holder(set.copy, _write_set)
CELL = Holder(read_cell, _write_cell)
CLASS = Holder(read_class, _write_class, _class_values)
SLOTS = Holder(read_slots, write_slots, dict.values)
TRAINER = Holder(read_trainer, _write_trainer, dict.values)
OPTIMIZER = Holder(read_optimizer, _write_optimizer, dict.values)
OBJECTS = Holder(read_objects, write_objects)
CONTAINERS = {Kind.DICT: DICT, Kind.LIST: LIST, Kind.DEQUE: DEQUE, Kind.SET: SET}


class Held(NamedTuple):
    """What a container holds at a moment: the very objects."""

    owner: Any
    holder: Holder
    content: Any

    def is_same(self) -> bool:
        """Whether the container still holds the very same."""
        now = self._now()
        return len(now) == len(self.content) and self._begins_alike(now)

    def has_grown(self) -> bool:
        """Whether it holds the same, and perhaps more at its end."""
        now = self._now()
        grows = self.holder in (LIST, DICT, ORDERED) and len(now) > len(self.content)
        return (grows or len(now) == len(self.content)) and self._begins_alike(now)

    def _now(self) -> Any:
        """Returns what it holds now; a plain one itself, which may be too large to copy."""
        is_plain = type(self.owner) in (dict, list)
        return self.owner if is_plain else self.holder.read(self.owner)

    def _begins_alike(self, now: Any) -> bool:
        then = self.content
        if isinstance(now, set):
            return bool(now == then)
        alike = all(map(operator.is_, now, then))
        if isinstance(now, dict):
            alike = alike and all(map(operator.is_, now.values(), then.values()))
        return alike


def cut(owner: Any, holder: Holder, length: int) -> bool:
    """Takes away what has come at the end of a container; returns whether that was possible."""
    if holder is LIST:
        list.__delitem__(owner, slice(length, None))
    elif holder in (DICT, ORDERED):
        pop = OrderedDict.popitem if holder is ORDERED else dict.popitem
        while len(owner) > length:
            pop(owner)
    return len(owner) == length


# --------------------------------------------------------------------- generators and iterators


def read_generator(value: Any) -> Any:
    """Returns the state of a generator of random numbers."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    return value.getstate() if isinstance(value, random.Random) else value.bit_generator.state


def write_generator(value: Any, state: Any) -> None:
    """Puts back what :func:`read_generator` returned."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    else:
        value.bit_generator.state = state


def _reduced(value: Any) -> tuple[Any, ...] | None:
    """Returns what an iterator over things in memory is made of; None where that is not known."""
    if kind_of(type(value)) is not Kind.ITERATOR:
        return None
    if type(value).__module__ not in ("builtins", "itertools"):
        return None
    try:
        parts: tuple[Any, ...] = value.__reduce__()
    except TypeError:  # a generator, an open file, or from Python 3.14 on
        return None
    return parts


def functions_of(value: Any) -> list[Any]:
    """Returns what an iterator and its parts call, as ``map`` does; copies call the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        reduced = _reduced(value)
    found = []
    for part in reduced[1] if reduced is not None else ():
        if kind_of(type(part)) is Kind.ITERATOR:
            found += functions_of(part)
        elif callable(part):
            found.append(part)
    return found


def copy_iterator(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Copies an iterator over things in memory, at its position; None where it has no copy.

    Args:
        value: The iterator.
        memo: Iterators and their copies, by ``id``: one that two others draw from stays one.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        reduced = _reduced(value)
        if reduced is None:
            return None
        kind, arguments, *state = reduced
        try:
            result = kind(*_copy_parts(arguments, memo))
            if state and state[0] is not None:
                result.__setstate__(_copy_parts(state[0], memo, is_state=True))
        except TypeError:  # it is made of something that has no copy
            return None
    # The original is kept: parts of a cycle are made anew to be copied, and ids are given again.
    memo[id(value)] = value, result
    return result


def _copy_parts(state: Any, memo: dict[int, Any], *, is_state: bool = False) -> Any:
    """Copies iterators that are parts of another, and the list that ``itertools.cycle`` fills."""
    if not isinstance(state, tuple):
        return state
    parts = []
    for part in state:
        if kind_of(type(part)) is Kind.ITERATOR:
            part = copy_iterator(part, memo)
            if part is None:
                raise TypeError
        elif type(part) is tuple:
            part = _copy_parts(part, memo, is_state=is_state)
        elif is_state and isinstance(part, list):
            part = list(part)
        parts.append(part)
    return tuple(parts)


class Guard:
    """Stands in the place of an iterator that could not be put back; refuses to be advanced."""

    def __init__(self, iterator: Any, refuse: Callable[[Any], Any]) -> None:
        self._iterator = iterator
        self._refuse = refuse

    def __iter__(self) -> Guard:
        return self

    def __next__(self) -> Any:
        self._refuse(self._iterator)

    def __getattr__(self, name: str) -> Any:  # send, close, …
        self._refuse(self._iterator)
