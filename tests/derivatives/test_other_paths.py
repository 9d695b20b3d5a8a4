"""Parameters that the loss reaches by other paths than the module tree, under every backend."""

import pytest
import torch
from cases import Mlp, fit, last_hypergradient, observe, relative_error, truth, weights
from torch.nn import functional as F

from lightning_hpo import ClipR, UnrollK


class InAList(Mlp):
    """Its loss reads the weights from a plain list, as code that sums norms does."""

    def __init__(self, **options):
        super().__init__("momentum", granularity="model", **options)
        self.listed = [[p] for p in self.net.parameters()]

    def extra(self):
        return sum(p.square().square().sum() for (p,) in self.listed)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.3 * self.extra()


class InAClosure(InAList):
    """The first weight is never read from the module at all."""

    def __init__(self, **options):
        super().__init__(**options)
        first = self.net[0].weight
        self.first_layer = lambda x: torch.tanh(F.linear(x, first, self.net[0].bias))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net[2](self.first_layer(x)), y)


class InTheOptimizer(InAList):
    def extra(self):
        groups = self.trainer.optimizers[0].param_groups
        return sum(p.square().sum().square() for group in groups for p in group["params"])


@pytest.mark.parametrize("make", [InAList, InAClosure, InTheOptimizer])
@pytest.mark.parametrize("derivatives", ["forward", "reverse", "finite_difference"])
@pytest.mark.parametrize("estimator", [ClipR(float("inf")), UnrollK(10, "reverse")])
def test_hypergradient(make, derivatives, estimator):
    every = 10 if isinstance(estimator, UnrollK) else 1
    callback = observe(estimator, make(), derivatives=derivatives, every_n_steps=every)
    tolerance = 1e-4 if derivatives == "finite_difference" else 1e-6
    assert relative_error(last_hypergradient(callback), truth(make)) < tolerance


@pytest.mark.parametrize("make", [InAList, InAClosure, InTheOptimizer])
def test_training_is_bit_identical(make):
    plain, watched = make(), make()
    fit(plain)
    observe(ClipR(float("inf")), watched, derivatives="forward")
    assert torch.equal(weights(plain), weights(watched))
