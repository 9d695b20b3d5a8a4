"""OnlineHPOCallback: when things happen, nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_hpo import compatibility
from lightning_hpo._tensors import widened
from lightning_hpo.data import T2Stream, find_t2_source, to_device
from lightning_hpo.distributed import gather, is_sharded, local, together
from lightning_hpo.dynamics import GradientClipping, OptimizerOptions, make_dynamics
from lightning_hpo.estimators import ClipR, Estimator, Problem, ValidationGradient
from lightning_hpo.hyper_optimizer import HyperOptimizer, OptimizerFactory, default_optimizer
from lightning_hpo.hyperparameters import Hyperparameter, named_hyperparameters
from lightning_hpo.monitoring import History, HistoryRecord, log_record, make_record
from lightning_hpo.objectives import Moment, TrainingObjective, ValidationObjective
from lightning_hpo.regularizers import PenaltyMixin
from lightning_hpo.replay_check import ReplayCheck
from lightning_hpo.rng import RandomState, ResumedRandomState
from lightning_hpo.shield import Shadow
from lightning_hpo.values import fixed_options, remember_options


class OnlineHPOCallback(pl.Callback):
    """Tunes every :class:`Hyperparameter` of the module during a single training.

    After every ``every_n_steps`` optimizer steps it draws a held-out batch, estimates the
    hypergradient dL_V/dλ, and moves raw λ with an optimizer of its own. With a λ-optimizer of
    learning rate 0 the training is bit-identical to one without the callback.

    Example::

        trainer = lightning.Trainer(callbacks=[OnlineHPOCallback(ClipR(radius=20.0))])

    Args:
        estimator: How the hypergradient is estimated. Default: ``ClipR()``.
        optimizer: Makes the λ-optimizer from the list of raw tensors. Default: Adam with learning
            rate 0.01.
        every_n_steps: Optimizer steps between two updates. Default: the estimator's own horizon (1
            for T1T2 and ClipR, K for UnrollK).
        warmup_steps: Optimizer steps before the first update; tangents advance meanwhile.
        dataloader: Held-out batches. Default: ``hpo_dataloader()`` of the module or the datamodule,
            else the validation dataloader, reshuffled.
        derivatives: ``"auto"``, ``"reverse"``, ``"forward"`` or ``"finite_difference"``; see
            :func:`lightning_hpo.derivatives.joint_hvp`. ``"auto"`` takes ``"reverse"`` where the
            model supports it and falls back to finite differences, saying so once.
        scale_lr_with_model: Multiplies the λ-optimizer's learning rate c by the model's learning
            rate η in force at that step (that of its first parameter group): c·η of Algorithm 1 of
            the online-HPO paper.
        validation_loss: L_V as a function of the module and a batch. Default: what
            ``validation_step`` returns, or else logs under ``monitor``.
        monitor: The name under which ``validation_step`` logs its loss, where it returns none.
        dataloader_idx: Which of several validation dataloaders to draw from.
        seed: Seed of the order in which held-out batches are drawn.
        strict: Whether a checkpoint of other hyperparameters, or of another estimator, is refused.
            With False the training goes on with what fits: the states of the λ-optimizer and of
            the estimator where they and the hyperparameters are the same. (Where the module has
            other hyperparameters, Lightning itself needs ``strict_loading = False`` on it.)
        optimizer_hyperparameters: Options of the model's optimizer to tune as well, such as
            ``["lr", "momentum"]``, or a mapping from options to the :class:`Hyperparameter` to use;
            see :class:`~lightning_hpo.dynamics.OptimizerOptions`.

    Attributes:
        history: One :class:`~lightning_hpo.monitoring.HistoryRecord` per update; a sequence that
            takes a few bytes per number.
        skipped: How many updates were skipped because their hypergradient was not finite.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``every_n_steps`` is smaller than the window
            of the estimator.
        MisconfigurationException: At the start of the training, before its first step, if the
            module, the data or the trainer do not fit; all findings in one message.
    """

    def __init__(
        self,
        estimator: Estimator | None = None,
        optimizer: OptimizerFactory = default_optimizer,
        every_n_steps: int | None = None,
        warmup_steps: int = 0,
        dataloader: Iterable[Any] | None = None,
        derivatives: compatibility.Derivatives = "auto",
        scale_lr_with_model: bool = False,
        validation_loss: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        monitor: str = "val_loss",
        dataloader_idx: int = 0,
        seed: int = 0,
        optimizer_hyperparameters: Iterable[str] | Mapping[str, Hyperparameter] = (),
        strict: bool = True,
    ) -> None:
        estimator = ClipR() if estimator is None else estimator
        compatibility.check_arguments(
            estimator,
            optimizer,
            dataloader,
            derivatives,
            validation_loss,
            optimizer_hyperparameters,
            flags={"scale_lr_with_model": scale_lr_with_model, "strict": strict},
        )
        every_n_steps = estimator.horizon if every_n_steps is None else every_n_steps
        compatibility.check_numbers(
            every_n_steps=(every_n_steps, 1),
            warmup_steps=(warmup_steps, 0),
            dataloader_idx=(dataloader_idx, 0),
            seed=(seed, 0),
        )
        compatibility.check_window(estimator, every_n_steps)
        self.estimator = estimator
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        self.derivatives = derivatives
        self.scale_lr_with_model = scale_lr_with_model
        self.history = History()
        self.skipped = 0
        self._optimizer_factory = optimizer
        self._dataloader = dataloader
        self._validation_loss = validation_loss
        self._monitor = monitor
        self._dataloader_idx = dataloader_idx
        self._seed = seed
        self._option_names = optimizer_hyperparameters
        self._strict = strict
        self._steps = 0
        self._handles: list[RemovableHandle | Shadow] = []
        self._shadow: Shadow | None = None
        self._restored: dict[str, Any] | None = None
        self._rng = ResumedRandomState()
        self._final: dict[str, Any] = {}
        self._fitting = True
        self._ready = False

    # ---------------------------------------------------------------------------------- scheduling

    def should_update(self, step: int) -> bool:
        """Whether λ is updated after the given optimizer step (counted from 1). May be overridden.

        An override must leave at least the estimator's window between two updates.
        """
        return step % self.every_n_steps == 0 and step > self.warmup_steps

    def _observes(self) -> bool:
        """Whether the estimator needs to see the coming step."""
        window = self.estimator.window
        coming = self._steps + 1
        if window is None:
            return coming % self.estimator.stride == 0
        return any(self.should_update(coming + i) for i in range(window))

    # -------------------------------------------------------------------------------------- set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes whether a state that may be loaded next belongs to a training."""
        self._fitting = stage == "fit"
        self._restored = None
        self._rng = ResumedRandomState()
        if self._fitting:
            self._final = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on with the random numbers of the training that was saved."""
        self._rng.on_start(trainer.strategy.root_device, trainer.global_rank, trainer.world_size)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets an epoch begin with the random numbers with which it would have begun."""
        loop = trainer.fit_loop
        # When Lightning makes another iterator; before 2.6 also at the start of a resumed epoch.
        again = trainer.current_epoch > 0 and not loop.epoch_loop.restarting
        if again and not getattr(loop, "is_resuming", False):
            self._rng.on_another_iterator(trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the hyperparameters, checks that all can work, and starts the estimator."""
        self.on_fit_start(trainer, pl_module)  # here for strategies that load the state late
        with together():
            self._set_up(trainer, pl_module)

    def _set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hyperparameters = {
            name: h for name, h in named_hyperparameters(pl_module).items() if not h.frozen
        }
        tuned_options = self._tuned_options(pl_module)
        source = find_t2_source(trainer, pl_module, self._dataloader, self._dataloader_idx)
        findings = compatibility.check_trainer(
            trainer, pl_module, [*self._hyperparameters, *tuned_options], self.derivatives
        )
        findings += compatibility.check_example_weights(pl_module, trainer.train_dataloader)
        if source is None:
            findings.append(
                "There are no held-out (T2) data. Pass dataloader=, define hpo_dataloader() on the "
                "module or the datamodule, or give the Trainer a validation dataloader"
            )
        compatibility.refuse(findings)
        assert source is not None

        (optimizer,) = trainer.optimizers
        self._options = self._make_options(trainer, pl_module, tuned_options)
        if self._options is not None:
            self._hyperparameters |= self._options.hyperparameters
        self._problem = self._make_problem(trainer, pl_module)
        self._stream = T2Stream(source, self._seed, trainer.global_rank, max(1, trainer.world_size))
        self._validation = ValidationObjective(
            trainer, pl_module, self._validation_loss, self._monitor, self._dataloader_idx
        )
        self._hyper_optimizer = HyperOptimizer(self._hyperparameters, self._optimizer_factory)
        self._module = pl_module
        self._clipped: tuple[GradientClipping, list[Tensor | None]] | None = None
        self._stepped = False
        self._observing = False
        self._lr = 0.0
        self._verified = False
        self._penalties_checked = False
        self._check = ReplayCheck(
            self._problem, partial(compatibility.may_change_gradients, trainer, pl_module, self)
        )
        self._ready = False
        if self._restored is None:
            self.history, self.skipped, self._steps = History(), 0, 0
        self._remove_hooks()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]
        self._watch_clipping(trainer)

    def _make_options(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        tuned: dict[str, Hyperparameter | None],
    ) -> OptimizerOptions | None:
        """Makes hyperparameters of the optimizer's options that are to be tuned."""
        options = None
        if tuned:
            scheduled = bool(trainer.lr_scheduler_configs)
            options = OptimizerOptions(trainer.optimizers[0], tuned, scheduled=scheduled)
            for h in options.hyperparameters.values():
                h.to(module.device)
        remember_options(module, {} if options is None else options.hyperparameters)
        return options

    def _make_problem(self, trainer: pl.Trainer, module: pl.LightningModule) -> Problem:
        """Describes to the estimator what it differentiates."""
        dynamics = make_dynamics(trainer.optimizers[0])
        return Problem(
            objective=TrainingObjective(trainer, module, list(self._hyperparameters.values())),
            hyperparameters=self._hyperparameters,
            penalties=compatibility.gradient_penalties(module),
            dynamics=dynamics,
            derivatives=self.derivatives,
            options=self._options,
            sharded=is_sharded(dynamics.theta),
        )

    def _tuned_options(self, module: pl.LightningModule) -> dict[str, Hyperparameter | None]:
        """Returns the optimizer's options to tune, without those that are frozen."""
        names = self._option_names
        given = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
        fixed = fixed_options(module)
        return {name: h for name, h in given.items() if f"optimizer.{name}" not in fixed}

    def _first_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Makes the checks that need data, then starts the estimator."""
        moment = self._problem.objective.moment(batch, batch_idx)
        # The forward pass of sharded parameters is itself a collective.
        with nullcontext() if self._problem.sharded else together():
            gradients = self._try_losses(trainer, module, moment)
        if gradients is None:
            return  # a skipped batch shows nothing; look again at the next
        self.estimator.setup(self._problem)
        if self._restored is not None:
            self._restore(self._restored)
            self._restored = None
        if self.estimator.replay != "never":
            self._problem.settle(moment, gradients)
        if trainer.accumulate_grad_batches == 1:
            self._check.expect(gradients)
        self._ready = True

    def _try_losses(
        self, trainer: pl.Trainer, module: pl.LightningModule, moment: Moment
    ) -> list[Tensor | None] | None:
        """Takes the gradient of both losses once; returns that of the training loss over θ."""
        problem = self._problem
        theta = problem.theta
        versions = [p._version for p in theta]
        before = [] if problem.sharded else [p.detach().clone() for p in theta]
        batch_t2 = to_device(trainer, self._stream.peek(), self._dataloader_idx)
        self._validation.gradient(batch_t2, self._stream.consumed, theta)

        objective = problem.objective
        gradients = objective.gradient(moment, theta, objective.leaves())
        findings = compatibility.check_untouched(module, theta, versions)
        if findings:
            for p, value in zip(theta, before, strict=True):
                p.data.copy_(value)
        compatibility.refuse(findings)
        del before
        if gradients is None:
            return None
        problem.in_loss = {
            name
            for name, g in zip(self._hyperparameters, gradients[len(theta) :], strict=True)
            if g is not None
        }
        options = [] if self._options is None else list(self._options.hyperparameters.values())
        compatibility.refuse(
            compatibility.check_dependence(
                module,
                {n: h for n, h in self._hyperparameters.items() if h not in options},
                problem.in_loss,
                problem.penalties,
                theta,
            )
        )
        return gradients[: len(theta)]

    # ---------------------------------------------------------------------------------- every step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Arranges to look at the micro-batch just before it is trained on, θ_t in place.

        That is after the module's own ``on_train_batch_start``, which Lightning calls after those
        of all callbacks: any of them may draw random numbers or set what the loss depends on.
        """
        self._stepped = False
        self._clipped = None  # of a step that overflowed
        self._check.forget()
        self._rng.on_batch_start(trainer.strategy.root_device)
        self._observing = not self._ready or self._observes()
        if not self._observing:
            return
        hook = pl_module.on_train_batch_start

        def after_the_module(*args: Any, **kwargs: Any) -> Any:
            self._unshadow()
            response = hook(*args, **kwargs)
            if response != -1:  # the module ends the epoch
                self._before_batch(trainer, pl_module, batch, batch_idx)
            return response

        self._unshadow()
        self._shadow = Shadow(pl_module, "on_train_batch_start", after_the_module)

    def _before_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Shows the estimator a micro-batch."""
        if not self._ready:
            self._first_batch(trainer, module, batch, batch_idx)
            if not (self._ready and self._observes()):
                self._observing = False
                return
        accumulated = trainer.accumulate_grad_batches
        if batch_idx % accumulated == 0:
            self.estimator.discard()  # what is left of a step that overflowed
        problem = self._problem
        problem.replays_at_once = (
            accumulated > 1
            or self._check.forbids_delay
            or compatibility.may_interfere(trainer, module, self)
        )
        self._check.look_at_hooks()
        objective = problem.objective
        if (
            problem.is_one_sided
            and self._check.is_due(self._steps + 1)
            and self.should_update(self._steps + 1)
        ):
            moment = objective.moment(batch, batch_idx)
            self._check.expect(objective.gradient(moment, problem.theta), is_regular=True)
        replay = self.estimator.replay
        if replay == "never":
            return
        if replay == "after_step":
            is_window = self.estimator.window is not None and self.estimator.window > 1
            moment = objective.moment(batch, batch_idx, keep=True, share=is_window)
        elif problem.replays_at_once:
            moment = objective.moment(batch, batch_idx)
        else:
            moment = objective.moment(batch, batch_idx, keep=True)
            self._check.watch(moment)
        self.estimator.before_batch(moment, 1 / accumulated)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compares the gradient with that of a replay, where that is due."""
        self._check.compare(self._steps + 1)

    def _watch_clipping(self, trainer: pl.Trainer) -> None:
        """Looks at gradients just before they are clipped: penalties and all hooks have acted."""
        plugin = trainer.precision_plugin
        clip = plugin.clip_gradients

        def watched(optimizer: torch.optim.Optimizer, value: float, algorithm: str) -> None:
            if self._observing and value > 0:
                self._keep_unclipped(float(value), by_value=algorithm == "value")
            clip(optimizer, value, algorithm)  # type: ignore[arg-type]

        self._handles.append(Shadow(plugin, "clip_gradients", watched))

    def _keep_unclipped(self, value: float, *, by_value: bool) -> None:
        """Keeps the gradient, which the derivative of clipping needs, if anything is clipped."""
        problem = self._problem
        clipping = GradientClipping(value, by_value, problem.sharded)
        gradients = [None if p.grad is None else local(p.grad.detach()) for p in problem.theta]
        if clipping.acts_on(gradients):
            copies = [None if g is None else widened(g.clone()) for g in gradients]
            self._clipped = clipping, copies

    def _before_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Looks at the step as soon as its gradient is final, which is inside Lightning's closure.

        With a gradient scaler there is no closure, and the gradient is final already.
        """
        if self._options is not None:
            self._options.set_()
        if not self._observing and self._penalties_checked:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._observe_step()
            return None

        def observed() -> Any:
            result = closure()
            self._observe_step()
            return result

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    @torch.no_grad()
    def _observe_step(self) -> None:
        if isinstance(self._module, PenaltyMixin):
            self._module.check_penalties_applied()
        self._penalties_checked = True
        if self._observing:
            step = self._problem.dynamics.capture()
            if not self._verified:
                self._verified = True
                compatibility.refuse(compatibility.check_step(self._problem.dynamics, step))
            if self._clipped is not None:
                step.clipping, step.unclipped = self._clipped
                self._clipped = None
            self.estimator.before_step(step)

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped = True
        if self.scale_lr_with_model:
            self._lr = float(optimizer.param_groups[0]["lr"])
        if self._options is not None:
            self._options.restore_()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Updates λ where an update is due and the optimizer has stepped."""
        if not self._stepped:
            return
        self._steps += 1
        if self._ready and self.should_update(self._steps):
            self._update(trainer, pl_module)

    # -------------------------------------------------------------------------------------- update

    def _update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        batch = to_device(trainer, self._stream.next(), self._dataloader_idx)
        validation = ValidationGradient(
            self._problem, self._validation, batch, self._stream.consumed
        )
        with torch.no_grad():
            hypergradients = self.estimator.hypergradient(validation)
            if hypergradients is not None:
                scale = self._lr if self.scale_lr_with_model else 1.0
                if not self._hyper_optimizer.step(hypergradients, scale):
                    self._skip()
            self.estimator.after_update()
        if hypergradients is None:
            return
        record = make_record(
            self._steps,
            self._hyperparameters,
            hypergradients,
            self.estimator.tangent_norms(),
            self.skipped,
            None if self.estimator.outcome is None else str(self.estimator.outcome),
        )
        self.history.append(record)
        log_record(trainer, module, record, trainer.global_step)

    def _skip(self) -> None:
        if self.skipped == 0:
            warnings.warn(
                f"OnlineHPOCallback: the hypergradient at step {self._steps} is not finite; λ is "
                "left alone. Further such updates are skipped silently and counted in .skipped",
                stacklevel=2,
            )
        self.skipped += 1

    # ------------------------------------------------------------------------------------ clean-up

    def _unshadow(self) -> None:
        if self._shadow is not None:
            self._shadow.remove()
            self._shadow = None

    def _remove_hooks(self) -> None:
        self._unshadow()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _release(self) -> None:
        """Lets go of the optimizer, the module, the data and their worker processes."""
        self._remove_hooks()
        if self._ready:
            self._final = self.state_dict()
        self._ready = False
        self.estimator.release()
        for name in ("_problem", "_stream", "_validation", "_check", "_hyper_optimizer"):
            vars(self).pop(name, None)
        for name in ("_options", "_module", "_hyperparameters", "_clipped"):
            vars(self).pop(name, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the state for a later checkpoint, and lets go of everything else."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keeps the state for a later checkpoint, and lets go of everything else."""
        # Sharded tangents are assembled by all processes together, and here others may be missing.
        if self._ready and self._problem.sharded:
            self._ready, self._final = False, {}
        self._release()

    # --------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns counters, history, λ-optimizer and estimator, for a checkpoint."""
        if not self._ready:
            # Before the first step of a training that was resumed, nothing has moved yet.
            return self._final if self._restored is None else self._restored
        return {
            "steps": self._steps,
            "consumed": self._stream.consumed,
            "skipped": self.skipped,
            "history": [asdict(record) for record in self.history],
            "hyperparameters": {n: list(h.raw.shape) for n, h in self._hyperparameters.items()},
            "optimizer": {
                "kind": type(self._hyper_optimizer.optimizer).__name__,
                "state": self._hyper_optimizer.state_dict(),
            },
            "estimator": {"kind": self.estimator.kind, "state": self.estimator.state_dict()},
            "gradient": {
                "reused": self._problem.reuses_gradient,
                "compared_at": self._check.step,
                "forbids_delay": self._check.forbids_delay,
                "derivatives": self._problem.derivatives,
            },
            "options": {n: {"value": v} for n, v in fixed_options(self._module).items()}
            | {
                name: {"value": h().tolist(), "raw": h.raw.clone()}
                for name, h in (self._options.hyperparameters if self._options else {}).items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the training starts and everything is on its device."""
        if self._fitting:
            self._restored = dict(state_dict) or None
            self._rng = ResumedRandomState(state_dict.get("rng"))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random state of every process, without which dropout could not go on."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state and "rng" not in state:  # it is there before the first step of a resumed training
            rng = RandomState.capture(trainer.strategy.root_device)
            in_epoch = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            checkpoint["callbacks"][self.state_key] = {
                **state,
                "rng": {"in_epoch": in_epoch, "ranks": gather(rng.state_dict())},
            }

    def _restore(self, state: dict[str, Any]) -> None:
        differences = compatibility.compare_checkpoint(
            state,
            self._hyperparameters,
            self.estimator.kind,
            type(self._hyper_optimizer.optimizer).__name__,
        )
        if self._strict:
            compatibility.refuse(differences.values())
        self._steps = state["steps"]
        self.skipped = state["skipped"]
        self.history = History(HistoryRecord(**record) for record in state["history"])
        self._stream.skip_to(state["consumed"])
        if not differences.keys() & {"hyperparameters", "optimizer"}:
            self._hyper_optimizer.load_state_dict(state["optimizer"]["state"])
        if not differences.keys() & {"hyperparameters", "estimator"}:
            self.estimator.load_state_dict(state["estimator"]["state"])
            self._problem.reuses_gradient = state["gradient"]["reused"]
            self._check.step = state["gradient"]["compared_at"]
            self._check.forbids_delay = state["gradient"].get("forbids_delay", False)
            if self.derivatives == "auto" and state["gradient"]["derivatives"] != "reverse":
                self._problem.derivatives = state["gradient"]["derivatives"]  # it had fallen back
        if self._options is not None:
            for name, h in self._options.hyperparameters.items():
                raw = state["options"].get(name, {"raw": h.raw})["raw"]
                if raw.shape == h.raw.shape:
                    h.raw.copy_(raw)
