"""Averages of the weights do not average λ; nothing else is left on a module; file names."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from cases import STEPS, Mlp, fit, frozen, weights
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging

from lightning_hpo import T1T2, ClipR, Hyperparameter, OnlineHPOCallback, fixed_values, freeze


class OwnAverage(pl.Callback):
    """As people write it: a copy of the module, and a loop over everything in it."""

    def on_fit_start(self, trainer, pl_module):
        self.ema = copy.deepcopy(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        pairs = zip(self.ema.state_dict().values(), pl_module.state_dict().values(), strict=True)
        for mine, theirs in pairs:
            mine.lerp_(theirs, 0.1)

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.ema.state_dict())


AVERAGES = {
    "mean": lambda: of_lightning.WeightAveraging(),
    "without-buffers": lambda: of_lightning.WeightAveraging(use_buffers=False),
    "ema": lambda: of_lightning.EMAWeightAveraging(decay=0.8, update_every_n_steps=3),
    "swa": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1),
    "own": OwnAverage,
}


NEW = pytest.mark.skipif(
    not hasattr(of_lightning, "EMAWeightAveraging"), reason="Lightning has it since 2.6"
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("swa", "own") else NEW) for kind in AVERAGES]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:SWA is currently only supported")
def test_the_averaged_module_has_the_tuned_values(kind, first):
    callback, average = OnlineHPOCallback(T1T2()), AVERAGES[kind]()
    model, plain = Mlp(), Mlp()
    callbacks = [callback, average] if first else [average, callback]
    fit(model, callbacks, steps=-1, max_epochs=2)
    last = callback.history[-1].values
    assert last["l2.net.0"] != callback.history[0].values["l2.net.0"]
    assert fixed_values(model) == pytest.approx(last, rel=1e-12)
    # The weights are averages all the same: those of a training without tuning, of the same λ.
    fit(plain, AVERAGES[kind](), steps=-1, max_epochs=2)
    watched = Mlp()
    fit(watched, [OnlineHPOCallback(optimizer=frozen), AVERAGES[kind]()], steps=-1, max_epochs=2)
    assert torch.equal(weights(plain), weights(watched))


@NEW
@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_a_checkpoint_of_an_average_has_the_tuned_values(kind, tmp_path):
    callback, path = OnlineHPOCallback(T1T2()), tmp_path / "average.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)

    fit(Mlp(), [callback, AVERAGES[kind](), Save()])
    assert torch.load(path, weights_only=True)["current_model_state"]
    assert fixed_values(freeze(Mlp(), path)) == pytest.approx(callback.history[-1].values)


class Bare(pl.LightningModule):
    """No mixin: one hyperparameter of its own."""

    def __init__(self):
        super().__init__()
        self.net = Mlp().net
        self.alpha = Hyperparameter(0.5)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss + self.alpha() * self.net[0].weight.square().sum()

    def validation_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [Bare, Mlp])
@pytest.mark.parametrize("make", [T1T2, ClipR])
def test_no_attribute_is_left_on_a_module(kind, make):
    plain, watched = kind(), kind()
    fit(plain)
    fit(watched, OnlineHPOCallback(make()))
    for (name, a), b in zip(plain.named_modules(), watched.modules(), strict=True):
        assert vars(a).keys() == vars(b).keys(), name
    assert ("_hpo_record" in vars(watched)) is (kind is Mlp)  # a mixin's own, callback or not


def test_tuned_options_of_the_optimizer_stay_readable():
    model = Bare()
    fit(model, OnlineHPOCallback(T1T2(), optimizer_hyperparameters=["lr"]))
    assert "optimizer.lr" in fixed_values(model)
    fit(model, OnlineHPOCallback(T1T2()))
    assert "_hpo_record" not in vars(model)


@pytest.mark.parametrize("pattern", ["{epoch}-{hpo/l2.net.0:.3f}", "l2={hpo/l2.net.0:.2e}"])
def test_the_value_in_the_name_of_a_checkpoint(pattern, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename=pattern, auto_insert_metric_name=False)
    fit(Mlp(), [OnlineHPOCallback(T1T2()), keep], steps=STEPS, enable_checkpointing=True)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.ckpt")]
    assert files
    assert all(len(path.parts) == 1 for path in files)
