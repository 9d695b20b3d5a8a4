"""Everything that a step may change: found."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
)
from lightning_hpo.distributed import is_sharded
from lightning_hpo.holders import (
    CELL,
    CLASS,
    CONTAINERS,
    DEQUE,
    DICT,
    METHODS,
    MODULE,
    ORDERED,
    SLOTS,
    Guard,
    Held,
    Holder,
    read_cell,
    read_class,
)

# Tensors and arrays up to this many elements, kept as plain attributes, are copied for a replay. A
# larger one is rather data than a counter; a replay that writes to it is refused.
_COPIED_ELEMENTS = 1_000_000

# A container with more entries is looked through now and then only: see Walker.
_LARGE = 1_000

# Walks at which that happens in any case: the losses of both kinds, and the first products.
_FIRST = 4

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
                (outer.holder is DEQUE or outer.has_grown())
                and all(held.is_same() for held in inner.held.values())
                and all(torch.equal(t.data, before[k]) for k, t in inner.tensors.items())
                and all(np.array_equal(a, before[k]) for k, a in inner.arrays.items())
                and not inner.generators
            )
            if is_still:
                self._still[key] = outer.owner
                if outer.holder is not DEQUE and len(outer.owner) == len(outer.content):
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
                if type(child) is Guard:
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
                hold(vars(value), DICT)
            if slots_of(cls):
                hold(value, SLOTS)

        def classes(cls: type) -> None:
            for base in classes_of(cls):
                if id(base) not in seen:
                    seen.add(id(base))
                    hold(base, CLASS)

        while stack:
            value = stack.pop()
            kind = kind_of(type(value))
            if kind is Kind.MODULE:
                classes(type(value))
                own = vars(value)
                content = dict(own)
                reached.held[id(own)] = Held(own, MODULE, content)
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
                hold(value, CELL)
            elif kind in CONTAINERS:
                holder = CONTAINERS[kind]
                if isinstance(value, OrderedDict):
                    holder = ORDERED
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
        state = read_class(base).items()
        yield from ((f".{name}", child) for name, child in state if not isinstance(child, METHODS))
    if kind is Kind.DICT:
        yield from ((f"[{key!r}]", child) for key, child in dict.items(value))
    elif kind in (Kind.LIST, Kind.DEQUE, Kind.TUPLE):
        yield from ((f"[{i}]", child) for i, child in enumerate(value))
    elif kind is Kind.OBJECT:
        yield from ((f".{m.__name__}", child) for m, child in read_slots(value).items())
    elif kind is Kind.FUNCTION:
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        yield from ((f".{name}", held) for name, cell in cells for held in read_cell(cell))
        yield from ((".__defaults__", child) for child in (value.__defaults__ or ()))
    elif kind is Kind.METHOD:
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif kind is Kind.PARTIAL:
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
