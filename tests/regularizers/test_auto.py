"""``init="auto"``: the strength at which a penalty begins to matter over a training."""

import copy
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    BATCH,
    L2SP,
    TRAIN,
    VALID,
    EachRank,
    fit,
    frozen,
    make_optimizer,
    make_trainer,
    train_loader,
    valid_loader,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    Interval,
    L1Mixin,
    L2Mixin,
    OnlineHPOCallback,
    UnitInterval,
    UnrollK,
    fixed_values,
    freeze,
    named_hyperparameters,
    schedule,
    with_mixins,
)

EPOCHS = 4  # of five batches


class Net(L2Mixin, L1Mixin, pl.LightningModule):
    """Registers what it is told to, after a network whose weights never change."""

    def __init__(self, optimizer="sgd", scheduler=None, *, kind="l2", interval="step", **options):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer, self.scheduler, self.interval = optimizer, scheduler, interval
        self.frequency = options.pop("frequency", 1)
        self.inside_loss = options.get("inside_loss", False)
        {"l2": self.register_l2, "l1": self.register_l1}[kind](**options)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss + self.penalty() if self.inside_loss else loss

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        if callable(self.optimizer):
            optimizer = self.optimizer(self)
        else:
            optimizer = make_optimizer(self.optimizer, self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        config = {"interval": self.interval, "frequency": self.frequency, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}


class Watch(pl.Callback):
    """Writes down the options of each step, and the gradient of the first without penalties."""

    def __init__(self):
        self.rates, self.gradient, self.weights, self.values = [], None, None, []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.rates.append(groups)
        if self.gradient is None:
            self.gradient = {n: p.grad.clone() for n, p in module.named_parameters()}
            self.weights = {n: p.detach().clone() for n, p in module.named_parameters()}

    def total(self, gain=lambda group: 1.0, group=0):
        return sum(groups[group]["lr"] * gain(groups[group]) for groups in self.rates)


PENALIZED = ("net.0.weight", "net.2.weight")


def flat(named, names=PENALIZED):
    return torch.cat([named[name].flatten() for name in names])


def strengths(model):
    return torch.stack([h.value for h in named_hyperparameters(model).values()])


def rms(x):
    return x.square().mean().sqrt().item()


def train(model, *callbacks, epochs=EPOCHS, **options):
    """Trains for some epochs; returns what a watch has seen."""
    watch = Watch()
    options = {"train": train_loader(), **options}
    fit(model, [watch, *callbacks], steps=options.pop("steps", -1), max_epochs=epochs, **options)
    return watch


def repeats(group):
    return (1 - group["dampening"]) / (1 - group["momentum"])


def momentum(**options):
    return lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, **options)


