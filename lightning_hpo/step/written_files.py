"""Which files the user's code opens to write to them, while somebody looks."""

from __future__ import annotations

import builtins
import io
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from lightning_hpo.private_state import is_library

# What these write is a cache of theirs, and no matter of the step that they were called by.
_CACHING = ("_dynamo", "_inductor", "triton", "importlib")

# Before Python 3.11 pathlib keeps a reference of its own.
_PATHLIB = getattr(pathlib, "_NormalAccessor", io)


@contextmanager
def files_written() -> Iterator[list[str]]:
    """Gives a list to which the files are added that this thread opens to write to them.

    The functions that open files are replaced for a while. An audit hook would see more, but cannot
    be taken back: it makes every ``id()`` of the process several times as slow for good.
    """
    files: list[str] = []
    thread = threading.get_ident()

    def opened(real: Any, *args: Any, **kwargs: Any) -> Any:
        path: Any = args[0] if args else kwargs.get("file", kwargs.get("path"))
        how = args[1] if len(args) > 1 else kwargs.get("mode", kwargs.get("flags"))
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        is_here = isinstance(path, str) and threading.get_ident() == thread
        if is_here and _writes(how) and _is_called_by_user():
            files.append(path)
        return real(*args, **kwargs)

    def saved(real: Any, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(f, (str, os.PathLike)):  # opened in C
            files.append(os.fspath(f))
        real(obj, f, *args, **kwargs)

    with ExitStack() as stack:
        for owner in dict.fromkeys((builtins, io, os, _PATHLIB)):
            stack.enter_context(_replaced(owner, "open", opened))
        stack.enter_context(_replaced(torch, "save", saved))
        yield files


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Puts a function in the place of another one, which it is given as its first argument."""
    real = getattr(owner, name)
    setattr(owner, name, partial(function, real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def _writes(how: Any) -> bool:
    if isinstance(how, int):
        return bool(how & (os.O_WRONLY | os.O_RDWR))
    return isinstance(how, str) and not set("wax+").isdisjoint(how)


def _is_called_by_user() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and is_library(frame.f_code.co_filename):
        if any(name in frame.f_code.co_filename for name in _CACHING):
            return False
        frame = frame.f_back
    return frame is not None and "lightning_hpo" not in frame.f_globals.get("__name__", "")
