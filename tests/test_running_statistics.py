"""Running statistics are state that training moves: hypergradients see how λ moves them."""

import math
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import (
    Mlp,
    fit,
    frozen,
    last_hypergradient,
    make_optimizer,
    observe,
    relative_error,
    train_loader,
    truth,
    valid_loader,
    validation_loss,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    GaussianNoiseMixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

STEPS = 6
ESTIMATORS = {
    "ClipR": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(STEPS, "forward"),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}
BACKENDS = ["reverse", "forward", "finite_difference"]


class Twice(nn.Module):
    """A layer that a forward pass goes through two times."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, momentum=0.3)

    def forward(self, x):
        return self.norm(self.norm(x).tanh() + x)


class Images(nn.Module):
    """Convolutions; momentum=None is a cumulative average."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv1d(1, 5, 2, bias=False)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x.unsqueeze(1))).tanh().mean(-1)


class Direct(nn.BatchNorm1d):
    """As layers of other packages do: a subclass with a forward of its own."""

    def forward(self, x):
        rate = self.momentum if self.training else 0.0
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            rate,
            self.eps,
            False,
        ).tanh()


def flat_net(norm):
    return nn.Sequential(nn.Linear(4, 5, bias=False), norm, nn.Tanh())


NETS = {
    "batch": lambda: flat_net(nn.BatchNorm1d(5)),
    "cumulative": lambda: flat_net(nn.BatchNorm1d(5, momentum=None, affine=False)),
    "twice": lambda: flat_net(Twice()),
    "direct": lambda: flat_net(Direct(5)),
    "images": lambda: Images(nn.BatchNorm1d(5, momentum=None)),
    "instance": lambda: Images(nn.InstanceNorm1d(5, track_running_stats=True)),
    "instance_affine": lambda: Images(nn.InstanceNorm1d(5, affine=True, track_running_stats=True)),
}


class Lit(Mlp):
    """The classifier of all tests, with a normalized hidden layer."""

    def __init__(self, net="batch", optimizer="momentum", **options):
        super().__init__(optimizer, granularity="model", schedule=False, **options)
        del self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(NETS[net](), nn.Linear(5, 3))
        self.double()
        self.add_penalties()

    def add_penalties(self):
        self.register_l2(init=0.05, name="hidden", granularity="model")


def make(net="batch", optimizer="momentum"):
    return Lit(net, optimizer)