# By name: the arguments of the module, and those of the training.
SCHEDULES = {
    "constant": ({}, {}),
    "cosine": ({"scheduler": lambda o: lr_scheduler.CosineAnnealingLR(o, 20)}, {}),
    "lambda": ({"scheduler": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))}, {}),
    "epoch": (
        {"scheduler": lambda o: lr_scheduler.StepLR(o, 1, 0.3), "interval": "epoch"},
        {},
    ),
    "every other epoch": (
        {
            "scheduler": lambda o: lr_scheduler.StepLR(o, 1, 0.3),
            "interval": "epoch",
            "frequency": 2,
        },
        {},
    ),
    "every other step": (
        {"scheduler": lambda o: lr_scheduler.ExponentialLR(o, 0.7), "frequency": 2},
        {},
    ),
    "warm-up": (
        {
            "scheduler": lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.LinearLR(o, 0.01, 1, 5), lr_scheduler.ExponentialLR(o, 0.9)],
                [5],
            )
        },
        {},
    ),
    "accumulation": (
        {"scheduler": lambda o: lr_scheduler.ExponentialLR(o, 0.7)},
        {"accumulate_grad_batches": 2},
    ),
    "accumulation, every other batch": (
        {"scheduler": lambda o: lr_scheduler.ExponentialLR(o, 0.7), "frequency": 2},
        {"accumulate_grad_batches": 2},
    ),
    "accumulation, epoch": (
        {"scheduler": lambda o: lr_scheduler.StepLR(o, 1, 0.3), "interval": "epoch"},
        {"accumulate_grad_batches": 2},
    ),
    "steps": ({"scheduler": lambda o: lr_scheduler.ExponentialLR(o, 0.7)}, {"steps": 7}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_under_sgd_it_is_one_over_the_rates_of_the_whole_training(name):
    """Of the rates that the training itself has, step by step; and schedules go on as ever."""
    made, options = SCHEDULES[name]
    model = Net("sgd", **made)
    watch = train(model, **options)
    assert model.l2().item() == pytest.approx(1 / watch.total(), rel=1e-10)
    given = Net("sgd", init=model.l2().item(), **made)
    assert train(given, **options).rates == watch.rates
    torch.testing.assert_close(weights(given), weights(model), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "optimizer",
    [momentum(), momentum(nesterov=True), momentum(dampening=0.5)],
    ids=["momentum", "nesterov", "dampening"],
)
@pytest.mark.parametrize("name", ["constant", "cosine", "accumulation, epoch"])
def test_momentum_counts_each_rate_as_often_as_it_acts(name, optimizer):
    made, options = SCHEDULES[name]
    model = Net(optimizer, **made)
    watch = train(model, **options)
    assert model.l2().item() == pytest.approx(1 / watch.total(repeats), rel=1e-10)


def test_a_schedule_of_the_momentum_is_followed_too():
    model = Net(momentum(), lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20))
    watch = train(model)
    assert len({groups[0]["momentum"] for groups in watch.rates}) > 10
    assert model.l2().item() == pytest.approx(1 / watch.total(repeats), rel=1e-10)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "lion"])
@pytest.mark.parametrize("name", ["constant", "cosine", "accumulation"])
def test_adaptive_optimizers_divide_by_the_gradient(name, optimizer):
    """By that of the first step: averaged over its batches, and without the penalty."""
    made, options = SCHEDULES[name]
    model = Net(optimizer, **made)
    watch = train(model, **options)
    expected = rms(flat(watch.gradient)) / watch.total()
    assert model.l2().item() == pytest.approx(expected, rel=1e-10)


def test_the_momentum_of_rmsprop_adds_up_steps():
    model = Net(lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9))
    watch = train(model)
    expected = 0.1 * rms(flat(watch.gradient)) / watch.total()
    assert model.l2().item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_l1_eats_a_mean_weight_once(optimizer):
    model = Net(optimizer, kind="l1")
    watch = train(model)
    size = flat(watch.weights).abs().mean().item()
    factor = {"sgd": 1.0, "momentum": 0.1, "adam": rms(flat(watch.gradient))}[optimizer]
    assert model.l1().item() == pytest.approx(size * factor / watch.total(), rel=1e-10)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_each_layer_has_its_own(optimizer):
    model = Net(optimizer, kind="l1", granularity="layer")
    watch = train(model)
    for layer in ("0", "2"):
        name = f"net.{layer}.weight"
        factor = 1.0 if optimizer == "sgd" else rms(watch.gradient[name])
        expected = watch.weights[name].abs().mean().item() * factor / watch.total()
        found = model.l1.net._modules[layer]().item()
        assert found == pytest.approx(expected, rel=1e-10)


def test_two_penalties_see_the_gradient_without_each_other():
    model = Net("adam")
    model.register_l1()
    watch = train(model)
    expected = rms(flat(watch.gradient)) / watch.total()
    size = flat(watch.weights).abs().mean().item()
    assert model.l2().item() == pytest.approx(expected, rel=1e-10)
    assert model.l1().item() == pytest.approx(size * expected, rel=1e-10)


def two_groups(module):
    groups = [{"params": module.net[0].parameters(), "lr": 0.3}, {"params": module.net[2].weight}]
    return torch.optim.SGD([*groups, {"params": module.net[2].bias, "lr": 7.0}], lr=0.1)


