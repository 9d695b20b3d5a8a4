"""Caches of functions: a replay may fill them, and leaves them as they were where that is known."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_hpo.outside import Outside
from lightning_hpo.private_state import names_in

_DRAWS = frozenset(
    {
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
        *("normal", "normal_", "uniform", "uniform_", "bernoulli", "bernoulli_", "multinomial"),
        *("random", "random_", "standard_normal", "choice", "choices", "sample", "shuffle"),
        *("permutation", "integers", "gauss", "dropout"),
    }
)


class Caches:
    """Functions with a ``functools.cache`` that the steps of a module may call.

    A cache that a replay fills is emptied where it was empty before: what is drawn at the first
    call is then drawn by the training. Single entries cannot be taken out; where a function that
    draws random numbers gets more of them, there is a warning.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._found: list[Any] | None = None
        self._told: set[str] = set()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Lets a replay fill caches."""
        if self._found is None:
            self._found = Outside(self._module).caches
        before = [function.cache_info() for function in self._found]
        try:
            yield
        finally:
            for function, info in zip(self._found, before, strict=True):
                if function.cache_info().misses != info.misses:
                    self._undo(function, was_empty=info.currsize == 0)

    def _undo(self, function: Any, *, was_empty: bool) -> None:
        if was_empty:
            function.cache_clear()
            return
        name = function.__qualname__
        code = getattr(function.__wrapped__, "__code__", None)
        if code is None or name in self._told or _DRAWS.isdisjoint(names_in(code)):
            return
        self._told.add(name)
        warnings.warn(
            f"OnlineHPOCallback: replays of training_step or validation_step fill the cache of "
            f"{name!r}, which draws random numbers. The training takes from the cache what it "
            "would have drawn, so that it is another one than without the callback. Draw in "
            "__init__ or on_fit_start, or keep what is drawn in a dictionary of the module",
            stacklevel=2,
        )
