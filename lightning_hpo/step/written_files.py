"""Which files the user's code opens to write to them, while somebody looks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from lightning_hpo.private_state import is_library

# What these write is a cache of theirs, and no matter of the step that they were called by.
_CACHING = ("_dynamo", "_inductor", "triton", "importlib")

_looking: list[tuple[int, list[str]]] = []


@contextmanager
def files_written() -> Iterator[list[str]]:
    """Gives a list to which the files are added that this thread opens to write to them."""
    _install()
    _looking.append((threading.get_ident(), []))
    save = torch.save

    def noted(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(f, (str, os.PathLike)):  # opened in C, of which Python is not told
            _looking[-1][1].append(os.fspath(f))
        save(obj, f, *args, **kwargs)

    torch.save = noted
    try:
        yield _looking[-1][1]
    finally:
        torch.save = save
        _looking.pop()


@lru_cache(maxsize=1)
def _install() -> None:
    """Has Python tell of opened files; that cannot be taken back, and is ignored afterwards."""
    sys.addaudithook(_note)


def _note(event: str, args: Any) -> None:
    if not _looking or event != "open" or threading.get_ident() != _looking[-1][0]:
        return
    path, _, flags = args
    if isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR) and _is_called_by_user():
        _looking[-1][1].append(path)


def _is_called_by_user() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and is_library(frame.f_code.co_filename):
        if any(name in frame.f_code.co_filename for name in _CACHING):
            return False
        frame = frame.f_back
    return frame is not None and "lightning_hpo" not in frame.f_globals.get("__name__", "")
