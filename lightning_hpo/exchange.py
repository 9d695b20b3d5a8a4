"""What a step may change: remembered, exchanged for copies, put back.

Objects keep their identity; what they hold is exchanged. So whoever shares an object with the
module (a hook, a closure, a bound method) sees at any time what the module sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpo._kinds import Kind, kind_of
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._tensors import exchanges_of
from lightning_hpo.contents import Reached, Walker, is_computed
from lightning_hpo.holders import (
    MODULE,
    MODULE_INTERNALS,
    SET,
    Guard,
    Held,
    copy_iterator,
    cut,
    read_generator,
    write_generator,
)
from lightning_hpo.stores import read_store, write_store

# Above this many elements, copies of a tensor that has not changed are shared between moments.
_SHARED_ELEMENTS = 10_000


def copies_of(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Copies tensors, without their graphs; what shares memory still does so in the copies."""
    by_storage: dict[Any, list[int]] = {}
    for key, t in tensors.items():
        by_storage.setdefault(_place(t), []).append(key)
    copies = {}
    for keys in by_storage.values():
        if len(keys) == 1:
            copies[keys[0]] = tensors[keys[0]].detach().clone()
            continue
        memory = tensors[keys[0]].untyped_storage().clone()
        for key in keys:
            t = tensors[key]
            view = torch.empty(0, dtype=t.dtype, device=t.device)
            copies[key] = view.set_(memory, t.storage_offset(), t.size(), t.stride())
    return copies


