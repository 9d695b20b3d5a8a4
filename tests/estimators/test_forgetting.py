"""What the decay of ClipR is for."""

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import ClipR, L2Mixin, OnlineHPOCallback, Positive

STEPS = 1000

# Near enough to be reached within a short training.
BOUND = 1e-5


class Digits(L2Mixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.register_l2(init=0.1, constraint=Positive(low=BOUND))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@pytest.fixture(scope="module")
def trained():
    """λ starts at 0.1, far too high for 100 digits: the network cannot learn until λ has fallen."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    train = torch.utils.data.Subset(data, order[:100])
    held_out = torch.utils.data.Subset(data, order[100:400])

    def run(decay):
        pl.seed_everything(0, verbose=False)
        callback = OnlineHPOCallback(
            ClipR(radius=20.0, decay=decay), optimizer=lambda raw: torch.optim.Adam(raw, lr=0.02)
        )
        model = Digits()
        pl.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=[callback], barebones=True).fit(
            model,
            DataLoader(train, batch_size=100),
            DataLoader(held_out, batch_size=300),
        )
        signs = [record.hypergradients["l2"].sign().item() for record in callback.history]
        return model.l2().item(), signs

    return {decay: run(decay) for decay in (1.0, 0.99)}


@pytest.mark.slow
def test_without_decay_the_tangent_keeps_its_sign_and_drives_the_strength_to_its_bound(trained):
    strength, signs = trained[1.0]
    assert strength == pytest.approx(BOUND, rel=1e-3)
    assert all(sign > 0 for sign in signs[50:])


@pytest.mark.slow
def test_with_decay_the_sign_turns_once_the_strength_is_too_low(trained):
    strength, signs = trained[0.99]
    assert strength > 5 * BOUND
    assert all(sign < 0 for sign in signs[-100:])
