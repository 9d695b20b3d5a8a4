"""Copies of batches, whatever their type, for replays that may write to them."""

from __future__ import annotations

import array
import copy
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_hpo._kinds import Kind, has_dict, kind_of, read_slots, write_slots
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.stores import read_objects, write_objects


def copy_batch(batch: Any) -> Any:
    """Copies a batch with all of its tensors, arrays and containers.

    What is shared within the batch is shared within the copy. Objects are copied by their own
    ``clone()``, where its tensors are new, else attribute by attribute, else with
    :func:`copy.deepcopy`.

    Raises:
        MisconfigurationException: If an object in it can be copied by none of these.
    """
    return _copied(batch, {}, {})


def _copied(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    kind = kind_of(type(value))
    if kind in _SHARED:
        return value
    if id(value) not in memo:
        # The original is kept, so that its id is not given to another object meanwhile.
        memo[id(value)] = value, _COPIERS.get(kind, _copy_object)(value, memo, memories)
    return memo[id(value)][1]


_SHARED = {
    *(Kind.ATOM, Kind.MODULE, Kind.SCRIPT, Kind.FUNCTION, Kind.METHOD, Kind.BUILTIN, Kind.PARTIAL),
    *(Kind.CELL, Kind.HOST, Kind.TRAINER, Kind.OPTIMIZER, Kind.WEAK),
}


class _Part(NamedTuple):
    """A stretch of a storage, in bytes, and the tensors that lie in it with their copies."""

    start: int
    end: int
    views: list[tuple[Tensor, Tensor]]


def _copy_tensor(value: Tensor, memo: dict[int, Any], memories: dict[int, Any]) -> Tensor:
    """Copies a tensor, and the attributes that have been set on it.

    One that overlaps with another lies in the same memory as its copy. Only what is covered by
    both is copied: batches may be slices of the whole data.
    """
    if value.is_nested or value.layout is not torch.strided:
        return value.detach().clone()
    memory = value.untyped_storage()
    start = int(value.storage_offset()) * value.element_size()
    steps = zip(value.size(), value.stride(), strict=True)
    last = int(sum((n - 1) * stride for n, stride in steps)) if value.numel() else -1
    new = _Part(start, start + (last + 1) * value.element_size(), [])
    # The storage is kept, so that its place is not given to another one meanwhile.
    _, parts = memories.setdefault(memory._cdata, (memory, []))
    shared = [part for part in parts if part.start < new.end and new.start < part.end]
    if shared:
        copied = torch.empty(0, dtype=value.dtype, device=value.device)
        if type(value) is not Tensor:
            copied = copied.as_subclass(type(value))
    else:
        copied = value.detach().clone()
    new.views.append((value, copied))
    if shared:
        parts[:] = [part for part in parts if not any(part is other for other in shared)]
        new = _joined([*shared, new], memory)
    parts.append(new)
    for name, item in vars(value).items():
        if name not in vars(copied):
            vars(copied)[name] = _copied(item, memo, memories)
    return copied.requires_grad_() if value.requires_grad else copied


def _joined(parts: list[_Part], memory: torch.UntypedStorage) -> _Part:
    """Lays the copies of tensors that overlap into one copy of their memory."""
    views = [pair for part in parts for pair in part.views]
    start = min(part.start for part in parts) // 16 * 16  # a multiple of each element's size
    end = max(part.end for part in parts)
    whole = torch.empty(0, dtype=torch.uint8, device=views[0][0].device)
    own = whole.set_(memory, start, (end - start,), (1,)).clone().untyped_storage()
    with torch.no_grad():
        for like, view in views:
            offset = like.storage_offset() - start // like.element_size()
            view.set_(own, offset, like.size(), like.stride())
    return _Part(start, end, views)


def _copy_array(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    """Copies an array, of objects too, or other memory that is written to in place."""
    if isinstance(value, np.ndarray):
        result = np.array(value, copy=True, subok=True)
        if value.dtype == object:
            memo[id(value)] = value, result
            write_objects(result, [_copied(item, memo, memories) for item in read_objects(value)])
        return result
    if isinstance(value, (bytearray, array.array)):
        return value[:]
    if isinstance(value, memoryview):
        if value.readonly:
            return value
        own: Any = memoryview(bytearray(value))
        return own.cast(value.format, value.shape)
    if isinstance(value, torch.UntypedStorage):
        return value.clone()
    return type(value).from_buffer_copy(value)


def _copy_generator(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return copy.deepcopy(value)


def _copy_tuple(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    items = [_copied(item, memo, memories) for item in value]
    kind = type(value)
    if kind in (tuple, frozenset):
        return kind(items)
    result = tuple.__new__(kind, items) if isinstance(value, tuple) else kind(items)
    if has_dict(kind):
        vars(result).update({n: _copied(v, memo, memories) for n, v in vars(value).items()})
    return result


def _copy_container(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    """Copies lists, dictionaries and sets; those of a class of their own with its attributes."""
    if not _is_standard(type(value)):
        return _copy_object(value, memo, memories)
    result = copy.copy(value)
    memo[id(value)] = value, result
    _copy_items(result, memo, memories)
    return result


def _is_standard(cls: type) -> bool:
    return cls.__module__ in ("builtins", "collections")


def _copy_items(result: Any, memo: dict[int, Any], memories: dict[int, Any]) -> None:
    """Puts copies in the place of what a container holds."""
    if isinstance(result, OrderedDict):
        for key in list(OrderedDict.keys(result)):
            OrderedDict.__setitem__(result, key, _copied(dict.get(result, key), memo, memories))
    elif isinstance(result, dict):
        for key, item in list(dict.items(result)):
            dict.__setitem__(result, key, _copied(item, memo, memories))
    elif isinstance(result, (list, deque)):
        base: Any = list if isinstance(result, list) else deque
        for i, item in enumerate(list(base.__iter__(result))):
            base.__setitem__(result, i, _copied(item, memo, memories))


def _copy_object(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    copiers = (
        _by_clone,
        lambda v: _by_attributes(v, memo, memories),
        lambda v: copy.deepcopy(v),
    )
    start = dict(memo)
    for copier in copiers:
        try:
            result = copier(value)
        except MisconfigurationException:
            raise
        except Exception:  # whatever the class raises: another way may do
            result = None
        if result is not None and _is_own(result, value):
            return result
        memo.clear()
        memo.update(start)
    if kind_of(type(value)) is Kind.ITERATOR:
        raise MisconfigurationException(
            f"The batch holds a {type(value).__name__}, which gives what it holds only once; "
            "replays of the step would take it from the training. Let collate_fn return a list or "
            "a tuple of all that it yields"
        )
    raise MisconfigurationException(
        f"The batch holds a {type(value).__name__}, of which no copy can be made that shares no "
        "tensors with it; replays of the step would write to the batch of the training. Give "
        f"{type(value).__name__} a clone() method that returns a copy with tensors of its own"
    )


def _by_clone(value: Any) -> Any:
    """Copies an object by the method that its class offers for that."""
    clone = getattr(type(value), "clone", None)
    result = value.clone() if callable(clone) else None
    return result if type(result) is type(value) and _names(result) == _names(value) else None


def _names(value: Any) -> set[Any]:
    own = set(vars(value)) if has_dict(type(value)) else set()
    return own | set(read_slots(value))


def _by_attributes(value: Any, memo: dict[int, Any], memories: dict[int, Any]) -> Any:
    """Copies an object, and then what its attributes, slots and entries hold."""
    if kind_of(type(value)) is Kind.ITERATOR:
        return None
    is_its_own = has_dict(type(value)) and vars(value) is value  # entries are attributes
    result = dict.__new__(type(value)) if is_its_own else copy.copy(value)
    if type(result) is not type(value) or result is value:
        return None
    memo[id(value)] = value, result
    if is_its_own:
        result.__dict__ = result
        dict.update(result, value)
    elif has_dict(type(value)):
        # As they are in the original: what a __copy__ has made of them may be half a copy.
        held = {name: _copied(item, memo, memories) for name, item in vars(value).items()}
        vars(result).clear()
        vars(result).update(held)
    slots = {m: _copied(item, memo, memories) for m, item in read_slots(value).items()}
    write_slots(result, slots)
    _copy_items(result, memo, memories)
    return result


def _is_own(result: Any, value: Any) -> bool:
    """Whether a copy shares no tensor, array or container with the original, and has as many."""
    ours, theirs = list(_memories(result)), list(_memories(value))
    return len(ours) == len(theirs) and not set(ours) & set(theirs)


def _memories(value: Any) -> Iterator[Any]:
    """Yields where tensors, arrays and containers that an object reaches lie in memory."""
    seen = {id(value)}
    stack = [value]
    while stack:
        value = stack.pop()
        kind = kind_of(type(value))
        children: list[Any] = []
        if kind is Kind.TENSOR:
            try:
                if value.numel():
                    yield value.untyped_storage().data_ptr()
            except (NotImplementedError, RuntimeError):
                yield id(value)
        elif kind is Kind.ARRAY:
            if not isinstance(value, np.ndarray):
                yield id(value)
            elif value.dtype == object:
                children += read_objects(value)
            elif value.size:
                yield value.__array_interface__["data"][0]
        elif kind not in _SHARED:
            if kind in (Kind.DICT, Kind.LIST, Kind.DEQUE, Kind.SET) and len(value):
                yield id(value)
            if kind is Kind.DICT:
                children += dict.values(value)
            elif kind in (Kind.LIST, Kind.DEQUE, Kind.TUPLE, Kind.SET):
                children += value
            if has_dict(type(value)):
                children += vars(value).values()
            children += read_slots(value).values()
        for child in children:
            if id(child) not in seen and kind_of(type(child)) not in _SHARED:
                seen.add(id(child))
                stack.append(child)


_COPIERS = {
    Kind.TENSOR: _copy_tensor,
    Kind.ARRAY: _copy_array,
    Kind.GENERATOR: _copy_generator,
    Kind.TUPLE: _copy_tuple,
    Kind.DICT: _copy_container,
    Kind.LIST: _copy_container,
    Kind.DEQUE: _copy_container,
    Kind.SET: _copy_container,
}
