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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_hpo._kinds import Kind, has_dict, kind_of, read_slots, slots_of, write_slots
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.distributed import is_sharded
from lightning_hpo.stores import (
    is_same_store,
    is_writable,
    read_objects,
    read_store,
    size_of,
    write_objects,
    write_store,
)

# Tensors and arrays up to this many elements, kept as plain attributes, are copied for a replay. A
# larger one is rather data than a counter: it is copied where steps have been seen to change it.
_COPIED_ELEMENTS = 1_000_000

# All of the larger ones are copied at the first replays, up to this many elements together.
_LOOKED_AT = 1 << 26

# Above this many elements, copies of a tensor that has not changed are shared between moments.
_SHARED_ELEMENTS = 10_000

# What holds more entries, all in all, is looked through now and then only: see Walker.
_LARGE = 1_000

# Up to this many entries are looked at one by one.
_FEW = 32

# Walks of each kind at which that happens in any case.
_FIRST = 3

_WITH_ATTRIBUTES = {Kind.MODULE, Kind.OBJECT, Kind.HOST, Kind.DICT, Kind.LIST, Kind.ARRAY}

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


def _read_trainer(trainer: Any) -> dict[str, Any]:
    # Connectors have names with an underscore; so have the loggers, which the shield exchanges.
    return {name: value for name, value in vars(trainer).items() if not name.startswith("_")}


def _write_trainer(trainer: Any, content: dict[str, Any]) -> None:
    own = vars(trainer)
    for name in _read_trainer(trainer).keys() - content.keys():
        del own[name]
    own.update(content)


