"""What a step changes in what the trainer leads to: callbacks, datamodules, datasets, loaders."""

import lightning.pytorch as pl
import pytest
import torch
from cases import TRAIN, Mlp, frozen, make_trainer, valid_loader, weights
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK

ESTIMATORS = {"T1T2": T1T2, "ClipR": ClipR, "reverse": lambda: UnrollK(4, "reverse")}


class Counted(pl.Callback):
    """Keeps a number and a tensor of the step's in its own attributes."""

    def __init__(self):
        self.calls = 0
        self.sums = torch.zeros(1)

    def count(self):
        self.calls += 1
        self.sums += 0.1
        return self.calls + float(self.sums[0])


class Weighing(TensorDataset):
    """Training data with a weight for each example, which the step writes."""

    def __init__(self):
        super().__init__(*TRAIN, torch.arange(len(TRAIN[0])))
        self.weights = torch.ones(len(TRAIN[0]))


class Schooling(pl.LightningDataModule):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def train_dataloader(self):
        return DataLoader(Weighing(), batch_size=4)

    def val_dataloader(self):
        return valid_loader()


class ByTrainer(Mlp):
    def loss(self, batch):
        return super().loss(batch[:2])


class ByDataModule(ByTrainer):
    def training_step(self, batch, batch_idx):
        self.trainer.datamodule.seen["n"] += len(batch[0])
        return self.loss(batch) / (1 + 0.01 * self.trainer.datamodule.seen["n"])


class ByCallback(ByTrainer):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) / (1 + 0.01 * self.trainer.callbacks[0].count())


class ByTrainerItself(ByTrainer):
    def on_train_start(self):
        self.trainer.seen = 0

    def training_step(self, batch, batch_idx):
        self.trainer.seen += 1
        return self.loss(batch) / (1 + 0.01 * self.trainer.seen)

    def validation_step(self, batch, batch_idx):
        self.trainer.seen_at_last = self.trainer.seen
        return self.loss(batch)


class ByDataset(ByTrainer):
    def training_step(self, batch, batch_idx):
        weights = self.trainer.train_dataloader.dataset.weights
        loss = self.loss(batch) * weights[batch[2]].mean()
        weights[batch[2]] *= 0.9
        return loss


class ByLoader(ByTrainer):
    """Replays examples of its own, in an order of their own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        dataset = TensorDataset(*TRAIN)
        self.memory = DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + 0.1 * self.loss(next(iter(self.memory)))


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(
    "kind",
    [ByDataModule, ByCallback, ByTrainerItself, ByDataset, ByLoader],
    ids=lambda k: k.__name__,
)
def test_what_the_trainer_leads_to_is_put_back(kind, make):
    results = []
    for estimator in (None, make()):
        callbacks = [Counted()]
        if estimator is not None:
            callbacks.append(OnlineHPOCallback(estimator, optimizer=frozen))
        torch.manual_seed(3)
        model, data = kind(), Schooling({"n": 0})
        trainer = make_trainer(9, callbacks=callbacks)
        trainer.fit(model, datamodule=data)
        results.append((weights(model), data.seen, callbacks[0].calls))
    (plain, *counts), (observed, *others) = results
    assert torch.equal(observed, plain)
    assert others == counts
