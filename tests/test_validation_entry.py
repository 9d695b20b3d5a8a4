"""validation_step is called within its contract, and leaves nothing."""

import copy
import math
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    VALID,
    Mlp,
    fit,
    frozen,
    last_hypergradient,
    observe,
    relative_error,
    truth,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK


def small_batches():
    return DataLoader(TensorDataset(*VALID), batch_size=5)


class Seen:
    """Keeps what a replay shows, which would be forgotten with the module's own attributes."""

    def __init__(self):
        self.entries = []


# --------------------------------------------------------------------------------- what is there


class Indexed(Mlp):
    def on_validation_start(self):
        self.losses = torch.zeros(self.trainer.num_val_batches[0])

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses[batch_idx] = loss.detach()
        self.log("val_loss", loss)
        return loss


class Listed(Mlp):
    def on_validation_epoch_start(self):
        self.losses = []

    def validation_step(self, batch, batch_idx):
        assert batch_idx < 4
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("val_loss", loss)
        return loss


class PerBatch(Mlp):
    def on_validation_batch_start(self, batch, batch_idx):
        self.losses = [batch_idx]

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("val_loss", loss)
        assert self.losses[0] == batch_idx
        return loss


@pytest.mark.parametrize("kind", [Indexed, Listed, PerBatch])
@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
def test_what_the_entry_makes_is_there_and_leaves_nothing(kind, make):
    plain, model = kind("momentum"), kind("momentum")
    options = {"valid": small_batches(), "val_check_interval": 5}
    expected = fit(plain, **options)
    callback = OnlineHPOCallback(make(), optimizer=frozen)
    trainer = fit(model, callback, **options)
    assert len(callback.history) == 10 // callback.every_n_steps
    assert torch.equal(weights(plain), weights(model))
    assert [float(x) for x in model.losses] == [float(x) for x in plain.losses]
    assert torch.equal(trainer.callback_metrics["val_loss"], expected.callback_metrics["val_loss"])


@pytest.mark.parametrize("limit", [None, 2, 0])
def test_the_index_is_one_of_the_validation_loop(limit):
    seen = set()

    class Watched(Mlp):
        def validation_step(self, batch, batch_idx):
            seen.add((self.trainer.validating, batch_idx))
            return self.loss(batch)

    observe(T1T2(), Watched(), valid=small_batches(), limit_val_batches=limit, max_epochs=2)
    count = 2 if limit == 2 else 4
    assert seen == {(True, k) for k in range(count)}


def logged_places(kind, estimator, folder):
    seen = Seen()

    class Watched(Mlp):
        def look(self):
            logger = self.logger
            logger.log_metrics({"x": 1.0})
            logger.experiment.add_image("x")
            found = (logger.log_dir, logger.save_dir, logger.name, logger.version)
            seen.entries.append((*found, self.trainer.log_dir, isinstance(logger, kind)))
            os.path.join(logger.log_dir, "image.png")

        def training_step(self, batch, batch_idx):
            if "log" in vars(self):
                self.look()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if "log" in vars(self):
                self.look()
            return self.loss(batch)

    logger = kind(folder, name="here", version=3)
    fit(Watched(), OnlineHPOCallback(estimator, optimizer=frozen), logger=logger)
    assert len(seen.entries) > 10
    (found,) = set(seen.entries)
    expected = (logger.log_dir, str(folder), "here", 3, logger.log_dir, True)
    assert (found[0], str(found[1]), *found[2:]) == expected


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("estimator", [T1T2(), ClipR()])
def test_loggers_tell_where_they_are_and_write_nothing(kind, estimator, tmp_path):
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    logged_places(kind, estimator, tmp_path)


# -------------------------------------------------------------------------------- modes and hooks


class Scaling(Mlp):
    """Keeps a part in training mode while it is validated, as chemprop keeps its scaling."""

    def __init__(self, **options):
        super().__init__("momentum", granularity="model", **options)
        self.scale = Doubling()

    def loss(self, batch):
        return super().loss([self.scale(batch[0]), batch[1]])

    def on_validation_model_eval(self):
        self.eval()
        self.scale.train()


class WithSuper(Scaling):
    def on_validation_model_eval(self):
        super(Scaling, self).on_validation_model_eval()
        self.scale.train()

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.net[1].eval()


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else -x


@pytest.mark.parametrize("kind", [Scaling, WithSuper])
def test_the_mode_of_the_validation_is_the_modules(kind):
    result = last_hypergradient(observe(ClipR(float("inf")), kind()))
    expected = truth(kind)  # the module is left in training mode, where the scale is the same
    assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("kind", [Scaling, WithSuper])
