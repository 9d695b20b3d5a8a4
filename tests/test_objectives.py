"""training_step and validation_step as pure losses."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import VALID, Mlp, Recorder, fit, flat, frozen, last_hypergradient, observe, valid_loader
from torch import nn

from lightning_hpo import T1T2, ClipR, L2Mixin, OnlineHPOCallback, UnrollK

START = math.log(0.05)


# -------------------------------------------------------------------------------- the training loss


class Dict(Mlp):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "other": 1}


class BatchOnly(Mlp):
    def training_step(self, batch):
        return Mlp.training_step(self, batch, 0)

    def validation_step(self, batch):
        return self.loss(batch)


class AnyArguments(Mlp):
    def training_step(self, *args):
        assert len(args) == 2
        return super().training_step(*args)

    def validation_step(self, *args):
        return self.loss(args[0])


@pytest.mark.parametrize("kind", [Dict, BatchOnly, AnyArguments])
@pytest.mark.parametrize("make", [ClipR, lambda: UnrollK(5, "reverse")])
def test_every_signature_and_return_value(kind, make):
    expected = last_hypergradient(observe(make(), Mlp(inside_loss=True)))
    result = last_hypergradient(observe(make(), kind(inside_loss=True)))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("make", [lambda: ClipR(math.inf), lambda: UnrollK(5, "reverse")])
def test_a_loss_that_follows_a_schedule(make):
    """``global_step`` reads in a replay as it did in the step, also when that is long past."""
    logs = Recorder(entries=[])

    class Scheduled(Mlp):
        def training_step(self, batch, batch_idx):
            logs.entries.append((batch_idx, self.global_step))
            return super().training_step(batch, batch_idx)

    observe(make(), Scheduled(inside_loss=True), steps=5)
    assert {step for _, step in logs.entries} == set(range(5))
    assert all(batch_idx == step for batch_idx, step in logs.entries)
    assert len(logs.entries) > 9


@pytest.mark.parametrize("make", [ClipR, lambda: UnrollK(5, "reverse"), T1T2])
def test_replays_run_under_the_precision_of_the_training(make):
    logs = Recorder(entries=[])

    class Mixed(Mlp):
        def training_step(self, batch, batch_idx):
            found = torch.is_autocast_enabled("cpu"), self.net(batch[0]).dtype
            logs.entries.append((self.global_step, *found))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            found = torch.is_autocast_enabled("cpu"), self.net(batch[0]).dtype
            logs.entries.append((self.global_step, *found))
            return super().validation_step(batch, batch_idx)

    single = [t.float() if t.is_floating_point() else t for t in VALID]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*single), batch_size=5)
    callback = observe(
        make(),
        Mixed(inside_loss=True).float(),
        precision="bf16-mixed",
        steps=5,
        train=loader,
        valid=loader,
    )
    # But for a check at the start, which compares values of the loss.
    found = {tuple(kind) for step, *kind in logs.entries if step > 0}
    assert found == {(True, torch.bfloat16)}
    assert len(logs.entries) > 10
    assert last_hypergradient(callback).dtype == torch.float32


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind):
    """They hold a second list of their weights, which must be swapped along with the first."""

    class Recurrent(L2Mixin, pl.LightningModule):
        def __init__(self, raw=START):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = kind(2, 3, batch_first=True)
            self.head = nn.Linear(3, 3)
            self.register_l2(0.05)
            self.l2.raw.fill_(raw)

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.head(self.rnn(x.reshape(-1, 2, 2))[0][:, -1]), y)

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    def trained(raw):
        model = Recurrent(raw)
        fit(model)
        with torch.no_grad():
            return model.loss(VALID).item()

    h = 1e-4
    truth = (trained(START + h) - trained(START - h)) / (2 * h)
    for make in (lambda: ClipR(math.inf), lambda: UnrollK(10, "reverse")):
        for derivatives in ("reverse", "forward", "finite_difference"):
            # oneDNN's recurrent layers have no forward derivative; torch's own have.
            with torch.backends.mkldnn.flags(enabled=derivatives != "forward"):
                callback = observe(make(), Recurrent(), derivatives=derivatives)
            assert last_hypergradient(callback).item() == pytest.approx(truth, rel=1e-5)


class Skipping(Mlp):
    """Has no loss on some batches, which Lightning then skips."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("inside_loss", [False, True])
