"""Memory that is written to in place: arrays, buffers of bytes, storages, numbers of ctypes."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import numpy as np
import torch


def is_writable(value: Any) -> bool:
    """Whether anything can be written to such an object, and put back."""
    if isinstance(value, np.ndarray):
        return bool(value.flags.writeable)
    if isinstance(value, memoryview):
        try:
            return not value.readonly and value.c_contiguous and value.nbytes > 0
        except ValueError:  # released
            return False
    return True


def size_of(value: Any) -> int:
    """Returns the number of its elements, or bytes."""
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, (memoryview, torch.UntypedStorage)):
        return value.nbytes if isinstance(value, memoryview) else value.nbytes()
    return len(value) if isinstance(value, (bytearray, array.array)) else ctypes.sizeof(value)


def read_store(value: Any) -> Any:
    """Returns a copy of what is there."""
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray).copy()
    if isinstance(value, torch.UntypedStorage):
        return value.clone()
    if isinstance(value, (bytearray, array.array)):
        return value[:]
    if isinstance(value, memoryview):
        return value.tobytes()
    return ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value))


def write_store(value: Any, content: Any) -> None:
    """Puts back what :func:`read_store` returned."""
    if isinstance(value, np.ndarray):
        np.copyto(value.view(np.ndarray), content)
    elif isinstance(value, torch.UntypedStorage):
        value.copy_(content)
    elif isinstance(value, (bytearray, array.array)):
        value[:] = content
    elif isinstance(value, memoryview):
        value.cast("B")[:] = content
    else:
        ctypes.memmove(ctypes.addressof(value), content, len(content))


def is_same_store(value: Any, content: Any) -> bool:
    """Whether what is there is what :func:`read_store` returned."""
    if isinstance(value, np.ndarray):
        return np.array_equal(value.view(np.ndarray), content)
    if isinstance(value, torch.UntypedStorage):
        return bytes(value) == bytes(content)
    return bool(read_store(value) == content)


def read_objects(value: Any) -> list[Any]:
    """Returns the objects that an array of objects holds."""
    return list(value.view(np.ndarray).flat)


def write_objects(value: Any, content: list[Any]) -> None:
    """Puts back what :func:`read_objects` returned."""
    flat = value.view(np.ndarray).flat
    for i, item in enumerate(content):
        flat[i] = item
