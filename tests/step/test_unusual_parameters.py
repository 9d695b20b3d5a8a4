"""Parameters that join late, freeze, lie oddly in memory, or have an unusual gradient."""

import math

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, observe, relative_error, truth
from torch import nn

from lightning_hpo import T1T2, ClipR, L2Mixin, OnlineHPOCallback, UnrollK
from lightning_hpo.derivatives import gradient_products

BACKENDS = pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])


class Quantizer(torch.autograd.Function):
    """Passes gradients straight through, and none to the scale."""

    @staticmethod
    def forward(ctx, x, scale):
        return torch.round(x / scale) * scale

    @staticmethod
    def backward(ctx, g):
        return g, None


class Quantized(Mlp):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def loss(self, batch):
        x, y = batch
        return super().loss((Quantizer.apply(x * 1.0, self.scale), y))


@pytest.mark.parametrize(
    "make", [T1T2, lambda: T1T2(scale_by_lr=False), ClipR, lambda: UnrollK(2, "forward")]
)
def test_a_backward_without_a_gradient(make):
    found = observe(make(), Quantized("momentum"))
    assert len(found.history) > 0
    assert last_hypergradient(found).abs().min() > 0
    p = nn.Parameter(torch.ones(2))
    loss = Quantizer.apply(torch.ones(3, requires_grad=True), p.sum()).sum()
    assert gradient_products(loss, [p], [torch.ones(1, 2)]) == [None]


class Half(torch.autograd.Function):
    """½‖w‖², whose backward returns w itself: so does its product with the Hessian."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return 0.5 * (w * w).sum()

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return w


class Decaying(Mlp):
    def training_step(self, batch, batch_idx):
        return sum(Half.apply(p) for p in self.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_product_that_is_its_direction(optimizer, granularity):
    def make():
        return Decaying(optimizer, granularity=granularity)

    found = last_hypergradient(observe(ClipR(math.inf), make(), derivatives="reverse"))
    assert relative_error(found, truth(make)) < 1e-5


class JoinsWithin(pl.Callback):
    """Adds a parameter between the micro-batches of a step, or between its batch and the step."""

    def __init__(self, hook):
        self.join = Joins().on_train_batch_end
        setattr(self, hook, self.join_once)

    def join_once(self, trainer, module, *_):
        if not hasattr(module, "extra"):
            self.join(trainer, module, None, None, 0)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize(
    ("hook", "accumulated"), [("on_train_batch_end", 2), ("on_before_zero_grad", 1)]
)
@BACKENDS
def test_parameters_that_join_within_a_step(optimizer, hook, accumulated, derivatives):
    runs = []
    for other in (JoinsWithin(hook), pl.Callback()):
        callback = OnlineHPOCallback(ClipR(), optimizer=frozen, derivatives=derivatives)
        fit(
            Mlp(optimizer, schedule=False),
            [other, callback],
            steps=4,
            accumulate_grad_batches=accumulated,
        )
        runs.append(last_hypergradient(callback))
    assert relative_error(*runs) < 1e-6


class Freezing(Mlp):
    """Freezes a layer in every other step, within the step."""

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(self.global_step % 2 == 0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [T1T2, lambda: UnrollK(3, "reverse")])
def test_a_step_that_freezes_a_layer(make):
    """Exact products are those of differences.

    (Tangents differ in the step that freezes: differences see that the rest depends on the layer.)
    """
    results = []
    for derivatives in ("reverse", "finite_difference"):
        model = Freezing("momentum", inside_loss=True)
        callback = observe(make(), model, derivatives=derivatives, accumulate_grad_batches=2)
        results.append(last_hypergradient(callback))
    assert relative_error(*results) < 1e-5
    tangents = observe(ClipR(), Freezing("momentum"), accumulate_grad_batches=2)
    assert last_hypergradient(tangents).isfinite().all()


class Joins(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            extra = nn.Parameter(torch.zeros(2))
            module.register_parameter("extra", extra)
            trainer.optimizers[0].add_param_group({"params": [extra]})


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "forward")])
def test_parameters_that_join_between_step_and_update(make):
    """They are not yet affected by λ, and do not get in the way."""
    runs = []
    for other in (Joins(), pl.Callback()):
        callback = OnlineHPOCallback(make(), optimizer=frozen)
        fit(Mlp("momentum", schedule=False), [other, callback], steps=4)
        runs.append(last_hypergradient(callback))
    assert torch.equal(*runs)


class Transposed(L2Mixin, pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(
            torch.randn(6, 4).T if kind else torch.randn(6, 4).T.contiguous()
        )
        self.register_l2(0.05)

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weight).tanh().square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("make", [T1T2, ClipR])
def test_parameters_that_are_not_contiguous(make, monkeypatch):
    """They stay whole: flattening them block by block would copy them as often."""
    from lightning_hpo.dynamics import OptimizerStep, base

    monkeypatch.setattr(base, "BLOCK", 3)
    blocks = []
    restricted = OptimizerStep.restricted
    monkeypatch.setattr(
        OptimizerStep, "restricted", lambda self, b: blocks.append(b) or restricted(self, b)
    )
    plain = last_hypergradient(observe(make(), Transposed(False), steps=3))
    assert len(blocks) == 3 * 8
    blocks.clear()
    found = last_hypergradient(observe(make(), Transposed(True), steps=3))
    assert len(blocks) == 3
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
