"""Lightning comes as two packages with classes of their own; this package works with either.

``lightning.pytorch`` is a dependency. ``pytorch_lightning`` is never imported here: it counts where
the user, or a package of the user's, has imported it.
"""

from __future__ import annotations

import sys
from operator import attrgetter
from types import ModuleType
from typing import Any

import lightning.pytorch
from lightning.fabric.utilities import exceptions

_STANDALONE = "pytorch_lightning"


def packages() -> list[ModuleType]:
    """Lists those of the two packages that have been imported."""
    standalone = sys.modules.get(_STANDALONE)
    # While it is being imported itself, it has no classes yet.
    if standalone is None or not hasattr(standalone, "Trainer"):
        return [lightning.pytorch]
    return [lightning.pytorch, standalone]


def classes(path: str) -> tuple[type, ...]:
    """Returns a class of Lightning from each package, for ``isinstance`` and comparisons.

    Args:
        path: Where it stands in the package, such as ``"strategies.FSDPStrategy"``.
    """
    return tuple(attrgetter(path)(package) for package in packages())


def is_lightning_module(value: Any) -> bool:
    """Whether an object is a LightningModule of either package."""
    return isinstance(value, classes("LightningModule"))


def package_of(value: Any) -> ModuleType:
    """Returns the package that a trainer or a module comes from."""
    roots = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    return packages()[-1] if _STANDALONE in roots else lightning.pytorch


class MisconfigurationException(exceptions.MisconfigurationException):
    """That of Lightning; of both packages, where both have been imported."""


_TWINS: list[tuple[type, str]] = []


def join(kind: type, path: str) -> None:
    """Lets a class that derives from one of ``lightning.pytorch`` derive from its twin as well.

    A Trainer, LightningCLI and ``except`` ask for it. The twins keep no state, and what they do is
    the same. See :func:`join_again`.

    Args:
        kind: A class of this package.
        path: That of its base, as for :func:`classes`.
    """
    _TWINS.append((kind, path))
    join_again()


def join_again() -> None:
    """Does what :func:`join` does, if ``pytorch_lightning`` has been imported since."""
    for kind, path in _TWINS:
        for twin in classes(path):
            if not issubclass(kind, twin):
                kind.__bases__ = (*kind.__bases__, twin)


join(MisconfigurationException, "utilities.exceptions.MisconfigurationException")