_DICT = Holder(dict.copy, _write_dict, dict.values)
_MODULE = Holder(dict.copy, _write_dict, dict.values)
_ORDERED = Holder(_read_ordered, _write_ordered, dict.values)
_LIST = Holder(list.copy, _write_list)
_DEQUE = Holder(list, _write_deque)
_SET = Holder(set.copy, _write_set)
_CELL = Holder(_read_cell, _write_cell)
_SLOTS = Holder(read_slots, write_slots, dict.values)
_TRAINER = Holder(_read_trainer, _write_trainer, dict.values)
_OBJECTS = Holder(read_objects, write_objects)
_CONTAINERS = {Kind.DICT: _DICT, Kind.LIST: _LIST, Kind.DEQUE: _DEQUE, Kind.SET: _SET}


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
        watched: Tensors and arrays that are too large to be copied every time.
        arrays: Arrays that a step may write to.
        generators: Generators of random numbers.
        iterators: Iterators.
        lengths: Large containers that steps have not been seen to change, and their lengths.
        parents: By way of what an object has been reached.
        data: What is reached by way of callbacks, datamodules and loaders only.
        is_due: Whether all has been looked through, to see what a step changes.
        is_early: Whether that is one of the first times.
        is_thorough: Whether what is large is copied.
    """

    held: dict[int, Held] = field(default_factory=dict)
    empty: dict[int, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[int, Tensor | None] = field(default_factory=dict)
    parameters: dict[int, Tensor] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    tuples: dict[int, Any] = field(default_factory=dict)
    watched: dict[int, Any] = field(default_factory=dict)
    arrays: dict[int, Any] = field(default_factory=dict)
    generators: dict[int, Any] = field(default_factory=dict)
    iterators: dict[int, Any] = field(default_factory=dict)
    lengths: dict[int, tuple[Any, Holder, int]] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    data: set[int] = field(default_factory=set)
    is_due: bool = False
    is_early: bool = False
    is_thorough: bool = False


class Walker:
    """Goes through everything that a module reaches: attributes, containers, hooks, closures.

    At the first walks all is looked through, and copied, and then ever more rarely. In between,
    what has been seen to change is copied, and so is what is small. Where there are many entries,
    nested ones counted, and no step has been seen to change any of it, but perhaps by adding to
    the end of a container, only the length of that one is kept. So what a replay costs does not
    grow with a vocabulary, a history or a frozen backbone.

    What callbacks, datamodules and loaders hold comes last: a step gets at it by the trainer. Of
    the data there, entries of large containers are not looked into.

    Args:
        root: The module, or any other object.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._walks: dict[Any, int] = {}
        self._size = 0
        self._still: dict[int, Any] = {}
        self._moving: dict[int, Any] = {}
        self._judged: dict[int, Any] = {}
        self._volatile: dict[int, Any] = {}
        self._seen: set[int] = set()

    def walk(self, *, looks: str | bool = False) -> Reached:
        """Walks.

        Args:
            looks: What runs now, so that it can be seen what it changes: a validation step may
                leave alone what a training step changes. Else nothing does.
        """
        reached = Reached()
        if looks:
            count = self._walks[looks] = self._walks.get(looks, 0) + 1
            # Two at a time: the gradient of a step, and its products.
            since = count - 10 ** (len(str(count)) - 1)
            reached.is_early = count <= _FIRST
            reached.is_due = reached.is_early or since < 2
        reached.is_thorough = reached.is_due or (not looks and self._walks.get("step", 0) < _FIRST)
        self._seen = {id(self._root)}
        hosts = self._explore([self._root], reached)
        if hosts:
            known = set(self._seen)
            while hosts:  # a callback may hold a loader
                hosts = self._explore(hosts, reached, is_data=True)
            reached.data = self._seen - known
        for marked in (self._still, self._moving, self._judged, self._volatile):
            for key in marked.keys() - self._seen:
                del marked[key]
        return reached

    def chosen(self, reached: Reached) -> dict[int, Any]:
        """Returns what is copied of the tensors and arrays that are watched."""
        watched = reached.watched
        if not reached.is_thorough:
            return {key: watched[key] for key in watched.keys() & self._volatile.keys()}
        found = {}
        room = _LOOKED_AT
        for size, key in sorted((_size(value), key) for key, value in watched.items()):
            is_data = key in reached.data and size > _COPIED_ELEMENTS
            if key in self._volatile or (size <= room and not is_data):
                room -= size
                found[key] = watched[key]
        return found

    def judge(self, reached: Reached, before: Mapping[int, Any]) -> set[int]:
        """Notes what a step has changed.

        Args:
            reached: What was reached before the step.
            before: What tensors and arrays held then.

        Returns:
            The keys of containers that hold what they held, and need not be put back.
        """
        unchanged = {key for key, held in reached.held.items() if held.is_same()}
        changed = reached.held.keys() - unchanged
        for found in (reached.tensors, reached.parameters, reached.arrays, reached.watched):
            for key, value in found.items():
                if key in before and not _is_as_before(value, before[key]):
                    changed.add(key)
        for key in changed & reached.watched.keys():
            if key not in self._volatile:
                self._volatile[key] = value = reached.watched[key]
                if not reached.is_early:
                    self._warn(value, f"{_size(value)} elements")
        self._mark(reached, changed)
        self._size = len(reached.held)
        return unchanged

    def must_judge(self, reached: Reached) -> bool:
        """Whether it is time to see what the step under way changes."""
        return (
            reached.is_due
            or len(reached.held) > 2 * self._size + _LARGE
            or any(
                len(held.content) > _LARGE and key not in self._still and key not in self._judged
                for key, held in reached.held.items()
            )
        )

    def _mark(self, reached: Reached, changed: set[int]) -> None:
        """Notes behind what there are many entries of which none changes."""
        swapped = reached.parameters.keys() | reached.buffers.keys() | reached.iterators.keys()
        owners: dict[int, Any] = {key: held.owner for key, held in reached.held.items()}
        owners |= reached.tuples
        large = {key for key, held in reached.held.items() if len(held.content) > _LARGE}
        grown = {
            key
            for key in large & changed
            if reached.held[key].holder is _DEQUE or reached.held[key].has_grown()
        }
        owners.update(reached.tensors | reached.parameters | reached.arrays | reached.watched)
        self._moving.update((key, owners[key]) for key in changed - grown)
        self._judged.update((key, owners[key]) for key in large)
        weight: dict[int, int] = {}
        live = set(reached.generators)  # what is to be come by at each walk
        for key, held in reached.held.items():
            values = held.holder.values(held.content)
            weight[key] = 1 + len(held.content)
            if held.holder is _MODULE or not swapped.isdisjoint(map(id, values)):
                live.add(key)
        for key, value in reached.tuples.items():
            weight[key] = 1 + len(value)
            if not swapped.isdisjoint(map(id, value)):
                live.add(key)
        below: set[int] = set()  # of these, something further down changes
        for key, parent in reversed(reached.parents.items()):
            weight[parent] = weight.get(parent, 1) + weight.get(key, 1)
            if key in live:
                live.add(parent)
            if key in self._moving or key in grown or key in below:
                below.add(parent)
        still: dict[int, Any] = {}
        inside: set[int] = set()
        for key, parent in reached.parents.items():
            if parent in still or parent in inside:
                inside.add(key)
            elif (
                weight.get(key, 0) > _LARGE
                and (key in reached.held or key in reached.tuples)
                and key not in live
                and key not in below
                and key not in self._moving
            ):
                still[key] = owners[key]
        if not reached.is_due:
            self._still.update(still)
            return
        before, self._still = self._still, still
        if reached.is_early:
            return
        for key in before.keys() & owners.keys() & (below | (large & changed - grown)):
            entries = len(owners[key]) if key in large else weight[key] - 1
            self._warn(owners[key], f"{entries} entries")

    def _warn(self, value: Any, size: str) -> None:
        warnings.warn(
            f"OnlineHPOCallback: steps change {self.name_of(value)}, which has {size} and which "
            "they left alone at first. Until now replays may have changed it as well; keep what "
            "steps change in a smaller object",
            stacklevel=2,
        )

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

    def _explore(self, stack: list[Any], reached: Reached, *, is_data: bool = False) -> list[Any]:
        """Goes through some objects, but for callbacks, datamodules and loaders: returns these."""
        seen = self._seen
        parents = reached.parents
        later: list[Any] = []

        def push(values: Iterable[Any], parent: int) -> None:
            for value in values:
                if kind_of(type(value)) is not Kind.ATOM and id(value) not in seen:
                    seen.add(id(value))
                    parents[id(value)] = parent
                    stack.append(value)

        def hold(owner: Any, holder: Holder) -> None:
            key = id(owner)
            is_left = key in self._still and not reached.is_due
            if is_left and len(owner) > _LARGE and holder is not _DEQUE:
                reached.lengths[key] = owner, holder, len(owner)
                return
            content = holder.read(owner)
            reached.held[key] = Held(owner, holder, content)
            # A deque may let go of its first entries for new ones.
            if is_left or (is_data and len(content) > _LARGE):
                return
            kinds = set() if len(content) <= _FEW else set(map(type, holder.values(content)))
            if not kinds or any(kind_of(kind) is not Kind.ATOM for kind in kinds):
                push(holder.values(content), key)

        def attributes(value: Any) -> None:
            cls = type(value)
            if has_dict(cls) and type(own := vars(value)) is dict:
                parents.setdefault(id(own), id(value))
                hold(own, _DICT)
            if slots_of(cls):
                hold(value, _SLOTS)

        while stack:
            value = stack.pop()
            kind = kind_of(type(value))
            key = id(value)
            if kind is Kind.MODULE:
                own = vars(value)
                content = dict(own)
                parents[id(own)] = key
                reached.held[id(own)] = Held(own, _MODULE, content)
                reached.buffers.update((id(b), b) for b in content["_buffers"].values())
                for name, item in content.items():
                    if name in _CHECKPOINT_HOOKS:
                        continue
                    if type(item) in (dict, OrderedDict) and not item:
                        reached.empty[id(item)] = item
                    else:
                        push((item,), id(own))
            elif kind is Kind.TENSOR:
                _sort(value, reached, _SHARED_ELEMENTS if is_data else _COPIED_ELEMENTS)
            elif kind is Kind.CELL:
                hold(value, _CELL)
            elif kind in _CONTAINERS:
                hold(value, _ORDERED if isinstance(value, OrderedDict) else _CONTAINERS[kind])
                attributes(value)
            elif kind is Kind.TUPLE:
                reached.tuples[key] = value
                if reached.is_due or key not in self._still:
                    push(value, key)
            elif kind is Kind.OBJECT or (kind is Kind.HOST and is_data):
                attributes(value)
            elif kind is Kind.TRAINER and is_data:
                hold(value, _TRAINER)
                push((value.train_dataloader, value.val_dataloaders), key)
            elif kind in (Kind.HOST, Kind.TRAINER):
                later.append(value)
            elif kind is Kind.FUNCTION:
                push(value.__closure__ or (), key)
                push((value.__defaults__, value.__kwdefaults__), key)
                if value.__dict__:
                    push((value.__dict__,), key)
            elif kind is Kind.METHOD:
                push((value.__self__, value.__func__), key)
            elif kind is Kind.PARTIAL:
                push((value.func, value.args, value.keywords), key)
            elif kind is Kind.WEAK:
                push((value(),), key)
            elif kind is Kind.ARRAY:
                if isinstance(value, np.ndarray) and value.dtype == object:
                    hold(value, _OBJECTS)
                elif is_writable(value):
                    most = _SHARED_ELEMENTS if is_data else _COPIED_ELEMENTS
                    (reached.arrays if _size(value) <= most else reached.watched)[key] = value
                if isinstance(value, np.ndarray):  # the mask of one that is masked
                    attributes(value)
            elif kind is Kind.GENERATOR:
                reached.generators[key] = value
            elif kind is Kind.ITERATOR:
                reached.iterators[key] = value
            elif kind is Kind.SCRIPT:
                buffers = list(value.buffers())
                reached.buffers.update((id(b), b) for b in buffers)
                push(buffers, key)
        return later


