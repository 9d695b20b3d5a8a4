"""What the loss reaches by other paths than the module tree, under every backend."""

import functools
import warnings

import pytest
import torch
from cases import Mlp, fit, last_hypergradient, observe, relative_error, truth, weights
from torch.nn import functional as F

from lightning_hpo import ClipR, Hyperparameter, UnrollK


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


expected = functools.cache(truth)


@pytest.mark.parametrize("make", [InAList, InAClosure, InTheOptimizer])
@pytest.mark.parametrize("derivatives", ["forward", "reverse", "finite_difference"])
@pytest.mark.parametrize("estimator", [ClipR(float("inf")), UnrollK(10, "reverse")])
def test_hypergradient(make, derivatives, estimator):
    every = 10 if isinstance(estimator, UnrollK) else 1
    callback = observe(estimator, make(), derivatives=derivatives, every_n_steps=every)
    tolerance = 1e-4 if derivatives == "finite_difference" else 1e-6
    assert relative_error(last_hypergradient(callback), expected(make)) < tolerance


@pytest.mark.parametrize("make", [InAList, InAClosure, InTheOptimizer])
def test_training_is_bit_identical(make):
    plain, watched = make(), make()
    fit(plain)
    observe(ClipR(float("inf")), watched, derivatives="forward")
    assert torch.equal(weights(plain), weights(watched))


# ----------------------------------------------------------------------------------------------- λ

ELSEWHERE = []


class Referring(Mlp):
    """Calls its hyperparameter, and reads the raw tensor that it has kept as well."""

    def __init__(self, refer=lambda raw: None, read=lambda kept: 0.0):
        super().__init__("momentum", granularity="model")
        del self.l2
        vars(self).pop("_hpo_record")
        self.alpha = Hyperparameter(0.5)
        self.kept = refer(self.alpha.raw)
        self.read = read

    def training_step(self, batch, batch_idx):
        size = self.net[0].weight.square().sum()
        return super().training_step(batch, batch_idx) * self.alpha() + size * self.read(self.kept)


def _closure(raw):
    return lambda: raw


REFERENCES = {
    "attribute": (lambda raw: raw, lambda kept: kept),
    "list": (lambda raw: [raw], lambda kept: kept[0]),
    "closure": (_closure, lambda kept: kept()),
    "view": (lambda raw: raw.view(1), lambda kept: kept[0]),
    "view in a tuple": (lambda raw: (raw.expand(2),), lambda kept: kept[0].mean()),
    "detached": (lambda raw: {"a": raw.detach()}, lambda kept: kept["a"]),
}


@functools.cache
def referring(name):
    return truth(lambda: Referring(*REFERENCES[name]))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("derivatives", ["forward", "reverse", "finite_difference"])
@pytest.mark.parametrize("estimator", [ClipR(float("inf")), UnrollK(10, "reverse")])
def test_references_to_raw(name, derivatives, estimator):
    """Views, too, lie in the memory that the λ-optimizer writes to."""

    every = 10 if isinstance(estimator, UnrollK) else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*by another path")
        callback = observe(
            estimator,
            Referring(*REFERENCES[name]),
            derivatives=derivatives,
            every_n_steps=every,
        )
    assert relative_error(last_hypergradient(callback), referring(name)) < 1e-6


@pytest.mark.parametrize("derivatives", ["forward", "reverse", "finite_difference"])
def test_a_reference_out_of_reach_is_named(derivatives):
    def make():
        model = Referring(lambda raw: None, lambda kept: ELSEWHERE[0])
        ELSEWHERE[:] = [model.alpha.raw]
        return model

    with pytest.warns(UserWarning, match=r"raw tensor of \['alpha'\] by another path.*Call the"):
        callback = observe(ClipR(float("inf")), make(), derivatives=derivatives)
    assert relative_error(last_hypergradient(callback), truth(make)) > 0.1
