"""Scripted and traced submodules: their weights are penalized, and a replay leaves nothing."""

import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, observe, relative_error, weights
from torch import nn

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


def script(module, example):
    return torch.jit.script(module)


def trace(module, example):
    return torch.jit.trace(module, example)


class Compiled(Mlp):
    """Some of its layers are scripted or traced before the penalty is registered."""

    def __init__(self, how=None, normalized=False, **options):
        super().__init__("momentum", **options)
        penalty = dict(self.l2.named_children())
        assert penalty
        del self.l2
        vars(self).pop("_hpo_record")
        if normalized:
            self.net.insert(1, nn.BatchNorm1d(5))
            self.net.insert(3, nn.Dropout(0.2))
        if how is not None:
            self.net[0] = how(self.net[0], torch.randn(8, 4))
            if normalized:
                self.net[1] = how(self.net[1], torch.randn(8, 5))
        self.register_l2(init=0.05, granularity="model", inside_loss=self.inside_loss)


@pytest.mark.parametrize("how", [script, trace])
@pytest.mark.parametrize("inside_loss", [False, True])
def test_weights_are_penalized_without_the_callback(how, inside_loss):
    compiled, plain = Compiled(how, inside_loss=inside_loss), Compiled(inside_loss=inside_loss)
    without = Compiled(how, inside_loss=inside_loss)
    without.l2.raw.fill_(-100.0)
    for model in (compiled, plain, without):
        fit(model)
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=0, atol=1e-14)
    assert not torch.allclose(weights(compiled), weights(without))


@pytest.mark.parametrize("how", [script, trace])
@pytest.mark.parametrize(
    ("make", "derivatives"),
    [
        (T1T2, "auto"),
        (ClipR, "auto"),
        (ClipR, "forward"),
        (ClipR, "finite_difference"),
        (lambda: UnrollK(3, mode="reverse"), "auto"),
    ],
)
def test_hypergradients_are_those_of_eager_layers(how, make, derivatives):
    found = [
        last_hypergradient(observe(make(), Compiled(h), derivatives=derivatives))
        for h in (how, None)
    ]
    assert relative_error(*found) < (1e-5 if derivatives == "finite_difference" else 1e-9)


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(3, mode="reverse")])
def test_statistics_and_mode_of_scripted_layers_are_left_alone(make):
    """They live outside of Python: buffers, and whether a layer is in training mode."""
    states = []
    for callback in (None, OnlineHPOCallback(make(), optimizer=frozen)):
        model = Compiled(script, normalized=True)
        torch.manual_seed(1)
        fit(model, callback)
        assert model.net[1].training
        states.append(model.state_dict())
    assert states[0]["net.1.num_batches_tracked"] == 10
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
