"""What beginners slip on: the message says what to do, before anything has moved, or it works."""

from __future__ import annotations

import inspect
import warnings

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, make_trainer, train_loader, valid_loader, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    Hyperparameter,
    L1Mixin,
    L2Mixin,
    OnlineHPOCallback,
    TunableDropout,
    fixed_values,
    freeze,
)


def refused(model, error=MisconfigurationException, callbacks=None):
    """Fits a module that is refused, unmoved; returns the message."""
    before = weights(model).clone()
    with pytest.raises(error) as caught:
        fit(model, callbacks or OnlineHPOCallback(T1T2()))
    assert torch.equal(weights(model), before)
    return str(caught.value)


# ------------------------------------------------------------------------------- several optimizers


class TwoOptimizers(Mlp):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class TwoGroups(Mlp):
    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.1},
            {"params": self.net[2].parameters(), "lr": 0.2},
        ]
        return torch.optim.SGD(groups)


def test_advice_on_several_optimizers_is_not_circular():
    message = refused(TwoOptimizers(), RuntimeError)  # Lightning's own, which asks for manual ones
    assert "do not set automatic_optimization = False" in message
    assert "Adam([{'params': self.encoder.parameters(), 'lr': 1e-4}" in message

    manual = TwoOptimizers()
    manual.automatic_optimization = False
    assert "several parameter groups" in refused(manual)

    callback = OnlineHPOCallback(T1T2())
    fit(TwoGroups(), callback)  # what is advised works
    assert len(callback.history)


def test_other_errors_are_left_as_they_are():
    class Fails(Mlp):
        def configure_optimizers(self):
            raise RuntimeError("out of luck")

    assert refused(Fails(), RuntimeError) == "out of luck"


# ------------------------------------------------------------------------------------------- frozen


def test_frozen_hyperparameters_are_not_said_to_be_missing():
    message = refused(freeze(Mlp(), fixed_values(Mlp())))
    assert "All hyperparameters of Mlp are frozen" in message
    assert "Leave OnlineHPOCallback out" in message
    assert "no Hyperparameter" not in message


def test_frozen_weights_are_named_as_the_reason():
    model = Mlp()
    for p in model.parameters():
        p.requires_grad_(False)
    message = refused(model)
    assert "All 4 parameters that the optimizer moves are frozen" in message


# ------------------------------------------------------------------------------------------ dropout


