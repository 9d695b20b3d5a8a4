"""Dictionaries of hooks, as torch keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def emptied(dictionaries: Iterable[MutableMapping[Any, Any]]) -> Iterator[None]:
    """Takes hooks out of their dictionaries, which keep their identity, and puts them back."""
    kept = [(hooks, dict(hooks)) for hooks in dictionaries if hooks]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)
