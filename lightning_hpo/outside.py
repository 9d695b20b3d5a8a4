"""What the methods of a module name outside of it: global variables, and caches of functions."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, cached_property, lru_cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from lightning_hpo._kinds import Kind, classes_of, kind_of, module_of, read_slots, root_of
from lightning_hpo.holders import METHODS, own_attributes, read_cell, read_class
from lightning_hpo.private_state import is_library, names_in

# What no training and no validation step calls; data are named there.
_NO_STEP = {
    *("__init__", "__repr__", "setup", "teardown", "prepare_data", "configure_model"),
    *("configure_optimizers", "configure_callbacks", "configure_sharded_model"),
    *("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"),
    *("hpo_dataloader", "test_step", "predict_step", "on_fit_start", "on_fit_end"),
    *("on_save_checkpoint", "on_load_checkpoint", "load_from_checkpoint"),
}
_CODE = (FunctionType, MethodType, *METHODS, cached_property, partial, _lru_cache_wrapper)
_CONTAINERS = {Kind.DICT, Kind.LIST, Kind.DEQUE, Kind.TUPLE, Kind.SET}
# How far a variable is looked into, and up to how many entries.
_DEPTH = 4
_ENTRIES = 10_000
_MISSING = object()


class Variable(NamedTuple):
    """A variable, or an attribute of a class or a Python module.

    Attributes:
        name: How it is called.
        read: Returns the object that it stands for now.
    """

    name: str
    read: Callable[[], Any]


class Outside:
    """What lies outside of a module, and is named by the functions that its steps may call.

    These are the methods of its classes, functions of the user's that they name, and methods of
    classes and objects that they name. Of classes and Python modules of the user's, attributes
    count as variables; so do those that a module holds as its own attributes.

    Args:
        module: The module.

    Attributes:
        variables: The variables.
        caches: Functions with a ``functools.cache``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.variables: list[Variable] = []
        self.caches: list[Any] = []
        self._named: set[tuple[int, str]] = set()
        self._seen: dict[int, Any] = {}
        self._waiting: list[Any] = []
        for kind in {type(m) for m in module.modules()}:
            self._waiting += _methods(kind)
        for m in module.modules():
            for name, value in own_attributes(m).items():
                self._attribute(name, value)
        while self._waiting:
            self._enter(self._waiting.pop())

    def _attribute(self, name: str, value: Any) -> None:
        """Looks at an attribute of the module, of a kind that replays do not put back."""
        if issubclass(type(value), (type, ModuleType)):
            self._space(name, value, None)
        elif issubclass(type(value), _CODE):
            self._waiting.append(value)
        elif _has_attributes(value):
            self._variable(id(value), name, partial(vars, value))

    def _enter(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        kind = type(value)
        if issubclass(kind, _lru_cache_wrapper):
            self.caches.append(value)
            self._waiting.append(value.__wrapped__)
        elif issubclass(kind, property):
            self._waiting += [value.fget, value.fset]
        elif issubclass(kind, (cached_property, partial)):
            self._waiting.append(value.func)
        elif issubclass(kind, (staticmethod, classmethod, MethodType)):
            self._waiting.append(value.__func__)
        elif issubclass(kind, FunctionType) and _is_own(value.__module__):
            self._function(value)

    def _function(self, function: FunctionType) -> None:
        if vars(function):
            self._variable(id(function), function.__name__, partial(vars, function))
        names = names_in(function.__code__)
        for name in _arguments_with_defaults(function):
            read = partial(_default, function, name)
            self._named_by(id(function), f"{function.__name__}({name}=…)", read, names)
        for name in names:
            if name in function.__globals__:
                read = partial(function.__globals__.get, name)
                self._named_by(id(function.__globals__), name, read, names)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._named_by(id(cell), name, partial(_content, cell), names)

    def _named_by(
        self, owner: int, name: str, read: Callable[[], Any], names: tuple[str, ...]
    ) -> None:
        """Looks at a variable that a function names, among other names."""
        value = read()
        kind = type(value)
        if issubclass(kind, (type, ModuleType)):
            self._space(name, value, names)
        elif issubclass(kind, _CODE):
            self._waiting.append(value)
        elif _has_attributes(value):
            self._variable(id(value), name, partial(vars, value))
        else:
            self._variable(owner, name, read)
            if kind_of(kind) in (Kind.OBJECT, Kind.MODULE):
                self._waiting += _methods(kind)

    def _space(self, name: str, space: Any, names: tuple[str, ...] | None) -> None:
        """Looks at the attributes of a class, or at those of a Python module that are named."""
        if isinstance(space, type):
            self._waiting += _methods(space)
            for base in classes_of(space):
                if _is_own(module_of(base)):
                    for attribute in {**read_class(base), **dict.fromkeys(names or ())}:
                        self._inside(name, base, attribute, names)
        elif _is_own(space.__name__):
            for attribute in names or [n for n in vars(space) if not n.startswith("__")]:
                self._inside(name, space, attribute, names)

    def _inside(self, name: str, space: Any, attribute: str, names: tuple[str, ...] | None) -> None:
        read = partial(_get, space, attribute)
        value = read()
        if names is None and issubclass(type(value), (type, ModuleType)):
            return  # what a module has imported
        if issubclass(type(value), (type, ModuleType)) and id(value) in self._seen:
            return
        if issubclass(type(value), (type, ModuleType)):
            self._seen[id(value)] = value
        self._named_by(id(space), f"{name}.{attribute}", read, names or ())

    def _variable(self, owner: int, name: str, read: Callable[[], Any]) -> None:
        key = owner, name.rpartition(".")[2]
        if key not in self._named:
            self._named.add(key)
            self.variables.append(Variable(name, read))


def _arguments_with_defaults(function: FunctionType) -> list[str]:
    code, defaults = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    return [*positional[len(positional) - len(defaults) :], *(function.__kwdefaults__ or ())]


def _default(function: FunctionType, name: str) -> Any:
    """Returns the default value of an argument; a later one is another variable."""
    if name in (function.__kwdefaults__ or ()):
        return (function.__kwdefaults__ or {})[name]
    code, defaults = function.__code__, function.__defaults__ or ()
    index = code.co_varnames.index(name) - code.co_argcount + len(defaults)
    return defaults[index] if 0 <= index < len(defaults) else None


def _methods(kind: type) -> Iterator[Any]:
    """Yields the methods of a class that steps may call."""
    for base in classes_of(kind):
        for name, member in vars(base).items():
            if name not in _NO_STEP and issubclass(type(member), _CODE):
                yield member


def _has_attributes(value: Any) -> bool:
    """Whether a value of a kind that replays leave as it is has attributes of its own."""
    # Types are asked, here and above, not values: a weak proxy may stand for what is gone.
    is_plain = issubclass(type(value), (enum.Enum, int, float, str))
    return is_plain and bool(getattr(value, "__dict__", None))


@lru_cache(maxsize=4096)
def _is_own(module: str | None) -> bool:
    """Whether a Python module is the user's."""
    if module is None or module.partition(".")[0] == "lightning_hpo":
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    return module == "__main__" or (path is not None and not is_library(path))


def entries_of(value: Any) -> tuple[list[Any], list[Any], list[int]]:
    """Looks into a value: containers, objects of the user's classes, and modules.

    Returns:
        All that it holds, in an order of its own, what of it can be written to in place, and the
        lengths of what is too large to be looked into.
    """
    entries, leaves, lengths = [value], [], []
    seen: dict[int, Any] = {}
    waiting = [(value, 0)]
    while waiting and len(entries) <= _ENTRIES:
        value, depth = waiting.pop()
        kind = kind_of(type(value))
        if id(value) in seen or kind is Kind.ATOM or depth > _DEPTH:
            continue
        seen[id(value)] = value
        held: list[Any] = []
        if kind is Kind.MODULE:
            held = [*value._parameters.values(), *value._buffers.values(), *value._modules.values()]
            held += own_attributes(value).values()
        elif kind is Kind.OBJECT:
            held = [*read_slots(value).values(), *getattr(value, "__dict__", {}).values()]
            if not _is_open(type(value)):
                entries += held if depth == 0 else []
                continue  # compiled functions of libraries keep what they have compiled
        elif kind is Kind.BUILTIN:
            held = [value.__self__]
        elif kind in _CONTAINERS:
            lengths.append(len(value))
            if len(value) <= _ENTRIES and kind is Kind.DICT:
                held = [part for pair in dict.items(value) for part in pair]
            elif len(value) <= _ENTRIES:
                held = list(value)
        else:
            leaves.append(value)
        entries += held
        waiting += [(each, depth + 1) for each in held]
    return entries, leaves, lengths


def _is_open(kind: type) -> bool:
    return root_of(kind) in ("argparse", "collections", "types") or _is_own(module_of(kind))


def _get(space: Any, name: str) -> Any:
    return vars(space).get(name, _MISSING)


def _content(cell: Any) -> Any:
    return next(iter(read_cell(cell)), None)