class Droppy(DropoutMixin, Mlp):
    def __init__(self, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_dropout(**options)


@pytest.mark.parametrize("init", [1, 1.0, 0, 0.0, 1.5])
def test_keep_probabilities_that_drop_nothing_or_all(init):
    with pytest.raises(ValueError, match=r"It is 1 − p: for a drop rate of p = 0\.2 pass 0\.8"):
        Droppy(init=init)
    with pytest.raises(ValueError, match=r"It is 1 − p"):
        TunableDropout(init)


@pytest.mark.parametrize("name", ["p", "drop_prob", "rate"])
def test_a_drop_rate_is_asked_for_as_a_keep_probability(name):
    with pytest.raises(
        TypeError, match=rf"no argument '{name}': init= is the keep.*pass init=0\.8"
    ):
        Droppy(**{name: 0.2})
    assert Droppy(init=0.8).keep().item() == pytest.approx(0.8)


# ------------------------------------------------------------------ a hyperparameter, not its value


@pytest.mark.parametrize(
    "use",
    [
        lambda h, x: h * x,
        lambda h, x: x * h,
        lambda h, x: 1 - h,
        lambda h, x: h + 1,
        lambda h, x: x / h,
        lambda h, x: x**h,
        lambda h, x: -h,
        lambda h, x: float(h),
        lambda h, x: torch.optim.SGD([x], lr=h),
    ],
)
def test_arithmetic_with_a_hyperparameter_says_to_call_it(use):
    h = Hyperparameter(0.5)
    with pytest.raises(TypeError, match=r"call it, as in self\.alpha\(\) \* x instead of"):
        use(h, nn.Parameter(torch.ones(3)))
    assert torch.equal(h() * torch.ones(3), torch.full((3,), 0.5))


def test_in_a_training_step_too():
    class Weighted(Mlp):
        def __init__(self):
            super().__init__()
            self.alpha = Hyperparameter(0.5)

        def training_step(self, batch, batch_idx):
            return self.alpha * self.loss(batch)

    assert "call it" in refused(Weighted(), TypeError)


# ----------------------------------------------------------------------------------- misspelt names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: OnlineHPOCallback(every_n_step=3), r"did you mean 'every_n_steps'\?"),
        (lambda m: ClipR(raduis=1.0), r"ClipR has no argument 'raduis': did you mean 'radius'\?"),
        (lambda m: T1T2(lr=0.1), "T1T2 has no argument 'lr': it takes scale_by_lr"),
        (lambda m: Hyperparameter(1.0, constrain=None), r"did you mean 'constraint'\?"),
        (lambda m: OnlineHPOCallback(learning_rate=0.1), r"lr=2\.0 doubles it"),
        (lambda m: OnlineHPOCallback(colour="red"), r"no argument 'colour': it takes estimator, "),
        (lambda m: m.register_l2(granularty="layer"), r"register_l2 .* mean 'granularity'\?"),
        (lambda m: m.register_l2(strength=0.1), r"given as init="),
        (lambda m: m.register_l2(lr=0.1), r"OnlineHPOCallback\(lr=2\.0\)"),
        (lambda m: m.register_l1(paramters=[]), r"register_l1 .* mean 'parameters'\?"),
    ],
)
def test_unknown_keywords_get_the_closest_one(call, message):
    class Model(L1Mixin, L2Mixin, pl.LightningModule):
        pass

    with pytest.raises(TypeError, match=message):
        call(Model())


def test_signatures_stay_visible():
    names = [*inspect.signature(OnlineHPOCallback).parameters]
    assert names[:2] == ["estimator", "optimizer"]
    assert "granularity" in inspect.signature(L2Mixin.register_l2).parameters


def test_a_factor_that_looks_like_a_learning_rate_is_warned_about():
    with pytest.warns(UserWarning, match=r"lr=0\.001 is a factor.*1000 times as slowly"):
        OnlineHPOCallback(lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnlineHPOCallback(lr=2.0)
        OnlineHPOCallback(lr=0.0)


# ------------------------------------------------------------------------------- layers that follow


class LaterHead(Mlp):
    """Registers its penalty before it is complete."""

    def __init__(self, **options):
        super().__init__()
        self.register_l2(1e-3, "more", **options)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.net(x)), y)


def warned(model, callback=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=callback).fit(model, train_loader(), valid_loader())
    return [str(w.message) for w in caught if "no penalty acts on" in str(w.message)]


@pytest.mark.parametrize("callback", [None, OnlineHPOCallback(T1T2())], ids=["alone", "callback"])
def test_weights_that_came_after_the_penalty_are_named_once(callback):
    model = LaterHead()
    (message,) = warned(model, callback)
    assert "no penalty acts on 'head.0.weight', added after" in message  # no bias, no norm
    assert warned(model) == []


def test_what_is_left_out_by_design_is_not_named():
    class Norms(Mlp):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def loss(self, batch):
            return nn.functional.cross_entropy(self.norm(self.net(batch[0])), batch[1])

    frozen = LaterHead()
    frozen.head[0].weight.requires_grad_(False)
    covered = LaterHead()
    covered.register_l2(1e-3, "rest", parameters=["head.0.weight"])
    pruned = Mlp()
    nn.utils.prune.l1_unstructured(pruned.net[0], "weight", amount=1)
    for model in (Mlp(), Norms(), frozen, covered, pruned):
        assert warned(model) == []


