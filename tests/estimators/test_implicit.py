"""The implicit estimator, on problems whose answer is known in closed form."""

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, frozen, observe
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import Hyperparameter, Implicit, L2Mixin, OnlineHPOCallback, Positive
from lightning_hpo.estimators import SolverOutcome


def _data(seed, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    return x, y + torch.randn(n, generator=generator, dtype=torch.float64)


class Ridge(L2Mixin, pl.LightningModule):
    """1/2n ‖X w − y‖² + ½ λ ‖w‖², started at its optimum, where SGD leaves it."""

    def __init__(self, inside_loss=False):
        super().__init__()
        self.x, self.y = _data(0, 30)
        self.linear = nn.Linear(4, 1, bias=False)
        self.register_l2(0.3, inside_loss=inside_loss)
        with torch.no_grad():
            self.linear.weight.copy_(self.optimum(self.l2()))

    def hessian(self, strength):
        return self.x.T @ self.x / len(self.x) + strength * torch.eye(4)

    def optimum(self, strength):
        return torch.linalg.solve(self.hessian(strength), self.x.T @ self.y / len(self.x))

    def loss(self, batch):
        x, y = batch
        return 0.5 * (x @ self.linear.weight[0] - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + (self.penalty() if self.loss_penalties else 0.0)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _observe(estimator, **options):
    model = Ridge(**options)
    valid = _data(1, 20)
    callback = OnlineHPOCallback(estimator, optimizer=frozen)
    fit(
        model,
        callback,
        steps=1,
        train=DataLoader(TensorDataset(model.x, model.y), batch_size=30),
        valid=DataLoader(TensorDataset(*valid), batch_size=20),
    )
    return model, valid, callback.history[-1]


@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_ridge_regression_at_its_optimum(solver, inside_loss):
    estimator = Implicit(solver, iterations=2000, tolerance=1e-12)
    model, (x, y), record = _observe(estimator, inside_loss=inside_loss)
    raw = model.l2.raw.clone().requires_grad_()
    weights = model.optimum(raw.exp())
    (truth,) = torch.autograd.grad(0.5 * (x @ weights - y).square().mean(), raw)
    found = record.hypergradients["l2"]
    assert found.item() == pytest.approx(truth.item(), rel=1e-8)
    assert record.outcome == SolverOutcome.CONVERGED.value


def test_damping_solves_the_damped_system():
    model, (x, y), record = _observe(Implicit(damping=0.5, tolerance=1e-12))
    w = model.linear.weight.detach()[0]
    g_v = x.T @ (x @ w - y) / len(x)
    strength = model.l2().item()
    v = torch.linalg.solve(model.hessian(strength) + 0.5 * torch.eye(4), g_v)
    assert record.hypergradients["l2"].item() == pytest.approx(-(strength * w @ v).item(), rel=1e-6)


def test_outcomes_are_told_apart():
    _, _, limited = _observe(Implicit("cg", iterations=1, tolerance=1e-12))
    assert limited.outcome == "iteration limit"
    _, _, slow = _observe(Implicit("neumann", iterations=3, tolerance=1e-12))
    assert slow.outcome == "iteration limit"

    class Saddle(pl.LightningModule):
        def __init__(self, lr=0.1):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0]))
            self.a = Hyperparameter(0.5, Positive())
            self.lr = lr

        def training_step(self, batch, batch_idx):
            return -self.w.square().sum() * self.a()

        def validation_step(self, batch, batch_idx):
            return self.w.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    record = observe(Implicit("cg"), Saddle(), steps=1).history[-1]
    assert record.outcome == "negative curvature"
    assert torch.isfinite(record.hypergradients["a"])
    record = observe(Implicit("neumann"), Saddle(), steps=1).history[-1]
    assert record.outcome == "diverged"


def test_the_outcome_is_kept_by_a_checkpoint(tmp_path):
    callback = OnlineHPOCallback(Implicit(iterations=2), optimizer=frozen)
    trainer = fit(Mlp(), callback, steps=3)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["OnlineHPOCallback"]
    assert [record["outcome"] for record in state["history"]] == [
        record.outcome for record in callback.history
    ]
    assert callback.history[-1].outcome is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "gmres"}, r"solver='gmres', expected one of \('cg', 'neumann'\)"),
        ({"iterations": 0}, r"iterations=0, expected a positive integer"),
        ({"damping": -1.0}, r"damping=-1\.0"),
        ({"tolerance": float("nan")}, r"tolerance=nan"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Implicit(**options)


def test_penalties_are_differentiated_where_theta_is_now():
    """In half precision, where the step has copies of the parameters, one step is a long way."""

    class Weight(L2Mixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
            self.register_l2(0.5)

        def training_step(self, batch, batch_idx):
            return 0.5 * self.weight.square().sum()

        def validation_step(self, batch, batch_idx):
            return 0.5 * (self.weight - 1.0).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    model = Weight()
    callback = observe(Implicit(), model, steps=1, precision="bf16-true")
    after = torch.tensor([1.0, -2.0]) * (1 - 0.5 * 1.5)
    assert torch.equal(model.weight.detach().double(), after)
    truth = -0.5 * after @ ((after - 1.0) / 1.5)
    assert callback.history[-1].hypergradients["l2"].item() == pytest.approx(truth.item(), rel=0.01)
