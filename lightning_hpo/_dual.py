"""Dual tensors of torch, without the warnings of their first use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.autograd import forward_ad


@contextmanager
def dual_level() -> Iterator[None]:
    """Opens a level of forward-mode AD."""
    _load_rules()
    with forward_ad.dual_level():
        yield


@cache
def _load_rules() -> None:
    """Lets torch load its rules now: it compiles them by ``torch.jit.script``, which warns."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
        one = torch.ones(())
        forward_ad.make_dual(one, one)
