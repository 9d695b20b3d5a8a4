"""Everything that a step may change: found, remembered, exchanged for copies, put back.

Objects keep their identity; what they hold is exchanged. So whoever shares an object with the
module (a hook, a closure, a bound method) sees at any time what the module sees.
"""

from __future__ import annotations

import copy
import operator
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_hpo._kinds import (
    Kind,
    classes_of,
    has_dict,
    kind_of,
    read_slots,
    slots_of,
    write_slots,
)
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.distributed import is_sharded

# Tensors and arrays up to this many elements, kept as plain attributes, are copied for a replay. A
# larger one is rather data than a counter; a replay that writes to it is refused.
_COPIED_ELEMENTS = 1_000_000

# Above this many elements, copies of a tensor that has not changed are shared between moments.
_SHARED_ELEMENTS = 10_000

# A container with more entries is looked through now and then only: see Walker.
_LARGE = 1_000

# Walks at which that happens in any case: the losses of both kinds, and the first products.
_FIRST = 4

_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"} | {"forward"}
"""Not the user's; kernels are exchanged by way of ``forward``."""


# Of these one object may stand in many places.
_NAMELESS = (int, float, complex, str, bytes, type, type(None))

# No step registers these for its own sake, but fully_shard does so at the first forward pass.
_CHECKPOINT_HOOKS = frozenset(
    {
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that are the user's state, and its mode."""
    return {name: value for name, value in vars(module).items() if name not in _MODULE_INTERNALS}


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


def _read_cell(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _write_cell(cell: Any, content: list[Any]) -> None:
    if content:
        cell.cell_contents = content[0]
    elif _read_cell(cell):
        del cell.cell_contents


def _read_class(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _write_class(cls: type, content: dict[str, Any]) -> None:
    now = _read_class(cls)
    for name in now.keys() - content.keys():
        type.__delattr__(cls, name)
    for name, value in content.items():
        if name not in now or now[name] is not value:  # each write costs the caches of the class
            type.__setattr__(cls, name, value)


def _class_values(content: dict[str, Any]) -> list[Any]:
    return [value for value in content.values() if not isinstance(value, _METHODS)]


_METHODS = (FunctionType, classmethod, staticmethod, property)

_DICT = Holder(dict.copy, _write_dict, dict.values)
_MODULE = Holder(dict.copy, _write_dict, dict.values)
_ORDERED = Holder(_read_ordered, _write_ordered, dict.values)
_LIST = Holder(list.copy, _write_list)
_DEQUE = Holder(list, _write_deque)
_SET = Holder(set.copy, _write_set)
_CELL = Holder(_read_cell, _write_cell)
_CLASS = Holder(_read_class, _write_class, _class_values)
_SLOTS = Holder(read_slots, write_slots, dict.values)
_CONTAINERS = {Kind.DICT: _DICT, Kind.LIST: _LIST, Kind.DEQUE: _DEQUE, Kind.SET: _SET}


def held_by(value: Any) -> Held | None:
    """Returns what a container holds now; None for other objects."""
    holder = _CONTAINERS.get(kind_of(type(value)))
    if isinstance(value, OrderedDict):
        holder = _ORDERED
    return None if holder is None else Held(value, holder, holder.read(value))


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
        grows = self.holder in (_LIST, _DICT, _ORDERED) and len(now) > len(self.content)
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


def _cut(owner: Any, holder: Holder, length: int) -> bool:
    """Takes away what has come at the end of a container; returns whether that was possible."""
    if holder is _LIST:
        list.__delitem__(owner, slice(length, None))
    elif holder in (_DICT, _ORDERED):
        pop = OrderedDict.popitem if holder is _ORDERED else dict.popitem
        while len(owner) > length:
            pop(owner)
    return len(owner) == length


# --------------------------------------------------------------------- generators and iterators


def read_generator(value: Any) -> Any:
    """Returns the state of a generator of random numbers."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    return value.getstate() if isinstance(value, random.Random) else value.bit_generator.state


def _write_generator(value: Any, state: Any) -> None:
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    else:
        value.bit_generator.state = state


def _copy_iterator(value: Any) -> Any:
    """Copies an iterator over things in memory, at its position; None where it has no copy."""
    if kind_of(type(value)) is not Kind.ITERATOR or type(value).__module__ not in (
        "builtins",
        "itertools",
    ):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            kind, arguments, *state = value.__reduce__()
    except TypeError:  # a generator, an open file, or from Python 3.14 on
        return None
    parts = []
    for part in arguments:
        if kind_of(type(part)) is Kind.ITERATOR:
            part = _copy_iterator(part)
            if part is None:
                return None
        parts.append(part)
    result = kind(*parts)
    if state and state[0] is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            result.__setstate__(copy.copy(_with_own_lists(state[0])))
    return result


def _with_own_lists(state: Any) -> Any:
    """``itertools.cycle`` goes on filling the list that is part of its state."""
    if isinstance(state, tuple):
        return tuple(list(part) if isinstance(part, list) else part for part in state)
    return state


class _Guard:
    """Stands in the place of an iterator that could not be put back; refuses to be advanced."""

    def __init__(self, iterator: Any, refuse: Callable[[Any], Any]) -> None:
        self._iterator = iterator
        self._refuse = refuse

    def __iter__(self) -> _Guard:
        return self

    def __next__(self) -> Any:
        self._refuse(self._iterator)

    def __getattr__(self, name: str) -> Any:  # send, close, …
        self._refuse(self._iterator)


# --------------------------------------------------------------------------------------- the walk


class Large(NamedTuple):
    """A large container that has been looked through, and what lies behind it alone."""

    outer: Held
    inner: Reached


@dataclass
class Reached:
    """What a walk has come by, by ``id``.

    Attributes:
        held: Containers, attributes included, and what they hold.
        empty: Dictionaries of modules in which there is nothing: hooks, mostly.
        buffers: Buffers of modules; copied whatever their size.
        parameters: Parameters, and other leaves that require grad.
        tensors: Other tensors that a step may write to.
        tuples: Tuples, which may hold what does change.
        watched: Tensors that are too large to be copied.
        arrays: Arrays that a step may write to.
        generators: Generators of random numbers.
        iterators: Iterators.
        lengths: Large containers that steps have not been seen to change, and their lengths.
        large: Large containers that have been looked through.
    """

    held: dict[int, Held] = field(default_factory=dict)
    empty: dict[int, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[int, Tensor | None] = field(default_factory=dict)
    parameters: dict[int, Tensor] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    tuples: dict[int, Any] = field(default_factory=dict)
    watched: dict[int, Tensor] = field(default_factory=dict)
    arrays: dict[int, Any] = field(default_factory=dict)
    generators: dict[int, Any] = field(default_factory=dict)
    iterators: dict[int, Any] = field(default_factory=dict)
    lengths: dict[int, tuple[Any, Holder, int]] = field(default_factory=dict)
    large: dict[int, Large] = field(default_factory=dict)

    def add(self, other: Reached) -> None:
        """Takes over what another walk has come by."""
        for name, found in vars(other).items():
            vars(self)[name].update(found)


class Walker:
    """Goes through everything that a module reaches: attributes, containers, hooks, closures.

    Attributes of classes are among them, but for those of libraries.

    A container of many entries is looked through at the first walks and then ever more rarely.
    Where no step has been seen to change it, or anything behind it, but perhaps by adding to its
    end, only its length is kept in between. So what a replay costs does not grow with a vocabulary
    or a history.

    Args:
        root: The module, or any other object.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._calls = 0
        self._is_due = True
        self._still: dict[int, Any] = {}
        self._moving: dict[int, Any] = {}
        self._seen: set[int] = set()

    def walk(self, *, looks: bool = False) -> Reached:
        """Walks.

        Args:
            looks: Whether a step runs now, so that a large container can be seen to change.
        """
        self._calls += looks
        # Two at a time: a validation step may leave alone what a training step changes.
        since = self._calls - 10 ** (len(str(self._calls)) - 1)
        self._is_due = looks and (self._calls <= _FIRST or since < 2)
        self._seen = {id(self._root)}
        reached = self._explore([self._root])
        for known in (self._still, self._moving):
            for key in known.keys() - self._seen:
                del known[key]
        return reached

    def judge(self, reached: Reached, before: Mapping[int, Any]) -> set[int]:
        """Notes which large containers a step has changed.

        Args:
            reached: What was reached before the step.
            before: What tensors, arrays and generators held then.

        Returns:
            The keys of those that hold what they held, and need not be put back.
        """
        unchanged = set()
        for key, (outer, inner) in reached.large.items():
            is_still = (
                (outer.holder is _DEQUE or outer.has_grown())
                and all(held.is_same() for held in inner.held.values())
                and all(torch.equal(t.data, before[k]) for k, t in inner.tensors.items())
                and all(np.array_equal(a, before[k]) for k, a in inner.arrays.items())
                and not inner.generators
            )
            if is_still:
                self._still[key] = outer.owner
                if outer.holder is not _DEQUE and len(outer.owner) == len(outer.content):
                    unchanged.add(key)
                continue
            self._moving[key] = outer.owner
            if self._still.pop(key, None) is not None and self._calls > _FIRST:
                warnings.warn(
                    f"OnlineHPOCallback: steps change {self.name_of(outer.owner)}, which has "
                    f"{len(outer.content)} entries and which they left alone at first. Until now "
                    "replays may have changed it as well; keep what steps change in a smaller "
                    "object",
                    stacklevel=2,
                )
        return unchanged

    def name_of(self, wanted: Any) -> str:
        """Returns where the module holds an object, as in ``'meters[0].total'``."""
        path = self.path_of(wanted)
        return repr(path) if path else f"a {type(wanted).__name__} of the module"

    def path_of(self, wanted: Any) -> str | None:
        """Returns what is written after the root to get at an object; None where it is not found.

        The path of attributes as a whole ends in ``.__dict__``.
        """
        seen = {id(self._root)}
        stack: list[tuple[str, Any]] = [("", self._root)]
        while stack:
            name, value = stack.pop(0)
            if value is wanted:
                return name
            if has_dict(type(value)) and vars(value) is wanted:
                return f"{name}.__dict__"
            for label, child in _named_children(value):
                if type(child) is _Guard:
                    child = vars(child)["_iterator"]
                if id(child) not in seen and not isinstance(child, _NAMELESS):
                    seen.add(id(child))
                    stack.append(((name + label).lstrip("."), child))
        return None

    def _explore(self, stack: list[Any]) -> Reached:
        reached = Reached()
        seen = self._seen

        def push(values: Iterable[Any]) -> None:
            for value in values:
                if kind_of(type(value)) is not Kind.ATOM and id(value) not in seen:
                    seen.add(id(value))
                    stack.append(value)

        def hold(owner: Any, holder: Holder) -> None:
            content = holder.read(owner)
            reached.held[id(owner)] = Held(owner, holder, content)
            push(holder.values(content))

        def attributes(value: Any) -> None:
            cls = type(value)
            classes(cls)
            if has_dict(cls) and type(vars(value)) is dict:
                hold(vars(value), _DICT)
            if slots_of(cls):
                hold(value, _SLOTS)

        def classes(cls: type) -> None:
            for base in classes_of(cls):
                if id(base) not in seen:
                    seen.add(id(base))
                    hold(base, _CLASS)

        while stack:
            value = stack.pop()
            kind = kind_of(type(value))
            if kind is Kind.MODULE:
                classes(type(value))
                own = vars(value)
                content = dict(own)
                reached.held[id(own)] = Held(own, _MODULE, content)
                reached.buffers.update((id(b), b) for b in content["_buffers"].values())
                for name, item in content.items():
                    if name in _CHECKPOINT_HOOKS:
                        continue
                    if type(item) in (dict, OrderedDict) and not item:
                        reached.empty[id(item)] = item
                    elif kind_of(type(item)) is not Kind.ATOM and id(item) not in seen:
                        seen.add(id(item))
                        stack.append(item)
            elif kind is Kind.TENSOR:
                _sort(value, reached)
            elif kind is Kind.CELL:
                hold(value, _CELL)
            elif kind in _CONTAINERS:
                holder = _CONTAINERS[kind]
                if isinstance(value, OrderedDict):
                    holder = _ORDERED
                if len(value) <= _LARGE:
                    hold(value, holder)
                elif id(value) not in self._still or self._is_due:
                    self._look_through(value, holder, reached)
                elif kind is Kind.DEQUE:  # it may let go of its first entries for new ones
                    reached.held[id(value)] = Held(value, holder, holder.read(value))
                else:
                    reached.lengths[id(value)] = value, holder, len(value)
                attributes(value)
            elif kind is Kind.TUPLE:
                push(value)
                reached.tuples[id(value)] = value
            elif kind is Kind.OBJECT:
                attributes(value)
            elif kind is Kind.FUNCTION:
                push(value.__closure__ or ())
                push((value.__defaults__, value.__kwdefaults__))
                if value.__dict__:
                    push((value.__dict__,))
            elif kind is Kind.METHOD:
                push((value.__self__, value.__func__))
            elif kind is Kind.PARTIAL:
                push((value.func, value.args, value.keywords))
            elif kind is Kind.ARRAY:
                if value.flags.writeable and value.size <= _COPIED_ELEMENTS:
                    reached.arrays[id(value)] = value
            elif kind is Kind.GENERATOR:
                reached.generators[id(value)] = value
            elif kind is Kind.ITERATOR:
                reached.iterators[id(value)] = value
            elif kind is Kind.SCRIPT:
                buffers = list(value.buffers())
                reached.buffers.update((id(b), b) for b in buffers)
                push(buffers)
        return reached

    def _look_through(self, value: Any, holder: Holder, reached: Reached) -> None:
        content = holder.read(value)
        outer = Held(value, holder, content)
        inner = Reached()
        kinds = {kind_of(cls) for cls in set(map(type, holder.values(content)))}
        if kinds != {Kind.ATOM}:
            new = [item for item in holder.values(content) if id(item) not in self._seen]
            self._seen.update(map(id, new))
            inner = self._explore(new)
        reached.add(inner)
        reached.held[id(value)] = outer
        if id(value) not in self._moving:
            reached.large[id(value)] = Large(outer, inner)


def _sort(value: Tensor, reached: Reached) -> None:
    """Files a tensor. One with a graph was computed, and is not written to."""
    if value.grad_fn is not None or is_lazy(value):
        return
    if is_sharded([value]):  # replays work on the shards themselves
        return
    if isinstance(value, nn.Parameter) or value.requires_grad:
        reached.parameters[id(value)] = value
    elif value.numel() <= _COPIED_ELEMENTS or id(value) in reached.buffers:
        reached.tensors[id(value)] = value
    else:
        reached.watched[id(value)] = value


def _named_children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what an object refers to, each with what is written to get there."""
    kind = kind_of(type(value))
    if kind is Kind.MODULE:
        for registered in (value._modules, value._buffers, value._parameters):
            yield from ((f".{name}", child) for name, child in registered.items())
    if kind in (Kind.MODULE, Kind.OBJECT, Kind.DICT, Kind.LIST) and has_dict(type(value)):
        yield from ((f".{name}", child) for name, child in vars(value).items())
    for base in classes_of(type(value)) if kind in (Kind.MODULE, Kind.OBJECT) else ():
        state = _read_class(base).items()
        yield from ((f".{name}", child) for name, child in state if not isinstance(child, _METHODS))
    if kind is Kind.DICT:
        yield from ((f"[{key!r}]", child) for key, child in dict.items(value))
    elif kind in (Kind.LIST, Kind.DEQUE, Kind.TUPLE):
        yield from ((f"[{i}]", child) for i, child in enumerate(value))
    elif kind is Kind.OBJECT:
        yield from ((f".{m.__name__}", child) for m, child in read_slots(value).items())
    elif kind is Kind.FUNCTION:
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        yield from ((f".{name}", held) for name, cell in cells for held in _read_cell(cell))
        yield from ((".__defaults__", child) for child in (value.__defaults__ or ()))
    elif kind is Kind.METHOD:
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif kind is Kind.PARTIAL:
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))


# --------------------------------------------------------------------------- copies and exchange


def copies_of(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Copies tensors, without their graphs; what shares memory still does so in the copies."""
    by_storage: dict[Any, list[int]] = {}
    for key, t in tensors.items():
        by_storage.setdefault(_place(t), []).append(key)
    copies = {}
    for keys in by_storage.values():
        if len(keys) == 1:
            copies[keys[0]] = tensors[keys[0]].detach().clone()
            continue
        memory = tensors[keys[0]].untyped_storage().clone()
        for key in keys:
            t = tensors[key]
            view = torch.empty(0, dtype=t.dtype, device=t.device)
            copies[key] = view.set_(memory, t.storage_offset(), t.size(), t.stride())
    return copies


def views_of(swaps: Mapping[int, Tensor], tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Returns what takes the place of views of exchanged tensors: the same views of the others.

    Args:
        swaps: What takes the place of tensors, by ``id``.
        tensors: These, and what may be views of them, by ``id``.
    """
    places = {key: _place(t) for key, t in tensors.items()}
    owners: dict[Any, list[int]] = {}
    for key in swaps.keys() & places.keys():
        owners.setdefault(places[key], []).append(key)
    found = {}
    for key, t in tensors.items():
        if key in swaps or not t.numel():
            continue
        last = sum((n - 1) * stride for n, stride in zip(t.size(), t.stride(), strict=True))
        for owner in owners.get(places[key], ()):
            offset = t.storage_offset() - tensors[owner].storage_offset()
            is_within = offset >= 0 and offset + last < tensors[owner].numel()
            if is_within and tensors[owner].is_contiguous():
                found[key] = swaps[owner].as_strided(t.size(), t.stride(), offset)
    return found


def _place(t: Tensor) -> Any:
    """Returns what is the same for tensors that share memory."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse
        return id(t)


@dataclass
class ModuleState:
    """What a module, and all that it reaches, held at an earlier moment; by ``id``.

    Attributes:
        held: Containers, and what they held.
        empty: Dictionaries in which there was nothing.
        tuples: Tuples.
        tensors: Tensors that a step may write to.
        values: What these held, and the arrays, generators and iterators.
        others: The arrays, generators and iterators.
    """

    held: dict[int, Held] = field(default_factory=dict)
    empty: dict[int, dict[str, Any]] = field(default_factory=dict)
    tuples: dict[int, Any] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    others: dict[int, Any] = field(default_factory=dict)


def remember(
    reached: Reached, tensors: Mapping[int, Tensor], previous: ModuleState | None = None
) -> ModuleState:
    """Copies what has been reached, for a later replay.

    Args:
        reached: What a walk has come by.
        tensors: Those of the tensors that a step may write to.
        previous: What was remembered at the moment before. Large tensors that have not changed
            since are shared with it, so that a long window holds them once.
    """
    values: dict[int, Any] = {}
    if previous is not None:
        for key, t in tensors.items():
            earlier = previous.values[key] if previous.tensors.get(key) is t else None
            # Versions would not tell: BatchNorm and ``.data`` write without counting.
            if earlier is not None and t.numel() > _SHARED_ELEMENTS and torch.equal(t, earlier):
                values[key] = earlier
    values |= copies_of({key: t for key, t in tensors.items() if key not in values})
    values |= {key: array.copy() for key, array in reached.arrays.items()}
    values |= {key: read_generator(value) for key, value in reached.generators.items()}
    values |= {key: _copy_iterator(value) for key, value in reached.iterators.items()}
    return ModuleState(
        held={key: _without_graphs(held) for key, held in reached.held.items()},
        empty=reached.empty,
        tuples=reached.tuples,
        tensors=dict(tensors),
        values=values,
        others={**reached.arrays, **reached.generators, **reached.iterators},
    )


def _without_graphs(held: Held) -> Held:
    """What an earlier step has computed is a number; its graph is let go of."""
    values = held.holder.values(held.content)
    if not any(isinstance(v, Tensor) and v.grad_fn is not None for v in values):
        return held
    return held._replace(content=_replaced(held, _detached))


def _detached(value: Any) -> Any:
    is_computed = isinstance(value, Tensor) and value.grad_fn is not None
    return value.detach() if is_computed else value


def _replaced(held: Held, change: Callable[[Any], Any]) -> Any:
    content = held.content
    if isinstance(content, dict):
        return {key: change(value) for key, value in content.items()}
    return type(content)(map(change, content))


@contextmanager
def exchanged(
    walker: Walker,
    reached: Reached,
    tensors: Mapping[int, Tensor],
    state: ModuleState | None,
    swaps: Mapping[int, Tensor],
) -> Iterator[None]:
    """Lets all that has been reached hold copies, and puts back afterwards what it held.

    Args:
        walker: What has walked.
        reached: What it has come by.
        tensors: Those of the tensors that a step may write to.
        state: What is to be held instead. Default: copies of the present.
        swaps: What takes the place of tensors wherever a container holds them, by ``id``.

    Raises:
        MisconfigurationException: If something has been changed that cannot be put back.
    """
    state = state or ModuleState()
    held = reached.held | {
        key: Held(owner, holder, holder.read(owner))
        for key, (owner, holder, _) in state.held.items()
        if key not in reached.held
    }
    # What is trained by now holds what the caller has put there.
    earlier = {k: t for k, t in state.tensors.items() if k not in reached.parameters}
    every = {**tensors, **earlier}
    before: dict[int, Any] = {key: t.data for key, t in every.items()}
    flags = [(t, t.requires_grad) for t in every.values() if t.is_leaf]
    arrays = reached.arrays | {k: a for k, a in state.others.items() if isinstance(a, np.ndarray)}
    generators = reached.generators | {
        k: g for k, g in state.others.items() if kind_of(type(g)) is Kind.GENERATOR
    }
    before |= {key: array.copy() for key, array in arrays.items()}
    before |= {key: read_generator(value) for key, value in generators.items()}
    sources = {key: state.values.get(key, before[key]) for key in every}
    substitutes = {**swaps, **_stand_ins(walker, reached, state)}
    versions = [(t, t._version) for t in reached.watched.values()]
    unchanged: set[int] = set()
    try:
        for key, value in copies_of(sources).items():
            every[key].data = value
        for key, array in arrays.items():
            if key in state.values:
                np.copyto(array, state.values[key])
        for key, generator in generators.items():
            if key in state.values:
                _write_generator(generator, state.values[key])
        _fill(reached, state, substitutes)
        yield
        if reached.large:  # those that an earlier content was put into are put back
            unchanged = walker.judge(reached, before) - state.held.keys()
    finally:
        for key, (owner, holder, content) in held.items():
            if key not in unchanged:
                holder.write(owner, content)
        for key, empty in reached.empty.items():
            if empty and key not in held:
                empty.clear()
        for key, t in every.items():
            t.data = before[key]
        for t, requires_grad in flags:
            if not t.is_leaf:  # written to in place, by what has a graph
                t.detach_()
            if t.requires_grad != requires_grad:
                t.requires_grad_(requires_grad)
        for key, array in arrays.items():
            np.copyto(array, before[key])
        for key, generator in generators.items():
            _write_generator(generator, before[key])
    for owner, holder, length in reached.lengths.values():
        if len(owner) != length and not _cut(owner, holder, length):
            raise MisconfigurationException(
                f"A replay of the step took away from {walker.name_of(owner)}, a container of "
                f"{length} entries that steps had only read or added to, which cannot be undone; "
                "keep it in a collections.deque, or change it in on_train_batch_end"
            )
    for t, version in versions:
        if t._version != version:
            raise MisconfigurationException(
                f"A replay of the step wrote to {walker.name_of(t)}, a tensor of shape "
                f"{tuple(t.shape)}, in place, which cannot be undone; register it as a "
                "buffer, or write to it in on_train_batch_end"
            )


def _substituted(substitutes: Mapping[int, Any], value: Any) -> Any:
    """Returns what takes the place of a value, tuples rebuilt."""
    # No closure that calls itself: it would be a cycle, which keeps what it holds alive.
    if id(value) in substitutes:
        return substitutes[id(value)]
    if kind_of(type(value)) is Kind.TUPLE and type(value) is not frozenset:
        items = [_substituted(substitutes, item) for item in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return value


def _fill(reached: Reached, state: ModuleState, substitutes: dict[int, Any]) -> None:
    """Puts an earlier content into containers, and substitutes into all of them."""
    substituted = partial(_substituted, substitutes)
    if substitutes:
        for value in [*reached.tuples.values(), *state.tuples.values()]:
            if (other := substituted(value)) is not value:
                substitutes[id(value)] = other
    for key, present in (state.held | reached.held).items():
        earlier = state.held.get(key)
        content = present.content
        if earlier is not None:
            content = earlier.content
            if present.holder is _MODULE:
                own = {n: v for n, v in content.items() if n not in _MODULE_INTERNALS}
                now = present.holder.read(present.owner)
                content = {n: v for n, v in now.items() if n in _MODULE_INTERNALS} | own
        if substitutes and present.holder is not _SET:
            values = present.holder.values(content)
            if not substitutes.keys().isdisjoint(map(id, values)):
                content = _replaced(present._replace(content=content), substituted)
        if earlier is not None or content is not present.content:
            present.holder.write(present.owner, content)
    for key, empty in state.empty.items():
        if empty and key not in state.held:
            empty.clear()


def _stand_ins(walker: Walker, reached: Reached, state: ModuleState) -> dict[int, Any]:
    """Returns what takes the place of iterators: copies, or what refuses to be advanced."""

    def refuse(iterator: Any) -> None:
        raise MisconfigurationException(
            f"training_step or validation_step advances {walker.name_of(iterator)}, a "
            f"{type(iterator).__name__}, which a replay cannot put back. Draw from it in "
            "on_train_batch_start and keep what was drawn as an attribute, or put a class with "
            "__next__ in its place that counts its position in an attribute"
        )

    found = {}
    iterators = reached.iterators | {
        key: value for key, value in state.others.items() if kind_of(type(value)) is Kind.ITERATOR
    }
    for key, value in iterators.items():
        copied = _copy_iterator(state.values.get(key, value))
        found[key] = _Guard(value, refuse) if copied is None else copied
    return found


# ------------------------------------------------------------------------- for checkpoints


def pack_state(module: nn.Module, state: ModuleState) -> dict[str, list[dict[str, Any]]]:
    """Returns the tensors and the own attributes of each module at an earlier moment, by name."""

    def now_held(value: Any) -> Any:
        return state.held[id(value)].content if id(value) in state.held else value

    def resolved(value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return state.values.get(id(value), value)
        if kind in (list, tuple):
            return kind(map(resolved, now_held(value)))
        if kind in (dict, OrderedDict):
            return kind({key: resolved(item) for key, item in now_held(value).items()})
        return value

    packed = {}
    for name, m in module.named_modules():
        if id(vars(m)) not in state.held:
            continue
        content = state.held[id(vars(m))].content
        parameters = now_held(content["_parameters"]).items()
        tensors = {n: resolved(b) for n, b in now_held(content["_buffers"]).items()}
        tensors |= {n: state.values[id(p)] for n, p in parameters if id(p) in state.values}
        own = {n: resolved(v) for n, v in content.items() if n not in _MODULE_INTERNALS}
        packed[name] = [tensors, own]
    return packed


def place_state(module: nn.Module, packed: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Puts what :func:`pack_state` returned in the place of the present; under a shield."""
    modules = dict(module.named_modules())
    for name, (tensors, attributes) in packed.items():
        m = modules.get(name)
        if m is None:
            continue
        for key in [key for key in m._buffers if key not in tensors]:
            del m._buffers[key]
        for key, value in tensors.items():
            present = m._parameters.get(key, m._buffers.get(key))
            if isinstance(present, Tensor) and isinstance(value, Tensor):
                present.data = value
            elif key not in m._parameters:
                m._buffers[key] = value
        m.__dict__.update(attributes)
