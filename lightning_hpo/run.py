"""One training with the callback: set-up, first batch, steps, updates, state, release."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hpo import compatibility
from lightning_hpo._stopwatch import Stopwatch
from lightning_hpo.auto import Starts
from lightning_hpo.auto import settle as settle_starts
from lightning_hpo.averages import Averages
from lightning_hpo.choices import Choices
from lightning_hpo.distributed import gather, together
from lightning_hpo.dynamics import (
    OptimizerOptions,
    make_dynamics,
)
from lightning_hpo.estimators import Estimator, PolicyGradient
from lightning_hpo.held_out import HeldOut
from lightning_hpo.hyper_optimizer import HyperOptimizer, OptimizerFactory, default_optimizer
from lightning_hpo.hyperparameters import (
    CategoricalHyperparameter,
    Hyperparameter,
    Positive,
    named_hyperparameters,
)
from lightning_hpo.monitoring import as_numbers
from lightning_hpo.objectives import Moment, TrainingObjective, ValidationObjective
from lightning_hpo.optimizer_verifier import OptimizerVerifier
from lightning_hpo.regularizers import Penalty, PenaltyMixin
from lightning_hpo.rng import ResumedRandomState
from lightning_hpo.served import Served
from lightning_hpo.signal_to_noise import SignalToNoise
from lightning_hpo.step import ExpectedValidation, Space, TrainingMap, ValidationGradient
from lightning_hpo.step.backends import settle, settle_statistics
from lightning_hpo.step.buffers import (
    check_buffers,
    find_buffers,
    follow_newly_written,
    warn_of_newly_written,
)
from lightning_hpo.step.forward_check import check_forward
from lightning_hpo.step.numbers import read_as_numbers, warn_of_other_paths
from lightning_hpo.step.recorder import Recorder
from lightning_hpo.step.snapshot import Snapshot
from lightning_hpo.step.trace_check import TraceCheck
from lightning_hpo.step.value_check import check_value
from lightning_hpo.strategy import LOGIT_STEP, LOOKS, TypicalValues, choose
from lightning_hpo.values import fixed_options, remember_options

# What state_dict() returns changes with it; the number is part of a checkpoint.
FORMAT = 5
# A choice may be asked for under some other choices only: in a layer that may be left out. So many
# looks are at random ones …
LOOKS_FOR_CHOICES = 16
# … unless there are no more combinations than this.
FEW_COMBINATIONS = 32


@dataclass
class Settings:
    """The arguments of the callback that a run needs; see :class:`OnlineHPOCallback`."""

    estimators: Mapping[str, Estimator] | None
    optimizer: OptimizerFactory | None
    lr: float
    every_n_steps: int | None
    dataloader: Iterable[Any] | None
    derivatives: str
    scale_lr_with_model: bool
    validation_loss: Callable[[pl.LightningModule, Any], Tensor] | None
    monitor: str | None
    dataloader_idx: int
    seed: int
    optimizer_hyperparameters: Iterable[str] | Mapping[str, Hyperparameter | Literal["auto"]]
    strict: bool
    should_update: Callable[[int], bool]


@dataclass
class Waiting:
    """Before a training has started: what a checkpoint says about it, if it goes on from one."""

    state: dict[str, Any] = field(default_factory=dict)
    rng: ResumedRandomState = field(default_factory=ResumedRandomState)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the checkpoint said."""
        return self.state


