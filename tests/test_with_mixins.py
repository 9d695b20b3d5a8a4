"""Modules that something else builds, and callbacks that it copies."""

import copy
import io
import pickle

import pytest
import torch
from cases import Mlp, fit, frozen, weights
from lightning.pytorch import LightningModule
from torch import nn

from lightning_hpo import (
    T1T2,
    DropoutMixin,
    GaussianNoiseMixin,
    L1Mixin,
    L2Mixin,
    OnlineHPOCallback,
    named_hyperparameters,
    with_mixins,
)
from lightning_hpo._lightning import MisconfigurationException


class Foreign(LightningModule):
    """What a package ships: it knows nothing of hyperparameters."""

    def __init__(self, width=5):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1), nn.Linear(width, 3))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def on_before_optimizer_step(self, optimizer):
        self.calls += 1
        super().on_before_optimizer_step(optimizer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Own(L2Mixin, Foreign):
    pass


def mixed(*mixins):
    module = Foreign()
    assert with_mixins(module, *(mixins or (L2Mixin,))) is module
    module.register_l2(init=0.05)
    return module


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def pickled_the_old_way(module):
    return pickle.loads(pickle.dumps(module, protocol=1))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def trained(module, callback=None):
    torch.manual_seed(1)
    fit(module, callback)
    return weights(module)


def test_it_is_the_class_that_one_would_have_written():
    own, added = Own(), mixed()
    own.register_l2(init=0.05)
    callbacks = [OnlineHPOCallback(T1T2()) for _ in range(2)]
    assert torch.equal(trained(own, callbacks[0]), trained(added, callbacks[1]))
    assert callbacks[0].history == callbacks[1].history
    assert len(callbacks[1].history) == 10
    assert added.calls == 10  # the hook of the module still runs
    assert isinstance(added, Foreign)
    assert type(added).__name__ == "Foreign"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, pickled_the_old_way, saved])
@pytest.mark.parametrize("mixins", [(L2Mixin,), (L2Mixin, DropoutMixin, GaussianNoiseMixin)])
def test_copies_keep_the_mixins(duplicate, mixins):
    module = mixed(*mixins)
    other = duplicate(module)
    assert type(other) is type(module)
    assert named_hyperparameters(other).keys() == named_hyperparameters(module).keys()
    before = weights(module)
    after = trained(other)
    assert torch.equal(before, weights(module))  # the copy has weights of its own
    assert torch.equal(after, trained(module))


def test_mixins_are_added_once_and_one_after_another():
    module = mixed()
    kind = type(module)
    assert type(with_mixins(module, L2Mixin)) is kind
    with_mixins(module, L1Mixin, DropoutMixin)
    module.register_l1(init=0.01)
    module.register_dropout()
    other = pickled(module)
    assert type(other) is type(module)
    assert {"l1", "l2", "keep"} <= named_hyperparameters(other).keys()
    assert len(other.gradient_penalties) == 2


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    whole, half = mixed(), mixed()
    trained(whole)
    trainer = fit(half, steps=5)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = mixed()
    fit(rest, ckpt_path=tmp_path / "half.ckpt")
    loaded = mixed()
    loaded.load_state_dict(rest.state_dict())
    assert torch.equal(weights(loaded), weights(rest))


@pytest.mark.parametrize(
    ("module", "mixins", "message"),
    [
        (object(), (L2Mixin,), "expected a LightningModule that has been built"),
        (Foreign, (L2Mixin,), "expected a LightningModule that has been built"),
        (Foreign(), (nn.Module,), "expected a mixin of lightning_hpo"),
        (Foreign(), ("l2",), "'l2', expected a mixin"),
    ],
)
def test_bad_input_is_refused(module, mixins, message):
    with pytest.raises(TypeError, match=message):
        with_mixins(module, *mixins)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))])
def test_what_is_no_lightning_module_is_refused(module):
    with pytest.raises(TypeError, match="expected a LightningModule"):
        with_mixins(module, L2Mixin)


class Keyword(Foreign):
    def __init_subclass__(cls, *, kind, **options):
        super().__init_subclass__(**options)


class Final(Foreign):
    def __init_subclass__(cls):
        raise TypeError(f"{cls.__name__} is final")


REGISTER = {}


class Registered(Foreign):
    def __init_subclass__(cls):
        super().__init_subclass__()
        if REGISTER.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"{cls.__name__} is registered already")


class RegisteredChild(Registered):
    pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Keyword, "TypeError: .*'kind'"),
        (Final, "TypeError: Final is final"),
        (RegisteredChild, "ValueError: RegisteredChild is registered already"),
    ],
)
@pytest.mark.parametrize("mixins", [(L2Mixin,), (L2Mixin, DropoutMixin)])
def test_a_class_that_cannot_be_made_is_refused_with_a_remedy(kind, reason, mixins):
    module = kind()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=reason) as caught:
        with_mixins(module, *mixins)
    names = ", ".join(mixin.__name__ for mixin in mixins)
    assert f"class Tuned({names}, {kind.__name__}, keyword=...)" in str(caught.value)
    assert type(module) is kind
    assert torch.equal(weights(module), before)


def test_the_remedies_work():
    class Tuned(L2Mixin, Keyword, kind="tuned"):
        pass

    class Around(L2Mixin, LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Final()

        def training_step(self, batch, batch_idx):
            return self.inner.training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            return self.inner.validation_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    found = []
    for kind in (Tuned, Around):
        module = kind()
        module.register_l2(init=0.05)
        found.append(trained(module, OnlineHPOCallback(T1T2(), optimizer=frozen)))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------- copied callbacks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_the_original_shows_what_its_copy_did(duplicate):
    callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
    used = duplicate(callback)
    fit(Mlp(), used, steps=4)
    assert len(callback.history) == 4
    assert callback.history == used.history
    assert callback.skipped == used.skipped


def test_copies_that_train_keep_their_own():
    callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
    first, second = copy.deepcopy(callback), copy.deepcopy(callback)
    fit(Mlp(), first, steps=3)
    assert len(second.history) == 3
    fit(Mlp(), second, steps=5)
    assert (len(first.history), len(second.history), len(callback.history)) == (3, 5, 5)
    fit(Mlp(), callback, steps=2)
    fit(Mlp(), second, steps=4)
    assert (len(first.history), len(second.history), len(callback.history)) == (3, 4, 2)


def test_a_pickled_callback_trains_for_itself():
    callback = OnlineHPOCallback(T1T2())
    other = pickled(callback)
    fit(Mlp(), other, steps=3)
    assert (len(other.history), len(callback.history)) == (3, 0)