def _sort(value: Tensor, reached: Reached, most: int) -> None:
    """Files a tensor. One with a graph was computed, and is not written to."""
    if is_computed(value) or is_lazy(value):
        return
    if is_sharded([value]):  # replays work on the shards themselves
        return
    if isinstance(value, nn.Parameter) or value.requires_grad:
        reached.parameters[id(value)] = value
    elif value.numel() <= most or id(value) in reached.buffers:
        reached.tensors[id(value)] = value
    else:
        reached.watched[id(value)] = value


def is_computed(value: Tensor) -> bool:
    """Whether a tensor has a graph.

    Of a view of what requires grad that is not asked: reading ``grad_fn`` makes the node anew where
    the memory has been written to since, and sums of gradients would have another order.
    """
    if not value.requires_grad:
        return False
    base = value._base
    return (base is not None and base.requires_grad) or value.grad_fn is not None


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else size_of(value)


def _is_as_before(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor):
        return torch.equal(value.data, before)
    return is_same_store(value, before)


def _named_children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what an object refers to, each with what is written to get there."""
    kind = kind_of(type(value))
    if kind is Kind.MODULE:
        for registered in (value._modules, value._buffers, value._parameters):
            yield from ((f".{name}", child) for name, child in registered.items())
    if kind in _WITH_ATTRIBUTES and has_dict(type(value)):
        for name, child in vars(value).items():
            # What lightning calls ``_trainer`` is known as ``trainer``.
            yield (
                f".{name.removeprefix('_') if kind_of(type(child)) is Kind.TRAINER else name}",
                child,
            )
    if kind is Kind.TRAINER:
        yield from ((f".{name}", child) for name, child in _read_trainer(value).items())
        yield ".train_dataloader", value.train_dataloader
        yield ".val_dataloaders", value.val_dataloaders
    if kind is Kind.DICT:
        yield from ((f"[{key!r}]", child) for key, child in dict.items(value))
    elif kind in (Kind.LIST, Kind.DEQUE, Kind.TUPLE):
        yield from ((f"[{i}]", child) for i, child in enumerate(value))
    elif kind is Kind.ARRAY:
        if isinstance(value, np.ndarray) and value.dtype == object:
            yield from ((f".flat[{i}]", child) for i, child in enumerate(read_objects(value)))
    elif kind is Kind.WEAK:
        yield "()", value()
    elif kind in (Kind.OBJECT, Kind.HOST):
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
    values |= {key: read_store(array) for key, array in reached.arrays.items()}
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
    if not any(isinstance(v, Tensor) and is_computed(v) for v in values):
        return held
    return held._replace(content=_replaced(held, _detached))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and is_computed(value) else value


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
    flags = [(t, t.requires_grad) for t in every.values() if not is_computed(t)]
    flags += [(p, p.requires_grad) for key, p in reached.parameters.items() if key not in every]
    arrays = reached.arrays | {
        k: a for k, a in state.others.items() if kind_of(type(a)) is Kind.ARRAY
    }
    generators = reached.generators | {
        k: g for k, g in state.others.items() if kind_of(type(g)) is Kind.GENERATOR
    }
    before |= {key: read_store(array) for key, array in arrays.items()}
    before |= {key: read_generator(value) for key, value in generators.items()}
    sources = {key: state.values.get(key, before[key]) for key in every}
    substitutes = {**swaps, **_stand_ins(walker, reached, state)}
    versions = [
        (t, t._version)
        for key, t in reached.watched.items()
        if key not in before and isinstance(t, Tensor)
    ]
    unchanged: set[int] = set()
    try:
        for key, value in copies_of(sources).items():
            every[key].data = value
        for key, array in arrays.items():
            if key in state.values:
                write_store(array, state.values[key])
        for key, generator in generators.items():
            if key in state.values:
                _write_generator(generator, state.values[key])
        _fill(reached, state, substitutes)
        yield
        if walker.must_judge(reached):  # what an earlier content was put into is put back
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
            write_store(array, before[key])
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
