"""What somebody keeps on the parts of a trainer: loops, connectors, the strategy."""

from __future__ import annotations

import enum
from functools import lru_cache
from types import FunctionType
from typing import Any

from lightning_hpo._kinds import Kind, has_dict, is_of_lightning, kind_of
from lightning_hpo.private_state import names_in

# Containers with more entries are taken to hold no parts.
_ENTERED = 20
# Of these the trainer says more shortly where they are than its attributes do.
_BY_PROPERTY = ("strategy", "precision_plugin", "accelerator", "fit_loop")
_PLAIN = (int, float, complex, str, bytes, type(None))


class TrainerParts:
    """The parts of a trainer, and the attributes there that are none of Lightning's own.

    Its own are those that its code names. To look again costs a few microseconds, as long as no
    attribute comes or goes.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._parts: dict[str, Any] = {}
        seen: set[int] = set()
        waiting: list[tuple[str, Any]] = [
            ("trainer", trainer),
            *((f"trainer.{name}", getattr(trainer, name)) for name in _BY_PROPERTY),
        ]
        while waiting:
            path, value = waiting.pop(0)
            if id(value) in seen:
                continue
            seen.add(id(value))
            kind: type = type(value)
            if value is trainer or _is_part(kind):
                self._parts[path] = value
                waiting += ((f"{path}.{name}", child) for name, child in vars(value).items())
            elif len(found := _entries(value)) <= _ENTERED:
                waiting += ((f"{path}[{label!r}]", child) for label, child in found)
        self._spaces = [vars(part) for part in self._parts.values()]
        self._lengths: list[int] = []
        self._names: list[tuple[int, str]] = []

    def read(self) -> dict[tuple[int, str], Any]:
        """Returns the attributes that are none of Lightning's own, by part and name."""
        lengths = list(map(len, self._spaces))
        if lengths != self._lengths:
            self._find(lengths)
        try:
            return {key: self._spaces[key[0]][key[1]] for key in self._names}
        except KeyError:  # one has gone where another has come
            self._find(lengths)
            return {key: self._spaces[key[0]][key[1]] for key in self._names}

    def write(self, content: dict[tuple[int, str], Any]) -> None:
        """Puts back what :meth:`read` returned."""
        for i, name in self.read().keys() - content.keys():
            del self._spaces[i][name]
        for (i, name), value in content.items():
            self._spaces[i][name] = value

    def paths(self) -> set[str]:
        """Returns how the attributes that are none of Lightning's own are written."""
        return {self.path_of(key) for key in self.read()}

    def path_of(self, key: tuple[int, str]) -> str:
        """Returns how an attribute is written."""
        return f"{list(self._parts)[key[0]]}.{key[1]}"

    def plain(self) -> dict[str, Any]:
        """Returns all attributes that are numbers and such, Lightning's own included, by path."""
        return {
            f"{path}.{name}": value
            for path, part in self._parts.items()
            if not path.endswith("_signal_connector")  # signals may come at any time
            for name, value in vars(part).items()
            if issubclass(type(value), _PLAIN)
        }

    def _find(self, lengths: list[int]) -> None:
        known = set(self._names)
        kinds: list[type] = [type(part) for part in self._parts.values()]
        names = [
            (i, name)
            for i, (kind, space) in enumerate(zip(kinds, self._spaces, strict=True))
            for name in space.keys() - _named_by_lightning(kind)
            # The public ones of the trainer itself are held by a holder of their own.
            if i > 0 or name[:1] == "_"
        ]
        # Keys that were known stay the same objects.
        self._names = [key for key in self._names if key in set(names)]
        self._names += [key for key in names if key not in known]
        self._lengths = lengths


def logged_in(trainer: Any) -> list[dict[str, Any]]:
    """Returns the dictionaries behind ``callback_metrics`` and the like, to which steps may add."""
    spaces = vars(trainer._logger_connector)
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    return [spaces[name] for name in names if type(spaces.get(name)) is dict]


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """Returns what a list or dictionary holds; parts are in no others."""
    kind = kind_of(type(value))
    if kind is Kind.LIST:
        return list(enumerate(value))
    return list(dict.items(value)) if kind is Kind.DICT else []


@lru_cache(maxsize=4096)
def _is_part(cls: type) -> bool:
    """Whether the instances of a class are machinery of Lightning, or made upon it.

    Datamodules, loaders, modules and callbacks of the user's are held as such, and loggers are
    muted. Progress bars are left alone: threads draw them.
    """
    kinds = (Kind.ATOM, Kind.OBJECT, Kind.DICT, Kind.OPTIMIZER)
    is_machinery = kind_of(cls) in kinds and has_dict(cls)
    names = {base.__name__ for base in cls.__mro__}  # those of this package are atoms elsewhere
    is_other = issubclass(cls, enum.Enum) or not names.isdisjoint({"Logger", "ProgressBar"})
    is_own = "Callback" in names and not is_of_lightning(cls, itself=True)
    return is_machinery and is_of_lightning(cls) and not (is_other or is_own)


@lru_cache(maxsize=4096)
def _named_by_lightning(cls: type) -> frozenset[str]:
    """Returns the names in the code of those of a class and its bases that are Lightning's."""
    names: set[str] = set()
    for base in cls.__mro__:
        if is_of_lightning(base, itself=True):
            for member in vars(base).values():
                names.update(_names_in(member))
    return frozenset(names)


def _names_in(member: Any) -> tuple[str, ...]:
    if isinstance(member, property):
        accessors = (member.fget, member.fset)
        return tuple(name for f in accessors if f is not None for name in _names_in(f))
    function = getattr(member, "__wrapped__", getattr(member, "__func__", member))
    return names_in(function.__code__) if isinstance(function, FunctionType) else ()
