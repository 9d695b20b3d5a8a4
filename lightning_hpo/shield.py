"""The shield: makes a call of a step invisible, and lets it see an earlier moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hpo._lightning import classes
from lightning_hpo.caches import Caches
from lightning_hpo.contents import Reached, Walker
from lightning_hpo.context_variables import context_put_back
from lightning_hpo.distributed import is_sharded, reshard
from lightning_hpo.exchange import ModuleState, exchanged, refusal, remember, views_of
from lightning_hpo.holders import copy_iterator
from lightning_hpo.muted import MutedLogger, MutedProfiler
from lightning_hpo.rng import RandomState, forked_rng

# Of a frozen backbone, only tensors up to this many elements are copied.
_SMALL = 10_000


class Shield:
    """Makes a call of ``training_step`` or ``validation_step`` invisible.

    Inside :meth:`__call__`, all that the module reaches holds copies, and ``self.log``, the loggers
    and the profiler are mute; afterwards every object holds what it held. Objects keep their
    identity throughout. A graph that was built inside must be used before the shield is gone.

    Args:
        trainer: The trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._kinds = classes("LightningModule")
        self._walker = Walker(module)
        self._caches = Caches(module)
        self._without_gradient: dict[int, Tensor] = {}
        self._with_own: Set[int] = set()

    @property
    def device(self) -> torch.device:
        """The device whose random numbers the module draws."""
        return self._trainer.strategy.root_device

    def treat_as_state(self, parameters: Iterable[Tensor]) -> None:
        """Takes trained parameters that get no gradient for state that a step may write to.

        A teacher that follows by a moving average is often among what the optimizer is given. One
        that gets a gradient later is trained from then on.
        """
        self._without_gradient = {id(p): p for p in parameters if not is_sharded([p])}

    def remember(self, previous: ModuleState | None = None) -> ModuleState:
        """Copies what the modules, and all that they reach, hold now, for a later replay.

        Args:
            previous: What was copied at the moment before. Large tensors that have not changed
                since are shared with it.
        """
        reshard(self._module.modules())  # a module holds gathered parameters after a validation
        reached = self._walker.walk()
        state = remember(reached, self._written(reached), previous)
        state.gradients = {
            key: None if t.grad is None else t.grad.clone()
            for key, t in self._leaves(reached).items()
        }
        return state

    def iterators(self) -> dict[int, Any]:
        """Returns the iterators that the module reaches and that cannot be copied, by ``id``."""
        reached = self._walker.walk()
        return {
            key: value
            for key, value in reached.iterators.items()
            if key not in reached.data and copy_iterator(value, {}) is None
        }

    def refuse_new(self, before: Mapping[int, Any]) -> None:
        """Refuses a step that has made an iterator and keeps it: a later replay would advance it.

        Args:
            before: What :meth:`iterators` returned before the step.

        Raises:
            MisconfigurationException: If there is such an iterator.
        """
        for key, value in self.iterators().items():
            if key not in before:
                raise refusal(self._walker, value)

    @contextmanager
    def __call__(
        self,
        *,
        rng: RandomState | None = None,
        state: ModuleState | None = None,
        swaps: dict[int, Tensor] | None = None,
        log: Callable[..., None] | None = None,
        looks: str | None = None,
    ) -> Iterator[None]:
        """Opens the shield.

        Args:
            rng: The random state to run under. Default: the present one.
            state: What the modules held at an earlier moment.
            swaps: Tensors to put in the place of parameters and buffers, by the ``id`` of these.
            log: What ``self.log`` calls instead. Default: nothing happens.
            looks: What runs (:meth:`Walker.walk`). Default: a step; without ``rng``, a validation.

        Raises:
            MisconfigurationException: If the step changes something that cannot be put back.
        """
        trainer = self._trainer
        modules = list(self._module.modules())
        # A backward pass through sharded parameters adds to the gradients of all of them.
        aside = self.gradients_aside() if reshard(modules) else nullcontext()
        reached = self._walker.walk(looks=looks or ("validation" if rng is None else "step"))
        # The step may write to what stands for a parameter that gets no gradient.
        swaps = {
            key: value.clone() if key in self._without_gradient else value
            for key, value in (swaps or {}).items()
        }
        for key, value in swaps.items():
            own = vars(reached.parameters.get(key, reached.tensors.get(key, value)))
            if own:  # attributes that somebody has set on it
                vars(value).update(own)
        swaps |= views_of(swaps, {**reached.tensors, **(state.tensors if state else {})})
        loggers, profiler = trainer.loggers, trainer.profiler  # type: ignore[attr-defined]
        scripted: list[tuple[torch.jit.ScriptModule, str, Any]] = []
        groups = [(group, dict(group)) for o in trainer.optimizers for group in o.param_groups]
        try:
            with (
                aside,
                self._caches(),
                context_put_back(None if state is None else state.context),
                forked_rng(self.device, rng),
                self._with_gradients(self._leaves(reached), state),
                exchanged(self._walker, reached, self._written(reached), state, swaps),
            ):
                for module in modules:
                    if isinstance(module, torch.jit.ScriptModule):
                        scripted += _isolate_scripted(module, state, swaps)
                    if isinstance(module, self._kinds):
                        _mute(module, log or _nothing)  # type: ignore[arg-type]
                trainer.loggers = [MutedLogger(each) for each in loggers]  # type: ignore[misc]
                trainer.profiler = MutedProfiler(profiler)  # type: ignore[attr-defined]
                try:
                    yield
                finally:
                    reshard(modules)
        finally:
            trainer.loggers = loggers
            trainer.profiler = profiler  # type: ignore[attr-defined]
            for owner, name, value in scripted:
                owner._c.setattr(name, value)
            for group, before in groups:
                group.clear()
                group.update(before)

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Lets a step call ``backward()`` and ``zero_grad()``: gradients are put back after it."""
        # What has been put in the place of parameters is not asked for.
        parameters: dict[int, Tensor] = {id(p): p for p in self._module.parameters() if p.is_leaf}
        parameters |= {id(p): p for p in self._optimized()}
        before = [(p, p.grad) for key, p in parameters.items() if key not in self._with_own]
        try:
            for p, grad in before:
                if grad is not None:
                    p.grad = None
            yield
        finally:
            for p, grad in before:
                if p.grad is not grad:
                    p.grad = grad

    @contextmanager
    def _with_gradients(
        self, leaves: dict[int, Tensor], state: ModuleState | None
    ) -> Iterator[None]:
        """Lets a step read and write gradients of leaves that no optimizer moves.

        Such are prompts and perturbations that the step itself moves by what the last step has left
        in their ``grad``.
        """
        earlier = {} if state is None else state.gradients
        before = [(t, t.grad) for t in leaves.values()]
        outer, self._with_own = self._with_own, leaves.keys()
        try:
            for key, t in leaves.items():
                grad = earlier.get(key, t.grad)
                if grad is not t.grad or grad is not None:
                    t.grad = None if grad is None else grad.clone()
            yield
        finally:
            self._with_own = outer
            for t, grad in before:
                if t.grad is not grad:
                    t.grad = grad

    def _leaves(self, reached: Reached) -> dict[int, Tensor]:
        """Returns the leaves that require grad, and that no optimizer moves."""
        optimized = {id(p) for p in self._optimized()}
        return {
            key: t
            for key, t in reached.parameters.items()
            if key not in optimized and t.requires_grad
        }

    def _optimized(self) -> Iterator[Tensor]:
        """Yields what the optimizers have been given."""
        for optimizer in self._trainer.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _written(self, reached: Reached) -> dict[int, Tensor]:
        """Chooses the tensors that are copied, among those that a walk has come by.

        These are all that are not trained, but for the large ones of a frozen backbone, which are
        watched. Parameters that are not trained: teachers that follow by a moving average, annealed
        temperatures.
        """
        trained = {id(p) for p in self._optimized() if p.requires_grad}
        for key, p in list(self._without_gradient.items()):
            if p.grad is not None:
                del self._without_gradient[key]
        trained -= self._without_gradient.keys()
        parameters = reached.parameters
        untrained = {key: p for key, p in parameters.items() if key not in trained}
        size = sum(p.numel() for p in untrained.values())
        room = sum(p.numel() for p in parameters.values()) - size if untrained else 0
        if size > 4 * room:
            # A teacher of what is trained is as large as that; some of the others are smaller.
            room *= 2
            for key, p in sorted(untrained.items(), key=lambda item: item[1].numel()):
                room -= p.numel()
                if room < 0 and p.numel() > _SMALL:
                    reached.watched[key] = untrained.pop(key)
        chosen = self._walker.chosen(reached)
        arrays = {key: value for key, value in chosen.items() if not isinstance(value, Tensor)}
        reached.arrays.update(arrays)
        return {**reached.tensors, **untrained, **{k: chosen[k] for k in chosen.keys() - arrays}}


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


def _isolate_scripted(
    module: torch.jit.ScriptModule, state: ModuleState | None, swaps: dict[int, Tensor]
) -> list[tuple[torch.jit.ScriptModule, str, Any]]:
    """Exchanges the tensors of a module that does not keep them in Python.

    Returns:
        What is to be put back: the module, the name and the value.
    """
    values = {} if state is None else state.values
    before: list[tuple[torch.jit.ScriptModule, str, Any]] = [(module, "training", module.training)]
    for name, own in [*module._parameters.items(), *module._buffers.items()]:
        value = swaps.get(id(own))
        if value is None and own is not None and name in module._buffers:
            value = values.get(id(own), own).detach().clone()
        if value is not None and own is not None:
            before.append((module, name, own))
            module._c.setattr(name, value)
    return before


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a muted method."""


def _mute(module: pl.LightningModule, log: Callable[..., None]) -> None:
    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log(name, value)

    vars(module).update(log=log, log_dict=log_dict, print=_nothing)
