"""The shield: makes a call of a step invisible, and lets it see an earlier moment."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_hpo._lightning import MisconfigurationException, classes, package_of
from lightning_hpo.distributed import is_sharded, reshard
from lightning_hpo.muted_logger import MutedLogger
from lightning_hpo.rng import RandomState, forked_rng

_MODULE_INTERNALS = frozenset(vars(nn.Module()))

# Tensors and arrays up to this many elements, kept as plain attributes, are copied for a replay. A
# larger one is rather data than a counter; a replay that writes to it is refused.
_COPIED_ELEMENTS = 1_000_000

# Above this many elements, copies of a tensor that has not changed are shared between moments, and
# tensors of a frozen backbone are not copied at all.
_SHARED_ELEMENTS = 10_000


class Shield:
    """Makes a call of ``training_step`` or ``validation_step`` invisible.

    Inside :meth:`__call__`, buffers are clones, metrics are clones, ``self.log`` and the loggers
    are mute; afterwards every attribute of every module is what it was. Buffers are rebound, never
    written in place, so a graph that was built inside may be used after the shield is gone.

    Args:
        trainer: The trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._kinds = classes("LightningModule")
        self._dummy_logger = package_of(trainer).loggers.logger.DummyLogger
        self._metrics: dict[int, tuple[nn.Module, nn.Module]] = {}

    def untrained(self) -> list[nn.Parameter]:
        """Lists the parameters that the optimizer does not move: a step may write to them.

        Teachers that follow by a moving average, annealed temperatures.
        """
        trained = {
            id(p)
            for optimizer in self._trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        return [
            p
            for p in self._module.parameters()
            # Replays work on the shards themselves.
            if not p.requires_grad or (id(p) not in trained and not is_sharded([p]))
        ]

    @property
    def device(self) -> torch.device:
        """The device whose random numbers the module draws."""
        return self._trainer.strategy.root_device

    @contextmanager
    def __call__(
        self,
        *,
        rng: RandomState | None = None,
        state: ModuleState | None = None,
        swaps: dict[int, Tensor] | None = None,
        log: Callable[..., None] | None = None,
    ) -> Iterator[None]:
        """Opens the shield.

        Args:
            rng: The random state to run under. Default: the present one.
            state: What the modules held at an earlier moment.
            swaps: Tensors to put in the place of parameters and buffers, by the ``id`` of these.
            log: What ``self.log`` calls instead. Default: nothing happens.
        """
        trainer = self._trainer
        modules = list(self._module.modules())
        sharded = reshard(modules)
        # A backward pass through sharded parameters adds to the gradients of all of them.
        grads = [(p, p.grad) for p in self._module.parameters()] if sharded else []
        before = [(module, dict(vars(module))) for module in modules]
        copied: dict[int, Any] = {}
        shared: list[tuple[str, Tensor, int]] = []
        untrained = self._copy_untrained(shared, state)
        swaps = {**untrained, **(swaps or {})}
        loggers = trainer.loggers
        metrics = []
        scripted: list[tuple[torch.jit.ScriptModule, str, Any]] = []
        try:
            with forked_rng(self.device, rng):
                for module in modules:
                    earlier = None if state is None else state.get(id(module))
                    if isinstance(module, torch.jit.ScriptModule):
                        scripted += _isolate_scripted(module, earlier, swaps)
                    else:
                        _isolate(module, earlier, swaps)
                        _copy_attributes(module, earlier, copied, shared)
                        metrics += self._swap_metrics(module)
                    if isinstance(module, self._kinds):
                        _mute(module, log or _nothing)
                trainer.loggers = [MutedLogger(each) for each in loggers]  # type: ignore[misc]
                for p, _ in grads:
                    p.grad = None
                yield
        finally:
            trainer.loggers = loggers
            reshard(modules)
            for p, grad in grads:
                p.grad = grad
            for module, attributes in before:
                vars(module).clear()
                vars(module).update(attributes)
            for owner, name, value in scripted:
                owner._c.setattr(name, value)
            for metric in metrics:
                metric.reset()
        for name, tensor, version in shared:
            if tensor._version != version:
                raise MisconfigurationException(
                    f"A replay of the step wrote to {name!r}, a tensor of shape "
                    f"{tuple(tensor.shape)}, in place, which cannot be undone; register it as a "
                    "buffer, or write to it in on_train_batch_end"
                )

    def _copy_untrained(
        self, shared: list[tuple[str, Tensor, int]], state: ModuleState | None
    ) -> dict[int, Tensor]:
        """Copies the parameters that are not trained, by the ``id`` of the original.

        Those of a large frozen backbone are shared instead, and watched.
        """
        every = self.untrained()
        untrained = _small_enough(every, self._module)
        backbone = {id(p) for p in every} - untrained
        if backbone:
            named = self._module.named_parameters()
            shared += [(name, p, p._version) for name, p in named if id(p) in backbone]
        copies: dict[int, Tensor] = {}
        for m in self._module.modules():
            earlier = (state or {}).get(id(m), ({}, {}))[0]
            for name, p in m._parameters.items():
                if p is not None and id(p) in untrained:
                    value = earlier.get(name)
                    value = p if value is None or value.shape != p.shape else value
                    copies[id(p)] = nn.Parameter(value.detach().to(p).clone(), p.requires_grad)
        return copies

    def _swap_metrics(self, module: nn.Module) -> list[Any]:
        """Puts clones in the place of the metrics that are direct children of ``module``.

        A metric's state is written in place, so that a reference to it would not protect it.
        """
        if isinstance(module, (Metric, MetricCollection)):
            return []
        clones: dict[str, Any] = {}
        for name, child in module._modules.items():
            if isinstance(child, (Metric, MetricCollection)):
                known = self._metrics.get(id(child))
                if known is None or known[0] is not child:
                    clone = child.clone()
                    clone.reset()
                    self._metrics[id(child)] = known = (child, clone)
                clones[name] = known[1]
        if clones:
            vars(module)["_modules"] = {**module._modules, **clones}
        return list(clones.values())


class Shadow:
    """Has a method of one object replaced by a function, until it is removed."""

    def __init__(self, owner: object, name: str, function: Callable[..., Any]) -> None:
        self._own = vars(owner)
        self._name = name
        self._before = {name: self._own[name]} if name in self._own else {}
        self._own[name] = function

    def remove(self) -> None:
        """Puts back what was there."""
        self._own.pop(self._name, None)
        self._own.update(self._before)


ModuleState = dict[int, tuple[dict[str, "Tensor | None"], dict[str, Any]]]
"""Copies of the buffers and of the plain attributes, by the ``id`` of the module that owns them."""


def capture_state(
    module: nn.Module, untrained: list[nn.Parameter], previous: ModuleState | None = None
) -> ModuleState:
    """Copies the buffers, some parameters and the attributes of a module tree, for a later replay.

    Args:
        module: The module.
        untrained: The parameters that are copied too, but for those of a large frozen backbone.
        previous: What was captured at the moment before. Large tensors that have not changed since
            are shared with it, so that a long window holds them once.
    """
    copied: dict[int, Any] = {}
    state: ModuleState = {}
    chosen = _small_enough(untrained, module)

    def copy_own(value: Any) -> Any:
        return _copied(value, copied)

    for m in module.modules():
        if isinstance(m, Metric):
            continue
        buffers, attributes = (previous or {}).get(id(m), ({}, {}))
        # A scripted module keeps its attributes out of sight.
        own = {} if isinstance(m, torch.jit.ScriptModule) else own_attributes(m)
        tensors = dict(m._buffers.items())
        tensors |= {n: p for n, p in m._parameters.items() if id(p) in chosen}
        state[id(m)] = (
            {
                name: None if b is None else _shared(b.detach(), buffers.get(name), torch.clone)
                for name, b in tensors.items()
            },
            {name: _shared(value, attributes.get(name), copy_own) for name, value in own.items()},
        )
    return state


def _shared(value: Any, earlier: Any, copy: Callable[[Any], Any]) -> Any:
    """Returns the earlier copy of a large tensor that still holds the same numbers, or a new one.

    Versions would not tell: BatchNorm and ``.data`` write without counting.
    """
    if (
        isinstance(value, Tensor)
        and isinstance(earlier, Tensor)
        and value.numel() > _SHARED_ELEMENTS
        and (value.shape, value.dtype, value.device)
        == (earlier.shape, earlier.dtype, earlier.device)
        and torch.equal(value, earlier)
    ):
        return earlier
    return copy(value)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that are the user's state."""
    return {name: value for name, value in vars(module).items() if _is_own(name)}


def _is_own(name: str) -> bool:
    """Whether an attribute is the user's, or the mode of the module, and no machinery of torch."""
    # Kernels are exchanged by way of "forward".
    return name not in _MODULE_INTERNALS | {"forward"} or name == "training"


def _isolate(
    module: nn.Module,
    earlier: tuple[dict[str, Tensor | None], dict[str, Any]] | None,
    swaps: dict[int, Tensor],
) -> None:
    """Rebinds a module's tensors: buffers to clones, and whatever is swapped."""
    attributes = vars(module)
    present = module._buffers
    values = present if earlier is None else earlier[0]

    def stand_in(name: str) -> Tensor | None:
        if id(present.get(name)) in swaps:
            return swaps[id(present[name])]
        value = values[name]
        return None if value is None else value.detach().clone()

    # Those that were there then: what a step registers or deletes is not its replay's.
    attributes["_buffers"] = {n: stand_in(n) for n in values if n not in module._parameters}
    attributes["_parameters"] = {
        name: None if p is None else swaps.get(id(p), p) for name, p in module._parameters.items()
    }
    attributes["_modules"] = dict(module._modules)
    if swaps and "_flat_weights" in attributes:  # recurrent layers hold a second list of them
        attributes["_flat_weights"] = [swaps.get(id(w), w) for w in attributes["_flat_weights"]]


def _isolate_scripted(
    module: torch.jit.ScriptModule,
    earlier: tuple[dict[str, Tensor | None], dict[str, Any]] | None,
    swaps: dict[int, Tensor],
) -> list[tuple[torch.jit.ScriptModule, str, Any]]:
    """Does what :func:`_isolate` does for a module whose tensors and mode do not live in Python.

    Returns:
        What is to be put back: the module, the name and the value.
    """
    values = {} if earlier is None else earlier[0]
    before: list[tuple[torch.jit.ScriptModule, str, Any]] = [(module, "training", module.training)]
    for name, own in [*module._parameters.items(), *module._buffers.items()]:
        value = swaps.get(id(own))
        if value is None and own is not None and name in module._buffers:
            kept = values.get(name)
            value = (own if kept is None else kept).detach().clone()
        if value is not None and own is not None:
            before.append((module, name, own))
            module._c.setattr(name, value)
    return before


def _small_enough(untrained: list[nn.Parameter], module: nn.Module) -> set[int]:
    """Returns the ids of those that are copied: of a frozen backbone only small tensors."""
    whole = sum(p.numel() for p in module.parameters())
    is_backbone = 5 * sum(p.numel() for p in untrained) > 4 * whole
    return {id(p) for p in untrained if not is_backbone or p.numel() <= _SHARED_ELEMENTS}


def _copy_attributes(
    module: nn.Module,
    earlier: tuple[dict[str, Tensor | None], dict[str, Any]] | None,
    copied: dict[int, Any],
    shared: list[tuple[str, Tensor, int]],
) -> None:
    """Gives a replay copies of what a module keeps in plain attributes: lists, counts, sums.

    Args:
        module: The module.
        earlier: What it held at an earlier moment; None: the present.
        copied: Copies made so far, by the ``id`` of the original: what is shared stays shared.
        shared: Receives the tensors that are too large to be copied, with their versions.
    """
    if isinstance(module, (Metric, MetricCollection)):
        return
    attributes = vars(module)
    if earlier is not None:
        for name in own_attributes(module).keys() - earlier[1].keys():
            del attributes[name]  # it has been set since
        attributes.update(earlier[1])
    for name, value in own_attributes(module).items():
        if isinstance(value, Tensor) and value.numel() > _COPIED_ELEMENTS:
            shared.append((name, value, value._version))
        else:
            attributes[name] = _copied(value, copied)


def _copied(value: Any, copied: dict[int, Any]) -> Any:
    """Copies containers all through, tensors, arrays, generators and plain objects.

    Anything else is shared.
    """
    kind = type(value)
    if isinstance(value, _ATOMS):
        return value
    if id(value) not in copied:
        if kind in _COPIERS:
            _COPIERS[kind](value, copied)
        elif isinstance(value, Metric):
            copied[id(value)] = value.clone()
        elif isinstance(value, tuple) and hasattr(kind, "_make"):
            copied[id(value)] = kind._make(_copied(item, copied) for item in value)
        elif _is_plain_object(value):
            copied[id(value)] = copy = object.__new__(kind)
            vars(copy).update({name: _copied(v, copied) for name, v in vars(value).items()})
        else:
            copied[id(value)] = value
    return copied[id(value)]


def _is_plain_object(value: Any) -> bool:
    """Whether an object is a bare bundle of numbers and containers, as an average meter is."""
    kind = type(value)
    return (
        kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
        and not isinstance(value, nn.Module)
        and hasattr(value, "__dict__")
        and not hasattr(kind, "__slots__")
        and all(isinstance(v, _ATOMS) or type(v) in _COPIERS for v in vars(value).values())
    )


def _deep_copy(value: Any, copied: dict[int, Any]) -> None:
    copied[id(value)] = deepcopy(value)


def _copy_generator(value: torch.Generator, copied: dict[int, Any]) -> None:
    clone = copied[id(value)] = torch.Generator(value.device)
    clone.set_state(value.get_state())


def _copy_sequence(value: Any, copied: dict[int, Any]) -> None:
    copy = copied[id(value)] = value.copy()
    copy.clear()
    copy.extend(_copied(item, copied) for item in value)


def _copy_tuple(value: tuple[Any, ...], copied: dict[int, Any]) -> None:
    items = [_copied(item, copied) for item in value]
    is_same = all(a is b for a, b in zip(items, value, strict=True))
    copied[id(value)] = value if is_same else tuple(items)


def _copy_mapping(value: Any, copied: dict[int, Any]) -> None:
    copy = copied[id(value)] = value.copy()
    for key, item in value.items():
        copy[key] = _copied(item, copied)


def _copy_set(value: Any, copied: dict[int, Any]) -> None:
    copied[id(value)] = value.copy()


def _copy_tensor(value: Tensor, copied: dict[int, Any]) -> None:
    # A tensor with a graph was computed, and is not written to.
    small = value.numel() <= _COPIED_ELEMENTS and not value.requires_grad
    copied[id(value)] = value.clone() if small else value


def _copy_array(value: np.ndarray[Any, Any], copied: dict[int, Any]) -> None:
    copied[id(value)] = value.copy() if value.size <= _COPIED_ELEMENTS else value


_COPIERS: dict[type, Callable[[Any, dict[int, Any]], None]] = {
    list: _copy_sequence,
    tuple: _copy_tuple,
    deque: _copy_sequence,
    dict: _copy_mapping,
    OrderedDict: _copy_mapping,
    defaultdict: _copy_mapping,
    Counter: _copy_mapping,
    set: _copy_set,
    Tensor: _copy_tensor,
    np.ndarray: _copy_array,
    torch.Generator: _copy_generator,
    np.random.Generator: _deep_copy,
    np.random.RandomState: _deep_copy,
    random.Random: _deep_copy,
}

_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a muted method."""


def _mute(module: nn.Module, log: Callable[..., None]) -> None:
    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log(name, value)

    vars(module).update(log=log, log_dict=log_dict, print=_nothing)
