"""How objects show the arguments that they were made with."""

from __future__ import annotations

import inspect
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
