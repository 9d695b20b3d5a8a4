"""What is kept with a module goes where the module goes, and is undone with what a replay does."""

import copy
import io
import pickle

import pytest
import torch
from cases import VALID, Mlp, fit
from torch import nn

from lightning_hpo import T1T2, L1Mixin, OnlineHPOCallback, fixed_values, freeze


class Both(L1Mixin, Mlp):
    """A penalty in the gradient and one in the loss."""

    def __init__(self):
        super().__init__()
        self.register_l1(0.1, inside_loss=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_the_penalties_of_a_copy_act_on_the_copy(duplicate):
    model = Both()
    other = duplicate(model)
    own = {id(p) for p in other.parameters()}
    modules = {id(m) for m in other.modules()}
    for mine, theirs in (
        (model.loss_penalties, other.loss_penalties),
        (model.gradient_penalties, other.gradient_penalties),
    ):
        assert len(mine) == len(theirs) > 0
        for penalty in theirs:
            assert id(penalty.hyperparameter) in modules
            assert {id(w) for w in penalty.weights} <= own
    before = other.penalty().item()
    with torch.no_grad():
        model.net[0].weight.zero_()
    assert other.penalty().item() == before > model.penalty().item()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_fixed_options_go_with_a_copy(duplicate):
    model = duplicate(freeze(Mlp("momentum"), {"optimizer.momentum": 0.5}))
    assert fixed_values(model)["optimizer.momentum"] == 0.5


def test_a_validation_loss_that_raises_leaves_the_penalty():
    """It is 0 within the validation loss only, however that ends."""
    seen = []

    class Failing(Both):
        def validation_step(self, batch, batch_idx):
            seen.append(self.penalty().item())
            raise KeyError("the user's own")

    model = Failing()
    with pytest.raises(KeyError, match="the user's own"):
        fit(model, OnlineHPOCallback(T1T2(), dataloader=[list(VALID)]))
    assert seen == [0.0]
    assert model.penalty().item() > 0


def test_reading_leaves_no_trace():
    module = nn.Linear(1, 1)
    before = set(vars(module))
    assert fixed_values(module) == {}
    assert set(vars(module)) == before
