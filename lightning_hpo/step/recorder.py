"""From batches to steps: looks at a training while it goes on, and hands each step out."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_hpo._stopwatch import Stopwatch
from lightning_hpo._tensors import widened
from lightning_hpo.distributed import local
from lightning_hpo.dynamics import Entry, GenericDynamics, GradientClipping, OptimizerStep
from lightning_hpo.regularizers import PenaltyMixin
from lightning_hpo.shield import Shadow
from lightning_hpo.step.batches import Batches
from lightning_hpo.step.hooks import may_change_gradients, may_interfere
from lightning_hpo.step.replay_check import ReplayCheck
from lightning_hpo.step.shifts import ShiftCheck
from lightning_hpo.step.space import Space
from lightning_hpo.step.step import Step
from lightning_hpo.step.trace_check import TraceCheck
from lightning_hpo.step.training_map import TrainingMap

Observer = tuple[Space, Callable[[Step], None]]
"""An estimator's space, and what is called with each of its steps."""


class Verifier(Protocol):
    """Looks at steps of the optimizer; raises an error where one cannot be followed."""

    def before(self, step: OptimizerStep, *, is_first: bool) -> None:
        """Looks at a step that is about to happen."""

    def after(self) -> None:
        """Looks at a step that has happened."""


class Recorder:
    """Watches the optimizer, the clipping and the batches of a training; all between two hooks.

    For each micro-batch: :meth:`begin`, then :meth:`see` with θ_t in place. When the gradient of
    the step is final, and θ has not moved yet, observers get the step. Afterwards ``stepped`` says
    whether the optimizer has made it.

    Args:
        trainer: The trainer, with its optimizer in place.
        module: The LightningModule.
        callback: The callback in whose name this happens: its own hooks interfere with nothing.
        training: What all steps share.
        verifier: Refuses an optimizer whose step has no derivative; sees each step that is handed
            out, and always the first.
        traces: Looks at what is left when it is handed out.
        clock: Measures the time that is spent inside the optimizer's step.

    Attributes:
        lr: The learning rate of the last step, of the first parameter group.
        check: Compares gradients with their replays.
        shifts: Compares θ with what the optimizer has left.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        callback: pl.Callback,
        training: TrainingMap,
        verifier: Verifier,
        traces: TraceCheck,
        clock: Stopwatch,
    ) -> None:
        self._stepped = False
        self._clock = clock
        self.check = ReplayCheck(training, partial(may_change_gradients, trainer, module, callback))
        self.shifts = ShiftCheck(module, training.dynamics.optimizer)
        self._trainer = trainer
        self._module = module
        self._training = training
        self._verifier = verifier
        self._traces = traces
        self._due = 1, True
        self._is_verified = False
        self._interferes = partial(may_interfere, trainer, module, callback)
        self._observers: Sequence[Observer] = ()
        self._batches: Batches | None = None
        self._clipped: tuple[GradientClipping, list[Tensor | None]] | None = None
        self._lr: Any = 0.0
        self._shadow: Shadow | None = None
        self._grown: tuple[Tensor, Tensor] | None = None
        self._iterators: dict[int, Any] | None = None
        self._is_told_of_lost = False
        self._depth = 0  # how many calls of the optimizer's step are under way
        self._handles: list[RemovableHandle | Shadow] = [
            *self._watch_steps(training.dynamics.optimizer),
            self._watch_clipping(),
        ]

    @property
    def lr(self) -> float:
        """The learning rate of the last step, of the first parameter group."""
        return float(self._lr)

    def watch_iterators(self) -> None:
        """Looks after the coming step whether it has made an iterator, before θ moves."""
        self._iterators = self._training.objective.shield.iterators()

    def take_step(self) -> bool:
        """Tells once whether the optimizer has stepped, at the end of a micro-batch.

        Lightning ends batches that it never began: those that are None.
        """
        stepped, self._stepped = self._stepped, False
        return stepped

    def close(self) -> None:
        """Takes all hooks away."""
        self._unshadow()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._observers = ()
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    # ------------------------------------------------------------------------------------- batches

    def begin(self, then: Callable[[], None] | None) -> None:
        """Starts a micro-batch.

        Args:
            then: Called right before ``training_step``, unless None: after the module's own
                ``on_train_batch_start``, which Lightning calls after those of all callbacks. Any of
                them may draw random numbers or set what the loss depends on.
        """
        self._stepped = False
        self._depth = 0
        self._observers = ()
        self._clipped = None  # of a step that overflowed
        self.check.forget()
        self._unshadow()
        if then is None:
            return
        hook = self._module.on_train_batch_start

        def after_the_module(*args: Any, **kwargs: Any) -> Any:
            self._unshadow()
            response = hook(*args, **kwargs)
            if response != -1:  # the module ends the epoch
                then()
            return response

        self._shadow = Shadow(self._module, "on_train_batch_start", after_the_module)

    def see(
        self,
        batch: Any,
        batch_idx: int,
        observers: Sequence[Observer],
        step: int,
        *,
        compares: bool,
    ) -> None:
        """Prepares what observers will need of a micro-batch: θ_t is in place.

        Args:
            batch: The batch, on the device.
            batch_idx: Its index in the epoch.
            observers: Who observes the coming step.
            step: Its number, counted from 1.
            compares: Whether its gradient may be compared with that of a replay.
        """
        training = self._training
        objective = training.objective
        accumulated = self._trainer.accumulate_grad_batches
        self._observers = observers
        self._due = step, compares
        if self._batches is None or batch_idx % accumulated == 0:
            self._batches = Batches(training)  # what is left of a step that overflowed goes
        self._look_at_sum(may_go_on=accumulated > 1 and batch_idx % accumulated != 0)
        at_once = accumulated > 1 or self.check.forbids_delay or self._interferes()
        self.check.look_at_hooks()
        if compares and training.is_one_sided and not at_once and self.check.is_due(step):
            moment = objective.moment(batch, batch_idx)
            gradients = objective.gradient(moment, training.theta)
            self.check.expect(gradients, is_regular=True)
        replaying = [space for space, _ in observers if space.replays]
        followed = [tangents for space in replaying for tangents in space.followed]
        windows = [space.window for space in replaying if not space.followed]
        is_late = bool(followed) and not at_once
        if windows:
            shares = any(window is not None and window > 1 for window in windows)
            moment = objective.moment(batch, batch_idx, keep=True, share=shares)
            self._batches.moments.append((moment, 1 / accumulated))
        elif followed:
            moment = objective.moment(batch, batch_idx, keep=is_late)
        if is_late:
            self.check.watch(moment)
            self._batches.expect(moment, followed)
        elif followed:
            self._batches.multiply(moment, 1 / accumulated, followed)

    def _look_at_sum(self, *, may_go_on: bool) -> None:
        """Warns where a training step lets go of the gradients of the micro-batches before it.

        Args:
            may_go_on: Whether they are to accumulate further.
        """
        before, self._grown = self._grown, None
        if before is not None and before[0].grad is not before[1] and not self._is_told_of_lost:
            self._is_told_of_lost = True
            warnings.warn(
                "OnlineHPOCallback: gradients of earlier micro-batches are gone when those of the "
                "next one come: does training_step call zero_grad()? The optimizer then gets only "
                "what comes after it, while hypergradients sum over all micro-batches. Use "
                "torch.autograd.grad in training_step, which leaves .grad alone",
                stacklevel=2,
            )
        if may_go_on and self._trainer.world_size == 1 and not self.check.hooks_may_change():
            grown = [p for p in self._training.theta if p.grad is not None]
            p = min(grown, key=Tensor.numel, default=None)
            self._grown = None if p is None or p.grad is None else (p, p.grad)

    # ------------------------------------------------------------------------------------ the step

    def _watch_steps(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle | Shadow]:
        """Looks at steps by the optimizer's hooks, or around its ``step`` where there are none.

        Optimizers that wrap another one often leave out ``super().__init__()``, which makes hooks.
        """
        has_hooks = hasattr(optimizer, "_optimizer_step_post_hooks")
        if has_hooks and hasattr(type(optimizer).step, "hooked"):
            before = optimizer.register_step_pre_hook(self._before_optimizer_step)
            after = optimizer.register_step_post_hook(self._after_optimizer_step)
            # Before those of others, which may move θ.
            hooks: OrderedDict[int, Any] = optimizer._optimizer_step_post_hooks  # type: ignore[assignment]
            hooks.move_to_end(after.id, last=False)
            return [before, after]
        step = optimizer.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = (optimizer, *args), kwargs
            given = self._before_optimizer_step(optimizer, *given) or given
            result = step(*given[0][1:], **given[1])
            self._after_optimizer_step(optimizer)
            return result

        return [Shadow(optimizer, "step", watched)]

    def _before_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Looks at the step as soon as its gradient is final, which is inside Lightning's closure.

        With a gradient scaler there is no closure, and the gradient is final already.
        """
        self._depth += 1
        if self._depth > 1:
            return None  # a subclass that calls super().step(), which has hooks of its own
        if self._training.options is not None:
            self._training.options.set_()
        if not self._observers and self._is_verified:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            with self._clock:
                self._hand_out(None, None)
            return None
        dynamics = self._training.dynamics
        entry: Entry | None = None
        if isinstance(dynamics, GenericDynamics) and dynamics.is_foreign:
            entry = dynamics.enter()
            if any(space.window != 1 for space, _ in self._observers):
                self.shifts.look_at_state()

        def observed() -> Any:
            if entry is not None:
                entry.begin()
            result = closure()
            with self._clock:
                self._hand_out(entry, result)
            return result

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    @torch.no_grad()
    def _hand_out(self, entry: Entry | None, loss: Any) -> None:
        """Shows the step to its observers; it starts from what the optimizer held at its entry."""
        step, may_wait = self._due
        before, self._iterators = self._iterators, None
        if before is not None:
            self._training.objective.shield.refuse_new(before)
        self._look_at_sum(may_go_on=False)
        if any(space.window != 1 for space, _ in self._observers):
            self.shifts.look(may_wait=may_wait)
            if entry is None:  # else the optimizer may have written to it already
                self.shifts.look_at_state()
        with self._traces("step", step, may_wait=may_wait):
            self._show(entry, loss)

    def _show(self, entry: Entry | None, loss: Any) -> None:
        point = self._training.dynamics.capture()
        point.choices = self._training.choices.drawn()
        point.asked = self._training.choices.asked()
        if entry is not None:
            # A copy, for whoever adds to the loss in place.
            point.loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
            entry.return_(point)
        if not self._is_verified and isinstance(self._module, PenaltyMixin):
            self._module.check_penalties_applied()
        self._verifier.before(point, is_first=not self._is_verified)
        self._is_verified = True
        if self._clipped is not None:
            (point.clipping, point.unclipped), self._clipped = self._clipped, None
        batches, self._batches = self._batches, None
        if batches is None:
            return
        try:
            for space, observe in self._observers:
                is_shared = len(self._observers) > 1
                observe(Step(space, point, batches.moments, batches, is_shared=is_shared))
        finally:
            batches.close()

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._stepped = True
        with self._clock:
            self._look_after(optimizer)

    def _look_after(self, optimizer: torch.optim.Optimizer) -> None:
        self._grown = None
        self._verifier.after()
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule writes to it in place
        if self._training.options is not None:
            self._training.options.restore_()
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        self.shifts.after_step(self._training.theta, is_last_batch=progress.is_last_batch)

    # ------------------------------------------------------------------------------------ clipping

    def _watch_clipping(self) -> Shadow:
        """Looks at gradients just before they are clipped: penalties and all hooks have acted."""
        plugin = self._trainer.precision_plugin
        clip = plugin.clip_gradients

        def watched(optimizer: torch.optim.Optimizer, value: float, algorithm: str) -> None:
            if self._observers and value > 0:
                with self._clock:
                    self._keep_unclipped(float(value), by_value=algorithm == "value")
            clip(optimizer, value, algorithm)  # type: ignore[arg-type]

        return Shadow(plugin, "clip_gradients", watched)

    def _keep_unclipped(self, value: float, *, by_value: bool) -> None:
        """Keeps the gradient, which the derivative of clipping needs, if anything is clipped."""
        training = self._training
        clipping = GradientClipping(value, by_value, training.sharded)
        gradients = [None if p.grad is None else local(p.grad.detach()) for p in training.theta]
        if clipping.acts_on(gradients):
            copies = [None if g is None else widened(g.clone()) for g in gradients]
            self._clipped = clipping, copies

    def _unshadow(self) -> None:
        if self._shadow is not None:
            self._shadow.remove()
            self._shadow = None