def test_the_rate_is_that_of_the_group_that_owns_the_weights():
    model = Net(two_groups, granularity="layer")
    train(model)
    found = [h.value.item() for h in named_hyperparameters(model).values()]
    assert found == pytest.approx([1 / (20 * 0.3), 1 / (20 * 0.1)], rel=1e-10)
    model = Net(two_groups)  # 20 weights and 15
    train(model)
    assert model.l2().item() == pytest.approx(35 / (20 * (20 * 0.3 + 15 * 0.1)), rel=1e-10)


def test_an_endless_training_is_taken_to_be_of_some_length():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*TRAIN, strict=True)

    for loader in (train_loader(), DataLoader(Endless(), batch_size=BATCH)):
        model = Net("sgd", lambda o: lr_scheduler.StepLR(o, 5000, 0.5))
        train(model, Stop(), train=loader, epochs=-1)
        total = 0.3 * 5000 + 0.15 * 5000
        assert model.l2().item() == pytest.approx(1 / total, rel=1e-10)


def test_a_very_long_schedule_counts_by_the_mean_of_its_beginning(monkeypatch):
    monkeypatch.setattr(schedule, "MOST_EVALUATIONS", 4)
    model = Net("sgd", lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    train(model)
    mean = 0.3 * sum(0.5**t for t in range(5)) / 5
    assert model.l2().item() == pytest.approx(1 / (20 * mean), rel=1e-10)


def test_epochs_are_counted_whole():
    """However many steps they have, a schedule that changes with them is evaluated that often."""
    seen = []

    def rate(epoch):
        seen.append(epoch)
        return 1 / (1 + epoch)

    model = Net("sgd", lambda o: lr_scheduler.LambdaLR(o, rate), interval="epoch")
    seen.clear()
    train(model)
    assert len(seen) == 1 + (EPOCHS - 1) + EPOCHS  # when it is made, for the sum, in the training


class Plateau(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Stepped(Net):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


class Uncopied(lr_scheduler.LambdaLR):
    def __deepcopy__(self, memo):
        raise TypeError("it holds a connection")


@pytest.mark.parametrize(
    ("kind", "scheduler", "interval"),
    [
        (Plateau, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0), "epoch"),
        (Stepped, lambda o: lr_scheduler.LinearLR(o, 0.01, 1, 20), "step"),
        (Net, lambda o: Uncopied(o, lambda t: 0.01 + t), "step"),
    ],
    ids=["plateau", "step of its own", "no copy"],
)
def test_rates_that_cannot_be_foreseen_count_as_constant(kind, scheduler, interval):
    """By the rate that the optimizer was made with, though the training warm up to it."""
    model = kind("sgd", scheduler, interval=interval)
    train(model)
    assert model.l2().item() == pytest.approx(1 / (20 * 0.3), rel=1e-10)


def test_a_schedule_that_is_a_method_is_not_copied_with_its_module():
    class Own(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the module was copied")

        def rate(self, t):
            return 1 / (1 + t)

        def configure_optimizers(self):
            self.scheduler = lambda optimizer: lr_scheduler.LambdaLR(optimizer, self.rate)
            return super().configure_optimizers()

    model = Own("sgd")
    watch = train(model)
    assert model.l2().item() == pytest.approx(1 / watch.total(), rel=1e-10)


def test_a_schedule_that_ends_too_early_counts_by_its_mean():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 5

    def ends(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10, cycle_momentum=False)

    model = Net("sgd", ends)
    watch = train(model, Stop(), epochs=EPOCHS)
    assert len(watch.rates) == 5
    whole = Watch()
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        fit(Net("sgd", ends), whole, steps=20)
    assert len(whole.rates) == 11
    assert model.l2().item() == pytest.approx(11 / 20 / whole.total(), rel=1e-10)


# -------------------------------------------------------------------------------- with the callback

TUNERS = {
    "T1T2": T1T2,
    "ClipR": lambda: ClipR(2.0),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("make", TUNERS.values(), ids=TUNERS)
def test_with_the_callback_it_is_the_same_training_bit_for_bit(make, optimizer, accumulated):
    plain, tuned = Net(optimizer), Net(optimizer)
    options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.3}
    train(plain, **options)
    callback = OnlineHPOCallback(make(), optimizer=frozen)
    train(tuned, callback, **options)
    assert torch.equal(plain.l2.raw, tuned.l2.raw)
    assert torch.equal(weights(plain), weights(tuned))
    assert callback.history
    assert callback.skipped == 0
    assert all(r.values["l2"] == tuned.l2().item() for r in callback.history)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_it_is_tuned_like_a_number(optimizer):
    """From the value found: the same λ, hypergradients and weights as from that number."""
    train(plain := Net(optimizer))
    value = plain.l2.value
    runs = []
    for init in ("auto", value):
        callback = OnlineHPOCallback(ClipR(2.0))
        train(model := Net(optimizer, init=init), callback)
        runs.append((weights(model), callback.history))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-12, atol=0)
    for one, two in zip(runs[0][1], runs[1][1], strict=True):
        assert one.values["l2"] == pytest.approx(two.values["l2"], rel=1e-12)
        torch.testing.assert_close(one.hypergradients, two.hypergradients, rtol=1e-10, atol=0)
    assert runs[0][1][-1].values["l2"] != pytest.approx(value.item(), rel=1e-3)


@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_inside_the_loss_it_is_the_same(kind, with_callback):
    runs = []
    for inside_loss in (False, True):
        model = Net("momentum", kind=kind, inside_loss=inside_loss)
        callbacks = [OnlineHPOCallback(T1T2())] if with_callback else []
        # Four batches: at the end of an epoch Lightning would halve the loss of a single one.
        options = {"accumulate_grad_batches": 2, "limit_train_batches": 4}
        train(model, *callbacks, num_sanity_val_steps=1, **options)
        runs.append((weights(model), strengths(model)))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("options", [{}, {"inside_loss": True}], ids=["gradient", "loss"])
def test_an_override_that_does_not_call_super_changes_nothing(options, with_callback):
    class Forgetful(Net):
        def on_train_start(self):
            pass

    runs = []
    for kind in (Net, Forgetful):
        callbacks = [OnlineHPOCallback(T1T2())] if with_callback else []
        train(model := kind("momentum", **options), *callbacks)
        runs.append((weights(model), model.l2()))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_a_tuned_weight_decay(optimizer, accumulated):
    model = freeze(Net(optimizer, SCHEDULES["cosine"][0]["scheduler"]), {"l2": 1e-10})
    callback = OnlineHPOCallback(
        T1T2(), optimizer=frozen, optimizer_hyperparameters={"weight_decay": "auto"}
    )
    watch = train(model, callback, accumulate_grad_batches=accumulated)
    gradient = rms(torch.cat([g.flatten() for g in watch.gradient.values()]))
    factor = {"momentum": 0.1, "adam": gradient, "rmsprop": gradient}.get(optimizer, 1.0)
    values = [record.values["optimizer.weight_decay"] for record in callback.history]
    assert values == pytest.approx([factor / watch.total()] * len(values), rel=1e-7)
    assert fixed_values(model)["optimizer.weight_decay"] == pytest.approx(values[0])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_tuned_weight_decay_acts_from_the_first_step(optimizer):
    def run(options, decay=0.0):
        def make(module):
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
            return kind(module.parameters(), lr=0.03, weight_decay=decay)

        callbacks = []
        if options:
            callbacks = [OnlineHPOCallback(T1T2(), frozen, optimizer_hyperparameters=options)]
        model = freeze(Net(make), {"l2": 1e-10})
        train(model, *callbacks)
        return model

    tuned = run({"weight_decay": "auto"})
    fixed = run({}, fixed_values(tuned)["optimizer.weight_decay"])
    torch.testing.assert_close(weights(tuned), weights(fixed), rtol=1e-10, atol=1e-13)
    assert not torch.allclose(weights(run({})), weights(fixed), rtol=1e-3)


# --------------------------------------------------------------------------- what is saved and said


@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_resumed_training_goes_on_with_the_value(optimizer, with_callback, tmp_path, caplog):
    def run(epochs, path=None):
        callbacks = []
        if with_callback:
            options = {"weight_decay": "auto"}
            callbacks = [OnlineHPOCallback(ClipR(2.0), optimizer_hyperparameters=options)]
        model = Net(optimizer)
        trainer = fit(model, callbacks, steps=-1, max_epochs=epochs, ckpt_path=path)
        return model, callbacks, trainer

    path = tmp_path / "half.ckpt"
    half, _, trainer = run(2)
    trainer.save_checkpoint(path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        resumed, callbacks, _ = run(4, path)
    assert 'init="auto"' not in caplog.text
    if with_callback:
        assert callbacks[0].skipped == 0
        first = callbacks[0].history[10].values["l2"]
        assert first == pytest.approx(half.l2().item(), rel=0.05)
        assert callbacks[0].history[10].values["optimizer.weight_decay"] == pytest.approx(
            fixed_values(half)["optimizer.weight_decay"], rel=0.05
        )
    else:
        assert torch.equal(resumed.l2.raw, half.l2.raw)
        other, *_ = run(4)
        assert not torch.allclose(resumed.l2.raw, other.l2.raw, rtol=1e-3)


def test_resumed_or_not_is_the_same_training(tmp_path):
    """By steps, so that both have one length."""

    def run(stop, path=None):
        class Stop(pl.Callback):
            def on_train_batch_end(self, trainer, *args):
                trainer.should_stop = trainer.global_step == stop

        callback = OnlineHPOCallback(ClipR(2.0), optimizer_hyperparameters={"weight_decay": "auto"})
        model = Net("adam")
        trainer = fit(model, [callback, Stop()], steps=-1, max_epochs=4, ckpt_path=path)
        return model, callback, trainer

    whole, callback, _ = run(None)
    *_, trainer = run(10)
    trainer.save_checkpoint(path := tmp_path / "half.ckpt")
    resumed, other, _ = run(None, path)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.l2.raw, resumed.l2.raw)
    assert callback.history == other.history


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Net("sgd"), 'l2: init="auto" → 0.167 = 1 / Σ lr over 20 steps'),
        (lambda: Net("momentum"), 'l2: init="auto" → 0.05 = (1 − momentum) / Σ lr over 20 steps'),
        (
            lambda: Net(momentum(dampening=0.5)),
            'l2: init="auto" → 0.1 = (1 − momentum) / (1 − dampening) Σ lr over 20 steps',
        ),
        (lambda: Net("adam"), 'l2: init="auto" → 0.0601 = rms(gradient) / Σ lr over 20 steps'),
        (
            lambda: Net("momentum", granularity="layer"),
            'l2.net.0 and 1 more: init="auto" → 0.05 = (1 − momentum) / Σ lr over 20 steps',
        ),
        (
            lambda: Net("sgd", kind="l1"),
            'l1: init="auto" → 0.0308 = mean |w| / Σ lr over 20 steps',
        ),
    ],
)
def test_it_is_said_once(model, message, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        train(model())
    assert [m for m in caplog.messages if 'init="auto"' in m] == [message]


def test_a_long_training_is_said_to_be_long(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        train(Net("sgd"), epochs=None, steps=2500, limit_train_batches=1, max_time={"seconds": 1})
    assert "over 2 500 steps" in caplog.text


def test_a_checkpoint_from_before_the_first_step_has_no_value(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    train(model := Net("adam"), Save())
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert state["l2.raw"].isnan()
    with pytest.raises(ValueError, match="'l2' has no value yet"):
        freeze(Net("adam"), tmp_path / "first.ckpt")
    resumed = Net("adam", init=0.3)
    train(resumed, ckpt_path=str(tmp_path / "first.ckpt"))
    assert torch.equal(resumed.l2.raw, model.l2.raw)


def test_until_then_it_is_shown_as_auto():
    model = Net("adam")
    assert "auto" in repr(model.l2)
    assert fixed_values(model) == {"l2": "auto"}
    with pytest.raises(ValueError, match="'l2' has no value yet"):
        freeze(Net("adam"), fixed_values(model))
    train(model)
    assert "auto" not in repr(model.l2)
    fresh = freeze(Net("adam"), fixed_values(model))
    assert torch.equal(fresh.l2.raw, model.l2.raw)


def test_a_value_that_is_given_overrides_it():
    model = Net("adam")
    model.l2.value = 0.3
    train(model)
    assert model.l2().item() == pytest.approx(0.3)
    frozen_model = freeze(Net("adam"), {"l2": 0.2})
    train(frozen_model)
    assert frozen_model.l2().item() == pytest.approx(0.2)


def test_one_that_is_frozen_is_found_all_the_same():
    model, other = Net("momentum"), Net("momentum")
    model.l2.frozen = True
    train(model)
    train(other)
    assert torch.equal(model.l2.raw, other.l2.raw)


def test_a_second_training_keeps_it():
    train(model := Net("momentum"))
    before = model.l2.raw.clone()
    train(model, epochs=2)
    assert torch.equal(model.l2.raw, before)


def test_it_is_copied_as_it_is():
    model = copy.deepcopy(Net("momentum"))
    assert not model.l2.is_resolved
    train(model)
    assert not copy.deepcopy(Net("momentum")).l2.is_resolved
    assert copy.deepcopy(model).l2.is_resolved


def test_mixins_that_are_added_later():
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return make_optimizer("sgd", self.parameters())

    model = with_mixins(Plain(), L2Mixin)
    model.register_l2()
    train(model)
    assert model.l2().item() == pytest.approx(1 / 6, rel=1e-10)


# ------------------------------------------------------------------------------ when it has to wait


class Unfreezes(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        module.net[0].weight.requires_grad_(trainer.current_epoch >= 2)


@pytest.mark.parametrize("make", TUNERS.values(), ids=TUNERS)
def test_weights_that_are_trained_later_are_looked_at_then(make):
    """Over the steps that are left; tuned from then on, while others are tuned from the start."""
    model = Net("adam", granularity="layer")
    model.net[0].weight.requires_grad_(False)

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            found.append(module.l2.net._modules["0"].is_resolved)

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 10:
                gradients.append(rms(module.net[0].weight.grad))

    found, gradients = [], []
    callback = OnlineHPOCallback(make(), optimizer=frozen)
    fit(model, [Unfreezes(), Look(), callback], steps=-1, max_epochs=EPOCHS)
    assert found == [False, False, True, True]
    late = model.l2.net._modules["0"]().item()
    assert late == pytest.approx(gradients[0] / (10 * 0.03), rel=1e-10)
    assert callback.skipped == 0
    for record in callback.history:
        assert ("l2.net.0" in record.values) == (record.step > 10)
        assert "l2.net.2" in record.values
    assert torch.isfinite(weights(model)).all()
    assert callback.history[-1].hypergradients["l2.net.0"] != 0
    assert len(callback.history.columns()["l2.net.0"]) == len(callback.history)


def test_a_gradient_of_zero_says_nothing():
    """As that of the first factor of a low-rank update, whose second starts at 0."""
    model = Net("adam", kind="l1", granularity="layer")
    with torch.no_grad():
        model.net[2].weight.zero_()
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append([h.is_resolved for h in named_hyperparameters(module).values()])

    train(model, Look())
    assert seen[0] == [False, False]
    assert seen[1] == [True, True]
    assert torch.isfinite(weights(model)).all()


def test_a_step_that_overflows_says_nothing():
    data = DataLoader(TensorDataset(TRAIN[0].float(), TRAIN[1]), batch_size=BATCH)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    model = Net("adam").float()
    sizes = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            sizes.append(flat({n: p.grad for n, p in module.named_parameters()}).clone())

    callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
    trainer = make_trainer(
        -1,
        max_epochs=40,
        callbacks=[Look(), callback],
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
    )
    valid = DataLoader(TensorDataset(VALID[0].float(), VALID[1]), batch_size=20)
    trainer.fit(model, data, valid)
    finite = [bool(torch.isfinite(g).all()) for g in sizes]
    first = finite.index(True)
    assert first > 0
    expected = rms(sizes[first]) / (0.03 * (200 - first))
    assert model.l2().item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(weights(model)).all()


# -------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("inside_loss", [False, True])
def test_what_is_evaluated_before_a_training_has_no_penalty_yet(inside_loss):
    class Seen(pl.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, *args):
            losses.append(outputs.item())

    losses = []
    model = Net("momentum", inside_loss=inside_loss)
    plain = model.loss(VALID).item()
    make_trainer(callbacks=Seen()).validate(model, valid_loader(), verbose=False)
    fit(model, Seen(), num_sanity_val_steps=1)
    assert losses[:2] == pytest.approx([plain, plain], rel=1e-12)
    assert math.isfinite(losses[-1])


def test_without_a_trainer_there_is_no_schedule():
    model = Net("sgd", inside_loss=True)
    match = r"l2: init=\"auto\" .* used without a Trainer.*module\.l2\.value = 1e-4"
    with pytest.raises(MisconfigurationException, match=match):
        model.penalty()
    with pytest.raises(MisconfigurationException, match=match):
        Net("sgd").on_before_optimizer_step(None)
    make_trainer().validate(model, valid_loader(), verbose=False)
    with pytest.raises(MisconfigurationException, match=match):
        model.penalty()
    model.l2.value = 0.1
    assert model.penalty().item() > 0


# ------------------------------------------------------------------------------------ several ranks


class Distributed(EachRank, Net):
    pass


@pytest.mark.usefixtures("within_two_minutes")
@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_two_ranks_find_what_one_process_finds(optimizer, with_callback):
    runs = []
    for devices in (1, 2):
        callbacks = []
        if with_callback:
            options = {"weight_decay": "auto"}
            callbacks = [
                OnlineHPOCallback(
                    T1T2(),
                    optimizer=lambda raw: torch.optim.SGD(raw, lr=0.1),
                    optimizer_hyperparameters=options,
                )
            ]
        model = Distributed(optimizer, kind="l1", granularity="layer")
        make_trainer(
            5,
            callbacks=callbacks,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
        ).fit(model)
        runs.append((weights(model), strengths(model)))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("with_callback", [False, True])
def test_in_the_loss_of_an_adaptive_optimizer_it_is_refused(with_callback):
    model = Net("adam", inside_loss=True)
    before = weights(model)
    callbacks = [OnlineHPOCallback()] if with_callback else []
    with pytest.raises(MisconfigurationException, match=r"l2: init=\"auto\" .* Adam.*inside_loss"):
        train(model, *callbacks)
    assert torch.equal(weights(model), before)


def test_of_an_unknown_weight_decay_it_is_refused():
    model = Net("lion", init=0.1)
    callback = OnlineHPOCallback(optimizer_hyperparameters={"weight_decay": "auto"})
    with pytest.raises(
        MisconfigurationException, match=r"not known for Lion.*Hyperparameter\(0\.1"
    ):
        train(model, callback)


def test_of_other_options_it_is_refused():
    with pytest.raises(
        ValueError, match=r"\['lr'\] is \"auto\", which is known for 'weight_decay'"
    ):
        OnlineHPOCallback(optimizer_hyperparameters={"lr": "auto"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.register_penalty(L2SP, "auto"), r"init='auto'.*not for L2SP"),
        (lambda m: m.register_l2("big", name="b"), r"init='big', expected a number or \"auto\""),
        (lambda m: m.register_l2(name="b", constraint=3), r"register_l2: constraint=3 is a int"),
    ],
)
def test_what_is_no_start_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call(Net(init=0.1))


def test_it_stays_within_the_constraint(caplog):
    model = Net("sgd", constraint=Interval(0.0, 0.1))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        train(model)
    assert model.l2().item() == 0.1
    assert "limited by Interval(low=0.0, high=0.1)" in caplog.text
    model = Net(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3), constraint=UnitInterval())
    with pytest.raises(MisconfigurationException, match=r"has found 50, which does not fit"):
        train(model)


def test_a_penalty_of_that_kind_takes_it_by_register_penalty_too():
    from lightning_hpo.regularizers import L2Penalty

    model = Net("sgd", init=0.1)
    model.register_penalty(L2Penalty, "auto", name="more")
    train(model)
    assert model.more().item() == pytest.approx(1 / 6, rel=1e-10)


def test_manual_optimization_counts_by_the_rate_it_has():
    class Manual(Net):
        automatic_optimization = False

        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    model = Manual("momentum")
    train(model)
    assert model.l2().item() == pytest.approx(1 / (20 * 0.1 * 10), rel=1e-10)
