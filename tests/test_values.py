"""Values found by one training, fixed in another."""

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, make_trainer, train_loader, valid_loader, weights

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    OnlineHPOCallback,
    fixed_values,
    freeze,
    named_hyperparameters,
)


@pytest.fixture
def tuned():
    model = Mlp()
    fit(model, OnlineHPOCallback(T1T2()))
    return model


def test_values_are_plain_and_fix_another_module(tuned):
    values = json.loads(json.dumps(fixed_values(tuned)))
    assert set(values) == {"l2.net.0", "l2.net.2"}
    fresh = freeze(Mlp(), values)
    for name, h in named_hyperparameters(fresh).items():
        assert h().item() == pytest.approx(values[name], rel=1e-12)
        assert h.frozen


def test_values_come_from_a_checkpoint_too(tuned, tmp_path):
    trainer = make_trainer()
    trainer.fit(tuned, train_loader(), valid_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = freeze(Mlp(), tmp_path / "last.ckpt")
    assert fixed_values(fresh) == fixed_values(tuned)


def test_a_callback_leaves_frozen_hyperparameters_alone(tuned):
    values = {"l2.net.0": 0.07}
    callback = OnlineHPOCallback(T1T2())
    model = freeze(Mlp(), values)
    fit(model, callback)
    assert model.l2.net._modules["0"]().item() == pytest.approx(0.07)
    assert set(callback.history[-1].values) == {"l2.net.2"}
    assert model.l2.net._modules["2"]().item() != 0.05


def test_with_everything_frozen_there_is_nothing_to_tune(tuned):
    with pytest.raises(Exception, match="All hyperparameters of Mlp are frozen"):
        fit(freeze(Mlp(), fixed_values(tuned)), OnlineHPOCallback(T1T2()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l3": 0.1}, r"no hyperparameter 'l3'; there are \['l2\.net\.0', 'l2\.net\.2'\]"),
        ({"l2.net.0": -1.0}, r"'l2\.net\.0' is refused.*-1"),
        ({"l2.net.0": [0.1, 0.2]}, r"shape \(2,\), expected \(\)"),
    ],
)
def test_bad_values_are_refused_and_change_nothing(values, message):
    model = Mlp()
    before = fixed_values(model)
    with pytest.raises(ValueError, match=message):
        freeze(model, values)
    assert fixed_values(model) == before
    assert not any(h.frozen for h in named_hyperparameters(model).values())


def test_frozen_strengths_still_act(tuned):
    """Retraining with fixed values equals a training that has them from the start."""
    frozen, plain = freeze(Mlp(), {"l2.net.0": 0.2, "l2.net.2": 0.2}), Mlp(init=0.2)
    fit(frozen), fit(plain)
    for a, b in zip(frozen.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shared_rates_come_from_a_checkpoint_once(tmp_path):
    class Dropped(DropoutMixin, Mlp):
        def __init__(self, **options):
            super().__init__()
            self.net.insert(2, torch.nn.Dropout(0.3))
            self.register_dropout(**options)

    for options in ({}, {"tied": False}):
        model = Dropped(**options)
        fit(model, OnlineHPOCallback(T1T2())).save_checkpoint(tmp_path / "last.ckpt")
        fresh = freeze(Dropped(**options), tmp_path / "last.ckpt")
        assert fixed_values(fresh) == fixed_values(model)
    with pytest.raises(ValueError, match=r"has no hyperparameters \['l2\.net\.0'"):
        freeze(Mlp(granularity="layer"), _without_l2(tmp_path))


def _without_l2(folder):
    torch.save({"state_dict": {}}, folder / "empty.ckpt")
    return folder / "empty.ckpt"


# ------------------------------------------------------------------------- options of the optimizer


def tune_options(schedule, path=None):
    model = Mlp("momentum", schedule=schedule)
    callback = OnlineHPOCallback(ClipR(), optimizer_hyperparameters=["lr", "momentum"])
    trainer = fit(model, callback)
    if path is not None:
        trainer.save_checkpoint(path)
    return model, callback


class Handmade(Mlp):
    """Has the learning rate and the momentum of its own in its optimizer from the start."""

    def __init__(self, values, schedule):
        super().__init__("momentum", schedule=schedule)
        self.values = values
        for name, h in named_hyperparameters(self).items():
            h.raw.copy_(h.constraint.inverse(torch.tensor(values[name])))

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        (group,) = (configured["optimizer"] if self.schedule else configured).param_groups
        group["momentum"] = self.values["optimizer.momentum"]
        lr = self.values["optimizer.lr"]
        if self.schedule:  # the first step uses what LambdaLR has set already, later ones base_lrs
            group["lr"] *= lr
            configured["lr_scheduler"]["scheduler"].base_lrs[0] *= lr
        else:
            group["lr"] = lr
        return configured


@pytest.mark.parametrize("schedule", [False, True])
def test_tuned_options_are_fixed_in_another_training(schedule, tmp_path):
    tuned, callback = tune_options(schedule, tmp_path / "last.ckpt")
    values = json.loads(json.dumps(fixed_values(tuned)))
    assert values == callback.history[-1].values
    truth = Handmade(values, schedule)
    fit(truth)
    for source in (values, tmp_path / "last.ckpt"):
        fresh = freeze(Mlp("momentum", schedule=schedule), source)
        assert fixed_values(fresh) == pytest.approx(values, rel=1e-12)
        fit(copy.deepcopy(fresh))
        fit(fresh)
        torch.testing.assert_close(weights(fresh), weights(truth), rtol=1e-12, atol=1e-14)
    untuned = freeze(
        Mlp("momentum", schedule=schedule), {n: v for n, v in values.items() if "l2" in n}
    )
    fit(untuned)
    assert (weights(untuned) - weights(truth)).norm() > 1e-4


def test_a_callback_leaves_fixed_options_alone():
    callback = OnlineHPOCallback(T1T2(), optimizer_hyperparameters=["lr", "momentum"])
    model = freeze(Mlp("momentum"), {"optimizer.lr": 0.5})
    fit(model, callback)
    assert set(callback.history[-1].values) == {"l2.net.0", "l2.net.2", "optimizer.momentum"}
    assert fixed_values(model)["optimizer.lr"] == 0.5
    assert (
        fixed_values(model)["optimizer.momentum"]
        == callback.history[-1].values["optimizer.momentum"]
    )


@pytest.mark.parametrize("value", ["fast", None, float("nan"), [0.9, float("inf")]])
def test_bad_options_are_refused(value):
    model = Mlp()
    with pytest.raises(ValueError, match=r"'optimizer\.lr' is .*expected a number"):
        freeze(model, {"optimizer.lr": value, "l2.net.0": 0.3})
    assert not any(h.frozen for h in named_hyperparameters(model).values())


def test_a_retraining_passes_the_values_on(tmp_path):
    """Values that are fixed stand in its checkpoint too, and other callbacks do not confuse it."""

    class Other(pl.Callback):
        def state_dict(self):
            return {"options": {"patience": 3}}

    model = freeze(Mlp("momentum"), {"optimizer.lr": 0.05})
    callback = OnlineHPOCallback(T1T2(), optimizer_hyperparameters=["lr", "momentum"])
    fit(model, [callback, Other()]).save_checkpoint(tmp_path / "last.ckpt")
    again = freeze(Mlp("momentum"), tmp_path / "last.ckpt")
    assert fixed_values(again) == pytest.approx(fixed_values(model), rel=1e-12)
    assert fixed_values(again)["optimizer.lr"] == 0.05


def test_values_are_those_of_the_last_tuning():
    model = Mlp("momentum")
    fit(model, OnlineHPOCallback(T1T2(), optimizer_hyperparameters=["lr"]))
    assert "optimizer.lr" in fixed_values(model)
    fit(model, OnlineHPOCallback(T1T2()))
    assert set(fixed_values(model)) == {"l2.net.0", "l2.net.2"}


@pytest.mark.parametrize(
    ("optimizer", "values", "message"),
    [
        ("sgd", {"optimizer.lr": -0.1}, r"'optimizer\.lr' is refused.*-0\.1"),
        ("adam", {"optimizer.betas": 0.9}, r"'betas' of Adam has 2 number\(s\), .* has 1"),
        ("sgd", {"optimizer.lr": [0.9, 0.8]}, r"'lr' of SGD has 1 number\(s\), .* has 2"),
    ],
)
def test_values_that_the_optimizer_cannot_take_are_refused(optimizer, values, message):
    with pytest.raises(ValueError, match=message):
        fit(freeze(Mlp(optimizer), values))


def test_an_option_that_the_optimizer_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"'betas' of the optimizer .* SGD has no such number"):
        fit(freeze(Mlp(), {"optimizer.betas": [0.9, 0.99]}))
