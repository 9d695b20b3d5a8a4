"""``lightning.pytorch`` and ``pytorch_lightning``: either works, and gives the same numbers."""

import subprocess
import sys

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from cases import frozen, train_loader, valid_loader
from torch import nn

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    Hyperparameter,
    L1Mixin,
    L2Mixin,
    LossWeightMixin,
    OnlineHPOCallback,
    UnrollK,
)
from lightning_hpo._lightning import MisconfigurationException
from lightning_hpo.regularizers import PenaltyMixin

standalone = pytest.importorskip("pytorch_lightning")
BOTH = pytest.mark.parametrize("lib", [lightning.pytorch, standalone], ids=["lightning", "pl"])


def module_of(lib, *mixins):
    """A module with noise, dropout, a log and a penalty of the given package."""

    class Lit(*mixins, lib.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))
            self.scale = Hyperparameter(0.5)
            if hasattr(self, "register_l2"):
                self.register_l2(init=0.05, granularity="layer")
            if hasattr(self, "register_dropout"):
                self.register_dropout()
            if hasattr(self, "register_noise"):
                self.register_noise(init=0.1)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss + 0.01 * self.scale() * self.net[0].weight.square().sum()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Lit()


def fitted(lib, model, callbacks=None, **options):
    trainer = lib.Trainer(
        max_steps=7,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(model, train_loader(), valid_loader())
    return trainer


@pytest.mark.parametrize(
    "mixins",
    [(), (L2Mixin,), (DropoutMixin,), (L2Mixin, GaussianNoiseMixin, DropoutMixin)],
    ids=lambda mixins: "+".join(m.__name__ for m in mixins) or "none",
)
@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(3)], ids=["t1t2", "clip", "unroll"])
def test_both_give_the_same(mixins, make):
    found = []
    for lib in (lightning.pytorch, standalone):
        model, callback = module_of(lib, *mixins), OnlineHPOCallback(make())
        fitted(lib, model, [callback])
        found.append((model.state_dict(), list(callback.history)))
    (ours, records), (theirs, others) = found
    assert records
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for record, other in zip(records, others, strict=True):
        assert record.values == other.values


@BOTH
@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.3}])
def test_invisible_in_both(lib, clipping):
    plain, watched = module_of(lib, L2Mixin, DropoutMixin), module_of(lib, L2Mixin, DropoutMixin)
    first = fitted(lib, plain, **clipping)
    # A callback that is no list, as Trainer takes it.
    second = fitted(lib, watched, OnlineHPOCallback(optimizer=frozen), **clipping)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    for name in ("train_loss", "val_loss"):
        assert torch.equal(first.callback_metrics[name], second.callback_metrics[name])


@BOTH
def test_hooks_of_the_package_are_no_foreign_hooks(lib):
    """No gradient is suspected of being changed where only Lightning's own hooks stand."""
    from lightning_hpo.step.hooks import may_change_gradients, may_interfere

    callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
    seen = []

    class Ask(lib.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(
                (
                    may_change_gradients(trainer, pl_module, callback),
                    may_interfere(trainer, pl_module, callback),
                )
            )

    fitted(lib, module_of(lib, L2Mixin), [callback, lib.callbacks.Timer(), Ask()])
    assert set(seen) == {(False, False)}


@BOTH
def test_refusals_are_the_package_s_own(lib):
    model = module_of(lib, L2Mixin)
    model.automatic_optimization = False
    with pytest.raises(
        lib.utilities.exceptions.MisconfigurationException, match="manual optimization"
    ):
        fitted(lib, model, [OnlineHPOCallback()])
    kind = type("Clips", (type(module_of(lib)),), {"clip_gradients": lambda self, *a, **k: None})
    with pytest.raises(MisconfigurationException, match="Clips overrides clip_gradients"):
        fitted(lib, kind(), [OnlineHPOCallback()])


@BOTH
def test_a_hook_sees_the_stage_of_its_package(lib):
    stages = []

    class Asking(type(module_of(lib, L2Mixin))):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append(self.trainer.state.stage)
            return batch

    fitted(lib, Asking(), [OnlineHPOCallback(T1T2(), optimizer=frozen)])
    kinds = {type(stage) for stage in stages}
    assert kinds == {lib.trainer.states.RunningStage}
    assert lib.trainer.states.RunningStage.VALIDATING in stages


@pytest.mark.parametrize("mixin", [L2Mixin, DropoutMixin, LossWeightMixin, ExampleWeightMixin])
def test_a_mixture_is_refused_where_the_class_is_defined(mixin):
    theirs = type("Theirs", (standalone.LightningModule,), {})
    with pytest.raises(TypeError, match=r"of lightning\.pytorch and of pytorch_lightning.*import"):
        type("Mixed", (mixin, theirs, lightning.pytorch.LightningModule), {})


@pytest.mark.parametrize("mixin", [L2Mixin, L1Mixin, PenaltyMixin])
@BOTH
def test_a_penalty_behind_the_module_is_refused(lib, mixin):
    """Its hooks would be hidden, and nothing would be penalized."""
    with pytest.raises(TypeError, match="Late names LightningModule before the mixin"):
        type("Late", (lib.LightningModule, mixin), {})
    base = type("Base", (lib.LightningModule,), {})
    with pytest.raises(TypeError, match="Name the mixin first"):
        type("Late", (base, mixin), {})


def test_a_penalty_without_a_lightning_module_is_refused():
    class Bare(L2Mixin):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.register_l2(init=0.1)

    with pytest.raises(TypeError, match=r"Bare is no LightningModule.*derive from one"):
        Bare()


@pytest.mark.slow
def test_the_standalone_package_is_never_imported():
    script = (
        "import sys, lightning_hpo as h, lightning as L\n"
        "type('A', (h.L2Mixin, L.LightningModule), {})\n"
        "h.OnlineHPOCallback()\n"
        "assert 'pytorch_lightning' not in sys.modules\n"
        "import pytorch_lightning as pl\n"
        "assert isinstance(h.OnlineHPOCallback(), pl.Callback)\n"
        "assert isinstance(h.OnlineHPOCallback(), L.Callback)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=110)


@pytest.mark.slow
def test_no_warning_of_torch_that_plain_training_has_not():
    """Forward-mode AD compiles its rules when it is used first, in a process of its own."""
    script = (
        "import sys, warnings; sys.path.insert(0, 'tests')\n"
        "import torch; torch.set_default_dtype(torch.float64)\n"
        "from cases import Mlp, observe\n"
        "from lightning_hpo import ClipR\n"
        "warnings.filterwarnings('error', message='.*torch.jit')\n"
        "observe(ClipR(), Mlp('rmsprop'), steps=2, derivatives='forward')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=110, capture_output=True)
