"""A training under observation is bit-identical to the training alone."""

import itertools
import random
from collections import Counter, defaultdict, deque
from functools import cache
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import TRAIN, VALID, MemoryLogger, Mlp, Recorder, fit, frozen, train_loader
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_hpo import T1T2, ClipR, Hyperparameter, Interval, L2Mixin, OnlineHPOCallback, UnrollK

ESTIMATORS = {
    "T1T2": lambda: T1T2(),
    "gTgV": lambda: T1T2(scale_by_lr=False),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
    "ClipR": lambda: ClipR(radius=2.0),
}
EVERY_ESTIMATOR = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


class Eventful(L2Mixin, pl.LightningModule):
    """Has everything in which a careless replay leaves a trace."""

    def __init__(self, recorder=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
        )
        self.sigma = Hyperparameter(0.1, Interval(0.0, 1.0))
        self.register_l2(init=0.01, inside_loss=True)
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection({"mean": MeanMetric()}, prefix="train_")
        self.valid_accuracy = MulticlassAccuracy(3)
        self.confusion = MulticlassConfusionMatrix(3)  # adds to its state in place
        self.outputs = []
        self.seen = {}
        self.calls = 0
        self.recorder = recorder or Recorder(draws=defaultdict(list), count=[])

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn_like(x)
        jitter = np.random.rand() + random.random()  # noqa: NPY002
        out = self.net(x + self.sigma() * noise)
        loss = F.cross_entropy(out, y) * (1 + 0.01 * jitter) + self.penalty()
        mask = F.dropout(torch.ones(5), 0.5)
        self.recorder.draws[self.global_step].append((noise, jitter, mask))
        self.calls += 1
        self.outputs.append(loss.item())
        self.seen[batch_idx] = self.calls
        self.confusion.update(out, y)
        self.accuracy(out, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.metrics(loss.detach()), on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("calls", float(self.calls))
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(jitter)}, step=self.global_step)
        return {"loss": loss, "out": out}

    def on_train_epoch_end(self):
        counts = self.confusion.compute()[0].double()
        self.log_dict({f"confusion_{i}": n for i, n in enumerate(counts)})
        self.confusion.reset()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.valid_accuracy(out, y)
        self.outputs.append(-loss.item())
        self.log("val_loss", loss)
        self.log("val_accuracy", self.valid_accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def strip(metrics):
    return {k: float(v) for k, v in metrics.items() if not k.startswith("hpo/")}


def train(callbacks, model_class=Eventful, **options):
    """Trains for three epochs of five steps; returns all that an onlooker could compare."""
    pl.seed_everything(7)
    model = model_class()
    logger = MemoryLogger()
    trainer = fit(
        model,
        callbacks,
        steps=15,
        train=DataLoader(TensorDataset(*TRAIN), batch_size=8, shuffle=True),
        valid=DataLoader(TensorDataset(*VALID), batch_size=7),
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=2,
        **options,
    )
    entries = [(step, strip(m)) for step, m in logger.entries]
    return SimpleNamespace(
        state={k: v.clone() for k, v in model.state_dict().items()},
        optimizer=trainer.optimizers[0].state_dict()["state"],
        entries=[(step, m) for step, m in entries if m],
        callback_metrics=strip(trainer.callback_metrics),
        attributes=(model.outputs, model.seen, model.calls),
        generators=(torch.get_rng_state().tolist(), np.random.rand(), random.random()),  # noqa: NPY002
        logger=logger,
    )


def assert_identical(observed, alone):
    assert observed.state.keys() == alone.state.keys()
    for name, tensor in alone.state.items():
        assert torch.equal(observed.state[name], tensor), name
    for i, state in alone.optimizer.items():
        for name, tensor in state.items():
            assert torch.equal(observed.optimizer[i][name], tensor), (i, name)
    assert observed.attributes == alone.attributes
    assert observed.generators == alone.generators
    assert observed.entries == alone.entries
    assert observed.callback_metrics == alone.callback_metrics


@cache
def alone():
    result = train(None)
    assert len(result.attributes[0]) > 15
    assert len(result.entries) > 30
    return result


@EVERY_ESTIMATOR
def test_weights_logs_and_random_numbers_are_untouched(make):
    callback = OnlineHPOCallback(make(), optimizer=frozen)
    observed = train(callback)
    assert len(callback.history) >= 5
    # Replays happened, and λ did have an influence.
    assert all(float(h.abs()) > 0 for h in callback.history[-1].hypergradients.values())
    assert_identical(observed, alone())


@EVERY_ESTIMATOR
@pytest.mark.parametrize("derivatives", ["forward", "finite_difference"])
def test_the_other_backends_are_as_invisible(make, derivatives):
    assert_identical(
        train(OnlineHPOCallback(make(), optimizer=frozen, derivatives=derivatives)), alone()
    )


@EVERY_ESTIMATOR
def test_with_accumulation_and_clipping(make):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    observed = train(OnlineHPOCallback(make(), optimizer=frozen), **options)
    assert_identical(observed, train(None, **options))


class InTheGradient(Eventful):
    """L2 acts on the gradient."""

    def __init__(self):
        super().__init__()
        self.register_l2(init=0.02, name="decay", granularity="layer")


@EVERY_ESTIMATOR
def test_with_penalties_in_the_gradient(make):
    observed = train(OnlineHPOCallback(make(), optimizer=frozen), InTheGradient)
    assert_identical(observed, train(None, InTheGradient))


def test_a_run_that_tunes_is_not_the_same():
    """Otherwise the comparisons above would prove nothing about the λ-optimizer's zero rate."""
    tuned = train(OnlineHPOCallback(ClipR()))
    assert not torch.equal(tuned.state["net.0.weight"], train(None).state["net.0.weight"])


def test_the_same_csv_file(tmp_path):
    def rows(callback, name):
        pl.seed_everything(3)
        logger = CSVLogger(tmp_path, name=name, version=0)
        fit(Eventful(), callback, logger=logger, log_every_n_steps=1)
        header, *lines = (tmp_path / name / "version_0" / "metrics.csv").read_text().splitlines()
        names = header.split(",")
        table = [dict(zip(names, line.split(","), strict=True)) for line in lines]
        kept = [{k: v for k, v in row.items() if v and not k.startswith("hpo/")} for row in table]
        return [row for row in kept if set(row) - {"step", "epoch"}]

    observed = rows(OnlineHPOCallback(UnrollK(2), optimizer=frozen), "observed")
    alone = rows(None, "alone")
    # A CSV file has one row per step: λ must not displace what the user logs at that step.
    assert observed == alone
    assert len(alone) > 5


ATTRIBUTES = {
    "dict-of-lists": (lambda: {"train": []}, lambda a, x: a["train"].append(x)),
    "defaultdict": (lambda: defaultdict(list), lambda a, x: a["train"].append(x)),
    "counter": (Counter, lambda a, x: a.update(["step"])),
    "deque": (lambda: deque(maxlen=3), lambda a, x: a.append(x)),
    "tensor": (lambda: torch.zeros(2), lambda a, x: a.add_(x)),
    "array": (lambda: np.zeros(2), lambda a, x: np.add(a, x, out=a)),
}


@pytest.mark.parametrize(("make", "change"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_what_a_module_keeps_for_itself_is_put_back(make, change):
    """A replay must not count twice what a module keeps besides its buffers."""

    class Keeping(Mlp):
        def __init__(self):
            super().__init__(inside_loss=True)
            self.kept = make()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            change(self.kept, loss.item())
            return loss

    observed, alone = Keeping(), Keeping()
    fit(observed, OnlineHPOCallback(ClipR(), optimizer=frozen))
    fit(alone)
    assert type(observed.kept) is type(alone.kept)
    if isinstance(alone.kept, (torch.Tensor, np.ndarray)):
        assert observed.kept.tolist() == alone.kept.tolist()
    else:
        assert observed.kept == alone.kept


# ---------------------------------------------------------------------------- the same random draws


@EVERY_ESTIMATOR
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
def test_a_replay_draws_what_its_step_drew(make, derivatives):
    """Noise, NumPy, Python and dropout; also where the replay comes steps later."""
    recorder = Recorder(draws=defaultdict(list))
    pl.seed_everything(7)
    fit(
        Eventful(recorder),
        OnlineHPOCallback(make(), optimizer=frozen, derivatives=derivatives),
        steps=9,
        train=DataLoader(TensorDataset(*TRAIN), batch_size=8, shuffle=True),
    )
    assert sorted(recorder.draws) == list(range(9))
    replayed = 0
    for step, (first, *others) in recorder.draws.items():
        replayed += bool(others)
        for other in others:
            assert torch.equal(other[0], first[0]), step
            assert other[1] == first[1]
            assert torch.equal(other[2], first[2])
    assert replayed == 9
    noises = [draws[0][0] for draws in recorder.draws.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(noises))


# ----------------------------------------------------------------------- when the user's code fails


class Witness(pl.Callback):
    """Looks at the module before each replay, and again when the training has failed."""

    def __init__(self, estimator):
        self.estimator = estimator
        self.seen = Recorder()

    def setup(self, trainer, module, stage):
        kind, witness = type(self.estimator), self

        class Watched(kind):  # a training works on a copy of the estimator
            def observe(self, step):
                witness.seen.before = witness.snapshot(*witness.watched)
                super().observe(step)

        self.estimator.__class__ = Watched

    def on_train_start(self, trainer, module):
        (callback,) = [c for c in trainer.callbacks if isinstance(c, OnlineHPOCallback)]
        self.watch(callback, "on_before_optimizer_step")

    def watch(self, owner, name):
        method = getattr(owner, name)

        def watched(*args):
            self.seen.before = self.snapshot(*self.watched)
            method(*args)

        setattr(owner, name, watched)

    def snapshot(self, trainer, module):
        return SimpleNamespace(
            attributes={name: dict(vars(m)) for name, m in module.named_modules()},
            buffers={name: (id(b), b.clone()) for name, b in module.named_buffers()},
            parameters={name: (id(p), p.detach().clone()) for name, p in module.named_parameters()},
            modes={name: m.training for name, m in module.named_modules()},
            outputs=list(module.outputs),
            loggers=list(trainer.loggers),
            stage=trainer.state.stage,
            global_step=trainer.global_step,
            rng=torch.get_rng_state(),
            numpy=np.random.get_state()[1].tolist(),  # noqa: NPY002
            python=random.getstate(),
        )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.watched = trainer, module
        self.seen.before = self.snapshot(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.before = self.snapshot(trainer, module)

    def on_exception(self, trainer, module, exception):
        self.after = self.snapshot(trainer, module)


def assert_put_back(before, after):
    for name, attributes in before.attributes.items():
        assert after.attributes[name].keys() == attributes.keys()
        changed = [k for k, v in attributes.items() if after.attributes[name][k] is not v]
        # Lightning writes down which hook is running.
        assert set(changed) <= {"_current_fx_name"}
    for kind in ("buffers", "parameters"):
        for name, (identity, value) in getattr(before, kind).items():
            same, present = getattr(after, kind)[name]
            assert same == identity
            assert torch.equal(present, value)
    assert torch.equal(after.rng, before.rng)
    for name in ("modes", "outputs", "loggers", "stage", "global_step", "numpy", "python"):
        assert getattr(after, name) == getattr(before, name), name


def fails_in(method, at, estimator, *, first_step=0, **callback_options):
    """Raises in the ``at``-th shielded call of a step, after it has left traces everywhere.

    Calls before ``first_step`` do not count.
    """

    class Failing(Eventful):
        def training_step(self, batch, batch_idx):
            result = super().training_step(batch, batch_idx)
            self._maybe_fail("training_step")
            return result

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self._maybe_fail("validation_step")

        def _maybe_fail(self, where):
            shielded = "log" in vars(self)
            if where == method and shielded and self.global_step >= first_step:
                self.recorder.count.append(1)
                if len(self.recorder.count) == at:
                    raise KeyError("the user's own")

    pl.seed_everything(5)
    witness = Witness(estimator)
    callback = OnlineHPOCallback(estimator, optimizer=frozen, **callback_options)
    model = Failing()
    with pytest.raises(KeyError, match="the user's own"):
        fit(model, [witness, callback], logger=MemoryLogger(), num_sanity_val_steps=2)
    return witness


# The first replay of a training finds out which λ its loss depends on.
@pytest.mark.parametrize("at", [1, 2, 5, 7, 9])
@pytest.mark.parametrize("derivatives", ["reverse", "forward", "finite_difference"])
def test_everything_is_put_back_when_a_replay_raises_at_once(at, derivatives):
    witness = fails_in("training_step", at, estimator=ClipR(), derivatives=derivatives)
    assert_put_back(witness.seen.before, witness.after)


@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize("at", [1, 2])
def test_everything_is_put_back_when_a_later_replay_raises(at, derivatives):
    """Here θ_t stands in the place of θ_{t+1}."""
    witness = fails_in(
        "training_step",
        at,
        estimator=UnrollK(3, "reverse"),
        first_step=1,
        derivatives=derivatives,
    )
    assert witness.after.global_step == 3
    assert_put_back(witness.seen.before, witness.after)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("make", [ClipR, lambda: UnrollK(2, "forward")])
@pytest.mark.parametrize("at", [3, 4])
def test_everything_is_put_back_when_a_replay_at_the_batch_raises(at, make, error):
    """Where gradients accumulate, tangents are multiplied before the step."""

    recorder = Recorder(count=[])

    class Failing(Mlp):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(5))

        def training_step(self, batch, batch_idx):
            if "log" in vars(self):
                recorder.count.append(batch_idx)
            if len(recorder.count) == at:
                raise error
            return super().training_step(batch, batch_idx)

    model = Failing()
    buffers = dict(model.named_buffers())
    options = {"train": train_loader(batch_size=4), "accumulate_grad_batches": 2}
    with pytest.raises((KeyError, SystemExit, KeyboardInterrupt)):
        fit(model, OnlineHPOCallback(make(), optimizer=frozen, derivatives="reverse"), **options)
    assert len(recorder.count) == at
    assert not {"log", "log_dict", "print"} & vars(model).keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name], name


@pytest.mark.parametrize("at", [1, 2, 4])
def test_everything_is_put_back_when_the_validation_step_raises(at):
    witness = fails_in("validation_step", at, estimator=T1T2())
    assert_put_back(witness.seen.before, witness.after)


def test_the_optimizer_is_let_go_of():
    """Hooks that stayed on the user's optimizer would keep the callback at work."""
    for fails in (False, True):

        class Model(Mlp):
            def training_step(self, batch, batch_idx, fails=fails):
                if fails and self.global_step == 3:
                    raise KeyError("the user's own")
                return super().training_step(batch, batch_idx)

        seen = []

        class Keep(pl.Callback):
            def on_train_start(self, trainer, module, seen=seen):
                seen.append(trainer.optimizers[0])

        callbacks = [OnlineHPOCallback(T1T2(), optimizer=frozen), Keep()]
        if fails:
            with pytest.raises(KeyError):
                fit(Model(), callbacks)
        else:
            fit(Model(), callbacks)
        (optimizer,) = seen
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
