"""Checks of arguments, whose errors say what was received and what was expected.

Each takes the name of the owner (the class or function whose arguments they are), what is expected,
and the arguments by their names.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NO_HINTS: Mapping[str, str] = MappingProxyType({})


def named_arguments(
    owner: str, hints: Mapping[str, str] = _NO_HINTS
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets the error for an unknown keyword name the argument that may have been meant.

    Args:
        owner: Whose arguments they are.
        hints: What to do instead, by keywords of the same meaning in other places.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known and name != "self":
                    raise TypeError(f"{owner} has no argument {name!r}: {_meant(name)}")
            return function(*args, **kwargs)

        def _meant(name: str) -> str:
            if name in hints:
                return hints[name]
            return did_you_mean(name, known) or f"it takes {', '.join(known)}"

        return checked

    return decorate


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Asks for the closest of the names that are known; empty where none is close."""
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def check_flag(owner: str, /, **flags: Any) -> None:
    """Checks that arguments are True or False.

    Raises:
        TypeError: If one is not a bool.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}: {name}={value!r}, expected True or False")


def check_integer(owner: str, least: int, unit: str = "", /, **numbers: Any) -> None:
    """Checks that arguments are integers.

    Args:
        owner: Whose arguments they are.
        least: The least value.
        unit: What ``least`` counts, for the message.
        **numbers: The arguments.

    Raises:
        TypeError: If one is no integer; a bool is none.
        ValueError: If one is less than ``least``.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{owner}: {name}={value!r} is a {type(value).__name__}, expected an integer"
            )
        if value < least:
            raise ValueError(f"{owner}: {name}={value}, expected at least {least} {unit}".rstrip())


def check_count(owner: str, expected: str = "a positive integer", /, **counts: Any) -> None:
    """Checks that arguments are positive integers.

    Args:
        owner: Whose arguments they are.
        expected: What they are, for the message.
        **counts: The arguments.

    Raises:
        ValueError: If one is no integer, or is not positive.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name}={value!r}, expected {expected}")


def check_number(
    owner: str, expected: str, holds: Callable[[Any], bool], /, **numbers: Any
) -> None:
    """Checks that arguments are numbers in some range.

    Args:
        owner: Whose arguments they are.
        expected: The range in words, for the message.
        holds: Whether a number lies in it; to be False for NaN.
        **numbers: The arguments.

    Raises:
        TypeError: If one is no real number; a bool is none.
        ValueError: If one lies outside the range.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{owner}: {name}={value!r}, expected a number")
        if not holds(value):
            raise ValueError(f"{owner}: {name}={value!r}, expected {expected}")


def check_choice(owner: str, options: Sequence[str], /, **values: Any) -> None:
    """Checks that arguments are among the options.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value not in options:
            raise ValueError(f"{owner}: {name}={value!r}, expected one of {options}")
