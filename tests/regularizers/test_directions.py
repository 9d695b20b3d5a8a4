"""Every kind of hyperparameter moves towards its optimum from both sides."""

import lightning.pytorch as pl
import pytest
import torch
from cases import fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    L1Mixin,
    L2Mixin,
    LabelSmoothing,
    LossWeightMixin,
    OnlineHPOCallback,
    named_hyperparameters,
)
from lightning_hpo.regularizers import IndexedDataset

FEATURES = 10


def _regression(seed, n, noise):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    truth = torch.zeros(FEATURES, dtype=torch.float64)
    truth[:3] = torch.tensor([1.0, -1.0, 0.5])
    y = x @ truth + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return x, y, truth


class Regression(pl.LightningModule):
    """Few noisy examples: without regularization it overfits, with too much it underfits."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.linear(batch[0])[:, 0], batch[1])

    def validation_step(self, batch, batch_idx):
        return F.mse_loss(self.linear(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)

    def data(self):
        return TensorDataset(*_regression(0, 14, 1.0)[:2])

    def held_out(self):
        return TensorDataset(*_regression(1, 400, 0.1)[:2])


class L2(L2Mixin, Regression):
    def __init__(self, start):
        super().__init__()
        self.register_l2(start)


class L1(L1Mixin, Regression):
    def __init__(self, start):
        super().__init__()
        self.register_l1(start)


class Noise(GaussianNoiseMixin, Regression):
    def __init__(self, start):
        super().__init__()
        self.register_noise(start)


class Dropout(DropoutMixin, Regression):
    def __init__(self, start):
        super().__init__()
        self.linear = nn.Sequential(nn.Dropout(0.5), self.linear)
        self.register_dropout(start)


class LossWeight(LossWeightMixin, Regression):
    """The auxiliary task pulls to weights that are near the truth, but not at it."""

    def __init__(self, start):
        super().__init__()
        self.register_loss_weights({"teacher": start})
        self.register_buffer("teacher", 0.6 * _regression(0, 1, 0.0)[2])

    def training_step(self, batch, batch_idx):
        teacher = (self.linear.weight[0] - self.teacher).square().sum()
        return self.weighted_loss(super().training_step(batch, batch_idx), teacher=teacher)


class Smoothing(Regression):
    """Noisy labels of two classes: the plain loss grows too certain."""

    def __init__(self, start):
        super().__init__()
        self.linear = nn.Linear(FEATURES, 2, bias=False)
        self.criterion = LabelSmoothing(start)

    def training_step(self, batch, batch_idx):
        return self.criterion(self.linear(batch[0]), batch[1])

    validation_step = training_step

    def data(self):
        x, y, _ = _regression(0, 14, 1.0)
        return TensorDataset(x, (y > 0).long())

    def held_out(self):
        x, y, _ = _regression(1, 400, 1.0)
        return TensorDataset(x, (y > 0).long())


class Plain(Regression):
    """The options of its optimizer are tuned: here regularization is early stopping's opposite."""

    def __init__(self, lr=0.05, momentum=0.5):
        super().__init__()
        self.options = {"lr": lr, "momentum": momentum}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.options)

    def data(self):
        return TensorDataset(*_regression(0, 40, 0.1)[:2])


def run(model, estimator, lr, batch_size=None, steps=150, **options):
    data, held_out = model.data(), model.held_out()
    callback = OnlineHPOCallback(
        estimator, optimizer=lambda raw: torch.optim.Adam(raw, lr=lr), **options
    )
    fit(
        model,
        callback,
        steps=steps,
        train=DataLoader(data, batch_size=batch_size or len(data)),
        valid=DataLoader(held_out, batch_size=len(held_out)),
    )
    return callback


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (L2, 1e-3, 10.0),
        (L1, 1e-3, 3.0),
        (Noise, 0.02, 3.0),
        (Dropout, 0.15, 0.98),
        (LossWeight, 0.01, 30.0),
        (Smoothing, 0.0, 0.95),
    ],
)
def test_strengths_move_inwards(kind, low, high):
    # The weights need some steps before a hypergradient says anything about them.
    for start, sign in ((low, 1), (high, -1)):
        torch.manual_seed(0)
        model = kind(start)
        (h,) = named_hyperparameters(model).values()
        callback = run(model, ClipR(20.0, decay=0.95), 0.05, steps=70, warmup_steps=30)
        assert sign * (h().item() - start) > 0, (start, h().item())
        assert len(callback.history) == 40


