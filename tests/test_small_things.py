"""Names and attributes that users reach for, and numbers that stay as they were given."""

import pytest
import torch
from cases import Mlp, fit, frozen, observe, valid_loader, weights
from torch import nn

from lightning_hpo import T1T2, ClipR, DropoutMixin, OnlineHPOCallback
from lightning_hpo._lightning import MisconfigurationException


@pytest.mark.parametrize(
    "ends", [lambda: (batch for batch in valid_loader()), lambda: iter(valid_loader())]
)
def test_held_out_data_that_end_are_refused_at_the_start(ends):
    model = Mlp()
    model.hpo_dataloader = ends
    before = weights(model)
    with pytest.raises(MisconfigurationException, match="that can be iterated again and again"):
        observe(T1T2(), model)
    assert torch.equal(weights(model), before)


class Logs(Mlp):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True)


@pytest.mark.parametrize("monitor", ["val_loss", "val_loss_epoch", "val_loss_step"])
def test_a_loss_may_be_called_as_lightning_shows_it(monitor):
    callbacks = [
        OnlineHPOCallback(T1T2(), optimizer=frozen, monitor=name) for name in (monitor, None)
    ]
    for callback in callbacks:
        fit(Logs(), callback, steps=3)
    assert callbacks[0].history == callbacks[1].history


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("rate", [0.1, 0.0123])
def test_options_that_do_not_move_are_the_numbers_that_were_given(kind, rate):
    class With(Mlp):
        def configure_optimizers(self):
            return kind(self.parameters(), lr=rate, weight_decay=0.03)

    plain, tuned = With(), With()
    fit(plain)
    options = ["lr", "weight_decay"]
    callback = OnlineHPOCallback(
        {"*": ClipR()}, optimizer=frozen, optimizer_hyperparameters=options
    )
    fit(tuned, callback)
    assert torch.equal(weights(plain), weights(tuned))


class Dropping(DropoutMixin, Mlp):
    def __init__(self, rate=0.4):
        super().__init__()
        self.rnn = nn.LSTM(4, 3, num_layers=2, dropout=rate, batch_first=True)
        self.net.insert(1, nn.Dropout(rate))
        self.register_dropout()


def test_a_rate_can_be_assigned():
    model = Dropping()
    model.net[1].p = 0.25
    assert model.net[1].p == pytest.approx(0.25)
    assert model.net[1].keep().item() == pytest.approx(0.75)


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_hh_l1"])
def test_recurrent_weights_are_found_by_their_names(name):
    model = Dropping()
    layer = model.rnn.layers[int(name[-1])]
    assert getattr(model.rnn, name) is getattr(layer, f"{name[:-1]}0")
    with pytest.raises(AttributeError):
        model.rnn.weight_hh_l2  # noqa: B018


def test_layers_with_a_rate_of_zero_are_named():
    with pytest.raises(ValueError, match=r"net\.1.*has a rate of 0.*init="):
        Dropping(0.0)
