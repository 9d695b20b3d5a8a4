"""Copies of batches, whatever their type, for replays that may write to them."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hpo._kinds import Kind, has_dict, kind_of, read_slots, write_slots
from lightning_hpo._lightning import MisconfigurationException


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
    *(Kind.ATOM, Kind.MODULE, Kind.SCRIPT, Kind.FUNCTION, Kind.METHOD, Kind.PARTIAL, Kind.CELL),
    *(Kind.HOST, Kind.TRAINER, Kind.WEAK),
}


def _copy_tensor(value: Tensor, memo: dict[int, Any], memories: dict[int, Any]) -> Tensor:
    """Copies a tensor; one that lies in the memory of another lies in that of its copy."""
    try:
        memory = value.untyped_storage()
        place = memory._cdata
    except (NotImplementedError, RuntimeError):  # sparse
        return value.clone()
    if place not in memories:
        memories[place] = memory, [], None
    _, views, own = memories[place]
    if not views:
        copied = value.detach().clone()
        views.append((value, copied))
    else:
        if own is None:
            own = memory.clone()
            memories[place] = memory, views, own
            _lay(views[0][1], own, views[0][0])
        copied = _lay(torch.empty(0, dtype=value.dtype, device=value.device), own, value)
    return copied.requires_grad_() if value.requires_grad else copied


def _lay(view: Tensor, memory: torch.UntypedStorage, like: Tensor) -> Tensor:
    with torch.no_grad():
        return view.set_(memory, like.storage_offset(), like.size(), like.stride())


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
    result = copy.copy(value)
    if type(result) is not type(value) or result is value:
        return None
    memo[id(value)] = value, result
    if has_dict(type(value)):
        # As they are in the original: what a __copy__ has made of them may be half a copy.
        held = {name: _copied(item, memo, memories) for name, item in vars(value).items()}
        vars(result).clear()
        vars(result).update(held)
    slots = {m: _copied(item, memo, memories) for m, item in read_slots(value).items()}
    write_slots(result, slots)
    _copy_items(result, memo, memories)
    return result


def _is_own(result: Any, value: Any) -> bool:
    """Whether a copy shares no tensor or array with the original, and has as many of them."""
    ours, theirs = list(_memories(result)), list(_memories(value))
    return len(ours) == len(theirs) and not set(ours) & set(theirs)


def _memories(value: Any) -> Iterator[Any]:
    """Yields where the tensors and arrays that an object reaches lie in memory."""
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
            if value.size:
                yield value.__array_interface__["data"][0]
        elif kind not in _SHARED:
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
    Kind.ARRAY: lambda value, *_: np.array(value, copy=True, subok=True),
    Kind.GENERATOR: _copy_generator,
    Kind.TUPLE: _copy_tuple,
    Kind.DICT: _copy_container,
    Kind.LIST: _copy_container,
    Kind.DEQUE: _copy_container,
    Kind.SET: _copy_container,
}
