"""Whether replays, trials and held-out batches have left a trace that nothing has put back."""

from __future__ import annotations

import io
import itertools
import mmap
import operator
import os
import queue
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_hpo._kinds import Kind, classes_of, kind_of
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo._repr import listed
from lightning_hpo.contents import DATA, Walker
from lightning_hpo.distributed import is_sharded, reshard
from lightning_hpo.holders import Held, read_generator
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.outside import Outside, Variable, entries_of
from lightning_hpo.parts import TrainerParts
from lightning_hpo.private_state import is_library
from lightning_hpo.rng import RandomState
from lightning_hpo.step.written_files import files_written
from lightning_hpo.stores import is_writable

# Looks at each place: the first two steps, and one that comes this many steps later.
_FIRST = 2
_LATER = 100

# What is found, by the first part of its name: how it is called, and what to do about it.
_REMEDIES = {
    "batch": (
        "the batch that the training gets",
        "Let steps write to the batch that they are given, or to a copy, and not to one that was "
        "kept elsewhere",
    ),
    "module": (
        "what the module holds",
        "Keep what steps change in tensors, numbers, lists, dictionaries and plain objects of the "
        "module, or change it in on_train_batch_end",
    ),
    "gradients": (
        "gradients of the training",
        "Change them in on_before_optimizer_step",
    ),
    "trainer": (
        "parts of the trainer",
        "Keep what steps change as attributes of the module, or change it in on_train_batch_end",
    ),
    "optimizer": (
        "the optimizer's state",
        "Change it in on_before_optimizer_step or on_train_batch_end",
    ),
    "lr_schedulers": (
        "learning rate schedulers",
        "Step them in on_train_batch_end, or let Lightning do so",
    ),
    "random": (
        "random states",
        "Draw within the step itself, and not in finalizers, threads or the clone() of a batch, or "
        "from a generator of your own that is an attribute of the module",
    ),
}

# Words in a row of the table that they are summed in.
_COLUMNS = 1024
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What is written to these has left the training.
_SHARED = (io.IOBase, queue.Queue, queue.SimpleQueue)
_PLAIN = (int, float, complex, str, bytes, type, type(None))
_NOTHING = object()
# Attributes that the package itself keeps, and changes where a strength gets its value.
_OWN = ("_hpo_record", "_is_resolved", "is_initial")


