"""``examples/guide/extending.md``: its code runs, and finds what it says."""

import re
from pathlib import Path

import lightning
import pytest
import torch
from cases import BATCH, Mlp, fit, frozen, train_loader, valid_loader
from reference import central_differences
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import ClipR, Implicit, L2Mixin, OnlineHPOCallback, freeze

GUIDE = Path(__file__).parents[2] / "examples" / "guide" / "extending.md"
ESTIMATOR, PENALTY, OPTIMIZER = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def guide():
    """The names that the blocks define, run one after the other."""
    names = {"__name__": "guide"}
    for block in (ESTIMATOR, PENALTY, OPTIMIZER):
        exec(compile(block, str(GUIDE), "exec"), names)
    return names


def lines_of(block, start):
    """Counts the lines of a class."""
    code = block[block.index(f"class {start}") :]
    return len(re.split(r"\n(?=\S)", code)[0].rstrip().splitlines())


def test_each_is_short():
    assert lines_of(ESTIMATOR, "StochasticNeumann") <= 40
    assert lines_of(PENALTY, "L2SP") <= 25
    assert lines_of(OPTIMIZER, "Lion") <= 40


class Ridge(L2Mixin, lightning.LightningModule):
    """Starts at its optimum, where SGD leaves it, so that every update has the same H and g_V."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False)
        self.register_l2(0.3)
        self.x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        self.y = self.x.sum(1)
        hessian = self.x.T @ self.x / 30 + 0.3 * torch.eye(4)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linalg.solve(hessian, self.x.T @ self.y / 30))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return 0.5 * (self.linear(x)[:, 0] - y).square().mean()

    def validation_step(self, batch, batch_idx):
        return (self.linear.weight - 2.0).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_ridge(estimator, steps):
    model = Ridge()
    callback = OnlineHPOCallback(estimator, optimizer=frozen)
    data = DataLoader(TensorDataset(model.x, model.y), batch_size=30)
    fit(model, callback, steps=steps, train=data)
    return [record.hypergradients["l2"].item() for record in callback.history]


def test_the_estimator_is_the_neumann_series_on_average(guide):
    found = train_ridge(guide["StochasticNeumann"](terms=5, rate=0.1), steps=40)
    values = {round(value, 9) for value in found}
    assert len(values) == 5  # each number of products has been drawn
    (series,) = train_ridge(Implicit("neumann", iterations=4, tolerance=0.0), steps=1)
    assert sum(values) / 5 == pytest.approx(series, rel=1e-7)
    assert min(abs(value - series) for value in values) > 0.01 * abs(series)


def test_the_estimator_resumes(guide, tmp_path):
    def train(steps, path=None):
        callback = OnlineHPOCallback(guide["StochasticNeumann"](5), every_n_steps=1)
        return fit(Mlp(), callback, steps=steps, ckpt_path=path), callback.history

    _, whole = train(10)
    trainer, _ = train(5)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = train(10, tmp_path / "half.ckpt")
    assert resumed == whole


def test_the_penalty_is_tuned_exactly(guide):
    def make():
        torch.manual_seed(0)
        return guide["FineTuned"](nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))

    callback = OnlineHPOCallback(ClipR(float("inf")), optimizer=frozen)
    model = make()
    fit(model, callback, steps=10)
    record = callback.history[-1]
    names = ["l2sp.net.0", "l2sp.net.2"]
    assert list(record.values) == names

    def loss(raws):
        moved = make()
        values = {
            name: torch.tensor(raw).exp().item() for name, raw in zip(names, raws, strict=True)
        }
        fit(freeze(moved, values), steps=10)
        (batch,) = valid_loader()
        with torch.no_grad():
            return moved.validation_step(batch, 0).item()

    truth = central_differences(loss, [torch.tensor(1e-3).log().item()] * 2)
    found = torch.stack([record.hypergradients[name] for name in names])
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-9)


def test_the_optimizer_is_followed(guide):
    class Under(Mlp):
        def configure_optimizers(self):
            return guide["Lion"](self.parameters(), lr=0.01, weight_decay=0.1)

    callback = guide["callback"]
    fit(Under(), callback, steps=5, train=train_loader(batch_size=BATCH))
    assert len(callback.history) == 5
    record = callback.history[-1]
    assert set(record.values) == {"l2.net.0", "l2.net.2", "optimizer.lr", "optimizer.weight_decay"}
    for name, gradient in record.hypergradients.items():
        assert bool(gradient != 0) is name.startswith("optimizer.")