@dataclass
class Finished:
    """After a training: its state, for a checkpoint that is written later."""

    state: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state at the end."""
        return self.state


@dataclass
class Update:
    """What one λ update did.

    Attributes:
        step: The number of optimizer steps taken.
        gradients: dL_V/d(raw λ), by name.
        norms: ‖dθ/d(raw λ)‖, by name; None where no estimator keeps tangents.
        outcome: How the estimates came about, where that can fail.
        is_applied: Whether λ has moved: not where a hypergradient is not finite.
        loss: L_V on the batch of this update; None where no estimator has asked for its gradient.
    """

    step: int
    gradients: dict[str, Tensor]
    norms: dict[str, Tensor] | None
    outcome: str | None
    is_applied: bool
    loss: float | None = None


class Run:
    """One training: everything that it needs lives here, and is dropped with it.

    Args:
        settings: The callback's arguments.
        trainer: The trainer, with optimizers and dataloaders in place.
        module: The LightningModule.
        callback: The callback in whose name this happens.
        resumed: What a checkpoint says, if the training goes on from one.
        clock: Measures the time that is spent here.

    Attributes:
        hyperparameters: All λ that are tuned, by name.
        strategy: What acts in this training, given or chosen.
        assigned: The patterns and estimators that serve any, each with its names.
        initial: The values with which they began, as in the history; NaN before they are known.
        held_out: The held-out data.
        clock: See above; whoever calls the methods of a run measures them.
        served: The estimators at work; empty until the first batch that has a loss.
        steps: The number of optimizer steps taken with the callback.
        first_step: The trainer's ``global_step`` before them.
        rng: The random state of a checkpoint, until it has been put in place.
        replaced: The hyperparameters whose starts were taken for guesses.
        held_constant: The hyperparameters that L_V itself reads, which hypergradients leave out.

    Raises:
        MisconfigurationException: If the module, the data or the trainer do not fit; all findings
            in one message.
    """

    def __init__(
        self,
        settings: Settings,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        callback: pl.Callback,
        resumed: Waiting,
        clock: Stopwatch,
    ) -> None:
        self.clock = clock
        self.rng = resumed.rng
        self.steps = 0
        self._batches: int = resumed.state.get("batches", 0)  # that choices were drawn for
        self._window: int = resumed.state.get("window", 0)  # the first of the present step
        self.first_step: int = resumed.state.get("first_step", trainer.global_step)
        self.served: list[Served] = []
        self.held_constant: list[str] = []
        self.replaced: set[str] = set()
        self._settings = settings
        self._trainer = trainer
        self._module = module
        self._resumed = resumed.state
        self._skips = compatibility.SkippedBatches()
        # In the loss of a step whose gradient is there, they move when it is over.
        self._waiting: list[Hyperparameter] = []
        self._start: Snapshot | None = None  # where the window began, if θ is to return there
        tuned = self._tuned_options()
        given = {f"optimizer.{option}": h for option, h in tuned.items()}
        known = {n: h for n, h in named_hyperparameters(module).items() if h not in given.values()}
        drawn = {
            n: h for n, h in (known | given).items() if isinstance(h, CategoricalHyperparameter)
        }
        compatibility.refuse(compatibility.check_controllers(module, drawn))
        self.choices = Choices(module, drawn, settings.seed, given)
        self.hyperparameters = {
            n: h
            for n, h in known.items()
            if not (h.frozen or n in self.choices.driven or h in self.choices.idle)
        }
        self.held_out = HeldOut(
            trainer,
            module,
            settings.dataloader,
            settings.dataloader_idx,
            settings.seed,
            moves=settings.validation_loss is not None,
        )
        names = [*self.hyperparameters, *(n for n in given if n not in self.choices.driven)]
        frozen = [*(known.keys() - self.hyperparameters), *fixed_options(module)]
        findings = compatibility.check_steps(module)
        passed = [h for h in tuned.values() if isinstance(h, Hyperparameter)]
        findings += compatibility.check_hidden(module, {*known.values(), *passed})
        assigned = None
        if settings.estimators is not None:
            assigned, more = compatibility.assign(settings.estimators, names, frozen)
            policy = [n for n, h in (known | given).items() if getattr(h, "is_policy", False)]
            assigned, others = compatibility.assign_choices(assigned, policy)
            findings += more + others
        findings += compatibility.check_trainer(trainer, module, names, settings.derivatives)
        findings += compatibility.check_auto(trainer.optimizers, tuned)
        findings += compatibility.check_example_weights(module, trainer.train_dataloader)
        if not self.held_out.is_found:
            findings.append(
                "There are no held-out (T2) data. Pass dataloader=, define hpo_dataloader() on the "
                "module or the datamodule, or give the Trainer a validation dataloader"
            )
        compatibility.refuse(findings)

        options = self._make_options(tuned)
        penalties = compatibility.gradient_penalties(module)
        self.strategy = choose(
            trainer,
            self.hyperparameters,
            self.first_step,
            chosen_for=resumed.state.get("chosen_for"),
            assigned=assigned,
            outside_loss=[*(options.hyperparameters if options else {}), *self._named(penalties)],
            every_n_steps=settings.every_n_steps,
            lr=settings.lr if settings.optimizer is None else None,
        )
        self.assigned = self.strategy.assigned
        compatibility.warn_of_resets(trainer, [estimator for _, estimator, _ in self.assigned])
        self.training = TrainingMap(
            objective=TrainingObjective(
                trainer, module, list(self.hyperparameters.values()), self.choices
            ),
            hyperparameters=self.hyperparameters,
            penalties=penalties,
            dynamics=make_dynamics(trainer.optimizers[0]),
            options=options,
            derivatives=settings.derivatives,
            logit_step=LOGIT_STEP if self.strategy.is_chosen else 0.0,
        )
        self._validation = ValidationObjective(
            trainer,
            module,
            settings.validation_loss,
            settings.monitor,
            self.training.objective.shield,
        )
        self._typical = TypicalValues(self.hyperparameters)
        self._hyper_optimizer = HyperOptimizer(
            self.hyperparameters, settings.optimizer or self._default_optimizer
        )
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._kept = [h.kept() for h in self.hyperparameters.values()] if dry else []
        every = self.hyperparameters | self.shown
        self.initial = {name: as_numbers(h.value) for name, h in every.items()}
        self._unresolved = self.hyperparameters.keys() - self.resolved.keys()
        if self.strategy.drifts and not resumed.state:
            self._replace_guesses(list(self._typical))
        verifier = OptimizerVerifier(self.training.dynamics, module)
        self._traces = TraceCheck(trainer, module)
        self.recorder = Recorder(
            trainer, module, callback, self.training, verifier, self._traces, clock
        )
        self._averages = Averages(trainer, module, callback)

    def _tuned_options(self) -> dict[str, Hyperparameter | Literal["auto"] | None]:
        """Returns the optimizer's options to tune, without those that are frozen."""
        names = self._settings.optimizer_hyperparameters
        given: dict[str, Any] = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
        fixed = fixed_options(self._module)
        return {name: h for name, h in given.items() if f"optimizer.{name}" not in fixed}

    def _named(self, penalties: Sequence[Penalty]) -> list[str]:
        """Lists the names of the strengths of penalties."""
        strengths = {id(penalty.hyperparameter) for penalty in penalties}
        return [name for name, h in self.hyperparameters.items() if id(h) in strengths]

    def _default_optimizer(self, raws: list[Tensor]) -> torch.optim.Optimizer:
        if not self.strategy.is_chosen:
            return default_optimizer(raws, self._settings.lr)
        return SignalToNoise(
            self.hyperparameters.values(),
            self.strategy.updates,
            self._typical,
            lr=self._settings.lr,
            is_known=self.strategy.is_length_known,
        )

    @property
    def resolved(self) -> dict[str, Hyperparameter]:
        """Those of the hyperparameters that have a value; the others wait for a gradient."""
        return {name: h for name, h in self.hyperparameters.items() if h.is_resolved}

    @property
    def shown(self) -> dict[str, Hyperparameter]:
        """What the history shows: those that have a value, and choices that a network decides."""
        return self.resolved | {name: self.choices[name] for name in self.choices.driven}

    def _make_options(
        self, tuned: dict[str, Hyperparameter | Literal["auto"] | None]
    ) -> OptimizerOptions | None:
        """Makes hyperparameters of the optimizer's options that are to be tuned."""
        options = None
        if tuned:
            scheduled = bool(self._trainer.lr_scheduler_configs)
            given = {
                name: Hyperparameter.unresolved(Positive()) if isinstance(h, str) else h
                for name, h in tuned.items()
            }
            options = OptimizerOptions(self._trainer.optimizers[0], given, scheduled=scheduled)
            # Others are with the module; the first batch is drawn before estimators are restored.
            saved = self._resumed.get("options", {})
            for name, h in options.hyperparameters.items():
                h.to(self._module.device)
                raw = saved.get(name, {}).get("raw")
                if raw is not None and raw.shape == h.raw.shape:
                    h.raw.copy_(raw)
            own = options.hyperparameters.items()
            self.hyperparameters |= {n: h for n, h in own if n not in self.choices.driven}
        remember_options(self._module, {} if options is None else options.hyperparameters)
        return options

    def _resolve_options(self, *, at_step: bool = False) -> None:
        """Gives tuned options with ``"auto"`` their values, as far as these are known by now."""
        options = self.training.options
        waiting = [] if options is None else [*options.unresolved().items()]
        if options is None or not waiting:
            return
        starts = Starts(self._trainer, at_step=at_step)
        start = starts.weight_decay(self._trainer.optimizers[0])  # of no other option is it known
        settle_starts(self._trainer, [(name, h, start) for name, h in waiting])
        options.renew_(name for name, _ in waiting)

    # --------------------------------------------------------------------------------- first batch

    def _first_batch(self, batch: Any, batch_idx: int) -> None:
        """Makes the checks that need data, then starts the estimators."""
        training = self.training
        if isinstance(self._module, PenaltyMixin):
            self._module.agree_on_constants()
            self._module.resolve_strengths()
        moment = training.objective.moment(batch, batch_idx)
        # The forward pass of sharded parameters is itself a collective.
        with nullcontext() if training.sharded else together():
            gradients = self._try_losses(moment)
        if gradients is None or None in gather(None if gradients is None else True):
            return  # a skipped batch shows nothing; look again at the next
        served = [
            Served(
                pattern,
                copy.copy(estimator),
                Space(
                    training,
                    names,
                    uses_hessian=estimator.uses_hessian,
                    window=estimator.window,
                ),
            )
            for pattern, estimator, names in self.assigned
        ]
        if not any(each.space.replays for each in served):
            training.statistics.follow(())  # where no λ acts on a forward pass, none moves them
        else:
            blind = [
                type(each.estimator).__name__
                for each in served
                if each.space.replays and not each.estimator.follows_statistics
            ]
            training.statistics.warn_of_constants(list(dict.fromkeys(blind)))
            find_buffers(
                training,
                moment,
                lambda buffers: self._validate([], buffers),
                is_read_later=any(
                    each.estimator.follows_statistics and each.estimator.window != 1
                    for each in served
                ),
                known=self._resumed.get("buffers", ()),
            )
            buffers = training.statistics.buffers()
            settle_statistics(
                training, moment, gradients, lambda: self._validate(training.theta, buffers)
            )
        for each in served:
            each.estimator.setup(each.space)
        follow = [each.space for each in served if each.estimator.follows_statistics]
        if follow and len(training.statistics):
            check_buffers(training, moment, follow)
        if self._trainer.world_size == 1:  # ranks would have to agree at each step
            training.follow_newly_written = lambda at: follow_newly_written(
                training, at, lambda buffers: self._validate([], buffers), follow
            )
        if self._resumed:
            self._restore(self._resumed, served)
            self._resumed = {}
        self._resolve_options()
        if any(each.space.replays for each in served):
            self.recorder.watch_iterators()
            training.derivatives = settle(training, moment, gradients)
            with together():
                uses_hessian = any(each.estimator.uses_hessian for each in served)
                check_forward(training, moment, uses_hessian=uses_hessian)
            check_value(training, moment, [each.space for each in served])
        if self._trainer.accumulate_grad_batches == 1:
            self.recorder.check.expect(gradients)
        self.recorder.shifts.follows_state = any(each.estimator.window != 1 for each in served)
        self.served = served

    def _look_at_inputs(self, batch: Any, batch_idx: int) -> None:
        """Replaces guesses of noise before the training adds any: too much kills at once.

        What one layer is given depends on the noise of those before it, so it looks again.
        """
        if not self.strategy.replaces_guesses or self._resumed:
            return
        strengths = {penalty.hyperparameter for penalty in self.training.penalties}
        unknown = [
            h for h in self.hyperparameters.values() if h.typical is None and h not in strengths
        ]
        objective = self.training.objective
        raws = [h.raw for h in self.hyperparameters.values()]
        known = {h: name for name, h in self.hyperparameters.items()}
        replaced: set[Hyperparameter] = set()
        for _ in range(LOOKS if unknown else 0):
            moment = objective.moment(batch, batch_idx)
            with objective.evaluations(moment, []) as evaluate:
                evaluate([], raws)
                sizes = {h: vars(h)["input_size"] for h in unknown if "input_size" in vars(h)}
            found = self._typical.look_at_inputs(self._trainer, sizes)
            moved = self._replace_guesses(found, replaced)
            if not moved:
                return
            replaced.update(h for h in found if known[h] in moved)

    def _validate(
        self, theta: Sequence[Tensor], statistics: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """Takes a gradient of the validation loss, on a batch that is not used up."""
        return self._validation.gradient(self.held_out.peek(), theta, statistics)

    def _look_at_direct_parts(self) -> list[str]:
        """Lists the λ that L_V itself reads: the weights are all that hypergradients go through."""
        options = {} if self.training.options is None else self.training.options.hyperparameters
        looked = {
            name: h
            for name, h in self.hyperparameters.items()
            if name not in options and not h.is_policy
        }
        if not looked or self.training.sharded:
            return []
        try:
            direct = self._validation.direct(self.held_out.peek(), list(looked.values()))
        except RuntimeError:
            # A step may do with raw λ as it is what it cannot do where that has a graph (.numpy()).
            return []
        pairs = zip(looked, direct, strict=True)
        return [n for n, g in pairs if g is not None and bool((g.isfinite() & (g != 0)).any())]

    def _try_losses(self, moment: Moment) -> list[Tensor | None] | None:
        """Takes the gradient of both losses once; returns that of the training loss over θ."""
        training = self.training
        theta = training.theta
        before = [] if training.sharded else [p.detach().clone() for p in theta]
        self._validation.settle(self.held_out.peek(), theta)
        self._validate(theta)
        self.held_constant = self._look_at_direct_parts()

        objective = training.objective
        gradients = objective.gradient(moment, theta, objective.leaves())
        if not training.sharded:
            findings = compatibility.check_untouched(
                self._module, theta, before, None if gradients is None else gradients[: len(theta)]
            )
            for p, value in zip(theta, before, strict=True):
                if not torch.equal(p, value):
                    p.data.copy_(value)
            compatibility.refuse(findings)
        del before
        if gradients is None:
            return None
        objective.shield.treat_as_state(
            p for p, g in zip(theta, gradients, strict=False) if g is None
        )
        training.in_loss = frozenset(
            name
            for name, g in zip(self.hyperparameters, gradients[len(theta) :], strict=True)
            if g is not None
        )
        training.in_loss |= read_as_numbers(training, moment)
        self._ask_for_choices(moment)
        options = {} if training.options is None else training.options.hyperparameters
        findings = compatibility.check_dependence(
            self._module,
            {n: h for n, h in self.hyperparameters.items() if n not in options and not h.is_policy},
            training.in_loss,
            training.penalties,
            theta,
        )
        over_lambda = dict(zip(self.hyperparameters, gradients[len(theta) :], strict=True))
        findings += compatibility.check_counted_once(self._module, self.resolved, over_lambda)
        compatibility.refuse(findings)
        warn_of_other_paths(training, moment, gradients[: len(theta)])
        return gradients[: len(theta)]

    def _ask_for_choices(self, moment: Moment) -> None:
        """Finds out which choices the step asks for, at least under some others.

        It looks at all combinations where they are few. Else at each choice, the others being the
        most probable ones, and at random ones.

        Raises:
            MisconfigurationException: If it never asks for one that is tuned. Only a warning, where
                others decide what is asked for, and it may be asked for under a combination that
                was not looked at.
        """
        training = self.training
        compatibility.warn_of_clipped_responses(self._trainer, [e for _, e, _ in self.assigned])
        options = [] if training.options is None else training.options.choices
        policy = {name: h for name, h in self.hyperparameters.items() if h.is_policy}
        wanted = [n for n in self.choices.decided_by(policy.values()) if n not in options]
        if not wanted:
            return
        raws = [h.raw for h in self.hyperparameters.values()]
        is_complete = self.choices.number(wanted) <= FEW_COMBINATIONS
        seen: set[frozenset[str]] = set()
        for indices in self.choices.looks(wanted, 0 if is_complete else LOOKS_FOR_CHOICES):
            look = replace(moment, choices=indices)
            with training.objective.evaluations(look, [], looks="choices") as evaluate:
                evaluate([], raws)
                seen.add(frozenset(name for name in wanted if self.choices[name].was_asked))
            if frozenset().union(*seen).issuperset(wanted):
                break
        asked = frozenset().union(*seen)
        may_be_asked = not is_complete and len(seen) > 1
        findings = compatibility.check_asked(self._module, wanted, asked, may_be_asked=may_be_asked)
        compatibility.refuse(findings)
        training.in_loss |= {
            name
            for name, h in policy.items()
            if {*wanted}.intersection(self.choices.decided_by([h]))
        }

    # --------------------------------------------------------------------------------------- steps

    def _observing(self) -> list[Served]:
        """Lists the estimators that need to see the coming step."""
        should_update = self._settings.should_update
        return [each for each in self.served if each.observes(self.steps + 1, should_update)]

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Arranges to look at a micro-batch just before it is trained on, θ_t in place."""
        if batch_idx % self._trainer.accumulate_grad_batches == 0:
            self._window = self._batches
        self.choices.draw(self._batches, self._window)
        self._batches += 1
        self.rng.on_batch_start(self._trainer.strategy.root_device)
        self._skips.look(batch_idx, self._trainer.accumulate_grad_batches)
        is_seen = not self.served or bool(self._observing())
        self.recorder.begin((lambda: self._see(batch, batch_idx)) if is_seen else None)

    def _see(self, batch: Any, batch_idx: int) -> None:
        step = self.steps + 1
        compares = self._settings.should_update(step)
        if not self.served:
            with self.clock, nullcontext() if self.training.sharded else together():
                self._look_at_inputs(batch, batch_idx)
        with self.clock, self._traces("batch", step, batch, may_wait=compares):
            self._look_at(batch, batch_idx, compares=compares)

    def _look_at(self, batch: Any, batch_idx: int, *, compares: bool) -> None:
        if not self.served:
            self._first_batch(batch, batch_idx)
        observing = self._observing()
        if not observing:
            return
        if self._start is None and any(each.estimator.restart for each in observing):
            self._start = Snapshot(self.training)
        self.recorder.see(
            batch,
            batch_idx,
            [(each.space, each.estimator.observe) for each in observing],
            self.steps + 1,
            compares=compares,
        )

    def before_step(self) -> None:
        """Compares the gradient with that of a replay, where that is due; penalties come later."""
        self.recorder.check.compare(self.steps + 1)
        self._resolve_options(at_step=True)
        if self.strategy.drifts and not self._typical.is_complete:
            found = self._typical.look(self._trainer, self.training.penalties)
            in_loss = {self.hyperparameters[name] for name in self.training.in_loss}
            self._waiting = [h for h in found if h in in_loss]
            self._replace_guesses(h for h in found if h not in in_loss)

    @torch.no_grad()
    def _replace_guesses(
        self, hyperparameters: Iterable[Hyperparameter], replaced: Set[Hyperparameter] = frozenset()
    ) -> list[str]:
        if self.first_step > 0 or not self.strategy.replaces_guesses:
            return []  # the module has been trained before, or will hardly be
        moved = self._typical.replace_guesses(hyperparameters, replaced)
        self.replaced.update(moved)
        if self.training.options is not None:
            self.training.options.renew_(n for n in moved if n.startswith("optimizer."))
        return moved

    def after_batch(self) -> Update | None:
        """Updates λ where the optimizer has stepped and an update is due."""
        try:
            return self._after_batch()
        finally:
            self.choices.forget()

    def _after_batch(self) -> Update | None:
        if not self.recorder.take_step():
            return None
        self.steps += 1
        for name in self._unresolved & self.resolved.keys():
            self.initial[name] = as_numbers(self.hyperparameters[name].value)
            self._unresolved.remove(name)
        update = None
        if self.served and self._settings.should_update(self.steps):
            update = self._update()
        if self._waiting:
            self._replace_guesses(self._waiting)
            self._waiting = []
        if update is not None:
            self._typical.settle()
        return update

    @torch.no_grad()
    def _update(self) -> Update | None:
        """Estimates the hypergradient and moves λ; None where no window is complete."""
        self.recorder.shifts.look(may_wait=True)
        with self._traces("update", self.steps):
            gradients, norms, outcomes, loss = self._estimate()
        warn_of_newly_written(self.training)
        is_applied = False
        if gradients:
            scale = self.recorder.lr if self._settings.scale_lr_with_model else 1.0
            found = [gradients.get(name) for name in self.hyperparameters]
            is_applied = self._hyper_optimizer.step(found, scale)
            self.choices.show()
            self._averages.follow()
        if self._start is not None:
            self._start.restore()
            self._start = None
            self.recorder.shifts.forget()
        if not gradients:
            return None
        parts = [
            outcome if len(self.served) == 1 else f"{pattern}: {outcome}"
            for pattern, outcome in outcomes.items()
        ]
        outcome = ", ".join(parts) or None
        return Update(self.steps, gradients, norms or None, outcome, is_applied, loss)

    def _estimate(
        self,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str], float | None]:
        """Asks all estimators: for hypergradients and norms by name, outcomes by pattern; L_V."""
        validation = self._validation_gradient()
        gradients: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        outcomes: dict[str, str] = {}
        for each in self.served:
            estimate = each.estimate(validation)
            if estimate is None:
                continue
            names = each.space.hyperparameters
            gradients.update(zip(names, estimate.gradients, strict=True))
            norms.update(zip(names, estimate.norms or (), strict=estimate.norms is not None))
            if estimate.outcome is not None:
                outcomes[each.pattern] = estimate.outcome
        for name in self.hyperparameters.keys() - self.resolved.keys():
            gradients.pop(name, None)
            norms.pop(name, None)
        return gradients, norms, outcomes, validation.loss()

    def _validation_gradient(self) -> ValidationGradient:
        """Makes g_V of the coming update: where there are choices, of the mean loss over them."""
        batch = self.held_out.next()
        policy = next(
            (e.estimator for e in self.served if isinstance(e.estimator, PolicyGradient)), None
        )
        if policy is None:
            is_shared = len(self.served) > 1
            return ValidationGradient(self.training, self._validation, batch, is_shared=is_shared)
        drawn = policy.draws("held out", self.held_out.consumed)
        return ExpectedValidation(self.training, self._validation, batch, drawn)

    # --------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns counters, λ-optimizer and estimators, for a checkpoint."""
        if not self.served:
            return self._resumed  # nothing has moved yet
        options = self.training.options
        return {
            "format": FORMAT,
            "steps": self.steps,
            "batches": self._batches,
            "window": self._window,
            "first_step": self.first_step,
            "chosen_for": self.strategy.chosen_for,
            "consumed": self.held_out.consumed,
            "hyperparameters": {n: list(h.raw.shape) for n, h in self.hyperparameters.items()},
            "optimizer": {
                "kind": type(self._hyper_optimizer.optimizer).__name__,
                "state": self._hyper_optimizer.state_dict(),
            },
            "estimators": [
                {
                    "kind": each.estimator.kind,
                    "names": list(each.space.hyperparameters),
                    "state": each.estimator.state_dict(),
                }
                for each in self.served
            ],
            "typical": self._typical.state_dict(),
            "start": None if self._start is None else self._start.state_dict(),
            "derivatives": self.training.derivatives,
            "buffers": self.training.followed(),
            "check": self.recorder.check.state_dict(),
            "options": {n: {"value": v} for n, v in fixed_options(self._module).items()}
            | {
                name: {"value": h.fixed(), "raw": h.raw.clone()}
                for name, h in (options.hyperparameters if options else {}).items()
            },
        }

    def _restore(self, state: dict[str, Any], served: list[Served]) -> None:
        differences = compatibility.compare_checkpoint(
            state,
            FORMAT,
            self.hyperparameters,
            [(each.estimator.kind, list(each.space.hyperparameters)) for each in served],
            type(self._hyper_optimizer.optimizer).__name__,
        )
        if self._settings.strict:
            compatibility.refuse(differences.values())
        training = self.training
        self.steps = state["steps"]
        self.held_out.skip_to(state["consumed"])
        if not differences.keys() & {"hyperparameters", "optimizer"}:
            if "typical" in state:
                self._typical.load_state_dict(state["typical"])
            self._hyper_optimizer.load_state_dict(state["optimizer"]["state"])
        if not differences.keys() & {"hyperparameters", "estimator"}:
            for each, saved in zip(served, state["estimators"], strict=True):
                each.estimator.load_state_dict(saved["state"])
            if state["start"] is not None:
                self._start = Snapshot(training, state["start"])
            self.recorder.check.load_state_dict(state["check"])
            if training.is_automatic and state["derivatives"] == "finite_difference":
                training.derivatives = state["derivatives"]  # it had fallen back

    def close(self) -> None:
        """Takes all hooks away; the run can then be let go of as a whole.

        What a dry run has found and tuned in its few steps is not for a training.
        """
        self.recorder.close()
        self.choices.forget()
        self.training.follow_newly_written = None
        for put_back in self._kept:
            put_back()