class TraceCheck:
    """Compares what is there before and after replays and held-out batches, by name.

    What a step changes is put back by the shield, wherever it knows how. This looks at the result:
    at what the module and the batch hold, at the optimizer's state, gradients, schedulers and
    random states, and at the variables outside of the module that its methods name. It looks at the
    first two steps, and at a later one; in between it costs nothing.
    Nothing is copied: tensors are compared by sums of their bits.

    Args:
        trainer: The trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._looks: dict[str, list[int]] = {}
        self._told: set[str] = set()

    @contextmanager
    def __call__(
        self, place: str, step: int, batch: Any = None, *, may_wait: bool = True
    ) -> Iterator[None]:
        """Compares around a block, if that is due.

        Args:
            place: Which of the blocks of a step it is.
            step: The step, counted from 1. Before the end of the first, a trace is an error.
            batch: The batch that the training gets.
            may_wait: Whether the host may wait for the device.

        Raises:
            MisconfigurationException: If a trace is left before anything has moved.
        """
        looks = self._looks.setdefault(place, [])
        is_early = step in looks or len(looks) < _FIRST
        if not is_early and not (len(looks) == _FIRST and step > looks[0] + _LATER and may_wait):
            yield
            return
        if step not in looks:
            looks.append(step)
        before = _Look(self._trainer, self._module, batch)
        with files_written() as files:
            yield
        changes = before.changes()
        if files:
            changes["shared"] = [*changes.get("shared", []), *map(repr, dict.fromkeys(files))]
        self._report(changes, refuses=step == 1 and place != "update")

    def _report(self, changes: dict[str, list[str]], *, refuses: bool) -> None:
        sentences = []
        if outside := self._untold(changes.pop("outside", [])):
            warnings.warn(
                "OnlineHPOCallback: replays of training_step or validation_step change variables "
                f"outside of the module, and do not put them back: {', '.join(outside)}. If steps "
                "depend on them, the training is another one than without the callback; keep them "
                "as attributes of the module",
                stacklevel=2,
            )
        if shared := self._untold(changes.pop("shared", [])):
            warnings.warn(
                "OnlineHPOCallback: replays of training_step or validation_step write, as the "
                f"training does, to {', '.join(shared)}; files and queues are not put back. Write "
                "to them in on_train_batch_end or on_validation_batch_end",
                stacklevel=2,
            )
        if read := self._untold(changes.pop("read", [])):
            warnings.warn(
                "OnlineHPOCallback: held-out batches or replays read on in open files that the "
                f"training reads, too: {', '.join(read)}. Their positions are not put back, so "
                "that the training misses what was read, unless each reading begins with seek(). "
                "Give the held-out data a dataset that opens the file for itself; what steps need, "
                "read in on_train_batch_start and keep as an attribute of the module",
                stacklevel=2,
            )
        for kind, names in changes.items():
            new = self._untold(names)
            of_data = [name for name in new if name[1:].startswith(DATA)]  # in quotes
            if of_data:
                self._warn_of_data(of_data)
                new = [name for name in new if name not in of_data]
            if new:
                what, remedy = _REMEDIES[kind]
                sentences.append(f"{what}: {', '.join(new)}. {remedy}")
        if not sentences:
            return
        message = (
            "OnlineHPOCallback: replays of training_step or validation_step have changed what "
            "cannot be put back, so that the training is another one than without the callback: "
            + "; also ".join(sentences)
        )
        if refuses:
            raise MisconfigurationException(message)
        warnings.warn(message, stacklevel=2)

    def _untold(self, names: list[str]) -> list[str]:
        """Returns those that have not been told of; they are now."""
        new = [name for name in names if name not in self._told]
        self._told.update(new)
        return new

    def _warn_of_data(self, names: list[str]) -> None:
        """Warns once: examples that are kept once they have been made are of no harm."""
        if not self._untold(["data"]):
            return
        warnings.warn(
            "OnlineHPOCallback: held-out batches or replays change what datasets hold, of which "
            f"there is too much to be put back: {listed(names, 3)}. That is well where "
            "examples are only kept for later; if they depend on it, as on a position or a random "
            "state, the training is another one than without the callback: give the held-out data "
            "a dataset of their own",
            stacklevel=2,
        )


class _Look:
    """What is there at a moment.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        batch: A batch.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        self._trainer = trainer
        self._device = trainer.strategy.root_device
        self._random = RandomState.capture(self._device)
        (self._optimizer,) = trainer.optimizers
        names = {id(p): name for name, p in module.named_parameters()}
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._parameters = {names.get(id(p), f"#{i}"): p for i, p in enumerate(trained)}
        shards = is_sharded(trained)
        self._has_shards = shards
        if shards:
            reshard(module.modules())
        # What is reached by several ways is called by the first.
        self._root = SimpleNamespace(
            batch=batch,
            module=None if shards else module,
            gradients={} if shards else {n: p.grad for n, p in self._parameters.items()},
            optimizer=self._states(),
            lr_schedulers=[c.scheduler for c in trainer.lr_scheduler_configs],
        )
        self._walker = Walker(self._root, _classes_of)
        reached = self._walker.walk(looks=True)
        self._held = list(reached.held.values())
        groups = [list(held.holder.values(held.content)) for held in self._held]
        groups += reached.tuples.values()
        found: dict[int, Any] = {}
        for group in groups:
            # A vocabulary has many entries, of few types.
            kinds = {kind for kind in set(map(type, group)) if not issubclass(kind, _PLAIN)}
            if kinds:
                found.update((id(value), value) for value in group if type(value) in kinds)
        for h in module.modules():
            if isinstance(h, Hyperparameter) and not h.is_resolved:
                found.pop(id(h.raw), None)  # it gets its value when the step's gradient is there
        self._values = list(found.values())
        self._shown = _shown(self._values)
        self._variables = [] if shards else Outside(module).variables
        self._outside = _outside(self._variables)
        parts = TrainerParts(trainer)
        self._plain, self._own = parts.plain(), parts.paths()

    def changes(self) -> dict[str, list[str]]:
        """Returns the names of what is another now, by what it belongs to."""
        found: dict[str, list[str]] = {}

        def note(path: str) -> None:
            kind, _, rest = path.partition(".")
            kind, bracket, item = kind.partition("[")
            name = rest if kind == "module" else bracket + item + (rest and f".{rest}")
            found.setdefault(kind, []).append(repr(name.strip().lstrip(".") or kind))

        for held in self._held:
            # The attributes of the root were made for this look.
            if held.owner is not vars(self._root):
                for path in self._changed_entries(held):
                    note(path)
        for value, then, now in zip(self._values, self._shown, _shown(self._values), strict=True):
            if then == now:
                continue
            path = self._path_of(value)
            if not (issubclass(type(value), _SHARED) or _is_summary_writer(value)):
                note(path)
            elif now is None or then is None or now > then:  # a thread may take from a queue
                kind = "read" if _is_read_only(value) else "shared"
                found.setdefault(kind, []).append(repr(path.partition(".")[2] or path))
        for name, state in self._states().items():
            if state is not _get(self._root.optimizer, name):
                note(f"optimizer[{name!r}]")
        for name, p in self._parameters.items():
            if name in self._root.gradients and p.grad is not self._root.gradients[name]:
                note(f"gradients[{name!r}]")
        outside = [
            repr(variable.name)
            for variable, then, now in zip(
                self._variables, self._outside, _outside(self._variables), strict=True
            )
            if then[1:] != now[1:]
            or len(then[0]) != len(now[0])
            or not all(map(operator.is_, then[0], now[0]))
        ]
        if outside:
            found["outside"] = list(dict.fromkeys(outside))
        parts = TrainerParts(self._trainer)  # a step may have had some made
        plain = parts.plain()
        moved = [n for n, value in self._plain.items() if n in plain and plain[n] != value]
        if moved or parts.paths() != self._own:
            found["trainer"] = [*map(repr, moved), *map(repr, sorted(parts.paths() ^ self._own))]
        differing = self._random.differences(RandomState.capture(self._device))
        if differing:
            found["random"] = [f"that of {name}" for name in differing]
        return found

    def _states(self) -> dict[str, Any]:
        if self._has_shards:
            return {}
        # To look for a parameter's state makes it one that is empty.
        states = self._optimizer.state
        return {name: states[p] for name, p in self._parameters.items() if states.get(p)}

    def _path_of(self, value: Any) -> str:
        return self._walker.path_of(value) or f"module.a {type(value).__name__}"

    def _changed_entries(self, held: Held) -> Iterator[str]:
        """Yields the paths of entries of a container that are other objects now."""
        if held.is_same():
            return
        then, now = held.content, held.holder.read(held.owner)
        path = self._path_of(held.owner)
        if not isinstance(now, dict):
            yield path
            return
        is_attributes = path.endswith(".__dict__")
        path = path.removesuffix(".__dict__")
        for key in {**then, **now}:
            if _get(then, key) is not _get(now, key) and key not in _OWN:
                label = getattr(key, "__name__", key)  # of a slot
                yield f"{path}.{label}" if is_attributes else f"{path}[{label!r}]"


