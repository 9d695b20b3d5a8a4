"""Every differentiable kind of regularizer, held to central differences of whole trainings."""

import math

import pytest
import torch
from cases import STEPS, VALID, Mlp, fit, observe
from torch import nn
from torch.nn import functional as F

from lightning_hpo import (
    ClipR,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    L1Mixin,
    LabelSmoothing,
    LossWeightMixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

ESTIMATORS = {
    "RTHO": lambda: ClipR(math.inf),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}


class Noise(GaussianNoiseMixin, Mlp):
    name = "noise"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_noise(0.3)


class HiddenNoise(GaussianNoiseMixin, Mlp):
    name = "noise.net.2"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_noise(0.3, at=["net.0", "net.2"], tied=False)


class L1(L1Mixin, Mlp):
    name = "l1"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_l1(0.01)


class L1InLoss(L1Mixin, Mlp):
    name = "l1"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_l1(0.01, inside_loss=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


class Smoothing(Mlp):
    name = "criterion.epsilon"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.criterion = LabelSmoothing(0.1)

    def loss(self, batch):
        return self.criterion(self.net(batch[0]), batch[1])


class LossWeight(LossWeightMixin, Mlp):
    name = "loss_weights.size"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_loss_weights({"size": 0.5})

    def training_step(self, batch, batch_idx):
        size = self.net(batch[0]).square().mean()
        return self.weighted_loss(super().training_step(batch, batch_idx), size=size)


class ExampleWeights(ExampleWeightMixin, Mlp):
    name = "example_weights"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_example_weights(40, 0.5)

    def training_step(self, batch, batch_idx):
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return self.weighted_mean(losses, torch.arange(8) + 8 * batch_idx)


KINDS = (Noise, HiddenNoise, L1, L1InLoss, Smoothing, LossWeight, ExampleWeights)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("kind", KINDS)
def test_hypergradients_equal_central_differences_of_the_training(kind, optimizer):
    def trained(element, distance):
        model = kind(optimizer)
        named_hyperparameters(model)[kind.name].raw.view(-1)[element] += distance
        torch.manual_seed(7)
        fit(model)
        with torch.no_grad():
            return F.cross_entropy(model.net.eval()(VALID[0]), VALID[1]).item()

    size = named_hyperparameters(kind(optimizer))[kind.name].raw.numel()
    elements = range(min(size, 3))
    h = 1e-4
    truth = torch.tensor([(trained(i, h) - trained(i, -h)) / (2 * h) for i in elements])
    assert truth.norm() > 1e-5
    for make in ESTIMATORS.values():
        model = kind(optimizer)
        torch.manual_seed(7)
        callback = observe(make(), model)
        found = callback.history[-1].hypergradients[kind.name].flatten()[: len(truth)]
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_noise_acts_in_training_only():
    model = Noise("sgd")
    x = VALID[0]
    torch.manual_seed(0)
    noisy = model.train().net(x)
    assert not torch.allclose(noisy, model.eval().net(x))
    with torch.no_grad():
        model.noise.raw.zero_()
    assert torch.equal(model.train().net(x), model.eval().net(x))


def test_several_kinds_train_together_and_log_separately():
    class Everything(GaussianNoiseMixin, Mlp):
        def __init__(self):
            super().__init__("momentum")
            self.net.append(nn.Identity())
            self.register_noise(0.1)

    callback = OnlineHPOCallback(ClipR(), optimizer_hyperparameters=["lr"])
    fit(Everything(), callback)
    first, last = callback.history[0], callback.history[-1]
    assert set(last.values) == {"l2.net.0", "l2.net.2", "noise", "optimizer.lr"}
    assert all(last.values[name] != first.values[name] for name in last.values)
