"""Hyperparameter: a raw buffer behind a constraint, found anywhere in a module tree."""

import copy

import pytest
import torch
from torch import nn

from lightning_hpo import Hyperparameter, Interval, Positive, UnitInterval, named_hyperparameters


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.strength = Hyperparameter(0.01, Positive())
        self.rates = nn.ModuleList([Hyperparameter(0.2, UnitInterval()), nn.Linear(2, 2)])
        self.inner = nn.Module()
        self.inner.weights = Hyperparameter(torch.ones(3), Interval(0, 2))


def test_calling_it_returns_the_value():
    assert Hyperparameter(0.25, Positive())().item() == pytest.approx(0.25, rel=1e-12)
    assert Hyperparameter(0.25)().item() == 0.25
    values = torch.tensor([[0.1, 0.5], [0.9, 0.3]])
    torch.testing.assert_close(Hyperparameter(values, UnitInterval())(), values)


def test_raw_is_a_buffer_and_no_parameter():
    """The model's optimizer must never see it, and a checkpoint must hold it."""
    module = Plain()
    assert not [name for name, _ in module.named_parameters() if "raw" in name]
    assert len(list(module.parameters())) == 4
    raws = ["strength.raw", "rates.0.raw", "inner.weights.raw"]
    assert [name for name, _ in module.named_buffers()] == raws
    assert set(raws) <= set(module.state_dict())
    assert not module.strength.raw.requires_grad


def test_it_is_saved_and_loaded(tmp_path):
    module, other = Plain(), Plain()
    module.strength.raw.fill_(-3.0)
    module.inner.weights.raw.copy_(torch.tensor([0.1, 0.2, 0.3]))
    path = tmp_path / "state.pt"
    torch.save(module.state_dict(), path)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(other.strength.raw, module.strength.raw)
    assert torch.equal(other.inner.weights(), torch.tensor([0.1, 0.2, 0.3]))


def test_it_follows_the_module_and_its_precision():
    module = Plain().to(torch.float32)
    assert {h.raw.dtype for h in named_hyperparameters(module).values()} == {torch.float32}
    assert Plain().to("meta").strength.raw.device.type == "meta"


def test_a_tensor_that_was_passed_in_is_not_shared():
    init = torch.ones(2)
    h = Hyperparameter(init)
    h.raw.add_(1)
    assert torch.equal(init, torch.ones(2))


def test_names_are_dotted_and_in_the_order_of_the_tree():
    module = Plain()
    found = named_hyperparameters(module)
    assert list(found) == ["strength", "rates.0", "inner.weights"]
    assert found["inner.weights"] is module.inner.weights
    assert named_hyperparameters(module.inner) == {"weights": module.inner.weights}
    assert list(named_hyperparameters(module.strength)) == [""]
    assert named_hyperparameters(nn.Linear(2, 2)) == {}


def test_a_shared_hyperparameter_appears_once_under_its_first_name():
    module = Plain()
    module.inner.again = module.strength
    module.zz = nn.ModuleDict({"third": module.strength})
    assert list(named_hyperparameters(module)) == ["strength", "rates.0", "inner.weights"]


def test_a_copy_is_independent():
    module = Plain()
    twin = copy.deepcopy(module)
    twin.strength.raw.fill_(1.0)
    assert module.strength().item() == pytest.approx(0.01)
    assert set(named_hyperparameters(twin)) == set(named_hyperparameters(module))


def test_its_text_shows_value_and_constraint():
    assert "0.01" in repr(Hyperparameter(0.01, Positive()))
    assert "Positive" in repr(Hyperparameter(0.01, Positive()))
    assert "shape=(3,)" in repr(Hyperparameter(torch.ones(3)))


def test_a_value_can_be_assigned():
    """It writes raw in place, as the constraint has it; what does not fit changes nothing."""
    h = Hyperparameter(0.01, Positive())
    raw = h.raw
    h.value = 3.0
    assert h.raw is raw
    assert h().item() == pytest.approx(3.0)
    assert h.value.item() == pytest.approx(3.0)
    several = Hyperparameter(torch.tensor([0.2, 0.4]), UnitInterval())
    several.value = torch.tensor([0.5, 0.9])
    torch.testing.assert_close(several(), torch.tensor([0.5, 0.9]))
    several.value = 0.3
    torch.testing.assert_close(several(), torch.tensor([0.3, 0.3]))
    before = several.raw.clone()
    for wrong, error in [(2.0, ValueError), (torch.ones(3) / 2, ValueError), ("0.5", TypeError)]:
        with pytest.raises(error, match="Hyperparameter"):
            several.value = wrong
    assert torch.equal(several.raw, before)
    several.frozen = True
    assert "frozen" in repr(several)
    assert "frozen" not in repr(h)