@lru_cache(maxsize=4096)
def _classes_of(cls: type) -> tuple[type, ...]:
    """Returns those of a type and its bases that are the user's.

    Those of installed packages fill caches of their own, such as a method that is chosen by the
    version of torch when it is first called.
    """
    return tuple(base for base in classes_of(cls) if not _is_installed(base))


def _is_installed(cls: type) -> bool:
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return path is not None and is_library(path)


def _get(mapping: Any, key: Any) -> Any:
    return dict.get(mapping, key, _NOTHING)


def _outside(variables: Sequence[Variable]) -> list[tuple[list[Any], list[Any], list[int]]]:
    """Returns what variables hold now: the very objects, and what is in those written to."""
    looks = [entries_of(variable.read()) for variable in variables]
    shown = iter(_shown([leaf for _, leaves, _ in looks for leaf in leaves]))
    return [(entries, [next(shown) for _ in leaves], sizes) for entries, leaves, sizes in looks]


def _shown(values: list[Any]) -> list[Any]:
    """Returns what can be compared of each value; None where there is nothing."""
    shown: list[Any] = [None] * len(values)
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, value in enumerate(values):
        kind = kind_of(type(value))
        if kind is Kind.TENSOR:
            if (total := sum_of_bits(value)) is not None:
                sums.setdefault(total.device, []).append((i, total))
        elif kind is Kind.ARRAY:
            shown[i] = _sum_of_store(value)
        elif kind is Kind.GENERATOR:
            shown[i] = str(read_generator(value))
        elif kind is Kind.ITERATOR:
            shown[i] = _position(value)
        elif kind is Kind.ATOM:
            shown[i] = _shown_by_opaque(value)
    for group in sums.values():  # a device is waited for once
        for (i, _), total in zip(group, torch.stack([t for _, t in group]).tolist(), strict=True):
            shown[i] = total
    return shown


