"""Which objects a step may change, by their types: containers, state, or nothing of interest."""

from __future__ import annotations

import array
import ctypes
import enum
import functools
import io
import logging
import queue
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

_T = TypeVar("_T")


class _ByType(dict[type, _T], Generic[_T]):
    """Keeps what a function of types returns; half as slow to ask as ``functools.lru_cache``.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[[type], _T]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, cls: type) -> _T:
        if len(self) >= 4096:  # some are made anew all the time
            self.clear()
        value = self[cls] = self._function(cls)
        return value


class Kind(enum.Enum):
    """How an object holds what can change in it."""

    ATOM = enum.auto()  # immutable, opaque, or machinery: neither copied nor looked into
    TENSOR = enum.auto()
    ARRAY = enum.auto()  # of NumPy, and other memory that is written to in place
    GENERATOR = enum.auto()  # of random numbers
    ITERATOR = enum.auto()  # cannot be put back once it has been advanced
    MODULE = enum.auto()
    SCRIPT = enum.auto()
    DICT = enum.auto()
    LIST = enum.auto()
    DEQUE = enum.auto()
    SET = enum.auto()
    TUPLE = enum.auto()
    FUNCTION = enum.auto()
    METHOD = enum.auto()
    BUILTIN = enum.auto()  # functions written in C, and bound methods that are
    PARTIAL = enum.auto()
    CELL = enum.auto()
    WEAK = enum.auto()  # a weak reference
    OBJECT = enum.auto()  # attributes, in a __dict__ or in slots
    HOST = enum.auto()  # the same of a callback, a datamodule or a loader, which may hold data
    TRAINER = enum.auto()
    OPTIMIZER = enum.auto()  # attributes that are numbers and such; the rest is not a step's

    __hash__ = object.__hash__  # that of Enum hashes the name, in Python


_ATOMS = (
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type,
    type(None),
    type(...),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
    np.generic,
    np.dtype,
    types.ModuleType,
    types.CodeType,
    weakref.ProxyType,
    weakref.CallableProxyType,
)

# By name, so that it is known in either package of Lightning.
_HOST = {"lightning", "lightning_fabric", "pytorch_lightning"}
_BY_HOST_BASE = {
    "Callback": Kind.HOST,
    "LightningDataModule": Kind.HOST,
    "Logger": Kind.ATOM,
    "Strategy": Kind.ATOM,
    "Trainer": Kind.TRAINER,
}
# What the training itself moves, or a thread or a file does: a step gets at it, but its state is
# not the module's.
_MACHINERY_OF = _HOST | {
    "_io",
    "_thread",
    "asyncio",
    "concurrent",
    "inspect",
    "io",
    "lightning_hpo",
    "logging",
    "multiprocessing",
    "pathlib",
    "queue",
    "re",
    "socket",
    "subprocess",
    "tensorboard",
    "tensorboardX",
    "threading",
    "typing",
    "wandb",
}
_MACHINERY_OF_TORCH = (
    "torch._",
    "torch.distributed.",
    "torch.fx.",
    "torch.utils.hooks",
    "torch.utils.tensorboard",
)

_BY_BASE: tuple[tuple[type | tuple[type, ...], Kind], ...] = (
    (_ATOMS, Kind.ATOM),
    (Tensor, Kind.TENSOR),
    ((np.ndarray, bytearray, array.array, memoryview, torch.UntypedStorage), Kind.ARRAY),
    (
        (torch.Generator, np.random.Generator, np.random.RandomState, random.Random),
        Kind.GENERATOR,
    ),
    (torch.optim.Optimizer, Kind.OPTIMIZER),
    ((threading.Thread, queue.Queue, queue.SimpleQueue, io.IOBase, logging.Filterer), Kind.ATOM),
    (DataLoader, Kind.HOST),
    (torch.jit.ScriptModule, Kind.SCRIPT),
    (nn.Module, Kind.MODULE),
    (dict, Kind.DICT),
    (list, Kind.LIST),
    (deque, Kind.DEQUE),
    (set, Kind.SET),
    ((tuple, frozenset), Kind.TUPLE),
    (types.FunctionType, Kind.FUNCTION),
    (types.MethodType, Kind.METHOD),
    ((types.BuiltinMethodType, types.MethodWrapperType), Kind.BUILTIN),
    (functools.partial, Kind.PARTIAL),
    (types.CellType, Kind.CELL),
    (weakref.ReferenceType, Kind.WEAK),
    (threading.local, Kind.OBJECT),
)


def _kind_of(cls: type) -> Kind:
    for bases, kind in _BY_BASE:
        if issubclass(cls, bases):
            return kind
    if _is_numeric(cls):
        return Kind.ARRAY
    name = module_of(cls)
    if name == "multiprocessing.sharedctypes":
        return Kind.OBJECT
    is_bare = not has_dict(cls) and not slots_of(cls)
    if issubclass(cls, Iterator) and (is_bare or name == "torch.utils.data.dataloader"):
        return Kind.ITERATOR
    if any(root_of(base) == "lightning_hpo" for base in cls.__mro__):
        return Kind.ATOM  # a penalty, whose constants may be as many as θ: replays share them
    if cls.__name__ == "Trainer" and root_of(cls) in _HOST:
        return Kind.TRAINER
    if is_bare or root_of(cls) in _MACHINERY_OF or name.startswith(_MACHINERY_OF_TORCH):
        return Kind.ATOM
    for base in cls.__mro__:
        if root_of(base) in _HOST and base.__name__ in _BY_HOST_BASE:
            return _BY_HOST_BASE[base.__name__]
    return Kind.OBJECT


kind_of: Callable[[type], Kind] = _ByType(_kind_of).__getitem__
"""Returns how the instances of a type hold what can change in them."""


def _is_numeric(cls: type) -> bool:
    """Whether a type is one of ctypes without pointers, whose content is put back as bytes."""
    parts: list[Any] = [cls]
    while parts:
        part = parts.pop()
        if issubclass(part, ctypes.Array):
            parts.append(part._type_)
        elif issubclass(part, (ctypes.Structure, ctypes.Union)):
            parts += [field[1] for field in getattr(part, "_fields_", ())]
        elif not issubclass(part, ctypes._SimpleCData) or getattr(part, "_type_", "P") in "OPXZz":
            return False
    return True


def module_of(cls: type) -> str:
    """Returns the name of the module that defines a class; empty where it is not said.

    The class of functions that Cython has compiled has a descriptor in the place of the name.
    """
    name: Any = cls.__module__
    return name if isinstance(name, str) else ""


def root_of(cls: type) -> str:
    """Returns the name of the package that defines a class; empty where it is not said."""
    return module_of(cls).partition(".")[0]


def has_dict(cls: type) -> bool:
    """Whether the instances of a type have attributes in a ``__dict__`` of their own."""
    return bool(cls.__dictoffset__) or issubclass(cls, threading.local)


def _slots_of(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    return tuple(
        member
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    )


slots_of: Callable[[type], tuple[types.MemberDescriptorType, ...]] = _ByType(_slots_of).__getitem__
"""Returns the slots of a type written in Python, inherited ones included."""


# Classes of these packages keep no state of a step.
_NO_STATE = _HOST | {"lightning_hpo", "torch", "torchmetrics", "numpy"} | sys.stdlib_module_names


def _classes_of(cls: type) -> tuple[type, ...]:
    return tuple(base for base in cls.__mro__ if root_of(base) not in _NO_STATE)


classes_of: Callable[[type], tuple[type, ...]] = _ByType(_classes_of).__getitem__
"""Returns those of a type and its bases whose own attributes a step may change."""


def read_slots(value: Any) -> dict[types.MemberDescriptorType, Any]:
    """Returns what the slots of an object hold; those that are empty are not there."""
    held = {}
    for member in slots_of(type(value)):
        try:
            held[member] = member.__get__(value)
        except AttributeError:
            continue
    return held


def write_slots(value: Any, held: dict[types.MemberDescriptorType, Any]) -> None:
    """Puts into the slots of an object what :func:`read_slots` returned; it may be frozen."""
    for member in slots_of(type(value)):
        if member in held:
            member.__set__(value, held[member])
        elif member in read_slots(value):
            member.__delete__(value)


def is_of_lightning(cls: type, *, itself: bool = False) -> bool:
    """Whether a class, or (unless ``itself``) one of its bases, is defined by Lightning."""
    return any(root_of(base) in _HOST for base in ((cls,) if itself else cls.__mro__))
