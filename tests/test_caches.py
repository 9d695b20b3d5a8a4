"""Functions with a cache draw at their first call: that is to be one of the training."""

import functools
import math
import warnings

import pytest
import torch
from cases import Mlp, fit, last_hypergradient, observe, relative_error, truth, weights

from lightning_hpo import T1T2, ClipR, UnrollK

STEPS = 6
ESTIMATORS = {"T1T2": T1T2, "ClipR": lambda: ClipR(math.inf), "reverse": lambda: UnrollK(3)}
EVERY_ESTIMATOR = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


def projected(x, matrix):
    return x + 0.3 * x @ matrix.to(x.dtype)


@functools.lru_cache
def matrix(size):
    return torch.randn(size, size)


class OfFunction(Mlp):
    def __init__(self):
        super().__init__(granularity="model")
        self.double()
        matrix.cache_clear()
        torch.manual_seed(3)

    def training_step(self, batch, batch_idx):
        noise = torch.randn(4)  # what is drawn later shows how much has been drawn before
        return self.loss((projected(batch[0], self.matrix()) + noise, batch[1]))

    def matrix(self):
        return matrix(4)


class OfMethod(OfFunction):
    def __init__(self):
        super().__init__()
        type(self).drawn.cache_clear()

    @functools.cache  # noqa: B019
    def drawn(self):
        return torch.randn(4, 4)

    def matrix(self):
        return self.drawn()


class OfAttribute(OfFunction):
    def __init__(self):
        super().__init__()
        self.drawn = functools.lru_cache(maxsize=2)(lambda: torch.randn(4, 4))

    def matrix(self):
        return self.drawn()


class OfProperty(OfFunction):
    @functools.cached_property
    def drawn(self):
        return torch.randn(4, 4)

    def matrix(self):
        return self.drawn


class OfValidation(OfFunction):
    """The training calls it from its second epoch on."""

    def matrix(self):
        return matrix(4) if self.current_epoch else torch.eye(4)

    def validation_step(self, batch, batch_idx):
        return self.loss((projected(batch[0], matrix(4)), batch[1]))


@EVERY_ESTIMATOR
@pytest.mark.parametrize("kind", [OfFunction, OfMethod, OfAttribute, OfProperty, OfValidation])
def test_the_training_draws_what_it_keeps(kind, make):
    plain = kind()
    fit(plain, steps=STEPS)
    model = kind()
    observe(make(), model, steps=STEPS)
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("kind", [OfFunction, OfMethod])
def test_hypergradients_see_what_is_kept(kind):
    callback = observe(ClipR(math.inf), kind(), steps=STEPS)
    assert relative_error(last_hypergradient(callback), truth(kind, steps=STEPS)) < 1e-5


class OfKeys(OfFunction):
    """Draws a matrix for each batch."""

    @functools.cache  # noqa: B019
    def drawn(self, key):
        return torch.randn(4, 4)

    def training_step(self, batch, batch_idx):
        return self.loss((projected(batch[0], self.drawn(self.global_step)), batch[1]))


@pytest.mark.parametrize(
    ("make", "accumulated"),
    [(ClipR, 2), (lambda: UnrollK(3, "forward"), 1)],
    ids=["ClipR", "UnrollK"],
)
def test_what_cannot_be_taken_out_is_named(make, accumulated):
    """Where a replay comes before its step; else the training has filled the cache already."""
    model = OfKeys()
    OfKeys.drawn.cache_clear()
    if accumulated == 1:
        model.drawn(-1)  # one that is empty before the first replay is emptied after it
    with pytest.warns(UserWarning, match=r"fill the cache of 'OfKeys\.drawn'.*Draw in") as caught:
        observe(make(), model, steps=STEPS, accumulate_grad_batches=accumulated)
    assert sum("fill the cache" in str(w.message) for w in caught) == 1


class Computing(OfKeys):
    """Beside a dropout, which draws."""

    @functools.cache  # noqa: B019
    def drawn(self, key):
        COMPUTED.append(key)
        return torch.eye(4) * key

    def training_step(self, batch, batch_idx):
        x = torch.nn.functional.dropout(batch[0], 0.2)
        return super().training_step((x, batch[1]), batch_idx)


COMPUTED = []


@EVERY_ESTIMATOR
def test_what_is_computed_stays(make):
    """No warning, and nothing is computed again but what has been computed first."""
    COMPUTED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fill the cache")
        observe(make(), Computing(), steps=STEPS)
    assert set(COMPUTED) == set(range(STEPS))
    assert sorted(COMPUTED)[-STEPS + 1 :] == list(range(1, STEPS))