def sum_of_bits(value: Tensor) -> Tensor | None:
    """Returns a sum over the bits of a tensor that depends on their places, too.

    That is Σ (2i + 1)·wᵢ over its words w, taken from the sums of the columns and of the rows of a
    table: to weight each word takes fifty times longer than to add them up.
    """
    if is_lazy(value) or is_sharded([value]) or value.layout is not torch.strided or value.is_meta:
        return None
    # Subclasses may do as they like with parts of them.
    with torch._C.DisableTorchFunctionSubclass():
        try:
            words = _words(value.detach())
        except (NotImplementedError, RuntimeError, KeyError):  # quantized, nested, …
            return None
        return _weighted_sum(words)


def _weighted_sum(words: Tensor) -> Tensor:
    rows = len(words) // _COLUMNS
    end = rows * _COLUMNS
    table = words[:end].view(rows, _COLUMNS)
    places = partial(torch.arange, device=words.device)
    return (
        (table.sum(0) * places(1, 2 * _COLUMNS, 2)).sum()
        + 2 * _COLUMNS * (table.sum(1) * places(rows)).sum()
        + (words[end:] * places(2 * end + 1, 2 * len(words) + 1, 2)).sum()
    )


def _words(value: Tensor) -> Tensor:
    """Returns the bits of a tensor as a flat one of long integers."""
    flat = (torch.view_as_real(value) if value.is_complex() else value).flatten()
    size = flat.element_size()
    if flat.storage_offset() * size % 8:
        flat = flat.clone()  # one that lies between two long words
    end = flat.numel() * size // 8 * 8 // size
    head, tail = flat[:end].view(torch.int64), flat[end:].view(_BITS[size])
    return torch.cat([head, tail]) if len(tail) else head


def _position(value: Any) -> Any:
    """Returns where an iterator is, if it shows that."""
    return repr(value) if isinstance(value, itertools.count) else operator.length_hint(value, -1)


def _is_read_only(value: Any) -> bool:
    """Whether a value is an open file that nobody can write to."""
    return issubclass(type(value), io.IOBase) and not value.closed and not value.writable()


def _is_summary_writer(value: Any) -> bool:
    """Whether a value is one of TensorBoard, without importing that."""
    return type(value).__name__ == "SummaryWriter"


def _sum_of_store(value: Any) -> int | None:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return None
        return zlib.crc32(np.ascontiguousarray(value.view(np.ndarray)).view(np.uint8).data)
    if not is_writable(value):
        return None
    if isinstance(value, torch.UntypedStorage):
        return zlib.crc32(bytes(value)) if value.device.type == "cpu" else None
    return zlib.crc32(value)


def _shown_by_opaque(value: Any) -> Any:
    """Returns what an object shows of itself that is neither copied nor looked into."""
    kind = type(value)  # a weak proxy would say that it is what it stands for
    try:
        if issubclass(kind, mmap.mmap):
            return len(value), zlib.crc32(value)
        if issubclass(kind, io.IOBase):
            return None if value.closed else value.tell()
        if issubclass(kind, (queue.Queue, queue.SimpleQueue)):
            return value.qsize()
        if _is_summary_writer(value):
            value.flush()
            return sum(entry.stat().st_size for entry in os.scandir(value.log_dir))
        if issubclass(kind, np.random.BitGenerator):
            return str(value.state)
    except (OSError, ValueError, TypeError, ReferenceError, AttributeError):
        # A pipe, one that is being read line by line, or a proxy of what is gone.
        return None
    return None
