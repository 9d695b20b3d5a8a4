"""Weights of examples: which example has which."""

import pytest
import torch
from cases import BATCH, TRAIN, Mlp, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_hpo import T1T2, ExampleWeightMixin, OnlineHPOCallback
from lightning_hpo.regularizers import IndexedDataset


class Weighted(ExampleWeightMixin, Mlp):
    pass


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(30))], ids=["all", "part"])
def test_too_few_example_weights_are_refused_before_the_first_step(wrap):
    class Weighed(ExampleWeightMixin, Mlp):
        def __init__(self, count):
            super().__init__()
            self.register_example_weights(count, 0.5)

        def training_step(self, batch, batch_idx):
            x, y, index = batch
            return self.weighted_mean(F.cross_entropy(self.net(x), y, reduction="none"), index)

    def train(count):
        loader = DataLoader(wrap(IndexedDataset(TensorDataset(*TRAIN))), batch_size=BATCH)
        model = Weighed(count)
        fit(model, OnlineHPOCallback(T1T2()), train=loader)
        return model

    needed = 40 if len(wrap(TensorDataset(*TRAIN))) == 40 else 30
    train(needed)
    with pytest.raises(
        MisconfigurationException, match=rf"{needed - 1} example weights.*register.*\({needed}\)"
    ):
        train(needed - 1)


def test_indexed_datasets_that_would_share_weights_are_refused():
    class Weighed(ExampleWeightMixin, Mlp):
        def __init__(self):
            super().__init__()
            self.register_example_weights(80, 0.5)

        def training_step(self, batch, batch_idx):
            x, y, index = batch
            return self.weighted_mean(F.cross_entropy(self.net(x), y, reduction="none"), index)

    part = TensorDataset(*TRAIN)
    wrong = ConcatDataset([IndexedDataset(part), IndexedDataset(part)])
    with pytest.raises(MisconfigurationException, match=r"IndexedDataset\(ConcatDataset"):
        fit(Weighed(), OnlineHPOCallback(T1T2()), train=DataLoader(wrong, batch_size=BATCH))
    right = IndexedDataset(ConcatDataset([part, part]))
    fit(Weighed(), OnlineHPOCallback(T1T2()), train=DataLoader(right, batch_size=BATCH))


def test_small_integers_are_positions_and_no_mask():
    model = Weighted()
    model.register_example_weights(4, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    index = torch.full((4,), 3, dtype=torch.uint8)
    assert model.weighted_mean(torch.ones(4), index).item() == pytest.approx(0.4)


def test_indexed_dataset_adds_the_position():
    data = IndexedDataset(torch.utils.data.TensorDataset(torch.arange(5.0)))
    assert data[3] == (torch.tensor(3.0), 3)
    assert len(data) == 5
