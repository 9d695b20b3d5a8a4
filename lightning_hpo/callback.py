"""OnlineHPOCallback: when things happen, nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor

from lightning_hpo import compatibility
from lightning_hpo._arguments import check_integer, check_number, named_arguments
from lightning_hpo._lightning import join, join_again
from lightning_hpo._repr import shown
from lightning_hpo._stopwatch import Stopwatch
from lightning_hpo._trainer import length
from lightning_hpo.diagnosis import Diagnosis, Subject
from lightning_hpo.distributed import gather, together
from lightning_hpo.estimators import Estimator
from lightning_hpo.hyper_optimizer import OptimizerFactory, default_optimizer
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.monitoring import (
    History,
    HistoryRecord,
    log_interval,
    log_record,
    make_record,
    show_record,
)
from lightning_hpo.overlap import flattened, overlap
from lightning_hpo.plots import plot
from lightning_hpo.results import Results
from lightning_hpo.rng import RandomState, ResumedRandomState
from lightning_hpo.run import Finished, Run, Settings, Update, Waiting
from lightning_hpo.strategy import Strategy

_RATE = (
    "the rate at which λ moves is chosen; lr=2.0 doubles it, and optimizer=lambda raw: "
    "torch.optim.Adam(raw, lr=0.01) sets one of your own"
)
_LIKE_A_RATE = (1e-5, 0.05)  # where learning rates lie, and factors do not
_HINTS = {
    "learning_rate": _RATE,
    "hyper_lr": _RATE,
    "val_dataloader": "held-out data are given as dataloader=",
    "metric": "the name of the logged loss that is L_V is given as monitor=",
    "loss": "L_V is given as validation_loss=lambda module, batch: ...",
}


class OnlineHPOCallback(pl.Callback):
    """Tunes every :class:`Hyperparameter` of the module during a single training.

    After every ``every_n_steps`` optimizer steps it draws a held-out batch, estimates the
    hypergradient dL_V/dλ, and moves raw λ with an optimizer of its own. With a λ-optimizer of
    learning rate 0 the training is bit-identical to one without the callback.

    A Trainer takes one such callback. Where hyperparameters need different estimators, give it a
    mapping (below).

    Without an ``estimator``, all that is not given is chosen when a training starts, from its
    length and from the kinds and the number of the λ; one line says what, and ``strategy`` has it.

    Example:
        >>> callback = OnlineHPOCallback()
        >>> Trainer(callbacks=[callback]).fit(Tuned(), train_loader, validation_loader)
        >>> print(callback.summary())
        OnlineHPOCallback: ... updates of λ in 20 steps...

    Args:
        estimator: How the hypergradient is estimated. Default: chosen, see
            :func:`lightning_hpo.strategy.choose_estimators`. A mapping from patterns
            of hyperparameter names to estimators, such as ``{"keep*": T1T2(), "*": ClipR()}``,
            gives each hyperparameter the estimator of the first pattern that fits (``*``, ``?`` and
            ``[...]`` as in :mod:`fnmatch`). They share the copies of batches, and the validation
            batch with its gradient; tangents share the graph of a replay. All λ are updated
            together.
        optimizer: Makes the λ-optimizer from the list of raw tensors; its learning rate is in units
            of raw λ. Default, with the estimator:
            :class:`lightning_hpo.signal_to_noise.SignalToNoise`, whose rate suits the length of
            the training. With an estimator of yours: Adam with learning rate 0.01.
        every_n_steps: Optimizer steps between two updates. Default: the longest horizon of the
            estimators that were given (1 for T1T2 and ClipR, K for UnrollK), else chosen.
        warmup_steps: Optimizer steps before the first update; tangents advance meanwhile.
        dataloader: Held-out batches. Default: ``hpo_dataloader()`` of the module or the datamodule,
            else the validation dataloader, reshuffled. Several loaders, in a list or a dict, count
            as those of the validation do; a ``CombinedLoader`` makes batches of batches in any mode
            but ``"sequential"``.
        derivatives: ``"auto"``, ``"reverse"``, ``"forward"`` or ``"finite_difference"``; see
            :mod:`lightning_hpo.derivatives`. ``"auto"`` takes ``"reverse"`` where the model
            supports it and falls back to finite differences, saying so once.
        scale_lr_with_model: Multiplies the λ-optimizer's learning rate c by the model's learning
            rate η in force at that step (that of its first parameter group): c·η of Algorithm 1 of
            the online-HPO paper.
        validation_loss: L_V as a function of the module and a batch. Default: that of
            ``validation_step``.
        monitor: The name under which ``validation_step`` logs its loss, a tensor or a metric, or
            returns it in a dict. Default: what it returns, a loss or a dict with ``loss``, else
            what it logs, or has in that dict, as ``val_loss``, ``valid_loss`` or
            ``validation_loss``.
        dataloader_idx: Which of several dataloaders to draw from, of the validation or given.
        seed: Seed of the order in which held-out batches are drawn.
        optimizer_hyperparameters: Options of the model's optimizer to tune as well, such as
            ``["lr", "momentum"]``, or a mapping from options to the :class:`Hyperparameter` to use.
            They are named ``optimizer.<option>`` and common to all parameter groups. ``lr`` is
            tuned on a log scale; under a schedule, or where the groups differ, as the *scale* on
            the learning rates, which starts at 1. A :class:`CategoricalHyperparameter` is drawn for
            each step; choices of ``lr`` are scales where that is. ``{"weight_decay": "auto"}``
            starts where it begins to matter over this training (see :mod:`lightning_hpo.auto`).
        strict: Whether a checkpoint of other hyperparameters, or of another estimator, is refused.
            With False the training goes on with what fits: the states of the λ-optimizer and of
            the estimator where they and the hyperparameters are the same. (Where the module has
            other hyperparameters, Lightning itself needs ``strict_loading = False`` on it.)
        lr: A factor, without unit, on the rate of the default λ-optimizer; 0 lets λ stay.

    Attributes:
        strategy: What acts in the training, given or chosen; None before the first one.
        every_n_steps: Optimizer steps between two updates; None before they are chosen.
        history: What each update has done; see :attr:`history`.
        skipped: How many updates were skipped because their hypergradient was not finite.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, ``every_n_steps`` is smaller than the window of
            an estimator, or one of several estimators has ``restart=True``.
        MisconfigurationException: At the start of the training, before its first step, if the
            module, the data or the trainer do not fit; all findings in one message.
        RuntimeError: On several ranks, where another one has raised an error at the start.
    """

    @named_arguments("OnlineHPOCallback", _HINTS)
    def __init__(
        self,
        estimator: Estimator | Mapping[str, Estimator] | None = None,
        optimizer: OptimizerFactory = default_optimizer,
        every_n_steps: int | None = None,
        warmup_steps: int = 0,
        dataloader: Iterable[Any] | None = None,
        derivatives: compatibility.Derivatives = "auto",
        scale_lr_with_model: bool = False,
        validation_loss: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        monitor: str | None = None,
        dataloader_idx: int = 0,
        seed: int = 0,
        optimizer_hyperparameters: Iterable[str]
        | Mapping[str, Hyperparameter | Literal["auto"]] = (),
        strict: bool = True,
        lr: float = 1.0,
    ) -> None:
        join_again()
        compatibility.check_arguments(
            estimator,
            optimizer,
            dataloader,
            derivatives,
            validation_loss,
            monitor,
            optimizer_hyperparameters,
            flags={"scale_lr_with_model": scale_lr_with_model, "strict": strict},
        )
        self.estimator = estimator
        estimators = self._estimators()
        if every_n_steps is None and estimators is not None:
            every_n_steps = max(each.horizon for each in estimators.values())
        if every_n_steps is not None:
            check_integer("OnlineHPOCallback", 1, every_n_steps=every_n_steps)
        check_integer(
            "OnlineHPOCallback",
            0,
            warmup_steps=warmup_steps,
            dataloader_idx=dataloader_idx,
            seed=seed,
        )
        check_number(
            "OnlineHPOCallback", "a finite number, at least 0", lambda x: 0 <= x < math.inf, lr=lr
        )
        if lr != 1 and optimizer is not default_optimizer:
            raise ValueError(
                f"OnlineHPOCallback: lr={lr:g} scales the rate of the λ-optimizer that is chosen "
                "where none is given; set the rate of your own in optimizer="
            )
        if _LIKE_A_RATE[0] <= lr <= _LIKE_A_RATE[1]:
            warnings.warn(
                f"OnlineHPOCallback: lr={lr:g} is a factor on the rate that is chosen, expected "
                f"near 1; λ will move {1 / lr:.0f} times as slowly. Leave it out, or for a rate in "
                f"raw λ pass optimizer=lambda raw: torch.optim.Adam(raw, lr={lr:g})",
                stacklevel=3,
            )
        if estimators is not None and every_n_steps is not None:
            compatibility.check_windows(estimators.values(), every_n_steps)
        self.lr = lr
        self.every_n_steps = self._given_interval = every_n_steps
        self.warmup_steps = warmup_steps
        self.derivatives = derivatives
        self.scale_lr_with_model = scale_lr_with_model
        self._results = Results()
        self._optimizer_factory = optimizer
        self._dataloader = dataloader
        self._validation_loss = validation_loss
        self._monitor = monitor
        self._dataloader_idx = dataloader_idx
        self._seed = seed
        self._option_names = optimizer_hyperparameters
        self._strict = strict
        self._phase: Waiting | Run | Finished = Waiting()
        self._is_logged = False  # whether loggers have the last record

    def __repr__(self) -> str:
        names = ("estimator", "every_n_steps", "warmup_steps", "derivatives", "lr")
        parts = [shown(self, names)]
        if self.history:
            values = [f"{name}={_brief(v)}" for name, v in self.history[-1].values.items()]
            parts += [f"{len(self.history)} updates, last {', '.join(values)}"]
        return f"OnlineHPOCallback({'; '.join(parts)})"

    def _estimators(self) -> Mapping[str, Estimator] | None:
        """Returns the estimators that were given, by the patterns of the names that they serve."""
        return {"*": self.estimator} if isinstance(self.estimator, Estimator) else self.estimator

    @property
    def history(self) -> History:
        """One :class:`lightning_hpo.monitoring.HistoryRecord` per update.

        A sequence that takes a few bytes per number. Where a package trains with a copy of this
        callback (``copy.deepcopy``), it is the copy's, until this one trains itself; a copy made by
        ``pickle``, in another process, keeps its own, in ``trainer.callbacks`` there.

        Example:
            >>> record = callback.history[-1]
            >>> record.step, list(record.values)
            (20, ['l2'])
        """
        return self._results.here.history

    @property
    def strategy(self) -> Strategy | None:
        """What acts in the last training, given or chosen; None before the first.

        Example:
            >>> callback.strategy.every_n_steps
            1
        """
        return self._results.here.strategy

    @property
    def skipped(self) -> int:
        """How many updates were skipped because their hypergradient was not finite.

        Example:
            >>> callback.skipped
            0
        """
        return self._results.here.skipped

    def plot(self, names: Sequence[str] | None = None) -> tuple[Any, Any]:
        """Draws the last training: each λ on its own scale, its hypergradients, and L_V.

        The first row has the values, with the bounds of their constraints where these are near, or
        the probabilities of choices; the second the hypergradients with respect to raw λ, their
        mean over a twentieth of the updates, and one standard deviation to both sides; below, L_V
        on the held-out batches.

        Args:
            names: The hyperparameters to draw. Default: the first four.

        Returns:
            A matplotlib figure and its array of axes.

        Raises:
            ModuleNotFoundError: Without matplotlib.
            RuntimeError: Before the first update.
            KeyError: If a name is unknown.
            ValueError: If ``names`` is empty.

        Example:
            >>> figure, axes = callback.plot(["l2"])
            >>> figure.savefig("l2.png")
        """
        subjects = self._diagnosis.subjects.items()
        constraints = {n: s.constraint for n, s in subjects}
        choices = {n: s.choices for n, s in subjects}
        return plot(self.history, constraints, names, choices)

    def summary(self) -> str:
        """Returns, in a few lines, what the last training has shown; its end logs them.

        For each λ its value before the first and after the last update, whether it was still on its
        way over the last fifth of them, and at which bound it sits; the held-out loss at the start
        and at the end; where there was any, in which share of the updates tangents were clipped,
        which were skipped, how far so few updates can move λ, and that the training has ended
        early; and what tuning has cost: the time of the whole training over that outside of this
        callback, on the host, since it was started or resumed. No device is waited for: on a GPU,
        where the host runs ahead, that is a rough number.

        Example:
            >>> from pathlib import Path
            >>> _ = Path("summary.txt").write_text(callback.summary(), encoding="utf-8")
        """
        if self._results.here.diagnosis is None:
            return "OnlineHPOCallback: there has been no training yet; call this after trainer.fit"
        if isinstance(self._phase, Run) and self._phase.served:
            self._diagnosis.steps = self._phase.steps
        updates = len(self.history)
        reach = None if self.strategy is None else self.strategy.reach(updates)
        return self._diagnosis.summary(self.history, self.skipped, reach)

    @property
    def _diagnosis(self) -> Diagnosis:
        diagnosis = self._results.here.diagnosis
        return Diagnosis() if diagnosis is None else diagnosis

    def should_update(self, step: int) -> bool:
        """Whether λ is updated after the given optimizer step. May be overridden.

        An override must leave at least the window of every estimator between two updates.

        Args:
            step: The number of the step in this training, counted from 1.

        Example:
            >>> class Early(OnlineHPOCallback):
            ...     def should_update(self, step):
            ...         return step <= 1000 and super().should_update(step)
            >>> Early(T1T2()).should_update(1001)
            False
        """
        every = self.every_n_steps
        return every is not None and step % every == 0 and step > self.warmup_steps

    # ------------------------------------------------------------------------------- start and end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes whether a state that may be loaded next belongs to a training."""
        if isinstance(self._phase, Run):
            self._phase.close()
        if stage == "fit":
            self._phase = Waiting()
        elif isinstance(self._phase, Waiting):
            self._phase = Finished()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on with the random numbers of the training that was saved."""
        assert isinstance(self._phase, Waiting)
        self._phase.rng.on_start(
            trainer.strategy.root_device, trainer.global_rank, trainer.world_size
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the hyperparameters, checks that all can work, and starts to watch the training."""
        self.on_fit_start(trainer, pl_module)  # here for strategies that load the state late
        assert isinstance(self._phase, Waiting)
        waiting = self._phase
        clock = Stopwatch()
        count = sum(isinstance(c, OnlineHPOCallback) for c in trainer.callbacks)  # type: ignore[attr-defined]
        compatibility.refuse(compatibility.check_alone(count))
        with clock:
            with together():
                self._phase = Run(self._settings(), trainer, pl_module, self, waiting, clock)
            strategy = self._phase.strategy
            self.every_n_steps = strategy.every_n_steps
            if strategy.is_chosen:
                rank_zero_info(f"OnlineHPOCallback: {strategy}")
            records = waiting.state.get("history", ())
            skipped = waiting.state.get("skipped", 0)
            diagnosis = self._begin_diagnosis(trainer, self._phase, waiting.state)
            history = (HistoryRecord(**record) for record in records)
            self._results.begin(history, skipped, diagnosis, strategy)

    def _begin_diagnosis(
        self, trainer: pl.Trainer, run: Run, state: Mapping[str, Any]
    ) -> Diagnosis:
        """Notes how the training starts, and warns of what can be seen already."""
        estimators = {name: each for _, each, names in run.assigned for name in names}
        is_regular = type(self).should_update is OnlineHPOCallback.should_update
        every = run.strategy.every_n_steps
        diagnosis = Diagnosis(
            subjects={
                name: Subject.of(name, h, run.initial[name], estimators.get(name))
                for name, h in (run.hyperparameters | run.shown).items()
            },
            clock=run.clock,
            is_told=trainer.is_global_zero,
            steps=state.get("steps", 0),
            every=every,
            warmup=self.warmup_steps,
            first_due=(self.warmup_steps // every + 1) * every if is_regular else None,
            planned=length(trainer) - run.first_step,
            replaced=run.replaced,
        )
        diagnosis.load_state_dict(state.get("diagnosis", {}))
        diagnosis.look_at_data(flattened(trainer.train_dataloader), run.held_out.loaders)
        sizes = {name: h.raw.numel() for name, h in run.hyperparameters.items()}
        diagnosis.look_at_estimators(run.assigned, sizes, run.training.theta)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            diagnosis.look_at_length(length(trainer) - run.first_step)
        return diagnosis

    def _settings(self) -> Settings:
        return Settings(
            estimators=self._estimators(),
            optimizer=None
            if self._optimizer_factory is default_optimizer
            else self._optimizer_factory,
            lr=self.lr,
            every_n_steps=self._given_interval,
            dataloader=self._dataloader,
            derivatives=self.derivatives,
            scale_lr_with_model=self.scale_lr_with_model,
            validation_loss=self._validation_loss,
            monitor=self._monitor,
            dataloader_idx=self._dataloader_idx,
            seed=self._seed,
            optimizer_hyperparameters=self._option_names,
            strict=self._strict,
            should_update=self.should_update,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the state for a later checkpoint, and lets go of everything else."""
        if isinstance(self._phase, Run):
            self._finish(trainer)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._diagnosis.look_back(self.history, self.skipped)
            rank_zero_info(self.summary())

    def _finish(self, trainer: pl.Trainer) -> None:
        run = self._run
        if run.served:
            self._diagnosis.steps = run.steps
        self._diagnosis.has_ended = True
        if self.history and not self._is_logged and log_interval(trainer) > 0:
            log_record(trainer, self.history[-1], trainer.global_step, run.choices.chances())
            self._is_logged = True
        run.close()
        self._phase = Finished(self.state_dict())
        run.clock.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keeps the state for a later checkpoint, and lets go of everything else."""
        if isinstance(self._phase, Waiting):
            compatibility.add_advice(exception)
        # Sharded tangents are assembled by all processes together, and here others may be missing.
        if isinstance(self._phase, Run) and self._phase.training.sharded:
            self._phase.close()
            self._phase = Finished()
        if isinstance(self._phase, Run):
            self._finish(trainer)

    # ---------------------------------------------------------------------------------- every step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets an epoch begin with the random numbers with which it would have begun."""
        loop = trainer.fit_loop
        # When Lightning makes another iterator; before 2.6 also at the start of a resumed epoch.
        again = trainer.current_epoch > 0 and not loop.epoch_loop.restarting
        if again and not getattr(loop, "is_resuming", False):
            self._run.rng.on_another_iterator(trainer.strategy.root_device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Arranges to look at the micro-batch just before it is trained on."""
        run = self._run
        with run.clock:
            run.before_batch(batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compares the gradient with that of a replay, where that is due."""
        run = self._run
        with run.clock:
            run.before_step()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Updates λ where an update is due and the optimizer has stepped; logs what was done."""
        run = self._run
        with run.clock:
            update = run.after_batch()
            if update is not None:
                self._record(trainer, pl_module, run, update)

    def _record(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: Run, update: Update
    ) -> None:
        """Keeps and logs what an update has done."""
        if not update.is_applied:
            self._skip(update.step)
        record = make_record(
            run.first_step + update.step,
            run.shown,
            update.gradients,
            update.norms,
            self.skipped,
            update.outcome,
            update.loss,
        )
        if not self.history:
            self._diagnosis.note_starts(run.initial)
            self._diagnosis.look_at_direct_parts(run.held_constant)
        previous = self.history[-1].step if self.history else run.first_step
        self.history.append(record)
        self._diagnosis.look_at_update(
            self.history, record, run.training.theta, sharded=run.training.sharded
        )
        chances = run.choices.chances()
        show_record(trainer, pl_module, record, chances)
        every = log_interval(trainer)
        self._is_logged = every > 0 and record.step // every > previous // every
        if self._is_logged:
            log_record(trainer, record, trainer.global_step, chances)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the loss of a validation on data that λ has not seen."""
        if isinstance(self._phase, Run) and not trainer.sanity_checking:
            loaders = self._phase.held_out.loaders
            self._diagnosis.look_at_validation(
                trainer.global_step,
                trainer.callback_metrics,
                self._monitor,
                lambda: not overlap(flattened(trainer.val_dataloaders), loaders, in_doubt=True),
            )

    def _skip(self, step: int) -> None:
        if self.skipped == 0:
            warnings.warn(
                f"OnlineHPOCallback: the hypergradient at step {step} is not finite; λ is left "
                "alone. Further such updates are skipped silently and counted in .skipped",
                stacklevel=2,
            )
        self._results.here.skipped += 1

    @property
    def _run(self) -> Run:
        assert isinstance(self._phase, Run)
        return self._phase

    # --------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns counters, history, λ-optimizer and estimators, for a checkpoint."""
        state = self._phase.state_dict()
        if isinstance(self._phase, Run) and self._phase.served:
            history = [asdict(record) for record in self.history]
            diagnosis = self._diagnosis.state_dict()
            state = {**state, "skipped": self.skipped, "history": history, "diagnosis": diagnosis}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the training starts and everything is on its device."""
        if isinstance(self._phase, Waiting):
            self._phase = Waiting(dict(state_dict), ResumedRandomState(state_dict.get("rng")))

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


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value['mean']:.4g} (mean)" if isinstance(value, dict) else f"{len(value)} values"


join(OnlineHPOCallback, "Callback")
