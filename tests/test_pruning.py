"""Pruning and parametrizations keep a weight under another name: the penalty follows."""

import math

import pytest
import torch
from cases import (
    Mlp,
    fit,
    frozen,
    last_hypergradient,
    observe,
    relative_error,
    train_loader,
    truth,
    weights,
)
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK
from lightning_hpo._lightning import MisconfigurationException


def pruning(**options):
    defaults = {
        "pruning_fn": "l1_unstructured",
        "amount": 0.3,
        "use_lottery_ticket_hypothesis": False,
    }
    return ModelPruning(**{**defaults, **options})


class Decayed(Mlp):
    """Trains its weights alone, with a penalty and a weight decay of the optimizer."""

    def __init__(self, decay):
        super().__init__(granularity="model", init=0.05)
        self.decay = decay

    def configure_optimizers(self):
        trained = [p for name, p in self.named_parameters() if name.endswith("weight")]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=self.decay)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_global_unstructured": False}, {"make_pruning_permanent": False}],
    ids=["global", "local", "kept"],
)
def test_the_penalty_acts_as_a_weight_decay_does(options):
    """Both on what the optimizer moves, the weight before its mask."""
    by_penalty, by_decay = Decayed(0.0), Decayed(0.05)
    by_decay.l2.raw.fill_(-math.inf)
    for model in (by_penalty, by_decay):
        fit(model, pruning(parameter_names=["weight"], **options))
    torch.testing.assert_close(weights(by_penalty), weights(by_decay), rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(3)], ids=["t1t2", "clip", "unroll"])
@pytest.mark.parametrize("inside_loss", [False, True])
def test_invisible_through_a_pruning(make, inside_loss):
    plain, watched = (Mlp("adam", inside_loss=inside_loss) for _ in range(2))
    fit(plain, pruning())
    fit(watched, [pruning(), OnlineHPOCallback(make(), optimizer=frozen)])
    assert (weights(plain) == 0).any()
    assert torch.equal(weights(plain), weights(watched))


def prune_some(net):
    prune.l1_unstructured(net[0], "weight", amount=0.4)
    prune.l1_unstructured(net[2], "weight", amount=0.3)


def parametrize(net):
    parametrizations.orthogonal(net[2])


class Replaced(Mlp):
    """Its weights move to other names after the penalty was registered."""

    def __init__(self, replace=prune_some, **options):
        super().__init__("momentum", granularity="model", **options)
        replace(self.net)


@pytest.mark.parametrize("inside_loss", [False, True])
def test_hypergradients_of_pruned_weights_are_exact(inside_loss):
    def make():
        return Replaced(inside_loss=inside_loss)

    callback = observe(ClipR(float("inf")), make())
    assert relative_error(last_hypergradient(callback), truth(make)) < 1e-6


def test_a_parametrized_weight_is_followed():
    model = Replaced(parametrize)
    (penalty,) = model.gradient_penalties
    assert penalty.weights[1] is model.net[2].parametrizations.weight.original


def test_a_penalty_registered_on_pruned_weights_outlives_the_pruning():
    model = Mlp()
    prune.l1_unstructured(model.net[0], "weight", amount=0.4)
    model.register_l2(init=0.1, name="late")
    prune.remove(model.net[0], "weight")
    fit(model)
    owned = {id(p) for p in model.parameters()}
    assert all(id(w) in owned for p in model.gradient_penalties for w in p.weights)


def test_what_cannot_be_followed_is_refused_by_name():
    model = Mlp()
    parametrizations.weight_norm(model.net[0])
    before = weights(model)
    with pytest.raises(MisconfigurationException, match=r"'weight' of a .*Linear.*register"):
        fit(model)
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize(("make", "warns"), [(ClipR, True), (T1T2, False)])
def test_a_lottery_ticket_is_warned_about(make, warns, recwarn):
    callbacks = [
        pruning(use_lottery_ticket_hypothesis=True),
        OnlineHPOCallback(make(), optimizer=frozen),
    ]
    fit(Mlp(), callbacks, train=train_loader())
    found = [str(w.message) for w in recwarn if "use_lottery_ticket_hypothesis=False" in str(w)]
    assert bool(found) is warns


def test_biases_too():
    model = Mlp()
    model.register_l2(init=0.1, name="biases", parameters=["net.0.bias"])
    fit(model, pruning(parameters_to_prune=[(model.net[0], "weight"), (model.net[0], "bias")]))
    assert isinstance(model.net[0].bias, nn.Parameter)
