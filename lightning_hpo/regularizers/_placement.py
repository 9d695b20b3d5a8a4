"""Where hyperparameters and layers are put in a user's module."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

# Keywords that are looked for in register_*, and what to do instead.
LR_HINTS = dict.fromkeys(
    ("lr", "learning_rate"), "how fast λ moves is said once for all: OnlineHPOCallback(lr=2.0)"
)
INIT_HINTS = LR_HINTS | dict.fromkeys(
    ("strength", "value", "weight", "lam", "lambda_", "alpha", "sigma", "std", "coefficient"),
    "where the value starts is given as init=",
)


def check_free_name(caller: str, module: nn.Module, name: str) -> None:
    """Refuses a name that is taken, or is none.

    Raises:
        ValueError: In both cases, and before ``super().__init__()``.
    """
    if "_modules" not in vars(module):
        raise ValueError(
            f"{caller}: {type(module).__name__} is not there yet; call super().__init__() first, "
            f"then build the network, and then call {caller}"
        )
    if not name.isidentifier() or hasattr(module, name):
        raise ValueError(
            f"{caller}: name={name!r} is {'taken' if name.isidentifier() else 'no name'} in "
            f"{type(module).__name__}; expected an attribute name that is free"
        )


def find_modules(caller: str, module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Looks up modules by their dotted names.

    Raises:
        ValueError: If one does not exist; the closest names are listed.
    """
    known = dict(module.named_modules())
    for name in names:
        if name not in known or not name:
            raise ValueError(
                f"{caller}: {type(module).__name__} has no module {name!r}; {closest(name, known)}"
            )
    return [known[name] for name in names]


def closest(name: str, known: Iterable[str]) -> str:
    """Says which known names come closest to one that does not exist."""
    known = [k for k in known if k]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"the closest names are {close or known[:3]}"


def attach(module: nn.Module, path: str, child: nn.Module) -> None:
    """Registers a module under a dotted path, with plain modules in between."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if leaf in module._modules:
        # A container is already there: a layer that owns weights besides its sub-layers'.
        module, leaf = module.get_submodule(leaf), "own"
    module.add_module(leaf, child)
