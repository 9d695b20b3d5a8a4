"""What held-out batches change in objects that they share with the user's own loaders."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from copy import copy
from functools import _lru_cache_wrapper, lru_cache, partial
from itertools import count
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any
from weakref import ProxyTypes

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_hpo._kinds import (
    classes_of,
    has_dict,
    read_slots,
    root_of,
    slots_of,
    write_slots,
)
from lightning_hpo._lightning import is_lightning_module
from lightning_hpo.holders import METHODS, own_attributes, read_class

# Containers with more entries, and tensors and arrays with more elements, are rather data than
# state: they are shared.
_ENTERED_ENTRIES = 100
_COPIED_ENTRIES = 10_000
_COPIED_ELEMENTS = 1_000
_OBJECTS = 20_000

# Objects of these packages keep no state that a transform, a collator or a sampler moves, or one
# that belongs to files and processes.
_CLOSED = {
    *("PIL", "pandas", "pyarrow", "h5py", "zarr", "lmdb", "numpy"),
    *("multiprocessing", "threading", "logging"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
}
# Of these a copy goes on where they are, and takes nothing from them.
_ITERATORS: tuple[type, ...] = (
    type(iter([])),
    type(iter(())),
    type(iter("")),
    type(iter(b"")),
    type(iter(range(0))),
    count,
)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# By their types: a weak proxy may stand for what is gone.
_PLAIN = {int, float, complex, bool, str, bytes, type(None)}
_MISSING = object()
_STDLIB = os.path.dirname(os.__file__)


class PrivateState:
    """Gives the fetching of held-out batches a state of its own in the objects that it uses.

    Datasets, transforms, collators and samplers may count, cache, hold generators and positions,
    and the user's loaders may hold the same objects. Inside :meth:`__call__`, generators are seeded
    by the batch, and what an earlier held-out batch has changed is as it left it; afterwards all is
    as the user's loaders left it.

    Found from the roots: attributes, those of classes, closures, global variables that a function
    names, those of other modules of the user's included, partials, bound methods, containers of up
    to 100 entries, and the generators in larger ones.

    Args:
        roots: The objects that make the batches.
        random_only: Whether only generators of random numbers are private, and what else the
            objects change is changed for all.
    """

    def __init__(self, *roots: Any, random_only: bool = False) -> None:
        self._roots = roots
        self._random_only = random_only
        self._changes: dict[tuple[int, Any], tuple[_Slot, Any]] = {}
        self._warned: set[str] = set()

    @contextmanager
    def __call__(self, seed: int) -> Iterator[None]:
        """Puts the private state in place, and the user's back.

        Args:
            seed: Seeds the generators.
        """
        found = _Found(self._roots)
        if self._random_only:
            found.slots, found.iterators = [], []
        if not found.is_complete:
            self._warn(
                f"reach more than {_OBJECTS} objects by way of "
                f"{', '.join(type(root).__name__ for root in self._roots)}; what lies behind those "
                "may be changed for loaders that share it"
            )
        cached = [function.cache_info().misses for function in found.caches]
        before = [slot.get() for slot in found.slots]
        generators = [(get(), set_) for get, set_, _ in found.generators]
        try:
            for _, _, reseed in found.generators:
                reseed(seed)
            for holder, name, iterator in found.iterators:
                self._put_copy(holder, name, iterator)
            for slot, value in self._changes.values():
                slot.set({**slot.get(), **value} if slot.is_mapping else value)
            started = [slot.get() for slot in found.slots]
            yield
            for slot, start in zip(found.slots, started, strict=True):
                self._keep(slot, start)
            for function, misses in zip(found.caches, cached, strict=True):
                if function.cache_info().misses != misses:
                    self._warn(
                        f"fill the cache of {function.__qualname__!r}, which draws random numbers; "
                        "loaders that share it get what was drawn for held-out batches"
                    )
        finally:
            for slot, user in zip(found.slots, before, strict=True):
                if not slot.equal(slot.get(), user):
                    slot.set(user)
            for state, set_ in generators:
                set_(state)

    def _keep(self, slot: _Slot, start: Any) -> None:
        """Keeps what a batch has changed; the rest of a namespace goes on to be shared."""
        now = slot.get()
        if slot.equal(now, start):
            return
        if slot.is_mapping:
            earlier = self._changes.get(slot.key, (slot, {}))[1]
            changed = {k: v for k, v in now.items() if start.get(k, _MISSING) is not v}
            now = {**earlier, **changed}
        self._changes[slot.key] = slot, now

    def _put_copy(self, holder: Any, name: Any, iterator: Any) -> None:
        """Puts a copy in the place of an iterator, which cannot be put back itself."""
        if isinstance(iterator, _BaseDataLoaderIter):
            stand_in = None  # a second iterator over the loader would reset the workers of this one
        elif isinstance(iterator, _ITERATORS) and holder is not None:
            stand_in = copy(iterator)
        else:
            self._warn(
                f"draw from {name!r}, a {type(iterator).__name__}, whose position cannot be "
                "copied; loaders that share it miss what held-out batches take"
            )
            return
        if name is None:
            holder.cell_contents = stand_in
        else:
            holder[name] = stand_in

    def _warn(self, text: str) -> None:
        if text in self._warned:
            return
        self._warned.add(text)
        warnings.warn(
            f"OnlineHPOCallback: the held-out data {text}. Pass dataloader= with data of their own",
            stacklevel=2,
        )


class _Slot:
    """One thing that can be read and put back as a whole.

    Attributes:
        key: Tells it apart from others.
        is_mapping: Whether its value is a namespace or a dict.
    """

    def __init__(
        self,
        owner: Any,
        get: Callable[[], Any],
        set_: Callable[[Any], Any],
        equal: Callable[[Any, Any], bool],
        name: Any = None,
    ) -> None:
        self.owner = owner  # kept alive, so that its id stays its own
        self.is_mapping = equal is _same and isinstance(get(), dict)
        self.key = id(owner), name
        self.get = get
        self.set = set_
        self.equal = equal


class _Found:
    """What can be reached from some objects: slots, generators of random numbers, iterators."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self.slots: list[_Slot] = []
        self.generators: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        self.iterators: list[tuple[Any, Any, Any]] = []
        self.caches: list[Any] = []
        self._seen: dict[int, Any] = {}
        self._waiting = list(roots)
        while self._waiting and len(self._seen) < _OBJECTS:
            self._enter(self._waiting.pop())
        self.is_complete = not self._waiting

    def _enter(self, value: Any) -> None:
        # By its type: what an object says of its class may be another one, and asking it for an
        # attribute that it lacks runs code of the user's.
        kind = type(value)
        if issubclass(kind, (int, float, complex, str, bytes, type, ModuleType, type(None))):
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if issubclass(kind, torch.Generator):
            self.generators.append((value.get_state, value.set_state, value.manual_seed))
        elif issubclass(kind, np.random.RandomState):
            self.generators.append((value.get_state, value.set_state, value.seed))
        elif issubclass(kind, np.random.Generator):
            self._numpy_generator(value.bit_generator)
        elif issubclass(kind, random.Random):
            self.generators.append((value.getstate, value.setstate, value.seed))
        elif issubclass(kind, (Tensor, np.ndarray)):
            self._array(value)
        elif issubclass(kind, (list, deque, set, dict)):
            self._container(value)
        elif issubclass(kind, (tuple, frozenset)):
            self._items(value)
        elif issubclass(kind, partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif issubclass(kind, MethodType):
            self._waiting += [value.__self__, value.__func__]
        elif issubclass(kind, (BuiltinMethodType, MethodWrapperType)):
            self._waiting.append(value.__self__)
        elif issubclass(kind, ProxyTypes):
            with suppress(ReferenceError):  # what it stands for is gone
                self._waiting.append(value.__repr__.__self__)
        elif _is_position(value):
            if not any(known is value for _, _, known in self.iterators):
                self.iterators.append((None, kind.__name__, value))
        elif issubclass(kind, FunctionType):
            self._function(value)
        elif issubclass(kind, _lru_cache_wrapper):
            self._waiting.append(value.__wrapped__)
            if _Found([value.__wrapped__]).generators:
                self.caches.append(value)
        elif root_of(kind) not in _CLOSED:
            self._object(value)

    def _numpy_generator(self, bits: Any) -> None:
        def set_(state: Any) -> None:
            bits.state = state

        def reseed(seed: int) -> None:
            bits.state = type(bits)(seed).state

        self.generators.append((lambda: bits.state, set_, reseed))

    def _array(self, value: Any) -> None:
        if isinstance(value, Tensor):
            # Numbers on another device would have to be waited for.
            if value.numel() > _COPIED_ELEMENTS or value.device.type != "cpu":
                return
            if type(value) is Tensor and not value.requires_grad:
                self.slots.append(_Slot(value, value.clone, value.copy_, torch.equal))
        elif value.size <= _COPIED_ELEMENTS and value.dtype != object and value.flags.writeable:

            def set_(before: Any) -> None:
                value[...] = before

            self.slots.append(_Slot(value, value.copy, set_, np.array_equal))

    def _container(self, value: Any) -> None:
        if len(value) > _COPIED_ENTRIES or type(value).__module__ not in (
            "builtins",
            "collections",
        ):
            return

        def set_(before: Any) -> None:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(before)

        self.slots.append(_Slot(value, partial(copy, value), set_, _same))
        self._items(value.values() if isinstance(value, dict) else value)
        if isinstance(value, dict):
            self._named(value, value)

    def _items(self, values: Any) -> None:
        if len(values) <= _ENTERED_ENTRIES:
            # An index may have thousands of tuples of numbers.
            self._waiting += [
                v for v in values if type(v) is not tuple or not _PLAIN.issuperset(map(type, v))
            ]
        elif any(issubclass(kind, _GENERATORS) for kind in set(map(type, values))):
            self._waiting += [v for v in values if issubclass(type(v), _GENERATORS)]

    def _function(self, function: FunctionType) -> None:
        for cell in function.__closure__ or ():
            self._cell(cell)
        self._waiting += function.__defaults__ or ()
        self._waiting += (function.__kwdefaults__ or {}).values()
        if vars(function):
            self._waiting.append(vars(function))
        variables = function.__globals__
        names = names_in(function.__code__)
        if is_library(function.__code__.co_filename):
            values = [variables.get(name) for name in names]
            self._waiting += [v for v in values if issubclass(type(v), _GENERATORS)]
            return
        spaces = [variables]
        for name in names:
            module = variables.get(name, sys.modules.get(name))
            if issubclass(type(module), ModuleType):
                path = getattr(module, "__file__", None)  # builtins have none
                if path is not None and not is_library(path):
                    spaces.append(vars(module))
        for space in spaces:
            for name in names:
                value = space.get(name, _MISSING)
                if value is not _MISSING and not issubclass(type(value), (type, ModuleType)):
                    self._variable(space, name)

    def _cell(self, cell: Any) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return

        def set_(before: Any) -> None:
            cell.cell_contents = before

        self.slots.append(_Slot(cell, lambda: cell.cell_contents, set_, _is))
        self._one(cell, None, value)

    def _variable(self, variables: MutableMapping[str, Any], name: str) -> None:
        def get() -> Any:
            return variables.get(name, _MISSING)

        def set_(before: Any) -> None:
            variables[name] = before

        self.slots.append(_Slot(variables, get, set_, _is, name))
        self._one(variables, name, variables[name])

    def _object(self, value: Any) -> None:
        if issubclass(type(value), (pl.Trainer, _BaseDataLoaderIter)):
            return
        if has_dict(type(value)) and isinstance(attributes := vars(value), dict):
            self._attributes(value, attributes)
        if slots_of(type(value)):
            get, set_ = partial(read_slots, value), partial(write_slots, value)
            self.slots.append(_Slot(value, get, set_, _same, "slots"))
            self._waiting += get().values()
        for kind in type(value).__mro__:
            self._waiting += _methods(kind)
        for kind in classes_of(type(value)):
            self._class(kind)

    def _class(self, kind: type) -> None:
        if id(kind) not in self._seen:
            self._seen[id(kind)] = kind

            def get() -> dict[str, Any]:
                state = read_class(kind).items()
                return {n: v for n, v in state if not issubclass(type(v), METHODS)}

            def set_(before: dict[str, Any]) -> None:
                for name in get().keys() - before.keys():
                    type.__delattr__(kind, name)
                for name, value in before.items():
                    if vars(kind).get(name, _MISSING) is not value:
                        type.__setattr__(kind, name, value)

            self.slots.append(_Slot(kind, get, set_, _same))
            self._waiting += get().values()

    def _attributes(self, owner: Any, attributes: dict[str, Any]) -> None:
        is_module = isinstance(owner, nn.Module)

        def get() -> dict[str, Any]:
            return own_attributes(owner) if is_module else dict(attributes)

        def set_(before: dict[str, Any]) -> None:
            for name in get().keys() - before.keys():
                del attributes[name]
            attributes.update(before)

        self.slots.append(_Slot(owner, get, set_, _same))
        own = get()
        self._waiting += own.values()
        if isinstance(owner, nn.Module) and not is_lightning_module(owner):
            self._waiting += [*owner._buffers.values(), *owner._modules.values()]
        self._named(attributes, own)
        if isinstance(owner, DataLoader) and attributes.get("_iterator") is not None:
            self.iterators.append((attributes, "_iterator", attributes["_iterator"]))

    def _named(self, holder: Any, values: dict[Any, Any]) -> None:
        for name, value in values.items():
            self._iterator(holder, name, value)

    def _one(self, holder: Any, name: Any, value: Any) -> None:
        self._iterator(holder, name, value)
        self._waiting.append(value)

    def _iterator(self, holder: Any, name: Any, value: Any) -> None:
        if _is_position(value):
            self.iterators.append((holder, name, value))


def _is_position(value: Any) -> bool:
    """Whether an object is an iterator that shows nothing of itself."""
    kind = type(value)
    return issubclass(kind, Iterator) and not has_dict(kind) and not issubclass(kind, ProxyTypes)


@lru_cache(maxsize=1024)
def is_library(path: str) -> bool:
    """Whether code is installed or Python's own: its global variables are no state of a loader."""
    # Debian and hosted notebooks install to dist-packages.
    is_installed = "site-packages" in path or "dist-packages" in path
    return is_installed or path.startswith((_STDLIB, "<frozen"))


@lru_cache(maxsize=1024)
def _methods(kind: type) -> list[Any]:
    """Returns the methods of a class of the user's, or of a library that it uses."""
    functions: list[Any] = [m for m in vars(kind).values() if isinstance(m, FunctionType)]
    is_closed = kind not in classes_of(kind)
    if is_closed and all(is_library(f.__code__.co_filename) for f in functions):
        return []
    return functions


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Returns the names that a function looks up, in functions and comprehensions within it too."""
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(dict.fromkeys(names_in(constant)))
    return tuple(found)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _same(a: Any, b: Any) -> bool:
    """Whether two shallow copies of a container hold the same objects in the same order."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return all(k is m or k == m for (k, _), (m, _) in pairs) and all(
            v is b[k] for k, v in a.items()
        )
    if isinstance(a, set):
        return bool(a == b)
    return all(x is y for x, y in zip(a, b, strict=True))
