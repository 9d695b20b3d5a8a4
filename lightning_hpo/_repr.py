"""How things are shown: objects by the arguments that they were made with, and a few of many."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


def shown(owner: Any, names: tuple[str, ...] | None = None) -> str:
    """Returns ``argument=value, ...``, of what the object keeps under an argument's own name.

    Args:
        owner: The object.
        names: The arguments to show. Default: all.
    """
    kept = vars(owner)
    parameters = inspect.signature(type(owner).__init__).parameters
    return ", ".join(
        f"{name}={kept[name]!r}"
        for name in parameters
        if name in kept and (names is None or name in names)
    )


def briefly(owner: Any) -> str:
    """Returns how an object is made, with what differs from the defaults, and numbers rounded."""
    kept = vars(owner)
    parts = []
    for name, parameter in inspect.signature(type(owner).__init__).parameters.items():
        value = kept.get(name, parameter.default)
        if name == "self" or value == parameter.default:
            continue
        if type(value).__module__.startswith("lightning_hpo"):
            parts.append(f"{name}={briefly(value)}")
        else:
            parts.append(f"{name}={value:.4g}" if type(value) is float else f"{name}={value!r}")
    return f"{type(owner).__name__}({', '.join(parts)})"


def listed(parts: Sequence[str], most: int) -> str:
    """Returns the first of some names, and how many more there are."""
    more = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {more} more" if more > 0 else "")


def counted(n: int, noun: str) -> str:
    """Returns a number with its noun, as in ``'1 step'`` and ``'10 000 steps'``."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}".replace(",", " ")
