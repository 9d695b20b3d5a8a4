"""Values found by one training, fixed in another."""

import json

import pytest
import torch
from cases import Mlp, fit, make_trainer, train_loader, valid_loader

from lightning_hpo import (
    T1T2,
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
    with pytest.raises(Exception, match="no Hyperparameter to tune"):
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
