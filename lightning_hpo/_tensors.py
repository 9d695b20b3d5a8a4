"""Lists of tensors: stacks of m directions, precision, memory, and values held for a while."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_hpo._hooks import emptied
from lightning_hpo.distributed import is_sharded, local


def stacked_zeros(like: Sequence[Tensor], m: int) -> list[Tensor]:
    """Returns zeros ``(m, *t.shape)`` per tensor t or its local slice, in float32 or better."""
    return [
        torch.zeros(
            (m, *t.shape), dtype=torch.promote_types(t.dtype, torch.float32), device=t.device
        )
        for t in map(local, like)
    ]


def widened(value: Any) -> Any:
    """Returns a tensor of half precision in float32, and anything else itself.

    Derivatives are not kept in half precision, in which small ones would be lost.
    """
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors, with zeros like others, or their slices, in the place of None."""
    return [
        torch.zeros_like(local(z)) if t is None else t for t, z in zip(tensors, like, strict=True)
    ]


def rows(stack: Tensor) -> Tensor:
    """Returns a stack of m tensors as a matrix of m rows, which may be empty."""
    return stack.reshape(len(stack), math.prod(stack.shape[1:]))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stacks m tensors; a single one is not copied."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


def is_on_host(tensor: Tensor) -> bool:
    """Whether a number can be read from a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def released(g: Tensor) -> Tensor:
    """Returns what a hook gives autograd to hold in the place of a gradient: a single zero."""
    return g.new_zeros(()).expand_as(g)


def add_scaled_(targets: Sequence[Tensor], values: Sequence[Tensor], factor: Tensor) -> None:
    """Adds ``factor`` (one number) times values to targets, in place; no device is waited for."""
    if not targets:
        return
    if is_on_host(factor):
        # In half precision the factor is not rounded.
        torch._foreach_add_(list(targets), list(values), alpha=float(factor))
    else:
        scale = factor.to(targets[0].dtype)
        torch._foreach_addcmul_(list(targets), list(values), [scale] * len(targets))


def separate(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[Tensor]:
    """Returns tensors that can be written to in place; copies those that share memory.

    Autograd may return one tensor as the gradient of several leaves, an expanded one, parts of one
    that overlap (the gradients of what was concatenated), or one of ``others`` that it was given.
    """
    seen = {t.untyped_storage().data_ptr() for t in others}
    result = []
    for t in tensors:
        storage = t.untyped_storage()
        is_part = t.numel() * t.element_size() != storage.nbytes()
        is_expanded = any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
        if t.numel() and (is_part or is_expanded or storage.data_ptr() in seen):
            t = t.clone(memory_format=torch.contiguous_format)
        seen.add(t.untyped_storage().data_ptr())
        result.append(t)
    return result


# Parameters of which a module keeps views, such as a transposed weight. Keys are weak references.
_VIEWED = WeakTensorKeyDictionary()


def note_views(bases: Iterable[Tensor]) -> None:
    """Notes parameters of which there are views, so that these see what :func:`holding` does."""
    for base in bases:
        _VIEWED[base] = None


# How often the storages of tensors have been exchanged, by their ``id``.
_EXCHANGES: dict[int, int] = {}


def exchanges_of(t: Tensor) -> int:
    """Returns a number that is another one as soon as :func:`holding` has exchanged a storage."""
    return _EXCHANGES.get(id(t), 0)


@contextmanager
def holding(tensors: Sequence[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Lets tensors hold other values for a while; afterwards they are bit for bit as before.

    The storages are exchanged: nothing is copied or rounded, and whatever refers to the tensors
    (modules, hooks, recurrent layers) sees the values. Sharded parameters refer to their storage in
    several places, and so do views; there values are copied into it, and the old ones put back by
    copy.
    """
    if is_sharded(tensors):
        slices = [local(t.detach()) for t in tensors]
        saved = [s.clone() for s in slices]
        try:
            for s, value in zip(slices, values, strict=True):
                s.copy_(value)
            yield
        finally:
            for s, value in zip(slices, saved, strict=True):
                s.copy_(value)
        return
    before = [t.data for t in tensors]
    viewed = {i: t.data.clone() for i, t in enumerate(tensors) if _VIEWED and t in _VIEWED}
    try:
        for i, (t, value) in enumerate(zip(tensors, values, strict=True)):
            if i in viewed:
                t.data.copy_(value)
            else:
                t.data = value.to(t.dtype)
            _EXCHANGES[id(t)] = exchanges_of(t) + 1
        yield
    finally:
        for i, (t, data) in enumerate(zip(tensors, before, strict=True)):
            t.data = data
            _EXCHANGES[id(t)] = exchanges_of(t) + 1
            if i in viewed:
                data.copy_(viewed[i])


def without_hooks(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Keeps the user's hooks on leaf tensors from what is no gradient of the training."""
    return emptied(t._backward_hooks for t in tensors if t._backward_hooks)