@pytest.mark.parametrize(("low", "high"), [(1e-4, 0.45)])
def test_learning_rate_moves_inwards(low, high):
    """Far below its optimum training is slow; above, on this quadratic, it overshoots."""
    for start, sign in ((low, 1), (high, -1)):
        callback = run(
            Plain(lr=start, momentum=0.0), T1T2(), 0.05, steps=40, optimizer_hyperparameters=["lr"]
        )
        assert sign * (callback.history[-1].values["optimizer.lr"] - start) > 0


def test_momentum_moves_inwards():
    for start, sign in ((0.05, 1), (0.99, -1)):
        callback = run(
            Plain(lr=0.02, momentum=start),
            ClipR(float("inf")),
            0.005,
            steps=40,
            optimizer_hyperparameters=["momentum"],
        )
        assert sign * (callback.history[-1].values["optimizer.momentum"] - start) > 0


def test_betas_move_inwards():
    """As momentum: too little is slow, too much swings."""
    for start, sign in ((0.02, 1), (0.98, -1)):

        class Moved(Plain):
            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=0.05, betas=(start, 0.9))  # noqa: B023

        callback = run(
            Moved(), ClipR(float("inf")), 0.05, steps=40, optimizer_hyperparameters=["betas"]
        )
        assert sign * (callback.history[-1].values["optimizer.betas"][0] - start) > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_moves_inwards(kind):
    """With fewer noisy examples than it takes, no decay overfits, and much of it shrinks all."""
    for start, sign in ((1e-3, 1), (10.0, -1)):

        class Decayed(Regression):
            def configure_optimizers(self):
                return kind(self.parameters(), lr=0.05, weight_decay=start)  # noqa: B023

        callback = run(
            Decayed(),
            ClipR(20.0, decay=0.95),
            0.05,
            steps=70,
            warmup_steps=30,
            optimizer_hyperparameters=["weight_decay"],
        )
        assert sign * (callback.history[-1].values["optimizer.weight_decay"] - start) > 0


class Weighted(ExampleWeightMixin, Regression):
    """Every second target is wrong."""

    def __init__(self, start):
        super().__init__()
        self.register_example_weights(60, start)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        return self.weighted_mean((self.linear(x)[:, 0] - y).square(), index)

    def data(self):
        x, y, _ = _regression(0, 60, 0.1)
        y[::2] = -y[::2]
        return IndexedDataset(TensorDataset(x, y))


@pytest.mark.parametrize("start", [0.1, 0.9])
def test_example_weights_separate_wrong_targets_from_right_ones(start):
    model = Weighted(start)
    run(model, T1T2(), 0.02)
    weights = model.example_weights()
    assert weights[::2].mean() < weights[1::2].mean() - 0.2
    if start == 0.1:
        assert weights[1::2].mean() > start
    else:
        assert weights[::2].mean() < start


def test_four_kinds_train_together_log_separately_and_resume(tmp_path):
    class Everything(DropoutMixin, GaussianNoiseMixin, L2Mixin, Regression):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
            )
            del self.linear
            self.register_l2(1e-3, granularity="layer")
            self.register_noise(0.1)
            self.register_dropout()

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0])[:, 0], batch[1])

        validation_step = training_step

    class Seeded(pl.Callback):
        """Lightning does not save the global generator: each step gets draws of its own."""

        def on_train_batch_start(self, trainer, *args):
            torch.manual_seed(trainer.global_step)

    def train(epochs, path=None):
        model = Everything()
        callback = OnlineHPOCallback(ClipR(5.0), optimizer_hyperparameters=["lr"])
        trainer = fit(
            model,
            [Seeded(), callback],
            steps=-1,
            max_epochs=epochs,
            train=DataLoader(model.data(), batch_size=7),
            valid=DataLoader(model.held_out(), batch_size=50),
            ckpt_path=path,
        )
        return model, callback.history, trainer

    model, whole, _ = train(6)
    names = {"l2.net.0", "l2.net.3", "noise", "keep", "optimizer.lr"}
    assert set(whole[-1].values) == names
    assert all(whole[0].values[name] != whole[-1].values[name] for name in names)
    path = str(tmp_path / "half.ckpt")
    train(3)[2].save_checkpoint(path)
    resumed, history, _ = train(6, path)
    assert history == whole
    for a, b in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
