"""What steps keep on the trainer's parts: loops, connectors, the strategy, the profiler."""

import math
from operator import attrgetter

import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, observe, relative_error, truth, weights
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_hpo import T1T2, ClipR, Implicit, OnlineHPOCallback, UnrollK
from lightning_hpo.parts import TrainerParts

ESTIMATORS = {
    "T1T2": T1T2,
    "ClipR": ClipR,
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
    "Implicit": Implicit,
}
PARTS = {
    "loop": attrgetter("fit_loop"),
    "epoch_loop": attrgetter("fit_loop.epoch_loop"),
    "validation_loop": attrgetter("fit_loop.epoch_loop.val_loop"),
    "progress": attrgetter("fit_loop.epoch_progress.total"),
    "connector": attrgetter("_logger_connector"),
    "strategy": attrgetter("strategy"),
    "precision": attrgetter("precision_plugin"),
    "accelerator": attrgetter("accelerator"),
    "profiler": attrgetter("profiler"),
    "results": attrgetter("fit_loop.epoch_loop._results"),
    "callback": lambda trainer: next(
        c for c in trainer.callbacks if type(c) is GradientAccumulationScheduler
    ),
    "wrapper": lambda trainer: trainer.strategy._lightning_optimizers[0],
    "schedule": lambda trainer: trainer.lr_scheduler_configs[0],
}


class Counting(Mlp):
    """Weights its loss by a number that it counts up, in both steps, on a part of the trainer."""

    part = "loop"
    name = "my_calls"
    since = -1

    def owner(self):
        return PARTS[self.part](self.trainer)

    def count(self):
        if self.global_step > self.since:
            setattr(self.owner(), self.name, getattr(self.owner(), self.name, 0) + 1)
        return getattr(self.owner(), self.name, 0)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.count() / 10)

    def validation_step(self, batch, batch_idx):
        self.count()
        return super().validation_step(batch, batch_idx)


class Underscored(Counting):
    name = "_my_calls"

    def owner(self):
        return self.trainer


class Late(Counting):
    """Begins where the walks no longer look through everything."""

    since = 6


class Listed(Counting):
    """Keeps a list there."""

    def count(self):
        if not hasattr(self.owner(), "my_losses"):
            self.owner().my_losses = []
        self.owner().my_losses.append(0.0)
        return len(self.owner().my_losses)


class Metrics(Counting):
    """Counts up in what is logged."""

    def count(self):
        metrics = self.trainer.callback_metrics
        metrics["calls"] = metrics.get("calls", torch.tensor(0.0)) + 1
        self.trainer.progress_bar_metrics["calls"] = float(metrics["calls"])
        return float(metrics["calls"])


class Profiling(Mlp):
    """Measures its steps."""

    def training_step(self, batch, batch_idx):
        with self.trainer.profiler.profile("mine"):
            return super().training_step(batch, batch_idx)


KINDS = {
    **{name: type(name, (Counting,), {"part": name}) for name in PARTS},
    **{kind.__name__: kind for kind in (Underscored, Late, Listed, Metrics)},
}


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", KINDS)
def test_attributes_that_steps_set_there_are_put_back(name, make):
    found = []
    for callbacks in ([], [OnlineHPOCallback(make(), optimizer=frozen)]):
        model = KINDS[name]()
        fit(model, [GradientAccumulationScheduler({0: 1}), *callbacks])
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_profiler_measures_steps_only(make):
    found = []
    for callbacks in ([], [OnlineHPOCallback(make(), optimizer=frozen)]):
        profiler = SimpleProfiler()
        fit(Profiling(), callbacks, profiler=profiler)
        found.append(len(profiler.recorded_durations["mine"]))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    "name", ["loop", "strategy", "profiler", "Underscored", "Late", "Listed", "Metrics"]
)
def test_replays_find_what_their_step_found(name):
    class Trained(KINDS[name]):
        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

    for make in (lambda: ClipR(math.inf), lambda: UnrollK(10, "reverse")):
        result = observe(make(), Trained(), every_n_steps=10)
        assert relative_error(last_hypergradient(result), truth(Trained)) < 1e-5


class Shortened(Mlp):
    """Moves what belongs to Lightning."""

    def training_step(self, batch, batch_idx):
        self.trainer.fit_loop.epoch_loop.max_steps += 1
        return super().training_step(batch, batch_idx)


class Extended(Mlp):
    """Keeps a number where none can be looked for: on a part that is made when it is asked for."""

    def training_step(self, batch, batch_idx):
        io = self.trainer.strategy.checkpoint_io
        io.calls = getattr(io, "calls", 0) + 1
        return super().training_step(batch, batch_idx)


REFUSED = {
    Shortened: r"trainer\.fit_loop\.epoch_loop\.max_steps",
    Extended: r"trainer\.strategy\._checkpoint_io\.calls",
}


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("kind", REFUSED)
def test_other_numbers_are_refused_by_name_before_anything_moves(kind, make):
    model = kind()
    before = weights(model)
    with pytest.raises(Exception, match=f"parts of the trainer.*{REFUSED[kind]}.*module"):
        observe(make(), model)
    assert torch.equal(weights(model), before)


class Measuring(SingleDeviceStrategy):
    """Keeps numbers of its own, some of which Lightning itself would not know."""

    def __init__(self):
        super().__init__(device="cpu")
        self.seen = {"steps": 0}


class Measured(Mlp):
    def training_step(self, batch, batch_idx):
        self.trainer.strategy.seen["steps"] += 1
        scale = 1 + self.trainer.strategy.seen["steps"] / 10
        return super().training_step(batch, batch_idx) * scale


def test_a_strategy_of_ones_own():
    found = []
    for callbacks in ([], [OnlineHPOCallback(ClipR(), optimizer=frozen)]):
        model = Measured()
        fit(model, callbacks, strategy=Measuring())
        found.append(weights(model))
    assert torch.equal(*found)


class Profiled(Mlp):
    def training_step(self, batch, batch_idx):
        assert self.trainer.strategy.checkpoint_io is not None
        with self.trainer.profiler.profile("mine"):
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("options", [{"profiler": "simple"}, {"gradient_clip_val": 0.3}, {}])
def test_a_training_that_keeps_nothing_there_is_not_bothered(make, options, recwarn):
    fit(Profiled(), OnlineHPOCallback(make(), optimizer=frozen), **options)
    assert not any("parts of the trainer" in str(w.message) for w in recwarn)


def test_looking_again_returns_the_same_keys():
    model = Mlp()
    trainer = fit(model)
    parts = TrainerParts(trainer)
    before = parts.read()
    trainer.strategy.mine = trainer.fit_loop.mine = 1
    now = parts.read()
    assert {parts.path_of(key) for key in now.keys() - before.keys()} == {
        "trainer.strategy.mine",
        "trainer.fit_loop.mine",
    }
    del trainer.strategy.mine
    trainer.strategy.other = 2  # as many as before
    assert "trainer.strategy.other" in {parts.path_of(key) for key in parts.read()}
    parts.write(before)
    assert parts.read() == before
    assert not hasattr(trainer.strategy, "other")
    assert not hasattr(trainer.fit_loop, "mine")