def test_modes_are_put_back(kind):
    modes = []

    class Check(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            modes.append([m.training for m in module.modules()])

    fit(kind(), [Check()], limit_val_batches=0)
    expected, modes[:] = list(modes), []
    fit(kind(), [Check(), OnlineHPOCallback(T1T2(), optimizer=frozen)], limit_val_batches=0)
    assert len(modes) == 10
    assert modes[:1] + modes[2:] == expected[:1] + expected[2:]


class Averaged(Mlp):
    """Validates averaged weights: swaps them in and out."""

    def __init__(self, how):
        super().__init__("momentum")
        self.how = how
        self.average = copy.deepcopy(self.net.state_dict())

    def on_train_batch_end(self, *_):
        for name, p in self.net.state_dict().items():
            self.average[name] = 0.5 * self.average[name] + 0.5 * p

    def swap(self):
        own = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        for name, p in self.net.named_parameters():
            if self.how == "copy":
                p.data.copy_(self.average[name])
            else:
                p.data = self.average[name]
        self.average = own

    def on_validation_start(self):
        self.swap()

    def on_validation_end(self):
        self.swap()


@pytest.mark.parametrize("how", ["copy", "pointer"])
@pytest.mark.parametrize("make", [T1T2, ClipR])
def test_hooks_that_write_to_the_weights_are_left_out_and_named(how, make):
    plain = Averaged(how)
    options = {"val_check_interval": 2}
    fit(plain, **options)
    model = Averaged(how)
    remedy = (
        r"Averaged\.on_validation_start writes to trained.*validation_loss=lambda module, batch"
    )
    with pytest.warns(UserWarning, match=remedy):
        callback = observe(make(), model, **options)
    assert torch.equal(weights(plain), weights(model))
    expected = observe(make(), Mlp("momentum"), **options)
    torch.testing.assert_close(
        last_hypergradient(callback), last_hypergradient(expected), rtol=1e-9, atol=0
    )


class Frozen(Mlp):
    def on_validation_model_eval(self):
        self.eval()
        self.requires_grad_(False)

    def on_validation_model_train(self):
        self.train()
        self.requires_grad_(True)


class Failing(Mlp):
    def on_validation_epoch_start(self):
        raise KeyError("not here")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Frozen, "model_eval changes requires_grad"), (Failing, r"epoch_start failed \(KeyError")],
)
def test_hooks_that_cannot_be_called_are_left_out_and_named(kind, message):
    with pytest.warns(UserWarning, match=message):
        callback = observe(T1T2(), kind(), limit_val_batches=0)
    expected = observe(T1T2(), Mlp(), limit_val_batches=0)
    assert torch.equal(last_hypergradient(callback), last_hypergradient(expected))


def test_ordinary_hooks_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*OnlineHPOCallback.*")
        observe(T1T2(), Listed(), valid=small_batches())


# --------------------------------------------------------------------------------- dataloader_iter


class Fetching(Mlp):
    def __init__(self, count=1):
        super().__init__()
        self.count = count

    def validation_step(self, dataloader_iter):
        losses = []
        for _ in range(self.count):
            batch, batch_idx, dataloader_idx = next(dataloader_iter)
            assert (batch_idx, dataloader_idx) == (0, 0)
            losses.append(self.loss(batch))
        return sum(losses)


@pytest.mark.parametrize("make", [T1T2, ClipR])
def test_a_validation_step_that_fetches_its_batch(make):
    result = last_hypergradient(observe(make(), Fetching()))
    assert torch.equal(result, last_hypergradient(observe(make(), Mlp())))


def test_a_validation_step_that_fetches_several_batches_is_refused():
    with pytest.raises(
        MisconfigurationException,
        match=r"Fetching\.validation_step takes more than one batch.*"
        r"validation_loss=lambda module, batch",
    ):
        observe(T1T2(), Fetching(2), limit_val_batches=0)


def test_a_training_step_that_fetches_its_batch_is_refused():
    class FetchingToTrain(Mlp):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(
        MisconfigurationException, match=r"FetchingToTrain\.training_step takes a dataloader_iter"
    ):
        observe(T1T2(), FetchingToTrain())


# ------------------------------------------------------------------------- optimizers with modes


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al. (2024), for SGD: it trains y, and a validation is to see x."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05, "k": 0, "trains": True})

    def train(self):
        self.exchange(to_train=True, weight=0.1)

    def eval(self):
        self.exchange(to_train=False, weight=1 - 1 / 0.9)

    @torch.no_grad()
    def exchange(self, *, to_train, weight):
        for group in self.param_groups:
            if group["trains"] is not to_train:
                for p in group["params"]:
                    if p in self.state:
                        p.lerp_(self.state[p]["z"], weight)
                group["trains"] = to_train

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            assert group["trains"]
            group["k"] += 1
            c = 1 / group["k"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, c).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - c) - 1))
                z.sub_(p.grad, alpha=group["lr"])
        return loss


class Free(Mlp):
    def __init__(self):
        super().__init__(granularity="model")
        torch.manual_seed(3)

    def configure_optimizers(self):
        self.free = ScheduleFree(self.parameters())
        return self.free


class FreeInEpochHooks(Free):
    def on_validation_epoch_start(self):
        self.free.eval()

    def on_validation_epoch_end(self):
        self.free.train()


class FreeInModeHooks(Free):
    def on_validation_model_eval(self):
        self.free.eval()
        self.eval()

    def on_validation_model_train(self):
        self.free.train()
        self.train()


class FreeInTrain(Free):
    def train(self, mode=True):
        if hasattr(self, "free"):
            self.free.train() if mode else self.free.eval()
        return super().train(mode)

    def on_validation_model_train(self):
        self.train()


class FreeByWrapper(Free):
    def on_validation_start(self):
        self.optimizers().eval()

    def on_validation_end(self):
        self.optimizers().train()


@pytest.mark.parametrize("make", [T1T2, lambda: ClipR(math.inf), lambda: UnrollK(3)])
@pytest.mark.parametrize("kind", [FreeInEpochHooks, FreeInModeHooks, FreeInTrain, FreeByWrapper])
def test_an_optimizer_with_modes_keeps_its_own(kind, make):
    """Its weights are not exchanged for a held-out batch; that is said at the start."""
    plain = kind()
    fit(plain, steps=10)
    model = kind()
    with pytest.warns(UserWarning, match="ScheduleFree has eval.* at those that it trains"):
        observe(make(), model, steps=10)
    assert torch.equal(weights(model), weights(plain))


def test_the_weights_that_an_optimizer_with_modes_trains_are_followed():
    expected = truth(FreeInEpochHooks, steps=4)  # no validation comes before the end
    found = last_hypergradient(observe(ClipR(math.inf), FreeInEpochHooks(), steps=4))
    assert relative_error(found, expected) < 1e-5