def views_of(swaps: Mapping[int, Tensor], tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Returns what takes the place of views of exchanged tensors: the same views of the others.

    Args:
        swaps: What takes the place of tensors, by ``id``.
        tensors: These, and what may be views of them, by ``id``.
    """
    if not swaps:
        return {}
    places = {key: _place(t) for key, t in tensors.items()}
    owners: dict[Any, list[int]] = {}
    for key in swaps.keys() & places.keys():
        owners.setdefault(places[key], []).append(key)
    found = {}
    for key, t in tensors.items():
        if key in swaps or not t.numel():
            continue
        last = sum((n - 1) * stride for n, stride in zip(t.size(), t.stride(), strict=True))
        for owner in owners.get(places[key], ()):
            offset = t.storage_offset() - tensors[owner].storage_offset()
            is_within = offset >= 0 and offset + last < tensors[owner].numel()
            if is_within and tensors[owner].is_contiguous():
                found[key] = swaps[owner].as_strided(t.size(), t.stride(), offset)
    return found


def _place(t: Tensor) -> Any:
    """Returns what is the same for tensors that share memory."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse
        return id(t)


@dataclass
class ModuleState:
    """What a module, and all that it reaches, held at an earlier moment; by ``id``.

    Attributes:
        held: Containers, and what they held.
        empty: Dictionaries and sets of modules in which there was nothing.
        tuples: Tuples.
        methods: Methods, written in C, of iterators.
        tensors: Tensors that a step may write to.
        values: What these held, and the arrays, generators and iterators.
        gradients: Gradients of leaves that no optimizer moves.
        others: The arrays, generators and iterators.
        context: Variables of the context (``contextvars``).
    """

    held: dict[int, Held] = field(default_factory=dict)
    empty: list[Any] = field(default_factory=list)
    tuples: dict[int, Any] = field(default_factory=dict)
    methods: dict[int, Any] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    gradients: dict[int, Tensor | None] = field(default_factory=dict)
    others: dict[int, Any] = field(default_factory=dict)
    context: Context | None = None


def remember(
    reached: Reached, tensors: Mapping[int, Tensor], previous: ModuleState | None = None
) -> ModuleState:
    """Copies what has been reached, for a later replay.

    Args:
        reached: What a walk has come by.
        tensors: Those of the tensors that a step may write to.
        previous: What was remembered at the moment before. Large tensors that have not changed
            since are shared with it, so that a long window holds them once.
    """
    values: dict[int, Any] = {}
    if previous is not None:
        for key, t in tensors.items():
            earlier = previous.values[key] if previous.tensors.get(key) is t else None
            # Versions would not tell: BatchNorm and ``.data`` write without counting.
            if earlier is not None and t.numel() > _SHARED_ELEMENTS and torch.equal(t, earlier):
                values[key] = earlier
    values |= copies_of({key: t for key, t in tensors.items() if key not in values})
    values |= {key: read_store(array) for key, array in reached.arrays.items()}
    values |= {key: read_generator(value) for key, value in reached.generators.items()}
    memo: dict[int, Any] = {}
    values |= {key: copy_iterator(value, memo) for key, value in reached.iterators.items()}
    return ModuleState(
        held={key: _without_graphs(held) for key, held in reached.held.items()},
        empty=reached.empty,
        tuples=reached.tuples,
        methods=reached.methods,
        tensors=dict(tensors),
        values=values,
        others={**reached.arrays, **reached.generators, **reached.iterators},
        context=copy_context(),
    )


def _without_graphs(held: Held) -> Held:
    """What an earlier step has computed is a number; its graph is let go of."""
    values = held.holder.values(held.content)
    if not any(_has_graph(v) for v in values):
        return held
    return held._replace(content=_replaced(held, _detached))


def _detached(value: Any) -> Any:
    return value.detach() if _has_graph(value) else value


def _has_graph(value: Any) -> bool:
    """Whether a value is a tensor that was computed, and no mere view of a parameter."""
    # By its type: a weak proxy may stand for what is gone.
    if not issubclass(type(value), Tensor) or not is_computed(value):
        return False
    return value._base is None or not value._base.is_leaf


def _replaced(held: Held, change: Callable[[Any], Any]) -> Any:
    content = held.content
    if isinstance(content, dict):
        return {key: change(value) for key, value in content.items()}
    return type(content)(map(change, content))


@contextmanager
def exchanged(
    walker: Walker,
    reached: Reached,
    tensors: Mapping[int, Tensor],
    state: ModuleState | None,
    swaps: Mapping[int, Tensor],
) -> Iterator[None]:
    """Lets all that has been reached hold copies, and puts back afterwards what it held.

    Args:
        walker: What has walked.
        reached: What it has come by.
        tensors: Those of the tensors that a step may write to.
        state: What is to be held instead. Default: copies of the present.
        swaps: What takes the place of tensors wherever a container holds them, by ``id``.

    Raises:
        MisconfigurationException: If something has been changed that cannot be put back.
    """
    state = state or ModuleState()
    held = reached.held | {
        key: Held(owner, holder, holder.read(owner))
        for key, (owner, holder, _) in state.held.items()
        if key not in reached.held
    }
    # What is trained by now holds what the caller has put there.
    earlier = {k: t for k, t in state.tensors.items() if k not in reached.parameters}
    every = {**tensors, **earlier}
    before: dict[int, Any] = {key: t.data for key, t in every.items()}
    exchanges = {key: exchanges_of(t) for key, t in every.items()}
    flags = [(t, t.requires_grad) for t in every.values() if not is_computed(t)]
    flags += [(p, p.requires_grad) for key, p in reached.parameters.items() if key not in every]
    arrays = reached.arrays | {
        k: a for k, a in state.others.items() if kind_of(type(a)) is Kind.ARRAY
    }
    generators = reached.generators | {
        k: g for k, g in state.others.items() if kind_of(type(g)) is Kind.GENERATOR
    }
    before |= {key: read_store(array) for key, array in arrays.items()}
    before |= {key: read_generator(value) for key, value in generators.items()}
    sources = {key: state.values.get(key, before[key]) for key in every}
    refused: list[MisconfigurationException] = []
    substitutes = {**swaps, **_stand_ins(walker, reached, state, refused)}
    versions = [
        (t, t._version)
        for key, t in reached.watched.items()
        if key not in before and isinstance(t, Tensor)
    ]
    unchanged: set[int] = set()
    try:
        for key, value in copies_of(sources).items():
            every[key].data = value
        for key, array in arrays.items():
            if key in state.values:
                write_store(array, state.values[key])
        for key, generator in generators.items():
            if key in state.values:
                write_generator(generator, state.values[key])
        _fill(reached, state, substitutes)
        with _raising(refused):
            yield
        if walker.must_judge(reached):  # what an earlier content was put into is put back
            unchanged = walker.judge(reached, before) - state.held.keys()
    finally:
        for key, (owner, holder, content) in held.items():
            if key not in unchanged:
                holder.write(owner, content)
        for filled in filter(None, reached.empty):
            if id(filled) not in held:
                filled.clear()
        for key, t in every.items():
            # What a difference has displaced meanwhile holds again what it held before that.
            if exchanges_of(t) == exchanges[key]:
                t.data = before[key]
        for t, requires_grad in flags:
            if not t.is_leaf:  # written to in place, by what has a graph
                t.detach_()
            if t.requires_grad != requires_grad:
                t.requires_grad_(requires_grad)
        for key, array in arrays.items():
            write_store(array, before[key])
        for key, generator in generators.items():
            write_generator(generator, before[key])
    for owner, holder, length in reached.lengths.values():
        if len(owner) != length and not cut(owner, holder, length):
            raise MisconfigurationException(
                f"A replay of the step took away from {walker.name_of(owner)}, a container of "
                f"{length} entries that steps had only read or added to, which cannot be undone; "
                "keep it in a collections.deque, or change it in on_train_batch_end"
            )
    for t, version in versions:
        if t._version != version:
            raise MisconfigurationException(
                f"A replay of the step wrote to {walker.name_of(t)}, a tensor of shape "
                f"{tuple(t.shape)}, in place, which cannot be undone; register it as a "
                "buffer, or write to it in on_train_batch_end"
            )


def _substituted(substitutes: Mapping[int, Any], value: Any) -> Any:
    """Returns what takes the place of a value, tuples rebuilt."""
    # No closure that calls itself: it would be a cycle, which keeps what it holds alive.
    if id(value) in substitutes:
        return substitutes[id(value)]
    if kind_of(type(value)) is Kind.TUPLE and type(value) is not frozenset:
        items = [_substituted(substitutes, item) for item in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return value


def _fill(reached: Reached, state: ModuleState, substitutes: dict[int, Any]) -> None:
    """Puts an earlier content into containers, and substitutes into all of them."""
    substituted = partial(_substituted, substitutes)
    for method in [*reached.methods.values(), *state.methods.values()]:
        if (owner := substitutes.get(id(method.__self__))) is not None:
            substitutes[id(method)] = getattr(owner, method.__name__)
    if substitutes:
        for value in [*reached.tuples.values(), *state.tuples.values()]:
            if (other := substituted(value)) is not value:
                substitutes[id(value)] = other
    for key, present in (state.held | reached.held).items():
        earlier = state.held.get(key)
        content = present.content
        if earlier is not None:
            content = earlier.content
            if present.holder is MODULE:
                own = {n: v for n, v in content.items() if n not in MODULE_INTERNALS}
                now = present.holder.read(present.owner)
                content = {n: v for n, v in now.items() if n in MODULE_INTERNALS} | own
        may_exchange = earlier is not None or key in reached.exchanging
        if substitutes and may_exchange and present.holder is not SET:
            values = present.holder.values(content)
            if not substitutes.keys().isdisjoint(map(id, values)):
                content = _replaced(present._replace(content=content), substituted)
        if earlier is not None or content is not present.content:
            present.holder.write(present.owner, content)
    for filled in filter(None, state.empty):
        if id(filled) not in state.held:
            filled.clear()


@contextmanager
def _raising(refused: list[MisconfigurationException]) -> Iterator[None]:
    """Raises what has been raised inside, also where the step takes it for an iterator's end."""
    try:
        yield
    except Exception as error:
        if refused and error is not refused[0]:
            raise refused[0] from error
        raise
    if refused:
        raise refused[0]


def refusal(walker: Walker, iterator: Any) -> MisconfigurationException:
    """Returns the error for an iterator that a step advances and that cannot be put back."""
    return MisconfigurationException(
        f"training_step or validation_step advances {walker.name_of(iterator)}, a "
        f"{type(iterator).__name__}, which a replay cannot put back. Draw from it in "
        "on_train_batch_start and keep what was drawn as an attribute, or put a class with "
        "__next__ in its place that counts its position in an attribute"
    )


def _stand_ins(
    walker: Walker,
    reached: Reached,
    state: ModuleState,
    refused: list[MisconfigurationException],
) -> dict[int, Any]:
    """Returns what takes the place of iterators: copies, or what refuses to be advanced."""

    def refuse(iterator: Any) -> None:
        refused.append(refusal(walker, iterator))
        raise refused[-1]

    found = {}
    memo: dict[int, Any] = {}
    iterators = reached.iterators | {
        key: value for key, value in state.others.items() if kind_of(type(value)) is Kind.ITERATOR
    }
    for key, value in iterators.items():
        copied = copy_iterator(state.values.get(key, value), memo)
        found[key] = Guard(value, refuse) if copied is None else copied
    return found


# ------------------------------------------------------------------------- for checkpoints


def _held_then(state: ModuleState, value: Any) -> Any:
    """Returns what a container held at an earlier moment."""
    return state.held[id(value)].content if id(value) in state.held else value


def _resolved(state: ModuleState, value: Any) -> Any:
    """Returns a value as it was at an earlier moment, containers and all."""
    kind = type(value)
    if isinstance(value, Tensor):
        return state.values.get(id(value), value)
    if kind in (list, tuple):
        return kind(_resolved(state, item) for item in _held_then(state, value))
    if kind in (dict, OrderedDict):
        then = _held_then(state, value).items()
        return kind({key: _resolved(state, item) for key, item in then})
    return value


def pack_state(module: nn.Module, state: ModuleState) -> dict[str, list[dict[str, Any]]]:
    """Returns the tensors and the own attributes of each module at an earlier moment, by name."""
    packed = {}
    for name, m in module.named_modules():
        if id(vars(m)) not in state.held:
            continue
        content = state.held[id(vars(m))].content
        parameters = _held_then(state, content["_parameters"]).items()
        tensors = {
            n: _resolved(state, b) for n, b in _held_then(state, content["_buffers"]).items()
        }
        tensors |= {n: state.values[id(p)] for n, p in parameters if id(p) in state.values}
        own = {n: _resolved(state, v) for n, v in content.items() if n not in MODULE_INTERNALS}
        packed[name] = [tensors, own]
    return packed


def place_state(module: nn.Module, packed: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Puts what :func:`pack_state` returned in the place of the present; under a shield."""
    modules = dict(module.named_modules())
    for name, (tensors, attributes) in packed.items():
        m = modules.get(name)
        if m is None:
            continue
        for key in [key for key in m._buffers if key not in tensors]:
            del m._buffers[key]
        for key, value in tensors.items():
            present = m._parameters.get(key, m._buffers.get(key))
            if isinstance(present, Tensor) and isinstance(value, Tensor):
                present.data = value
            elif key not in m._parameters:
                m._buffers[key] = value
        m.__dict__.update(attributes)
