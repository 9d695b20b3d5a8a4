"""Mixins for a module that already exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any

from torch import nn

from lightning_hpo._lightning import MisconfigurationException, is_lightning_module
from lightning_hpo.regularizers._mixin import RegularizerMixin


def with_mixins(module: nn.Module, *mixins: type[RegularizerMixin]) -> Any:
    """Adds mixins to a LightningModule that something else has built.

    That is for packages which make the module themselves: where the package lets you at it, after
    it has been built and before ``Trainer.fit`` (in gluonts, an override of
    ``create_lightning_module``).

    The module becomes an instance of a class made of the mixins and its own; it keeps parameters,
    name and behaviour, and may be copied and pickled. ``load_from_checkpoint`` of its class makes a
    module without them: build the module anew, add the mixins, and load the state_dict.

    Args:
        module: A LightningModule of either package; changed in place.
        *mixins: Mixins of this package, or of your own that derive from one.

    Returns:
        The same module.

    Raises:
        TypeError: If one is no such mixin, or ``module`` is no LightningModule.
        MisconfigurationException: If the class of the module has no subclasses, or asks for
            arguments to make one.

    Example:
        >>> module = with_mixins(LitModel(), L2Mixin)
        >>> module.register_l2(init=1e-4)
        >>> type(module).__name__, list(named_hyperparameters(module))
        ('LitModel', ['l2'])
    """
    if not is_lightning_module(module):
        raise TypeError(
            f"with_mixins: module={module!r} is a {type(module).__name__}, expected a "
            "LightningModule that has been built"
        )
    for mixin in mixins:
        if not (isinstance(mixin, type) and issubclass(mixin, RegularizerMixin)):
            raise TypeError(
                f"with_mixins: {mixin!r}, expected a mixin of lightning_hpo, for example L2Mixin"
            )
    added = tuple(mixin for mixin in mixins if not isinstance(module, mixin))
    if added:
        own: Any = type(module)
        base, known = vars(own).get("_made_of", (own, ()))
        try:
            module.__class__ = _mixed(base, (*added, *known))
        except Exception as error:  # whatever the class, or its metaclass, has against it
            names = ", ".join(mixin.__name__ for mixin in added)
            raise MisconfigurationException(
                f"with_mixins: no class can be made of {names} and {base.__name__}, the class of "
                f"the module ({type(error).__name__}: {error}). Write it yourself, with what "
                f"{base.__name__} asks of subclasses, as in class Tuned({names}, {base.__name__}, "
                "keyword=...), and build the module from that; if it allows none, build it inside "
                f"of a class of your own, class Tuned({names}, LightningModule), whose steps call "
                "those of the module"
            ) from error
    return module


@cache
def _mixed(base: type, mixins: tuple[type, ...]) -> Any:
    """Makes a class of mixins and the class of a module, under the name of the latter."""
    kind: Any = None

    def reduce(self: Any, protocol: Any) -> Any:
        made = super(kind, self).__reduce_ex__(protocol)
        if type(self) is not kind or isinstance(made, str) or made[1][:1] != (kind,):
            return made
        # Nobody can import the class by its name: it is made again.
        function, arguments, *rest = made
        return (_revive, (function, base, mixins, *arguments[1:]), *rest)

    own = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_made_of": (base, mixins),
    }
    kind = new_class(base.__name__, (*mixins, base), exec_body=lambda space: space.update(own))
    return kind


def _revive(function: Callable[..., Any], base: type, mixins: tuple[type, ...], *rest: Any) -> Any:
    return function(_mixed(base, mixins), *rest)
