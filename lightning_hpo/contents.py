"""Everything that a step may change: found."""

from __future__ import annotations

import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import filterfalse
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_hpo._kinds import Kind, classes_of, has_dict, kind_of, read_slots, slots_of
from lightning_hpo._tensors import note_views
from lightning_hpo.distributed import is_sharded
from lightning_hpo.holders import (
    CELL,
    CLASS,
    CONTAINERS,
    DEQUE,
    DICT,
    LIST,
    METHODS,
    MODULE,
    MODULE_PARTS,
    OBJECTS,
    OPTIMIZER,
    ORDERED,
    SET,
    SLOTS,
    TRAINER,
    Guard,
    Held,
    Holder,
    defaults_with_state,
    functions_of,
    parts_of,
    read_cell,
    read_class,
    read_trainer,
)
from lightning_hpo.parts import TrainerParts, logged_in
from lightning_hpo.stores import is_same_store, is_writable, read_objects, size_of

# Tensors and arrays up to this many elements, kept as plain attributes, are copied for a replay. A
# larger one is rather data than a counter: it is copied where steps have been seen to change it.
_COPIED_ELEMENTS = 1_000_000

# All of the larger ones are copied at the first replays, up to this many elements together.
_LOOKED_AT = 1 << 26

# Of data that a callback, a datamodule or a loader holds, up to this many.
_COPIED_DATA = 10_000

# What holds more entries, all in all, is looked through now and then only: see Walker.
_LARGE = 1_000
# Where examples come from, as paths begin.
DATA = ("trainer.train_dataloader", "trainer.val_dataloaders", "trainer.datamodule")

# Up to this many entries are looked at one by one.
_FEW = 32

# Walks of each kind at which that happens in any case. Several come before θ moves, and a teacher
# that follows θ does not change before.
_FIRST = 5

PARTS = Holder(TrainerParts.read, TrainerParts.write, dict.values)

_WITH_CLASS = {Kind.MODULE, Kind.OBJECT, Kind.HOST}
_WITH_ATTRIBUTES = {*_WITH_CLASS, Kind.DICT, Kind.LIST, Kind.ARRAY, Kind.TENSOR}

# What has neither attributes of its own nor a class that a step may change.
_BARE = frozenset({dict, list, set, deque})
# Neither lazy nor sharded.
_ORDINARY = frozenset({Tensor, nn.Parameter})

# In the place of these others may be put: parameters and their views, iterators, tuples and methods
# of them.
_EXCHANGED = frozenset({Kind.TENSOR, Kind.ITERATOR, Kind.TUPLE, Kind.BUILTIN})

# Of these one object may stand in many places.
_NAMELESS = (int, float, complex, str, bytes, type, type(None))


@dataclass
class Reached:
    """What a walk has come by, by ``id``.

    Attributes:
        held: Containers, attributes included, and what they hold.
        empty: Dictionaries and sets of modules, and attributes of tensors, in which there is
            nothing: hooks, mostly.
        buffers: Buffers of modules; copied whatever their size.
        parameters: Parameters, and other leaves that require grad.
        tensors: Other tensors that a step may write to.
        tuples: Tuples, which may hold what does change.
        methods: Methods, written in C, of iterators.
        watched: Tensors and arrays that are too large to be copied every time.
        arrays: Arrays that a step may write to.
        generators: Generators of random numbers.
        iterators: Iterators.
        exchanging: Containers in which something may stand that is exchanged for a replay.
        lengths: Large containers that steps have not been seen to change, and their lengths.
        parents: By way of what an object has been reached.
        data: What is reached by way of callbacks, datamodules and loaders only, where what is large
            is copied.
        is_due: Whether all has been looked through, to see what a step changes.
        is_early: Whether that is one of the first times.
        is_thorough: Whether what is large is copied.
    """

    held: dict[int, Held] = field(default_factory=dict)
    empty: list[Any] = field(default_factory=list)
    buffers: dict[int, Tensor | None] = field(default_factory=dict)
    parameters: dict[int, Tensor] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    tuples: dict[int, Any] = field(default_factory=dict)
    methods: dict[int, Any] = field(default_factory=dict)
    watched: dict[int, Any] = field(default_factory=dict)
    arrays: dict[int, Any] = field(default_factory=dict)
    generators: dict[int, Any] = field(default_factory=dict)
    iterators: dict[int, Any] = field(default_factory=dict)
    exchanging: set[int] = field(default_factory=set)
    lengths: dict[int, tuple[Any, Holder, int]] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    data: set[int] = field(default_factory=set)
    is_due: bool = False
    is_early: bool = False
    is_thorough: bool = False


