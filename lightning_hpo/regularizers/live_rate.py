"""Modules that pass a drop rate on as a number: the number follows a keep probability."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.regularizers.tunable_dropout import drop_rate


def follow_keep_probability(module: nn.Module, attribute: str, keep: Hyperparameter) -> None:
    """Makes an attribute of a module 1 − λ, whenever its code reads it.

    The module itself stays, with its parameters, its hooks and whoever refers to it; its class
    becomes a subclass of its own in which the attribute is a property. Copies and pickles of the
    module follow their own λ.

    Args:
        module: A module whose ``forward`` drops out at a rate that it keeps as a number.
        attribute: The name of that number.
        keep: The keep probability λ; it becomes a child of the module.
    """
    kind = type(module)
    followed = getattr(kind, "_hpo_followed", ())
    if followed:
        kind = kind.__mro__[2]
    del vars(module)[attribute]
    module.add_module(_child(attribute), keep)
    module.__class__ = _following(kind, (*followed, attribute))


def is_following(module: nn.Module) -> bool:
    """Whether an attribute of a module follows a keep probability already."""
    return isinstance(module, _Following)


class _Following:
    """Its copies and pickles are made from the class that the user knows."""

    _hpo_followed: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__mro__[2], self._hpo_followed), *reduced[2:]


def _blank(kind: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    following = _following(kind, attributes)
    return following.__new__(following)


_known: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _following(kind: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """Returns a subclass in which attributes are 1 − λ, always the same."""
    if (kind, attributes) in _known:
        return _known[kind, attributes]
    members: dict[str, Any] = {name: property(_reader(name)) for name in attributes}
    members |= {"_hpo_followed": attributes, "__module__": kind.__module__, "__doc__": kind.__doc__}
    made = _known[kind, attributes] = type(kind.__name__, (_Following, kind), members)
    return made


def _reader(attribute: str) -> Any:
    child = _child(attribute)

    def rate(module: nn.Module) -> float:
        return drop_rate(module._modules[child])  # type: ignore[arg-type]

    return rate


def _child(attribute: str) -> str:
    return f"keep_{attribute}"