def test_batches_without_a_loss(inside_loss):
    """They move neither θ nor the tangents' gradient; the trainings must agree step by step."""
    histories = []
    for make in (lambda: ClipR(math.inf), lambda: UnrollK(10, "reverse")):
        callback = observe(make(), Skipping("sgd", inside_loss=inside_loss))
        histories.append(last_hypergradient(callback))
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-9, atol=0)

    def trained(j, h):
        raw = [START] * 2
        raw[j] += h
        model = Skipping("sgd", inside_loss=inside_loss, raw=raw)
        fit(model)
        with torch.no_grad():
            return model.loss(VALID).item()

    h = 1e-4
    truth = torch.tensor([(trained(j, h) - trained(j, -h)) / (2 * h) for j in range(2)])
    torch.testing.assert_close(histories[0], truth, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------ the validation loss


class Noisy(Mlp):
    def __init__(self):
        super().__init__(inside_loss=True)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.modes = Recorder(entries=[])

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(self.dropout(self.norm(x))), y)

    def validation_step(self, batch, batch_idx):
        if "log" in vars(self):
            self.modes.entries.append(
                (self.training, self.dropout.training, self.trainer.validating)
            )
        return self.loss(batch)


def test_the_validation_loss_is_taken_in_evaluation_mode():
    """No dropout, no batch statistics, no penalty; the modes are put back afterwards."""
    states = []

    class Check(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with torch.no_grad():
                frozen_norm = module.norm.num_batches_tracked.item()
            states.append((module.training, module.dropout.training, frozen_norm))

    model = Noisy()
    fit(model, [OnlineHPOCallback(T1T2(), optimizer=frozen), Check()])
    assert set(model.modes.entries) == {(False, False, True)}
    assert states == [(True, True, n) for n in range(1, 11)]


def test_g_v_is_the_gradient_of_the_unregularized_loss():
    """T1T2 of gTgV: λ w · g_V reveals g_V; the penalty must have no part in it."""
    model = Mlp(inside_loss=True, init=0.5)
    before = Mlp(inside_loss=True, init=0.5)
    fit(before, steps=9)
    callback = observe(T1T2(scale_by_lr=False), model)
    gradient = torch.autograd.grad(model.loss(VALID), [model.net[0].weight, model.net[2].weight])
    old = (before.net[0].weight, before.net[2].weight)
    truth = torch.stack([-(0.5 * w * g).sum() for w, g in zip(old, gradient, strict=True)])
    torch.testing.assert_close(last_hypergradient(callback), truth.detach(), rtol=1e-9, atol=0)


def test_a_validation_loss_of_the_users():
    """It replaces validation_step, which need not even have a loss."""
    own = observe(T1T2(), Mlp())

    class Other(Mlp):
        def validation_step(self, batch, batch_idx):
            return None

    callback = OnlineHPOCallback(
        T1T2(), optimizer=frozen, validation_loss=lambda module, batch: 3 * module.loss(batch)
    )
    fit(Other(), callback)
    torch.testing.assert_close(
        last_hypergradient(callback), 3 * last_hypergradient(own), rtol=1e-9, atol=0
    )


def test_a_validation_loss_that_some_parameters_have_no_part_in():
    class Auxiliary(Mlp):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.other(batch[0]).square().mean()

    plain = observe(ClipR(math.inf), Mlp())
    result = observe(ClipR(math.inf), Auxiliary())
    expected = flat(plain.history[-1].hypergradients.values())
    torch.testing.assert_close(last_hypergradient(result), expected, rtol=1e-9, atol=0)


def test_a_validation_before_the_training_leaves_no_inference_tensors():
    """``trainer.validate`` runs in inference mode, and what it reassigns cannot be trained on."""

    class Reassigning(Mlp):
        def __init__(self):
            super().__init__(inside_loss=True)
            self.register_buffer("seen", torch.zeros(1))

        def validation_step(self, batch, batch_idx):
            if "log" not in vars(self):
                self.seen = self.seen + 1
            return self.loss(batch) * (1 + 0 * self.seen.sum())

    model = Reassigning()
    callback = OnlineHPOCallback(ClipR(), optimizer=frozen)
    trainer = pl.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
    )
    trainer.validate(model, valid_loader(), verbose=False)
    trainer.fit(model, valid_loader(), valid_loader())
    expected = OnlineHPOCallback(ClipR(), optimizer=frozen)
    fit(Mlp(inside_loss=True), expected, steps=5, train=valid_loader())
    torch.testing.assert_close(
        last_hypergradient(callback), last_hypergradient(expected), rtol=1e-12, atol=0
    )