def test_chosen_weights_are_meant_to_be_these_alone():
    class Chosen(L2Mixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3).double()
            self.register_l2(1e-3, parameters=["net.weight"])
            self.head = nn.Linear(3, 3).double()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert warned(Chosen()) == []


# ---------------------------------------------------------------------------------- penalty() twice


class InLoss(Mlp):
    def __init__(self, times, granularity="model"):
        super().__init__(inside_loss=True)
        self.register_l2(1e-2, "more", granularity, inside_loss=True)
        self.times = times

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + sum(self.penalty() for _ in range(self.times))


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_penalty_that_counts_twice(granularity, accumulated):
    model = InLoss(2, granularity)
    before = weights(model).clone()
    with pytest.raises(
        MisconfigurationException, match=r"2 times, expected once.*Add self\.penalty"
    ):
        fit(model, OnlineHPOCallback(T1T2()), accumulate_grad_batches=accumulated)
    assert torch.equal(weights(model), before)
    fit(InLoss(1, granularity), OnlineHPOCallback(T1T2()), accumulate_grad_batches=accumulated)


# ------------------------------------------------------------------------------ the validation loss


class Validating(Mlp):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def validation_step(self, batch, batch_idx):
        return self.step(self, batch)


def accuracy(model, batch):
    return (model.net(batch[0]).argmax(1) == batch[1]).double().mean()


def test_an_accuracy_is_no_validation_loss():
    message = refused(Validating(accuracy))
    assert "An accuracy" in message
    assert "return the loss, and log the accuracy" in message


def test_a_dict_without_a_loss_is_shown():
    message = refused(Validating(lambda m, batch: {"accuracy": accuracy(m, batch)}))
    assert "returned no loss (a dict with ['accuracy'])" in message


@pytest.mark.parametrize(
    ("output", "options"),
    [
        (lambda loss: {"val_loss": loss}, {}),
        (lambda loss: {"loss": loss, "val_loss": loss * 2}, {}),
        (lambda loss: {"mine": loss, "val_loss": loss * 2}, {"monitor": "mine"}),
    ],
)
def test_a_returned_dict_serves(output, options):
    losses = []
    for step in (Mlp.loss, lambda m, batch: output(m.loss(batch))):
        callback = OnlineHPOCallback(T1T2(), **options if step is not Mlp.loss else {})
        fit(Validating(step), callback)
        losses.append([record.loss for record in callback.history])
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------ after the run


def test_values_of_a_checkpoint(tmp_path):
    model = Mlp()
    trainer = fit(model, OnlineHPOCallback(T1T2()))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(
        TypeError, match=r"got a PosixPath.*fixed_values\(freeze\(LitClassifier\(\)"
    ):
        fixed_values(path)
    assert fixed_values(freeze(Mlp(), path)) == fixed_values(model)  # what is advised works
    with pytest.raises(TypeError, match=r"got a Trainer.*pass that module"):
        fixed_values(trainer)
    with pytest.raises(TypeError, match=r"freeze\(LitClassifier\(\), values\)"):
        freeze(fixed_values(model), Mlp())
    with pytest.raises(TypeError, match=r"values is a Mlp.*expected what fixed_values"):
        freeze(Mlp(), model)


# -------------------------------------------------------------------------------------- two of them


def test_two_callbacks():
    class Other(OnlineHPOCallback):
        pass

    message = refused(Mlp(), callbacks=[OnlineHPOCallback(T1T2()), Other(T1T2())])
    assert "has 2 OnlineHPOCallbacks, expected one" in message
    assert "OnlineHPOCallback({'l2*': T1T2()" in message
    # Of the very same class, Lightning refuses two by itself, and points to its documentation.
    with pytest.raises(RuntimeError, match=r"consult the documentation of `OnlineHPOCallback`"):
        make_trainer(callbacks=[OnlineHPOCallback(), OnlineHPOCallback()])
    assert "A Trainer takes one such callback" in OnlineHPOCallback.__doc__