class Walker:
    """Goes through everything that a module reaches: attributes, containers, hooks, closures.

    Attributes of classes are among them, but for those of libraries.

    At the first walks all is looked through, and copied, and then ever more rarely. In between,
    what has been seen to change is copied, and so is what is small. Where there are many entries,
    nested ones counted, and no step has been seen to change any of it, but perhaps by adding to
    the end of a container, only the length of that one is kept. So what a replay costs does not
    grow with a vocabulary, a history or a frozen backbone.

    What callbacks, datamodules and loaders hold comes last, and what somebody has set on loops and
    other parts of the trainer: a step gets at it by the trainer. Of the data there, entries of
    large containers are not looked into.

    Args:
        root: The module, or any other object.
        classes: Returns those of a type and its bases whose own attributes are looked at.
    """

    def __init__(self, root: Any, classes: Callable[[type], tuple[type, ...]] = classes_of) -> None:
        self._root = root
        self._classes = classes
        self._walks: dict[Any, int] = {}
        self._size = 0
        self._still: dict[int, Any] = {}
        self._moving: dict[int, Any] = {}
        self._judged: dict[int, Any] = {}
        self._volatile: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._parts: TrainerParts | None = None

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
        known = set(self._seen) if reached.is_thorough else self._seen
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
            if reached.held[key].holder is DEQUE or reached.held[key].has_grown()
        }
        owners.update(reached.tensors | reached.parameters | reached.arrays | reached.watched)
        self._moving.update((key, owners[key]) for key in changed - grown)
        self._judged.update((key, owners[key]) for key in large)
        weight: dict[int, int] = {}
        live = set(reached.generators)  # what is to be come by at each walk
        for key, held in reached.held.items():
            values = held.holder.values(held.content)
            weight[key] = 1 + len(held.content)
            if held.holder is MODULE or not swapped.isdisjoint(map(id, values)):
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
                and not (key in reached.held and reached.held[key].holder in (TRAINER, PARTS))
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
            if not (self.path_of(owners[key]) or "").startswith(DATA):  # loaders change these
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

        The path of attributes as a whole, a class's too, ends in ``.__dict__``.
        """
        seen = {id(self._root)}
        stack: list[tuple[str, Any]] = [("", self._root)]
        while stack:
            name, value = stack.pop(0)
            if value is wanted:
                return name
            if has_dict(type(value)) and vars(value) is wanted:
                return f"{name}.__dict__"
            if any(base is wanted for base in classes_of(type(value))):
                return f"{name}.__dict__"
            for label, child in _named_children(value):
                if type(child) is Guard:
                    child = vars(child)["_iterator"]
                if id(child) not in seen and not issubclass(type(child), _NAMELESS):
                    seen.add(id(child))
                    stack.append(((name + label).lstrip("."), child))
        return None

    def _explore(self, stack: list[Any], reached: Reached, *, is_data: bool = False) -> list[Any]:
        """Goes through some objects, but for callbacks, datamodules and loaders: returns these."""
        atom, tensor = Kind.ATOM, Kind.TENSOR  # to look them up takes as long as the rest of push
        seen, parents, exchanging = self._seen, reached.parents, reached.exchanging
        most = _COPIED_DATA if is_data else _COPIED_ELEMENTS
        later: list[Any] = []

        def push(values: Iterable[Any], parent: int) -> None:
            for value in values:
                kind = kind_of(type(value))
                if kind is atom:
                    continue
                if kind in _EXCHANGED:
                    exchanging.add(parent)
                if (key := id(value)) not in seen:
                    seen.add(key)
                    parents[key] = parent
                    if kind is tensor:
                        _sort(value, reached, most)
                        own = vars(value)
                        if not own:
                            reached.empty.append(own)
                        elif not value.is_nested:  # of that they are torch's, which caches there
                            parents[id(own)] = key  # else somebody has set them
                            stack.append(own)
                    else:
                        stack.append(value)

        def hold(owner: Any, holder: Holder) -> None:
            key = id(owner)
            is_left = key in self._still and not reached.is_due
            if is_left and holder in (DICT, LIST, ORDERED, SET) and len(owner) > _LARGE:
                reached.lengths[key] = owner, holder, len(owner)
                return
            content = holder.read(owner)
            reached.held[key] = Held(owner, holder, content)
            # A deque may let go of its first entries for new ones.
            if is_left or (is_data and len(content) > _LARGE):
                exchanging.add(key)
                return
            if len(content) > _FEW:  # a vocabulary has many entries, of few types
                kinds = set(map(type, holder.values(content)))
                if all(kind_of(kind) is Kind.ATOM for kind in kinds):
                    return
            push(holder.values(content), key)

        def attributes(value: Any) -> None:
            cls = type(value)
            classes(value)
            if has_dict(cls) and type(own := vars(value)) is dict:
                if any(issubclass(type(held), Thread) for held in own.values()):
                    return  # its thread may write to all of it at any time
                parents.setdefault(id(own), id(value))
                hold(own, DICT)
            if slots_of(cls):
                hold(value, SLOTS)

        def classes(value: Any) -> None:
            for base in self._classes(type(value)):
                if id(base) not in seen:
                    seen.add(id(base))
                    parents[id(base)] = id(value)
                    hold(base, CLASS)
                    push(defaults_with_state(base), id(base))

        while stack:
            value = stack.pop()
            kind = kind_of(type(value))
            key = id(value)
            if kind is Kind.MODULE:
                classes(value)
                own = vars(value)
                content = dict(own)
                parents[id(own)] = key
                reached.held[id(own)] = Held(own, MODULE, content)
                if buffers := content["_buffers"]:
                    reached.buffers.update((id(b), b) for b in buffers.values())
                parts = parts_of(content)
                reached.empty.extend(filterfalse(None, parts))
                push(filter(None, parts), id(own))
                push([v for name, v in content.items() if name not in MODULE_PARTS], id(own))
            elif kind is Kind.CELL:
                hold(value, CELL)
            elif kind in CONTAINERS:
                hold(value, ORDERED if isinstance(value, OrderedDict) else CONTAINERS[kind])
                if type(value) not in _BARE:
                    attributes(value)
            elif kind is Kind.TUPLE:
                reached.tuples[key] = value
                if reached.is_due or key not in self._still:
                    push(value, key)
            elif kind is Kind.OBJECT or (kind is Kind.HOST and is_data):
                attributes(value)
            elif kind is Kind.TRAINER and is_data:
                hold(value, TRAINER)
                push((value.train_dataloader, value.val_dataloaders, *value.optimizers), key)
                if self._parts is None or reached.is_thorough:  # some come later
                    self._parts = TrainerParts(value)
                seen.add(id(self._parts))
                parents[id(self._parts)] = key
                hold(self._parts, PARTS)
                for metrics in logged_in(value):  # as they are: what is logged is written anew
                    parents[id(metrics)] = key
                    reached.held[id(metrics)] = Held(metrics, DICT, dict(metrics))
            elif kind is Kind.OPTIMIZER:
                hold(value, OPTIMIZER)
                push((value.defaults,), key)
            elif kind in (Kind.HOST, Kind.TRAINER):
                later.append(value)
            elif kind is Kind.FUNCTION:
                push(value.__closure__ or (), key)
                push((value.__defaults__, value.__kwdefaults__, value.__dict__ or None), key)
            elif kind is Kind.METHOD:
                push((value.__self__, value.__func__), key)
            elif kind is Kind.BUILTIN:
                push((value.__self__,), key)
                if kind_of(type(value.__self__)) is Kind.ITERATOR:
                    reached.methods[key] = value
            elif kind is Kind.PARTIAL:
                push((value.func, value.args, value.keywords), key)
            elif kind is Kind.WEAK:
                push((value(),), key)
            elif kind is Kind.ARRAY:
                if isinstance(value, np.ndarray) and value.dtype == object:
                    hold(value, OBJECTS)
                elif is_writable(value):
                    (reached.arrays if _size(value) <= most else reached.watched)[key] = value
                if isinstance(value, np.ndarray):  # the mask of one that is masked
                    attributes(value)
            elif kind is Kind.GENERATOR:
                reached.generators[key] = value
            elif kind is Kind.ITERATOR:
                reached.iterators[key] = value
                push(functions_of(value), key)
            elif kind is Kind.SCRIPT:
                own_buffers = list(value.buffers())
                reached.buffers.update((id(b), b) for b in own_buffers)
                push(own_buffers, key)
        return later


def _sort(value: Tensor, reached: Reached, most: int) -> None:
    """Files a tensor. One with a graph was computed, and is not written to."""
    is_ordinary = type(value) in _ORDINARY
    if not is_ordinary and is_lazy(value):
        return
    if is_computed(value):
        if value._base is not None and value._base.is_leaf:
            note_views([value._base])
        return
    if not is_ordinary and is_sharded([value]):  # replays work on the shards themselves
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
    for base in classes_of(type(value)) if kind in _WITH_CLASS else ():
        state = read_class(base).items()
        yield from (
            (f".{name}", child) for name, child in state if not issubclass(type(child), METHODS)
        )
    if kind is Kind.TRAINER:
        yield from ((f".{name}", child) for name, child in read_trainer(value).items())
        parts = TrainerParts(value)
        for key, child in parts.read().items():
            yield parts.path_of(key).removeprefix("trainer"), child
        yield ".train_dataloader", value.train_dataloader
        yield ".val_dataloaders", value.val_dataloaders
        yield from ((f".optimizers[{i}]", child) for i, child in enumerate(value.optimizers))
    if kind is Kind.OPTIMIZER:
        yield ".defaults", value.defaults
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
        yield from ((f".{name}", held) for name, cell in cells for held in read_cell(cell))
        yield from ((".__defaults__", child) for child in (value.__defaults__ or ()))
    elif kind is Kind.METHOD:
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif kind is Kind.BUILTIN:
        yield ".__self__", value.__self__
    elif kind is Kind.PARTIAL:
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
