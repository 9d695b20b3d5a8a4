"""When something goes wrong at any point: training goes on, or stops with the user's own error."""

import math

import lightning.pytorch as pl
import pytest
import torch
from cases import VALID, MemoryLogger, Mlp, Recorder, fit, frozen, pairwise
from test_invisibility import Eventful, Witness, assert_put_back

from lightning_hpo import (
    T1T2,
    ClipR,
    GaussianNoiseMixin,
    OnlineHPOCallback,
    UnrollK,
    fixed_values,
)
from lightning_hpo.estimators import Estimate


class Fuse(torch.autograd.Function):
    """Does nothing, and tells when its derivatives are taken."""

    @staticmethod
    def forward(ctx, x, reached):
        ctx.reached = reached
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.reached("backward")
        return FuseBackward.apply(gradient, ctx.reached), None


class FuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reached):
        ctx.reached = reached
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.reached("double backward")
        return gradient, None


class Failing(Eventful):
    """Raises at one point of its n-th replay."""

    point, at = "start", 1
    counts = Recorder(count=[])  # the host's: not put back after a replay

    def reached(self, point):
        if point == self.point and "log" in vars(self):  # within a replay
            self.counts.count.append(point)
            if len(self.counts.count) == self.at:
                raise KeyError("the user's own")

    def training_step(self, batch, batch_idx):
        self.reached("start")
        handle = self.net[2].register_forward_hook(self.after_hidden)
        try:
            result = super().training_step(batch, batch_idx)
        finally:
            handle.remove()
        self.reached("end")
        return result

    def after_hidden(self, module, args, output):
        self.reached("forward")
        return Fuse.apply(output, self.reached)


POINTS = ["start", "forward", "end", "backward", "double backward"]


@pairwise(
    make={"ClipR": ClipR, "T1T2": T1T2, "UnrollK": lambda: UnrollK(3, "reverse")},
    # Differences take no second derivative.
    where=[
        *(("reverse", point) for point in POINTS),
        *(("finite_difference", point) for point in POINTS[:-1]),
    ],
    at=[1, 4],
)
def test_everything_is_put_back_wherever_a_replay_raises(make, where, at):
    derivatives, point = where
    pl.seed_everything(5)
    estimator = make()
    witness = Witness(estimator)
    model = type("Model", (Failing,), {"point": point, "at": at, "counts": Recorder(count=[])})()
    callback = OnlineHPOCallback(estimator, optimizer=frozen, derivatives=derivatives)
    with pytest.raises(KeyError, match="the user's own"):
        fit(model, [witness, callback], logger=MemoryLogger(), num_sanity_val_steps=2)
    assert_put_back(witness.seen.before, witness.after)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
def test_held_out_data_that_are_not_finite(make, value):
    """Updates are skipped; θ goes the way that it goes at those λ."""
    x, y = VALID
    wrong = [[torch.full_like(x, value), y]]
    model, plain = Mlp(), Mlp()
    callback = OnlineHPOCallback(make(), dataloader=wrong)
    with pytest.warns(UserWarning, match="is not finite; λ is left alone"):
        fit(model, callback)
    fit(plain)
    assert callback.skipped == len(callback.history) > 0
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


class Noisy(GaussianNoiseMixin, Mlp):
    def __init__(self):
        super().__init__(init=1.0)
        self.register_noise(0.1)


def test_a_lambda_at_its_bound_stays_there_and_comes_back():
    """The projection is no trap: the λ-optimizer goes on from the bound."""
    signs = iter([-1.0] * 5 + [1.0] * 5)

    class Driven(T1T2):
        def hypergradient(self, g_v):
            found = super().hypergradient(g_v)
            sign = next(signs)
            return Estimate([torch.full_like(h, -sign) for h in found.gradients])

    model = Noisy()
    callback = OnlineHPOCallback(Driven(), optimizer=lambda raw: torch.optim.SGD(raw, lr=0.05))
    fit(model, callback)
    path = [record.values["noise"] for record in callback.history]
    assert path[:5] == pytest.approx([0.05, 0.0, 0.0, 0.0, 0.0])
    assert path[5:] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])


def test_an_exploding_tangent_neither_stops_nor_bends_the_training():
    class Explosion(pl.Callback):
        def on_train_batch_end(self, *args):
            callback._run.served[0].estimator._tangents.scale_(1e200)

    model, plain = Mlp(), Mlp()
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
    with pytest.warns(UserWarning, match="is not finite; λ is left alone"):
        fit(model, [callback, Explosion()])
    fit(plain)
    assert 0 < callback.skipped < 10  # tangents that have overflowed start anew
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


class Unreliable:
    """Held-out batches that fail at the third, or are used up after the third."""

    def __init__(self, fails):
        self.fails, self.passes = fails, 0

    def __iter__(self):
        self.passes += 1
        for k in range(3 if self.passes == 1 or self.fails else 0):
            if self.fails and k == 2:
                raise OSError("the disk is gone")
            yield [t.clone() for t in VALID]


def test_a_loader_that_raises_stops_the_training_with_its_own_error():
    callback = OnlineHPOCallback(T1T2(), dataloader=Unreliable(True))
    with pytest.raises(OSError, match="the disk is gone"):
        fit(Mlp(), callback)
    assert len(callback.history) == 2


def test_a_loader_that_runs_dry_is_named():
    callback = OnlineHPOCallback(T1T2(), dataloader=Unreliable(False))
    with pytest.raises(Exception, match="T2 data of OnlineHPOCallback yield no batch"):
        fit(Mlp(), callback)
    assert len(callback.history) == 3


def test_values_survive_a_failure():
    """What has been found until then is still there."""
    callback = OnlineHPOCallback(T1T2(), dataloader=Unreliable(True))
    model = Mlp()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(model, callback)
    assert fixed_values(model) == callback.history[-1].values
    assert callback.state_dict()["steps"] == 3
