"""Batches that Lightning skips, because the loader yields None."""

import math

import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, relative_error, train_loader, truth, weights

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK

GOOD = list(train_loader())[:5]


class Batches:
    """Yields given batches; None at given places."""

    def __init__(self, *none_at):
        places = range(len(GOOD) + len(none_at))
        good = iter(GOOD)
        self.batches = [None if i in none_at else next(good) for i in places]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def tuned(train, make, **options):
    model = Mlp("momentum", schedule=False)
    callback = OnlineHPOCallback(make(), optimizer=frozen)
    trainer = fit(model, callback, train=train, steps=10, **options)
    return model, callback, trainer


@pytest.mark.parametrize("none_at", [(1, 3, 5, 7, 9), (0,), (2, 3, 6), (5,)])
@pytest.mark.parametrize(
    "make",
    [T1T2, lambda: ClipR(math.inf), lambda: UnrollK(2, "reverse"), lambda: UnrollK(2, "forward")],
    ids=["T1T2", "ClipR", "reverse", "forward"],
)
def test_batches_that_are_none_are_no_steps(make, none_at):
    plain, expected, _ = tuned(Batches(), make)
    model, callback, trainer = tuned(Batches(*none_at), make)
    assert torch.equal(weights(model), weights(plain))
    assert [r.step for r in callback.history] == [r.step for r in expected.history]
    assert callback.history[-1].step == trainer.global_step == 10
    # Held-out batches are the same, drawn in the same order.
    assert torch.equal(last_hypergradient(callback), last_hypergradient(expected))


@pytest.mark.parametrize("make", [lambda: ClipR(math.inf), lambda: UnrollK(10, "reverse")])
def test_within_a_window_of_accumulated_batches(make):
    """A window that ends with None takes no step, and its gradient is cleared."""
    options = {"accumulate_grad_batches": 2}
    model, callback, trainer = tuned(Batches(3), make, **options)

    def make_model():
        return Mlp("momentum", schedule=False)

    plain = make_model()
    fit(plain, train=Batches(3), steps=10, **options)
    assert torch.equal(weights(model), weights(plain))
    assert callback.history[-1].step == trainer.global_step == 10
    expected = truth(make_model, train=Batches(3), steps=10, **options)
    assert relative_error(last_hypergradient(callback), expected) < 1e-5


def test_a_window_that_begins_with_none_is_warned_about():
    with pytest.warns(UserWarning, match=r"batch 2 was None.*leave such batches out"):
        tuned(Batches(2), ClipR, accumulate_grad_batches=2)
